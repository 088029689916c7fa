//! The scheduler's sequences: which run, wait, or are away.

use std::collections::VecDeque;

use engine_kernels::Batch;

use super::{PlanEntry, Sequence, StepPlan};
use crate::cache::{KvPool, PageCounts};

/// Where a sequence lives from [`Scheduler::add`] to [`Scheduler::remove`]; below [`SchedulerLimits::max_sequences`],
/// and given to another sequence afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(u32);

impl SlotId {
    /// For tables kept beside the scheduler's.
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

/// Bounds of a step and of the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SchedulerLimits {
    /// Sequences running at once.
    pub max_num_seqs: usize,
    /// Tokens in one step; at least `max_num_seqs`.
    pub max_num_batched_tokens: usize,
    /// Sequences running and waiting.
    pub max_sequences: usize,
}

/// Who runs and who waits. Who waits enters in order of arrival, but for one too long for the pages beside those in
/// quarantine. The oldest that runs progresses in every step, because half of what a step has for prompts is for it,
/// pages are taken from the youngest when they run out, and the pool holds the longest sequence. Only pages that are
/// lent or in quarantine can make it wait, and those come back. The other half goes to prompts with little left.
///
/// A sequence whose prompt another worker computes is *away*: neither running nor waiting. It keeps its slot, its
/// prefix hits and its place among the running ones, to which it returns.
#[derive(Debug)]
pub struct Scheduler {
    pub(super) limits: SchedulerLimits,
    /// Tokens a page holds.
    pub(super) block_size: usize,
    pub(super) pool: KvPool,
    pub(super) slots: Box<[Option<Sequence>]>,
    free_slots: Vec<SlotId>,
    /// Both in order of arrival.
    pub(super) running: Vec<SlotId>,
    pub(super) waiting: VecDeque<SlotId>,
    /// Tokens of all that wait, which may be many: each step asks for the sum.
    pub(super) waiting_tokens: usize,
    /// Sequences whose prompt another worker computes.
    pub(super) away: Vec<SlotId>,
    /// Prefill-only sequences that are computed, or stopped, and whose pages somebody reads.
    pub(super) held: Vec<SlotId>,
    arrivals: u64,
    /// Prompt tokens of a step in which others decode, at most.
    pub(super) chunk_beside_decodes: usize,
    /// Prompt tokens of a step in which nobody decodes, at most.
    pub(super) chunk_alone: usize,
    /// The prompts that the step being planned is shared out among.
    pub(super) prompts: Vec<SlotId>,
}

impl Scheduler {
    /// No sequences, and `pages` free pages of `block_size` tokens, as those who hash the sequences' pages have them.
    pub fn new(limits: SchedulerLimits, block_size: usize, pages: usize) -> Self {
        assert!(limits.max_num_seqs > 0 && limits.max_num_batched_tokens >= limits.max_num_seqs);
        let max_sequences = limits.max_sequences as u32;
        Self {
            limits,
            block_size,
            pool: KvPool::new(pages),
            slots: (0..max_sequences).map(|_| None).collect(),
            free_slots: (0..max_sequences).rev().map(SlotId).collect(),
            running: Vec::with_capacity(limits.max_num_seqs),
            waiting: VecDeque::with_capacity(limits.max_sequences),
            waiting_tokens: 0,
            away: Vec::with_capacity(limits.max_num_seqs),
            held: Vec::with_capacity(limits.max_sequences),
            arrivals: 0,
            chunk_beside_decodes: limits.max_num_batched_tokens,
            chunk_alone: limits.max_num_batched_tokens,
            prompts: Vec::with_capacity(limits.max_num_seqs),
        }
    }

    /// From now on prompts get at most so many tokens, at least one, of a step in which others decode, and have to wait
    /// for it.
    pub fn cut_chunks_beside_decodes(&mut self, tokens: usize) {
        self.chunk_beside_decodes = tokens.max(1);
    }

