use std::{ops::Range, time::Instant};

use engine_kernels::{Batch, RowTask, SampleRow, Sampled};

use super::{EngineConfig, request_state::Terms, warm_up::NOBODY};
use crate::scheduler::{PlanEntry, Scheduler, SlotId, StepPlan};

/// A row of logits and whose it is: what comes after `position` is wanted.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row {
    slot: SlotId,
    position: usize,
}

/// Everything about one step, from plan to samples. Sized once, refilled each step.
pub(super) struct Step {
    pub(super) plan: StepPlan,
    pub(super) batch: Batch,
    pub(super) rows: Rows,
    pub(super) out: Vec<Sampled>,
    /// From its launch to the end of its computation. With a runner that runs ahead, `end` is when the launch returned,
    /// until the step is collected.
    pub(super) times: Range<Instant>,
}

/// The rows of logits a step computes, in the order of `Batch::logit_rows`.
pub(super) struct Rows {
    rows: Vec<Row>,
    /// Of each entry of the plan.
    counts: Vec<usize>,
}

impl Step {
    pub(super) fn new(config: &EngineConfig) -> Self {
        let pages = config.max_num_seqs * config.max_model_len.div_ceil(config.block_size);
        let tokens = config.max_num_batched_tokens;
        Self {
            plan: StepPlan::with_capacity(config.max_num_seqs),
            batch: Batch::with_capacity(tokens, config.max_num_seqs, pages),
            rows: Rows { rows: Vec::with_capacity(tokens), counts: Vec::with_capacity(config.max_num_seqs) },
            out: vec![Sampled::default(); tokens],
            times: Instant::now()..Instant::now(),
        }
    }

    /// Writes down what the plan's entries are made of.
    pub(super) fn fill(&mut self, scheduler: &Scheduler, terms: &[Option<Terms>]) {
        let Self { plan, batch, rows: Rows { rows, counts }, .. } = self;
        batch.clear();
        rows.clear();
        counts.clear();
        for &PlanEntry { slot, start, len, logits_from, .. } in plan.entries() {
            let sequence = scheduler.sequence(slot);
            let tokens = &sequence.tokens()[start..start + len];
            batch.push(tokens, start as u32, sequence.block_table(), logits_from);
            let before = rows.len();
            rows.extend((start + logits_from..start + len).map(|position| Row { slot, position }));
            let generates = terms[slot.index()].as_ref().is_some_and(Terms::generates);
            if start + len == sequence.tokens().len() && rows.len() > before && !generates {
                // Only the prompt was asked about; nobody looks at what would follow it.
                rows.pop();
                batch.logit_rows.pop();
            }
            counts.push(rows.len() - before);
        }
        debug_assert_eq!(rows.len(), batch.logit_rows.len());
    }
}

impl Rows {
    /// Rows of all entries.
    pub(super) fn len(&self) -> usize {
        self.rows.len()
    }

    /// How many rows each entry of the plan has.
    pub(super) fn counts(&self) -> &[usize] {
        &self.counts
    }

    /// What is wanted of row `i`. Of a sequence that has ended since the step was planned, nothing: the least there is.
    pub(super) fn task<'a>(&self, i: usize, scheduler: &'a Scheduler, terms: &'a [Option<Terms>]) -> SampleRow<'a> {
        let Row { slot, position } = self.rows[i];
        match &terms[slot.index()] {
            Some(terms) => terms.row(scheduler.sequence(slot), position),
            None => SampleRow {
                task: RowTask::Score { token: 0 },
                sequence: NOBODY,
                prompt: &[],
                output: &[],
                logprobs: None,
            },
        }
    }
}
