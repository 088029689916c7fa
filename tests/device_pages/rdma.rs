//! Pages that adapters read and write in device memory.

use std::{path::Path, thread};

use super::*;

/// A prompt that stays, one that goes, to a page's border, and another should the emulated machine be so slow that the
/// worker it goes to is taken for dead.
const LENGTHS: [usize; 3] = [20, 129, 133];
/// In short steps, so that a prefill worker on an emulated device of an emulated machine is not taken for dead.
const SHORTLY: [&str; 2] = ["--max-num-batched-tokens", "32"];
/// Over devices of the workers' choice.
const RDMA: [&str; 3] = ["--transport", "rdma", "--require-rdma"];
const THERE: &str = "adapters reach pages on the device themselves (nvidia-peermem";

/// What the stand-in for libcuda was asked so far.
fn calls(log: &Path, what: &str) -> usize {
    std::fs::read_to_string(log).unwrap_or_default().lines().filter(|line| *line == what).count()
}

fn prompts(cell: &Cell) -> Vec<Vec<u32>> {
    (0..).zip(LENGTHS).map(|(number, length)| cell.prompt(number, length)).collect()
}

#[test]
#[ignore = "needs RDMA devices and a stand-in for CUDA: make test-rdma"]
fn adapters_move_pages_from_device_to_device_or_else_staged_ones_with_the_same_answers() {
    let mut cell = cell();
    let expected: Vec<Value> = {
        let one = alone(&cell);
        prompts(&cell).iter().map(|prompt| ask(&one, prompt)).collect()
    };
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("calls");
    let noted = format!("STANDIN_LOG={}", log.display());
    for (variables, reached) in [(&[][..], true), (&["STANDIN_ADAPTERS=no"], false)] {
        cell.set_environment(&[&[noted.as_str()], variables].concat());
        let (decode, prefill) = (decode(&cell, &RDMA), prefill(&cell, &[&RDMA[..], &SHORTLY].concat()));
        cell.wait_for_prefill_worker(&decode);
        for worker in [&decode, &prefill] {
            let log = worker.log();
            assert_eq!((log.contains(THERE), log.contains("pages are staged")), (reached, !reached), "{log}");
        }
        // What was tried: both ways by either; by the one that takes flushes one, and one for what an adapter wrote.
        let before = calls(&log, "flush");
        let tried = [calls(&log, "dma-buf"), calls(&log, "sync-memops"), before];
        assert_eq!(tried, if reached { [2, 4, 2] } else { [0; 3] });
        for (prompt, expected) in prompts(&cell).iter().zip(&expected) {
            let answer = ask(&decode, prompt);
            assert!(is_alike(&answer, expected), "{answer:#} is not {expected:#}");
            if handoffs(&decode, "completed") == 1.0 {
                break;
            }
        }
        assert_eq!((handoffs(&decode, "completed"), prefills(&decode, "remote")), (1.0, 1.0), "{}", decode.log());
        // And one for each that went in vain.
        let flushed = calls(&log, "flush") - before;
        assert!(if reached { flushed > 0 } else { flushed == 0 }, "{flushed} flushes");
        wait_until_idle(&decode);
        wait_until_idle(&prefill);
        // There is none if nothing was asked for.
        let _ = std::fs::remove_file(&log);
    }
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
    assert!(is_alike(&answer, &ask(&alone(&cell), &prompt)));
}
