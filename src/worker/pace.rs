use std::{thread, time::Duration};

use engine_kernels::{Batch, SampleRow, Sampled};

use super::{Runner, RunnerError};

/// How long steps take in a mock, whatever they compute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// Each step.
    pub step: Duration,
    /// Each token of a step that belongs to a prompt, in addition.
    pub prompt_token: Duration,
}

/// A runner that takes its time: what another computes, later.
pub(super) struct Paced<R> {
    runner: R,
    pace: Option<Pace>,
}

impl<R> Paced<R> {
    /// Without a pace, `runner` as it is.
    pub(super) fn new(runner: R, pace: Option<Pace>) -> Self {
        Self { runner, pace }
    }
}

impl<R: Runner> Runner for Paced<R> {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        if let Some(Pace { step, prompt_token }) = self.pace {
            // One token of a sequence is a decode: that a chunk of a prompt may be as short changes little.
            let lengths = batch.sequences.iter().map(|span| span.query_len);
            let prompt_tokens: u32 = lengths.filter(|&length| length > 1).sum();
            thread::sleep(step + prompt_token * prompt_tokens);
        }
        self.runner.execute(batch, row, out, layer_done)
    }
}