    /// The same for steps in which nobody decodes.
    pub fn cut_chunks_alone(&mut self, tokens: usize) {
        self.chunk_alone = tokens.max(1);
    }

    /// Queues a sequence, last. `None`: all slots are taken, and the sequence is gone.
    pub fn add(&mut self, mut sequence: Sequence) -> Option<SlotId> {
        let slot = self.free_slots.pop()?;
        sequence.arrival = self.arrivals;
        self.arrivals += 1;
        self.waiting_tokens += sequence.remaining();
        self.slots[slot.index()] = Some(sequence);
        self.waiting.push_back(slot);
        Some(slot)
    }

    /// Takes a sequence out, finished or not. Its pages are free at once; those that are lent for it go into quarantine
    /// until [`Scheduler::free_lent`].
    pub fn remove(&mut self, slot: SlotId) -> Option<Sequence> {
        self.recall(slot);
        self.stop_waiting(slot);
        let mut sequence = self.slots[slot.index()].take()?;
        self.running.retain(|&other| other != slot);
        self.away.retain(|&other| other != slot);
        self.held.retain(|&other| other != slot);
        self.free_slots.push(slot);
        sequence.table.release(&mut self.pool);
        Some(sequence)
    }

    /// Takes a sequence out of the queue, if it is there.
    pub(super) fn stop_waiting(&mut self, slot: SlotId) {
        if let Some(at) = self.waiting.iter().position(|&other| other == slot) {
            self.waiting.remove(at);
            self.waiting_tokens -= self.sequence(slot).remaining();
        }
    }

    /// The sequence in a slot that is taken.
    pub fn sequence(&self, slot: SlotId) -> &Sequence {
        self.slots[slot.index()].as_ref().expect("a slot in a plan or queue is taken")
    }

    /// Sequences that run.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Sequences that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Tokens of all sequences: those still to be computed, and those that are.
    pub fn tokens(&self) -> (usize, usize) {
        let others = self.running.iter().chain(&self.away);
        others.fold((self.waiting_tokens, 0), |(pending, computed), &slot| {
            let sequence = self.sequence(slot);
            (pending + sequence.remaining(), computed + sequence.num_computed)
        })
    }

    /// Whether the running sequences that arrived before `arrival` lack more pages than the pool can give, and it can
    /// give fewer than there are such sequences.
    pub fn is_short(&self, arrival: u64) -> bool {
        let before = &self.running[..self.running.partition_point(|&slot| self.sequence(slot).arrival < arrival)];
        // One whose last token is on its way needs no page for it.
        let missing = |&slot: &SlotId| if self.sequence(slot).awaits_outcome() { 0 } else { self.missing_pages(slot) };
        let available = self.pool.available();
        available < before.len() && available < before.iter().map(missing).sum::<usize>()
    }

    /// Running sequences of which no step has computed anything yet.
    pub fn unstarted(&self) -> usize {
        self.running.iter().filter(|&&slot| !self.sequence(slot).started).count()
    }

    /// Whether there is nothing to compute.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// All slots, taken or not.
    pub fn slots(&self) -> impl Iterator<Item = SlotId> + use<> {
        (0..self.slots.len() as u32).map(SlotId)
    }

    /// Pages of each state.
    pub fn pages(&self) -> PageCounts {
        self.pool.counts()
    }

    /// Whether the sequence of a plan's entry is still here.
    pub fn has(&self, entry: &PlanEntry) -> bool {
        self.slots[entry.slot.index()].as_ref().is_some_and(|sequence| sequence.arrival == entry.arrival)
    }

    /// Takes note that a plan has been computed, or will be before the next one: pages that are full then can be found
    /// by others. All of its tokens are known by now.
    pub fn commit(&mut self, plan: &StepPlan) {
        for entry in plan.entries() {
            if !self.has(entry) {
                continue;
            }
            let sequence = self.sequence_mut(entry.slot);
            // Others would be given pages of another text.
            assert!(!sequence.has_placeholder(), "pages are found by their tokens");
            sequence.advance(entry.len);
            let done = sequence.prefill_only && sequence.remaining() == 0;
            self.publish(entry.slot);
            if done {
                self.hold(entry.slot);
            }
        }
    }

