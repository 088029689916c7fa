//! Engines that are drained or stopped, and engines that fail.

use std::sync::mpsc;

use engine_kernels::{Batch, SampleRow, Sampled};
use futures::FutureExt;

use super::{STARTS, collect, config, fake::Fault, request, start, waiting::block_on};
use crate::{engine::*, telemetry::Metrics};

#[test]
fn draining_finishes_what_runs_and_refuses_the_rest() {
    for start in STARTS {
        let (handle, control) = start(config());
        control.close();
        let mut running = handle.submit(request(0..5, 9)).unwrap();
        control.wait_until_held();
        let mut draining = std::pin::pin!(handle.drain());
        assert!(draining.as_mut().now_or_never().is_none());
        assert_eq!(handle.status(), EngineStatus::Draining);
        assert_eq!(handle.submit(request(0..5, 9)).unwrap_err(), SubmitError::ShuttingDown);
        control.open();
        block_on(draining);
        assert_eq!(block_on(collect(&mut running)).0.len(), 9);
        assert_eq!(handle.snapshot().pages_owned, 0);
        handle.stop();
        assert_eq!(block_on(handle.stopped()), EngineStatus::Stopped);
    }
}

#[test]
fn stopping_aborts_everything() {
    for start in STARTS {
        let (handle, control) = start(EngineConfig { max_num_seqs: 1, ..config() });
        control.close();
        let mut generations: Vec<_> = (0..3).map(|i| handle.submit(request([i], 100)).unwrap()).collect();
        control.wait_until_held();
        handle.stop();
        control.open();
        assert_eq!(block_on(handle.stopped()), EngineStatus::Stopped);
        for generation in &mut generations {
            assert_eq!(block_on(collect(generation)).1, FinishReason::Aborted);
        }
        assert_eq!(handle.submit(request([1], 1)).unwrap_err(), SubmitError::ShuttingDown);
        block_on(handle.drain());
    }
}

#[test]
fn an_idle_engine_stops() {
    let (handle, _) = start(config());
    handle.stop();
    assert_eq!(block_on(handle.stopped()), EngineStatus::Stopped);
}

#[test]
fn a_failure_aborts_every_request_and_is_told() {
    for (start, fault) in STARTS.into_iter().flat_map(|start| [(start, Fault::Panic), (start, Fault::Error)]) {
        let (handle, control) = start(EngineConfig { max_num_seqs: 2, ..config() });
        control.close();
        let mut generations: Vec<_> = (0..5).map(|i| handle.submit(request([i], 50)).unwrap()).collect();
        control.wait_until_held();
        control.fail(fault);
        control.open();
        for generation in &mut generations {
            assert_eq!(block_on(collect(generation)).1, FinishReason::Aborted);
            assert!(matches!(handle.status(), EngineStatus::Failed { .. }));
        }
        let EngineStatus::Failed { reason } = block_on(handle.stopped()) else { panic!() };
        assert!(reason.contains("a test wants this"), "{reason}");
        assert_eq!(handle.submit(request([1], 1)).unwrap_err(), SubmitError::ShuttingDown);
        block_on(handle.drain());
    }
}

/// Fails at once, and has a device to wait for then.
struct Stuck(mpsc::Receiver<()>);

impl Runner for Stuck {
    fn execute<'a>(
        &mut self,
        _: &Batch,
        _: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        _: &mut [Sampled],
        _: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        Err(RunnerError("a test wants this".to_owned()))
    }
}

impl Drop for Stuck {
    fn drop(&mut self) {
        // Until the test drops the other end.
        let _ = self.0.recv();
    }
}

#[test]
fn nobody_waits_for_the_device_of_an_engine_that_failed() {
    let (device, waits) = mpsc::channel();
    let handle = Engine::start(Stuck(waits), config(), Metrics::new().engine).unwrap();
    let mut generation = handle.submit(request([1], 5)).unwrap();
    assert_eq!(block_on(collect(&mut generation)).1, FinishReason::Aborted);
    assert_eq!(handle.submit(request([1], 1)).unwrap_err(), SubmitError::ShuttingDown);
    assert!(handle.stopped().now_or_never().is_none());
    drop(device);
    assert!(matches!(block_on(handle.stopped()), EngineStatus::Failed { .. }));
}
