use super::SlotId;
use crate::cache::LentPage;

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanEntry {
    /// Where the sequence lives.
    pub slot: SlotId,
    /// Which one it is: the slot may be another's by the time that the step is done.
    pub(super) arrival: u64,
    /// Position of the first token to compute.
    pub start: usize,
    /// Tokens to compute.
    pub len: usize,
    /// Leading tokens of these whose logits nobody wants.
    pub logits_from: usize,
    /// Whether this is the first the sequence sees of a step.
    pub first: bool,
    /// Whether this is one token of a sequence that is otherwise computed.
    pub decode: bool,
}

/// A sequence whose prompt another worker is to prefill, and the pages to fill.
#[derive(Debug)]
pub struct Loan {
    /// Which sequence. It is away until [`Scheduler::resume`](super::Scheduler::resume) or
    /// [`Scheduler::restart`](super::Scheduler::restart).
    pub slot: SlotId,
    /// Position of the first token that `pages` hold, a multiple of the block size: those before were found in the
    /// cache.
    pub first: usize,
    /// The pages of the tokens from `first` to the last but one.
    pub pages: Box<[LentPage]>,
}

/// What the next step computes: decodes first, oldest first, then chunks of prompts, those with the least left first.
/// Refilled, never reallocated.
#[derive(Debug, Default)]
pub struct StepPlan {
    entries: Vec<PlanEntry>,
    tokens: usize,
    preempted: usize,
    /// Sequences that leave for another worker.
    pub loans: Vec<Loan>,
    /// Prefill-only sequences that were found in the cache from end to end: there is nothing to compute.
    pub found: Vec<SlotId>,
}

impl StepPlan {
    /// An empty plan with room for `sequences`.
    pub fn with_capacity(sequences: usize) -> Self {
        Self { entries: Vec::with_capacity(sequences), ..Self::default() }
    }

    /// The sequences that take part.
    pub fn entries(&self) -> &[PlanEntry] {
        &self.entries
    }

    /// Tokens computed in total.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Tokens of prompts among them.
    pub fn prompt_tokens(&self) -> usize {
        self.entries.iter().filter(|entry| !entry.decode).map(|entry| entry.len).sum()
    }

    /// Sequences that lost what was computed of them to older ones.
    pub fn preempted(&self) -> usize {
        self.preempted
    }

    /// Sequences among the entries that are only decoded.
    pub fn decodes(&self) -> usize {
        self.entries.iter().filter(|entry| entry.decode).count()
    }

    pub(super) fn clear(&mut self) {
        debug_assert!(self.loans.is_empty(), "loans are taken out of a plan before the next");
        self.entries.clear();
        self.found.clear();
        self.tokens = 0;
        self.preempted = 0;
    }

    pub(super) fn push(&mut self, entry: PlanEntry) {
        self.tokens += entry.len;
        self.entries.push(entry);
    }

    /// Takes out a preempted sequence, which is to compute again what it `loses`, if that is anything.
    pub(super) fn preempt(&mut self, slot: SlotId, loses: bool) {
        self.preempted += usize::from(loses);
        if let Some(at) = self.entries.iter().position(|entry| entry.slot == slot) {
            self.tokens -= self.entries.remove(at).len;
        }
    }
}
