use std::process::{Command, Output};

use serde_json::Value;

/// The program with these flags, to be run to its end.
pub(crate) fn engine(flags: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
    // Whatever runs on this machine is not the test's business.
    command.args(flags).env_remove("ETCD_ENDPOINTS").env_remove("NATS_SERVER").env_remove("ENGINE_CLUSTER_TOKEN");
    command
}

/// Runs `engine doctor --json`: whether the doctor is content, and what it found.
pub(crate) fn findings(doctor: &mut Command) -> (bool, Vec<Value>) {
    let Output { status, stdout, stderr } = doctor.output().unwrap();
    let said: Value = serde_json::from_slice(&stdout)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&[stdout, stderr].concat())));
    assert_eq!(said["passed"], status.success(), "{said}");
    (status.success(), said["findings"].as_array().unwrap().clone())
}
