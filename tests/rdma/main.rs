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

use std::thread;

use cell::{
    Cell, Model, SLOWLY, answers_equal_those_of_one_process, ask, granted, handoffs, prefills, wait_until_idle,
};

/// A model that the guest's emulated processor is fast enough for.
fn cell() -> Cell {
    Cell::of(Model::made_up(2, 2, 1024))
}

/// Flags of a worker whose pages travel over this device or not at all.
fn over(device: &str) -> [&str; 3] {
    ["--require-rdma", "--rdma-device", device]
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn answers_equal_those_of_one_process_over_rdma() {
    answers_equal_those_of_one_process(&cell(), "rdma", &["--require-rdma"], &["--require-rdma"]);
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn answers_equal_those_of_one_process_between_two_adapters() {
    answers_equal_those_of_one_process(&cell(), "rdma", &over("rxw0"), &over("rxw1"));
}

#[test]
#[ignore = "needs an RDMA device: make test-rdma"]
fn a_prefill_worker_that_dies_while_it_writes_over_rdma_costs_a_pause() {
    let cell = cell();
    let decode =
        cell.decode(&[&["--max-local-prefill-length", "64", "--transport", "rdma"], &over("rxw0")[..]].concat());
    let flags = [&["--transport", "rdma"], &over("rxw1")[..]].concat();
    let prefill = cell.prefill(&[&SLOWLY[..], &flags].concat());
    cell.wait_for_prefill_worker(&decode);
    let (first, second) = (cell.prompt(1, 900), cell.prompt(2, 300));
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| ask(&decode, &first));
        decode.wait_until("the prompt is claimed", |decode| granted(decode) == 1.0);
        prefill
            .wait_until("it writes", |prefill| prefill.metric("engine_transfer_bytes_total{transport=\"rdma\"}") > 0.0);
        prefill.signal("KILL");
        answer.join().unwrap()
    });
    let alone = cell.alone();
    assert_eq!(answer, ask(&alone, &first));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    assert_eq!(handoffs(&decode, "fenced"), 1.0);
    wait_until_idle(&decode);

    // The next one finds an adapter and memory that are as good as new.
    drop(prefill);
    let _prefill = cell.prefill(&flags);
    decode.wait_until("it knows the new one", |decode| {
        decode.metric("engine_prefill_workers") >= 1.0 && decode.metric("engine_prefill_queue_depth") >= 0.0
    });
    assert_eq!(ask(&decode, &second), ask(&alone, &second));
    wait_until_idle(&decode);
}
