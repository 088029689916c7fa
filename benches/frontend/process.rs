//! A server as a process: started, waited for, its CPU time read, killed.

use std::{
    fs::File,
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};

/// How long a server may take to start. Not a measurement.
const START_TIME_MAX: Duration = Duration::from_secs(180);
/// Between two looks at one that is starting.
const POLL_PAUSE: Duration = Duration::from_millis(50);

/// A server, killed when dropped.
pub(crate) struct Process {
    name: &'static str,
    child: Child,
    pub(crate) address: SocketAddr,
}

impl Process {
    /// Starts `command`, which will listen on `address`; what it says goes to `log`.
    pub(crate) fn start(name: &'static str, mut command: Command, address: SocketAddr, log: &Path) -> Result<Self> {
        let log = File::create(log)?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        Ok(Self { name, child, address })
    }

    /// Asks `ready` until it says so.
    pub(crate) fn wait_until(&mut self, mut ready: impl FnMut() -> bool) -> Result<()> {
        let start = Instant::now();
        while !ready() {
            if let Some(status) = self.child.try_wait()? {
                bail!("{} ended: {status}", self.name);
            }
            if start.elapsed() > START_TIME_MAX {
                bail!("{} does not get ready", self.name);
            }
            thread::sleep(POLL_PAUSE);
        }
        Ok(())
    }

    /// Seconds of CPU time that all its threads have used.
    pub(crate) fn cpu(&self) -> Result<f64> {
        cpu(self.id())
    }

    /// Its number.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

/// Seconds of CPU time that all threads of a process have used, those included that have ended. To the nanosecond: the
/// ticks of `/proc` are longer than what a frontend with one client uses in a second.
pub(crate) fn cpu(process: u32) -> Result<f64> {
    let mut clock = libc::CLOCK_MONOTONIC;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: each writes to the one place it is given, which lives until it returns.
    let read = unsafe {
        libc::clock_getcpuclockid(process as libc::pid_t, &raw mut clock) == 0
            && libc::clock_gettime(clock, &raw mut time) == 0
    };
    ensure!(read, "the CPU time of process {process} cannot be read");
    Ok(time.tv_sec as f64 + time.tv_nsec as f64 / 1e9)
}

/// Bytes of memory that a process holds.
#[allow(dead_code, reason = "for the benchmark that includes this file as well")]
pub(crate) fn resident_bytes(process: u32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches("kB").trim().parse::<f64>()? * 1024.0)
}

impl Drop for Process {
    fn drop(&mut self) {
        // Either call fails only if it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
