use super::SlotId;
use crate::telemetry::StepKind;

/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlanEntry {
    /// Which sequence.
    pub slot: SlotId,
    /// Position of the first token to compute.
    pub start: usize,
    /// Tokens to compute.
    pub len: usize,
    /// Leading tokens of these whose logits nobody wants.
    pub logits_from: usize,
    /// Whether this is the first the sequence sees of a step; `start` is then how much of it was found in the cache.
    pub first: bool,
    /// Whether this is one token of a sequence that is otherwise computed.
    pub decode: bool,
}

/// What the next step computes: decodes first, then prefill chunks, each oldest first. Refilled, never reallocated.
#[derive(Debug, Default)]
pub struct StepPlan {
    entries: Vec<PlanEntry>,
    tokens: usize,
    preempted: usize,
}

impl StepPlan {
    /// An empty plan with room for `sequences`.
    pub fn with_capacity(sequences: usize) -> Self {
        Self { entries: Vec::with_capacity(sequences), tokens: 0, preempted: 0 }
    }

    /// The sequences that take part.
    pub fn entries(&self) -> &[PlanEntry] {
        &self.entries
    }

    /// Tokens computed in total.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Sequences that lost their pages to older ones.
    pub fn preempted(&self) -> usize {
        self.preempted
    }

    /// What the step is made of.
    pub fn kind(&self) -> StepKind {
        let decodes = self.entries.iter().filter(|entry| entry.decode).count();
        match decodes {
            0 => StepKind::Prefill,
            _ if decodes == self.entries.len() => StepKind::Decode,
            _ => StepKind::Mixed,
        }
    }

    pub(super) fn clear(&mut self) {
        self.entries.clear();
        self.tokens = 0;
        self.preempted = 0;
    }

    pub(super) fn push(&mut self, entry: PlanEntry) {
        self.tokens += entry.len;
        self.entries.push(entry);
    }

    /// Takes out a preempted sequence.
    pub(super) fn preempt(&mut self, slot: SlotId) {
        self.preempted += 1;
        if let Some(at) = self.entries.iter().position(|entry| entry.slot == slot) {
            self.tokens -= self.entries.remove(at).len;
        }
    }
}
