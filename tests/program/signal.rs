//! Signals to processes, done when the function returns.

use std::{fs, process::Command, thread, time::Duration};

/// Sends the signal called `name` to a process. A process is stopped thread by thread, and those that are left still
/// answer: waits for all of them.
pub(crate) fn send(process: u32, name: &str) {
    let id = process.to_string();
    assert!(Command::new("kill").args(["-s", name, &id]).status().expect("kill runs").success());
    while name == "STOP" && !is_stopped(&id) {
        thread::sleep(Duration::from_millis(1));
    }
}

fn is_stopped(id: &str) -> bool {
    let threads = fs::read_dir(format!("/proc/{id}/task")).expect("the process is there");
    threads.flatten().all(|thread| {
        // The state follows the name, which is in parentheses and may hold anything.
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_none_or(|rest| rest.is_empty() || rest.starts_with('T'))
    })
}
