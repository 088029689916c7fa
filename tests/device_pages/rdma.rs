//! Pages that adapters read and write in device memory.

use std::{path::Path, thread};

use super::*;

/// Over devices of the workers' choice.
const RDMA: [&str; 3] = ["--transport", "rdma", "--require-rdma"];
const THERE: &str = "adapters reach pages on the device themselves (nvidia-peermem";

/// What the stand-in for libcuda was asked so far.
fn calls(log: &Path, what: &str) -> usize {
    std::fs::read_to_string(log).unwrap_or_default().lines().filter(|line| *line == what).count()
}

#[test]
#[ignore = "needs RDMA devices and a stand-in for CUDA: make test-rdma"]
fn a_prefill_worker_that_dies_while_its_adapter_writes_to_a_device_costs_a_pause() {
    let mut cell = cell();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("calls");
    // Where no file can be had either that stands for device memory.
    cell.set_environment(&[&format!("STANDIN_LOG={}", log.display()), "STANDIN_DMA_BUF=no"]);
    let decode = decode(&cell, &RDMA);
    let prefill = prefill(&cell, &[&RDMA[..], &SLOWLY].concat());
    cell.wait_for_prefill_worker(&decode);
    assert!(decode.log().contains(THERE), "{}", decode.log());
    let prompt = cell.prompt(1, 120);
    let flushed = calls(&log, "flush");
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| ask(&decode, &prompt));
        let written = "engine_transfer_bytes_total{transport=\"rdma\"}";
        prefill.wait_until("it writes", |prefill| prefill.get("/metrics").text().contains(written));
        prefill.signal("KILL");
        answer.join().unwrap()
    });
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    assert_eq!(handoffs(&decode, "fenced"), 1.0);
    wait_until_idle(&decode);
    // Before the pages were used again.
    assert_eq!(calls(&log, "flush") - flushed, 1);
    assert!(is_alike(&answer, &ask(&cell.alone(), &prompt)));
}
