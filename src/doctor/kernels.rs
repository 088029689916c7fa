//! `engine doctor --gpu`: every CUDA kernel on the device at hand, beside the reference. The checks are those that the
//! tests run without a device (`kernels/suite`).

use super::{Area, Finding, Level, Report};

/// Findings, said as they come: there are checks that take long, and devices that stop in one.
struct Told {
    report: Report,
    json: bool,
}

impl Told {
    fn found(&mut self, check: &'static str, level: Level, seen: impl Into<String>, remedy: Option<&str>) {
        let finding = Finding::new(Area::Gpu, check, level, seen);
        self.report.extend([remedy.into_iter().fold(finding, Finding::remedy)]);
        if !self.json {
            print!("{}", self.report.last());
        }
    }
}

/// Runs the checks that have `words` in their names, and prints what it found. Whether all passed.
pub(super) fn run(words: &str, json: bool) -> bool {
    let mut told = Told { report: Report::default(), json };
    look(words, &mut told);
    let Told { report, .. } = told;
    print!("{}", if json { report.json() } else { report.verdict() });
    report.passed()
}

#[cfg(not(feature = "cuda"))]
fn look(_: &str, told: &mut Told) {
    let seen = "this engine was built without CUDA and has no kernels to check";
    told.found("gpu", Level::Failure, seen, Some("`make cuda` builds one that has them"));
}

#[cfg(feature = "cuda")]
fn look(words: &str, told: &mut Told) {
    use engine_cuda_device::Device;
    use engine_kernel_suite::{OnDevice, backend_checks, device_checks, kernels_run};
    use engine_kernels::cuda::Driver;
    use std::time::Instant;

    // Kept until the end: whoever uses a device last takes down what it takes a fraction of a second to set up.
    let device = match Device::new(0) {
        Ok(device) => device,
        // It says itself what can be done.
        Err(error) => return told.found("gpu", Level::Failure, error.to_string(), None),
    };
    told.found("gpu", Level::Ok, device.description(), None);

    let (mut run, mut works) = (0, true);
    for check in device_checks::<Device>().into_iter().chain(backend_checks::<OnDevice<Device>>()) {
        let sentence = check.name.replace('_', " ");
        if !format!("{}: {sentence}", check.topic).contains(words) {
            continue;
        }
        run += 1;
        let started = Instant::now();
        let result =
            if works { check.run().map_err(|failure| failure.to_string()) } else { by_itself(check.topic, &sentence) };
        let seconds = started.elapsed().as_secs_f32();
        let Err(failure) = result else {
            told.found(check.topic, Level::Ok, format!("{sentence} ({seconds:.1} s)"), None);
            continue;
        };
        let mut remedy =
            "run with --device cpu until this passes: answers from this device would be wrong; and report it"
                .to_owned();
        if device.has_wgmma() {
            remedy += ". ENGINE_CUDA_WITHOUT_WGMMA=1 does without the kernels that are for such devices alone: see \
                       whether this passes then";
        }
        told.found(check.topic, Level::Failure, format!("not so: {sentence}. {failure}"), Some(&remedy));
        // What a kernel does wrong can leave a device that does nothing more for this process.
        if works && let Err(error) = still_works() {
            let seen =
                format!("{error}: the device does nothing more for this process, so each of the others gets one");
            let remedy =
                format!("`engine doctor --gpu='{sentence}'` runs that check alone, and 'compute-sanitizer' says more");
            told.found("gpu", Level::Failure, seen, Some(&remedy));
            works = false;
        }
    }
    if run == 0 {
        return told.found("gpu", Level::Failure, format!("no check has '{words}' in its name"), None);
    }
    if words.is_empty() && works {
        let (ran, all) = (kernels_run(), device.kernels());
        let all = match all {
            Ok(all) => all,
            Err(error) => return told.found("kernels", Level::Failure, error.to_string(), None),
        };
        let never: Vec<&str> = all.iter().filter(|kernel| !ran.contains(*kernel)).map(String::as_str).collect();
        match never.is_empty() {
            true => told.found("kernels", Level::Ok, format!("{} have run, which are all", ran.len()), None),
            false => told.found("kernels", Level::Warning, format!("no check ran {}", never.join(", ")), None),
        }
    }
}

/// Runs a check in a process of its own, for which a device works that has failed this one. What does not hold.
#[cfg(feature = "cuda")]
fn by_itself(topic: &str, sentence: &str) -> Result<(), String> {
    use std::process::{Command, Stdio};
    use std::time::{Duration, Instant};

    /// No check takes as long on a device that works.
    const LIMIT: Duration = Duration::from_secs(60);

    let start = || -> std::io::Result<std::process::Output> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["doctor", "--json", &format!("--gpu={topic}: {sentence}")]);
        // What it says fits into a pipe.
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
        let started = Instant::now();
        while child.try_wait()?.is_none() && started.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = child.kill();
        child.wait_with_output()
    };
    let output = start().map_err(|error| format!("it could not be run by itself: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
    let failures = said["findings"].as_array().into_iter().flatten().filter(|finding| finding["level"] == "failure");
    let seen: Vec<&str> = failures.filter_map(|finding| finding["seen"].as_str()).collect();
    Err(if seen.is_empty() { format!("by itself, it ended with {}", output.status) } else { seen.join("; ") })
}

#[cfg(feature = "cuda")]
fn still_works() -> Result<(), engine_kernels::cuda::DriverError> {
    use engine_cuda_device::Device;
    use engine_kernels::cuda::{Driver, Memory};
    let device = Device::new(0)?;
    let memory = device.allocate(16)?;
    device.write(&[1; 16], memory.address())
}
