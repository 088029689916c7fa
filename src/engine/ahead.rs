//! One step ahead: while a device computes a step, the next is planned and launched.

use std::time::Instant;

use super::{Engine, Runner, RunnerError, request_state::Terms, step::Step};
use crate::scheduler::SlotId;

impl<R: Runner> Engine<R> {
    /// Leaves the step under way, so that the next is planned and launched before it is known what this one gives. A
    /// sequence that ends with it, which only its token will tell, takes part in the next one in vain; its pages may be
    /// others' by then, whose steps are computed after that.
    pub(super) fn run_ahead(&mut self) {
        let Self { scheduler, terms, step, under_way, .. } = self;
        let mut rows = 0;
        for (entry, count) in step.plan.entries().iter().zip(step.rows.counts()) {
            rows += count;
            let generates = terms[entry.slot.index()].as_ref().is_some_and(Terms::generates);
            if scheduler.has(entry) && generates && scheduler.sequence(entry.slot).is_computed() {
                scheduler.push_placeholder(entry.slot, rows - 1);
            }
        }
        std::mem::swap(step, under_way);
        self.is_under_way = true;
    }

    /// Has the step that was launched drawn from, before the one under way is finished, unless that would keep the
    /// readers of its tokens waiting, or hangs on one of these. The device computes meanwhile what is drawn from.
    pub(super) fn draw(&mut self) -> Result<(), RunnerError> {
        if self.awaits_token() || self.scores_prompt() {
            self.finish_under_way()?;
        }
        let Self { runner, scheduler, terms, step: Step { batch, rows, .. }, .. } = self;
        let (scheduler, terms, rows) = (&*scheduler, &**terms, &*rows);
        match runner.ahead() {
            Some(ahead) => ahead.draw(batch, &|i| rows.task(i, scheduler, terms)),
            None => Ok(()),
        }
    }

    /// Whether a prompt is scored in the step that was launched: enqueuing that may take as long as computing it.
    fn scores_prompt(&self) -> bool {
        let Self { terms, step: Step { plan, rows, .. }, scoring, .. } = self;
        let is_scored = |slot: SlotId| terms[slot.index()].as_ref().is_some_and(Terms::scores_prompt);
        let mut entries = plan.entries().iter().zip(rows.counts());
        *scoring > 0 && entries.any(|(entry, &rows)| rows > 0 && !entry.decode && is_scored(entry.slot))
    }

    /// Whether the step under way draws for a sequence with a grammar, and so what a grammar lets be drawn next is not
    /// known.
    fn awaits_token(&self) -> bool {
        let Self { scheduler, terms, under_way, is_under_way, constrained, .. } = self;
        *is_under_way
            && *constrained > 0
            && under_way.plan.entries().iter().any(|entry| {
                let is_constrained = terms[entry.slot.index()].as_ref().is_some_and(Terms::is_constrained);
                is_constrained && scheduler.has(entry) && scheduler.sequence(entry.slot).has_placeholder()
            })
    }

    /// Finishes the step under way, if there is one.
    pub(super) fn finish_under_way(&mut self) -> Result<(), RunnerError> {
        if !std::mem::take(&mut self.is_under_way) {
            return Ok(());
        }
        std::mem::swap(&mut self.step, &mut self.under_way);
        let finished = self.finish();
        std::mem::swap(&mut self.step, &mut self.under_way);
        finished
    }

    /// Waits until the step is computed, and passes on what it gives.
    pub(super) fn finish(&mut self) -> Result<(), RunnerError> {
        let Self { runner, step: Step { rows, out, times, .. }, .. } = self;
        if let Some(ahead) = runner.ahead() {
            ahead.collect(&mut out[..rows.len()])?;
            times.end = Instant::now();
        }
        // It was begun when it was launched, or when the one before it was done.
        let (begun, done) = (self.finished.max(times.start), times.end);
        let took = done - begun;
        self.finished = done;
        self.deliver(done);
        self.take_note(took);
        Ok(())
    }
}
