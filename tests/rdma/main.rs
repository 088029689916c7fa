//! Whole clusters whose pages travel by RDMA: real etcd, NATS and worker processes. It takes RDMA devices, so all this
//! runs in the guest of `guest.sh`, which has them (`make test-rdma`).

#[path = "../cell/mod.rs"]
mod cell;
#[path = "../program/mod.rs"]
mod program;
#[path = "../services/mod.rs"]
mod services;
#[path = "../support/mod.rs"]
mod support;

use std::{process::Command, thread};

use cell::{Cell, Model, SLOWLY, answers_equal_those_of_one_process, ask, handoffs, prefills, wait_until_idle};
use program::Server;
use serde_json::Value;

/// A model that the guest's emulated processor is fast enough for.
fn cell() -> Cell {
    Cell::of(Model::made_up(2, 2, 1024))
}

/// Pages travel by RDMA or not at all, over devices of the workers' choice.
const RDMA: [&str; 3] = ["--transport", "rdma", "--require-rdma"];

/// Whether a prefill worker has written any page.
fn writes(prefill: &Server) -> bool {
    // Until then there is no such metric.
    prefill.get("/metrics").text().contains("engine_transfer_bytes_total{transport=\"rdma\"}")
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn answers_equal_those_of_one_process_between_two_adapters() {
    let over = |device| ["--require-rdma", "--rdma-device", device];
    answers_equal_those_of_one_process(&cell(), "rdma", &over("rxw0"), &over("rxw1"));
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_prefill_worker_that_dies_while_it_writes_costs_a_pause() {
    let cell = cell();
    let decode = cell.decode(&[&["--max-local-prefill-length", "64"], &RDMA[..]].concat());
    let prefill = cell.prefill(&[&SLOWLY[..], &RDMA].concat());
    cell.wait_for_prefill_worker(&decode);
    let [first, second] = [1, 2].map(|number| cell.prompt(number, 300));
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| ask(&decode, &first));
        prefill.wait_until("it writes", writes);
        prefill.signal("KILL");
        answer.join().unwrap()
    });
    let alone = cell.alone();
    assert_eq!(answer, ask(&alone, &first));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    assert_eq!(handoffs(&decode, "fenced"), 1.0);
    wait_until_idle(&decode);

    // What it leaves behind is as good as new.
    drop(prefill);
    let prefill = cell.prefill(&RDMA);
    // The decode worker hears of it before it hears that the other one's lease is over.
    prefill.wait_until("it has joined", |prefill| prefill.log().contains("registered"));
    cell.wait_for_prefill_worker(&decode);
    assert_eq!(ask(&decode, &second), ask(&alone, &second));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 1.0));
    assert!(writes(&prefill));
    wait_until_idle(&decode);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_doctor_has_the_way_over_rdma_measured() {
    let cell = cell();
    let decode = cell.decode(&RDMA);
    let _prefill = cell.prefill(&RDMA);
    cell.wait_for_prefill_worker(&decode);
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_engine"));
    doctor.args(["doctor", "--json", "--require-rdma", "--measure", "--kv-cache-memory", "64MiB"]);
    doctor.args(["--etcd", &cell.etcd.url(), "--nats", &cell.nats.url()]);
    let said = doctor.output().unwrap();
    let text = String::from_utf8(said.stdout).unwrap();
    assert!(said.status.success(), "{text}\n{}", decode.log());
    let said: Value = serde_json::from_str(&text).unwrap();
    let findings = said["findings"].as_array().unwrap();
    let of = |check: &str| findings.iter().find(|finding| finding["check"] == check).unwrap()["seen"].to_string();
    assert!(of("transport").contains("RDMA: "), "{text}");
    assert!(of("transfer").contains("over rdma") && of("transfer").contains("of the link's"), "{text}");
    wait_until_idle(&decode);
}
