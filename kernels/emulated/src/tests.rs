use super::*;
use engine_kernels::cuda::Arg;

/// Runs a kernel that takes one array of 64 `int`s and what else is given, on one block of 64 threads.
fn run(kernel: &str, more: &[Arg]) -> Result<Vec<i32>, DriverError> {
    let driver = Emulated::default();
    let memory = driver.allocate(64 * 4)?;
    let args = [&[memory.address().into()], more].concat();
    driver.launch(&Launch { kernel, grid: [1, 1, 1], block: 64, args: &args })?;
    let mut bytes = [0; 256];
    driver.read(memory.address(), &mut bytes)?;
    Ok(bytes.as_chunks::<4>().0.iter().map(|int| i32::from_le_bytes(*int)).collect())
}

fn reason(result: Result<Vec<i32>, DriverError>) -> String {
    result.expect_err("a mistake").to_string()
}

#[test]
fn threads_that_never_come_to_a_barrier_are_an_error() {
    let reason = reason(run("faulty_divergence", &[]));
    assert!(reason.contains("for threads that do not come (16 wait, 48 have ended)"), "{reason}");
}

#[test]
fn lanes_that_meet_at_different_places_are_an_error() {
    let reason = reason(run("faulty_exchange", &[]));
    assert!(reason.contains("lanes of a warp meet at lines"), "{reason}");
}

#[test]
fn a_missing_barrier_shows() {
    let right: Vec<i32> = (0..64).map(|i| (i + 1) % 64).collect();
    assert_ne!(run("faulty_race", &[]).unwrap(), right);
}

#[test]
fn copies_to_shared_memory_arrive_when_they_are_waited_for() {
    assert_eq!(run("faulty_early", &[]).unwrap(), [-1; 64]);
    let unwaited = reason(run("faulty_unwaited", &[]));
    assert!(unwaited.contains("a thread ends while copies to shared memory are under way"), "{unwaited}");
    let unaligned = reason(run("faulty_alignment", &[]));
    assert!(unaligned.contains("a copy to shared memory is not aligned"), "{unaligned}");
}

#[test]
fn kernels_start_before_the_one_ahead_of_them_has_run() {
    let driver = Emulated::default();
    let memory = driver.allocate(64 * 4).unwrap();
    let args = [memory.address().into()];
    // Each adds one to what was there before, and the second is too early to see what the first has made of it.
    for _ in 0..2 {
        driver.launch(&Launch { kernel: "faulty_haste", grid: [1, 1, 1], block: 64, args: &args }).unwrap();
    }
    let mut bytes = [0; 256];
    driver.read(memory.address(), &mut bytes).unwrap();
    assert_eq!(bytes.as_chunks::<4>().0, [1u32.to_le_bytes(); 64]);
}

#[test]
fn threads_that_do_not_wait_for_the_kernel_before_are_an_error() {
    let reason = reason(run("faulty_independence", &[]));
    assert!(reason.contains("a thread ends that has not waited for the kernel before"), "{reason}");
}

#[test]
fn memory_ends_where_it_ends() {
    const RUN: &str = "ENGINE_EMULATED_BEYOND_ITS_END";
    if std::env::var_os(RUN).is_some() {
        let _ = run("faulty_bound", &[]);
        return;
    }
    // It takes the process with it: another one.
    let mut again = std::process::Command::new(std::env::current_exe().unwrap());
    let output = again.args(["--exact", "--nocapture", "tests::memory_ends_where_it_ends"]).env(RUN, "1").output();
    let output = output.unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("kernel faulty_bound, block (0, 0, 0), thread 63"), "{text}");
}

#[test]
fn arguments_are_what_the_kernel_takes() {
    let more = reason(run("faulty_race", &[Arg::Int(1)]));
    assert!(more.contains("are not its arguments"), "{more}");
    let unknown = reason(run("no_such_kernel", &[]));
    assert!(unknown.contains("there is no such kernel"), "{unknown}");
    let stranger = reason(run("rms_norm", &[]));
    assert!(stranger.contains("are not its arguments"), "{stranger}");
}

#[test]
fn pointers_lead_to_what_is_allocated() {
    let driver = Emulated::default();
    let address = driver.allocate(64).unwrap().address();
    let launch = Launch { kernel: "faulty_bound", grid: [1, 1, 1], block: 32, args: &[address.into()] };
    let error = driver.launch(&launch).unwrap_err().to_string();
    assert!(error.contains("is nobody's"), "{error}");
}

#[test]
fn nothing_runs_before_somebody_waits_and_events_wait_for_what_was_before_them() {
    let driver = Emulated::default();
    let (host, device) = (driver.allocate_host(16).unwrap(), driver.allocate(16).unwrap());
    let set = |byte: u8| {
        // SAFETY: sixteen bytes, and this test says when copies run.
        unsafe { host.start().write_bytes(byte, 16) }
    };
    let back = driver.allocate_host(16).unwrap();
    // SAFETY: as above.
    let seen = || unsafe { *back.start() };
    set(1);
    driver.upload(&host, device.address(), 16).unwrap();
    driver.download(device.address(), &back, 16).unwrap();
    let event = driver.record().unwrap();
    assert_eq!(seen(), 0);
    // Too early: the copy has not run, and will see this.
    set(2);
    driver.upload(&host, device.address(), 16).unwrap();
    driver.download(device.address(), &back, 16).unwrap();
    driver.wait(&event).unwrap();
    assert_eq!(seen(), 2);
    set(3);
    driver.synchronize().unwrap();
    assert_eq!(seen(), 3);
}

#[test]
fn what_was_recorded_runs_when_it_is_replayed_and_nothing_waits_in_between() {
    let driver = Emulated::default();
    let memory = driver.allocate(64 * 4).unwrap();
    let args = [memory.address().into()];
    driver.begin_capture().unwrap();
    driver.launch(&Launch { kernel: "faulty_race", grid: [1, 1, 1], block: 64, args: &args }).unwrap();
    assert!(driver.synchronize().is_err() && driver.allocate(1).is_err() && driver.begin_capture().is_err());
    let graph = driver.end_capture().unwrap();
    driver.synchronize().unwrap();
    assert_eq!(driver.launches(), 0);
    for replays in 1..=2 {
        driver.replay(&graph).unwrap();
        driver.synchronize().unwrap();
        assert_eq!(driver.launches(), replays);
    }
}
