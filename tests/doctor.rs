//! `engine doctor`, `engine bench` and `engine transfer-bench` as processes, before real services and workers.

mod cell;
mod program;
mod services;
mod support;

use std::{
    io::{BufRead, BufReader},
    process::Stdio,
};

use cell::Cell;
use engine::cluster::WorkerFilter;
use program::{
    Server,
    command::{engine, findings},
};
use serde_json::Value;

fn doctor(flags: &[&str]) -> (bool, Vec<Value>) {
    findings(&mut engine(&[&["doctor", "--json"], flags].concat()))
}

fn of<'a>(findings: &'a [Value], check: &str) -> Vec<&'a Value> {
    findings.iter().filter(|finding| finding["check"] == check).collect()
}

fn failed(findings: &[Value]) -> Vec<&str> {
    let failed = findings.iter().filter(|finding| finding["level"] == "failure");
    failed.map(|finding| finding["check"].as_str().unwrap()).collect()
}

fn in_cluster(cell: &Cell, flags: &[&str]) -> (bool, Vec<Value>) {
    doctor(&[&["--etcd", &cell.etcd.url(), "--nats", &cell.nats.url()], flags].concat())
}

/// Returns when so many workers are registered: one may know of another before it is registered itself.
fn wait_for_workers(cell: &Cell, count: usize) {
    tokio::runtime::Runtime::new().unwrap().block_on(async {
        let cluster = cell::join(cell).await;
        cell::registered(&cluster, WorkerFilter::default(), |workers| workers.len() == count).await;
    });
}

#[test]
fn a_model_is_measured_without_a_server() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/reference/models/qwen3");
    let bench =
        |flags: &[&str]| engine(&[&["bench", "--model", model, "--json", "--rounds", "1"], flags].concat()).output();
    let output = bench(&["--prefill", "20,30", "--decode", "1,3", "--context", "24", "--steps", "4"]).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows: Vec<Value> =
        String::from_utf8(output.stdout).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let measured: Vec<(&str, u64)> = rows
        .iter()
        .map(|row| (row["measured"].as_str().unwrap(), row["tokens"].as_u64().or(row["sequences"].as_u64()).unwrap()))
        .collect();
    assert_eq!(measured, [("prefill", 20), ("prefill", 30), ("decode", 1), ("decode", 3)]);
    assert!(rows.iter().all(|row| row["tokens_per_second"].as_f64().unwrap() > 0.0), "{rows:?}");
    assert_eq!(rows[3]["steps"], 4);

    let output = bench(&["--prefill", "20", "--decode", "3", "--context", "24", "--kv-blocks", "40"]).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("--kv-cache-memory"), "{said}");

    // The model has 512 positions.
    let output = bench(&["--prefill", "512", "--decode", "1", "--context", "24", "--steps", "4"]).unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("lower --prefill") && said.contains("512"), "{said}");
}

#[cfg(not(feature = "cuda"))]
#[test]
fn a_build_without_cuda_says_what_has_kernels_to_check() {
    let (passed, findings) = doctor(&["--gpu"]);
    assert!(!passed);
    assert_eq!(failed(&findings), ["gpu"], "{findings:?}");
    assert!(findings[0]["remedy"].as_str().unwrap().contains("make cuda"), "{findings:?}");
    let output = engine(&["bench-kernels"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && said.contains("make cuda"), "{said}");
}

#[test]
fn services_that_are_down_are_failures_with_remedies() {
    let (passed, findings) = doctor(&["--etcd", "http://127.0.0.1:1", "--nats", "nats://127.0.0.1:1"]);
    assert!(!passed);
    assert_eq!(failed(&findings), ["etcd", "nats"], "{findings:?}");
    assert!(
        findings.iter().filter(|finding| finding["level"] == "failure").all(|finding| finding["remedy"].is_string())
    );
}

#[test]
fn a_cluster_is_measured_from_its_prefill_workers_while_it_serves() {
    let cell = Cell::start();
    let (passed, findings) = in_cluster(&cell, &[]);
    assert!(passed, "{findings:?}");
    assert_eq!(of(&findings, "workers")[0]["level"], "note", "nobody is there yet");

    let token = ["--cluster-token", "secret"];
    let mock = ["mock", "--decode-workers", "2", "--prefill-workers", "1", "--etcd", &cell.etcd.url(), "--nats"];
    let mock = Server::start_as(&[&mock[..], &[&cell.nats.url()], &token].concat());
    mock.wait_until("the prefill worker is known", |mock| mock.metric("engine_prefill_workers") == 1.0);
    wait_for_workers(&cell, 3);
    let (passed, findings) = in_cluster(&cell, &[&["--measure"], &token[..]].concat());
    assert!(passed, "{findings:?}\n{}", mock.log());
    assert_eq!(of(&findings, "worker").len(), 3, "{findings:?}");
    let transfers = of(&findings, "transfer");
    assert_eq!(transfers.len(), 2, "{findings:?}");
    assert!(transfers.iter().all(|transfer| transfer["seen"].as_str().unwrap().contains("GB/s")), "{transfers:?}");
    // What was lent for it is back.
    cell::wait_until_idle(&mock);

    let (passed, findings) = in_cluster(&cell, &["--measure", "--cluster-token", "another"]);
    assert!(!passed);
    assert_eq!(failed(&findings), ["transfer", "transfer"], "{findings:?}");
}

#[test]
fn tcp_between_workers_is_a_failure_unless_it_is_wanted() {
    let cell = Cell::start();
    let mock = ["mock", "--prefill-workers", "1", "--transport", "tcp", "--etcd", &cell.etcd.url(), "--nats"];
    let mock = Server::start_as(&[&mock[..], &[&cell.nats.url()]].concat());
    mock.wait_until("the prefill worker is known", |mock| mock.metric("engine_prefill_workers") == 1.0);
    wait_for_workers(&cell, 2);
    let (_, findings) = in_cluster(&cell, &["--measure"]);
    assert_eq!(failed(&findings), ["transport", "transfer"], "{findings:?}");
    let (passed, findings) = in_cluster(&cell, &["--measure", "--transport", "tcp"]);
    assert!(passed, "{findings:?}");
}

#[test]
fn two_processes_measure_pages_of_each_size_over_the_way_that_is_asked_for() {
    let mut serving = engine(&["transfer-bench", "--serve", "--port", "0", "--log-level", "off"]);
    let mut serving = serving.stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(serving.stdout.take().unwrap()).read_line(&mut line).unwrap();
    let address = line.trim().rsplit(' ').next().unwrap();
    for transport in ["shm", "tcp"] {
        let flags =
            ["--page-size", "64KiB,256KiB", "--pages", "16", "--rounds", "3", "--json", "--transport", transport];
        let measured = engine(&[&["transfer-bench", "--connect", address], &flags[..]].concat()).output().unwrap();
        let stdout = String::from_utf8(measured.stdout).unwrap();
        let rows: Vec<Value> = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let errors = String::from_utf8_lossy(&measured.stderr);
        assert!(measured.status.success() && rows.len() == 2, "{stdout}{errors}");
        for (row, bytes) in rows.iter().zip([64 << 10, 256 << 10]) {
            assert_eq!((&row["transport"], &row["page_bytes"]), (&transport.into(), &bytes.into()));
            assert!(row["gigabytes_per_second"].as_f64().unwrap() > 0.0 && row["rounds"] == 3, "{row}");
        }
    }
    serving.kill().unwrap();
    serving.wait().unwrap();
}