    /// Makes a sequence's full pages findable, unless nothing is to be found again: then they stay its own.
    pub(super) fn publish(&mut self, slot: SlotId) {
        let Some(sequence) = &mut self.slots[slot.index()] else { return };
        let full = sequence.num_computed / self.block_size;
        if full > sequence.hashes.len() {
            // The pages end where the computed tokens do, which may be one short of the tokens.
            sequence.hash_pages(full * self.block_size);
        }
        while sequence.table.published() < full
            && let Some(&hash) = sequence.hashes.get(sequence.table.published())
        {
            if sequence.prefill_only && self.pool.is_published(hash) {
                // Publishing it again would free our copy, which somebody may be reading.
                return;
            }
            sequence.table.publish_next(hash, &mut self.pool);
        }
    }

    /// Appends a sampled token to a sequence whose every token is computed.
    pub fn push_token(&mut self, slot: SlotId, token: u32) {
        self.sequence_mut(slot).push_token(token);
    }

    /// The same with a placeholder for a token that will be known later: it is drawn in this row of the step that was
    /// planned last. What follows it can be planned at once, and committed after [`Scheduler::reveal`].
    pub fn push_placeholder(&mut self, slot: SlotId, row: usize) {
        self.sequence_mut(slot).push_token(Batch::PLACEHOLDER | row as u32);
    }

    /// Says which token it is that [`Scheduler::push_placeholder`] appended.
    pub fn reveal(&mut self, slot: SlotId, token: u32) {
        self.sequence_mut(slot).reveal(token);
    }

    /// Panics if a page is lost, or counted wrongly, or a queue is out of order.
    pub fn check_integrity(&mut self) {
        self.pool.check_integrity(self.slots.iter().flatten().map(|sequence| &sequence.table));
        let taken = self.slots.iter().flatten().count();
        let queued = self.running.len() + self.waiting.len() + self.away.len() + self.held.len();
        assert_eq!(taken, queued, "a sequence is in no queue");
        assert_eq!(taken + self.free_slots.len(), self.slots.len(), "a slot is lost");
        assert!(self.running.len() + self.away.len() <= self.limits.max_num_seqs, "more run than may");
        let arrival = |&slot: &SlotId| self.sequence(slot).arrival;
        let in_order = self.running.is_sorted_by_key(arrival) && self.waiting.iter().is_sorted_by_key(arrival);
        assert!(in_order, "who came first is not served first");
        for &slot in &self.waiting {
            assert!(self.sequence(slot).table.is_empty(), "a waiting sequence holds pages");
        }
        let tokens: usize = self.waiting.iter().map(|&slot| self.sequence(slot).remaining()).sum();
        assert_eq!(tokens, self.waiting_tokens, "tokens that wait are counted wrongly");
        for &slot in &self.running {
            let sequence = self.sequence(slot);
            assert_eq!(sequence.table.len(), self.pages_for(sequence.num_computed), "pages and tokens disagree");
        }
        for &slot in &self.away {
            let sequence = self.sequence(slot);
            assert_eq!(sequence.lent.len(), self.pages_to_lend(slot), "pages were not lent or not for this");
            assert!(sequence.lent.iter().all(|&page| self.pool.is_lent(page)), "a page is lent and in use");
        }
        let lent: usize = self.slots.iter().flatten().map(|sequence| sequence.lent.len()).sum();
        assert_eq!(lent, self.pool.counts().lent, "a page is lent for nobody");
    }

    pub(super) fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_size)
    }

    pub(super) fn sequence_mut(&mut self, slot: SlotId) -> &mut Sequence {
        self.slots[slot.index()].as_mut().expect("a slot in a plan or queue is taken")
    }
}
