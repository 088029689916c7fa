//! A whole cluster, over each transport that works on any machine. Over RDMA: `tests/rdma`.

use std::io::Write;

use crate::cell::{Cell, Model, Network, answers_equal_those_of_one_process};

/// Prompts that all come at once must not wait for half a minute on any machine.
fn small() -> Model {
    Model::made_up(2, 2, 1024)
}

/// The same with pages so large that no socket holds a long prompt's: its sender has to wait, and some of it is lost on
/// the way.
fn large_pages() -> Model {
    Model::made_up(20, 2, 1024)
}

#[test]
fn over_shared_memory() {
    answers_equal_those_of_one_process(&Cell::of(small()), "shm", &[], &[]);
}

#[test]
fn over_tcp() {
    answers_equal_those_of_one_process(&Cell::of(small()), "tcp", &[], &[]);
}

#[test]
fn between_network_namespaces_over_a_slow_and_lossy_network() {
    match Network::make() {
        Ok(network) => answers_equal_those_of_one_process(&Cell::across(network, large_pages()), "tcp", &[], &[]),
        Err(error) => {
            // Past the test runner, which shows nothing of tests that pass.
            let line = format!("\nSKIPPED: no network namespaces here, so no test between them: {error}\n");
            let _ = std::io::stderr().write_all(line.as_bytes());
        }
    }
}
