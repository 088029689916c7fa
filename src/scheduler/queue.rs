use std::collections::VecDeque;

use super::{PlanEntry, Sequence, StepPlan};
use crate::cache::{KvPool, PageCounts, PageHasher};

/// Where a sequence lives from [`Scheduler::add`] to [`Scheduler::remove`]; below [`SchedulerLimits::max_sequences`], and
/// given to another sequence afterwards.
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

/// Who runs and who waits. First come, first served: every running sequence arrived before every waiting one, and the
/// oldest progresses in every step, because pages are taken from the youngest when they run out and the pool holds the
/// longest sequence.
#[derive(Debug)]
pub struct Scheduler {
    limits: SchedulerLimits,
    hasher: PageHasher,
    pool: KvPool,
    slots: Box<[Option<Sequence>]>,
    free_slots: Vec<SlotId>,
    /// Both in order of arrival.
    running: Vec<SlotId>,
    waiting: VecDeque<SlotId>,
    arrivals: u64,
}

/// Which part of a step is being planned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Decodes,
    Prefills,
}

impl Scheduler {
    /// No sequences, and `pages` free pages of the hasher's block size.
    pub fn new(limits: SchedulerLimits, hasher: PageHasher, pages: usize) -> Self {
        assert!(limits.max_num_seqs > 0 && limits.max_num_batched_tokens >= limits.max_num_seqs);
        let max_sequences = limits.max_sequences as u32;
        Self {
            limits,
            hasher,
            pool: KvPool::new(pages),
            slots: (0..max_sequences).map(|_| None).collect(),
            free_slots: (0..max_sequences).rev().map(SlotId).collect(),
            running: Vec::with_capacity(limits.max_num_seqs),
            waiting: VecDeque::with_capacity(limits.max_sequences),
            arrivals: 0,
        }
    }

    /// Queues a sequence, last. `None`: all slots are taken, and the sequence is gone.
    pub fn add(&mut self, mut sequence: Sequence) -> Option<SlotId> {
        let slot = self.free_slots.pop()?;
        sequence.arrival = self.arrivals;
        self.arrivals += 1;
        self.slots[slot.index()] = Some(sequence);
        self.waiting.push_back(slot);
        Some(slot)
    }

    /// Takes a sequence out, finished or not; its pages are free at once.
    pub fn remove(&mut self, slot: SlotId) -> Option<Sequence> {
        let mut sequence = self.slots[slot.index()].take()?;
        self.running.retain(|&other| other != slot);
        self.waiting.retain(|&other| other != slot);
        self.free_slots.push(slot);
        sequence.table.release(&mut self.pool);
        Some(sequence)
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

    /// Whether there is nothing to do.
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

    /// Decides what the next step computes: every sequence that decodes, then chunks of prompts, oldest first, then whoever
    /// waits and fits. The pages for it are reserved. The plan is empty only if there is nothing to do.
    pub fn plan(&mut self, plan: &mut StepPlan) {
        plan.clear();
        self.plan_running(Pass::Decodes, plan);
        self.plan_running(Pass::Prefills, plan);
        if plan.preempted() == 0 {
            self.plan_waiting(plan);
        }
        debug_assert!(plan.tokens() <= self.limits.max_num_batched_tokens);
        debug_assert!(!plan.entries().is_empty() || self.running.is_empty() && self.waiting.is_empty());
    }

    /// Takes note that a plan has been computed: pages that are full now can be found by others.
    pub fn commit(&mut self, plan: &StepPlan) {
        for entry in plan.entries() {
            let Some(sequence) = &mut self.slots[entry.slot.index()] else { continue };
            sequence.advance(entry.len);
            let full = sequence.num_computed / self.hasher.block_size();
            if full > sequence.hashes.len() {
                // The pages end where the computed tokens do, which may be one short of the tokens.
                let computed = full * self.hasher.block_size();
                let mut hashes = std::mem::take(&mut sequence.hashes);
                self.hasher.extend(&mut hashes, &sequence.tokens()[..computed]);
                sequence.hashes = hashes;
            }
            while sequence.table.published() < full {
                let hash = sequence.hashes[sequence.table.published()];
                sequence.table.publish_next(hash, &mut self.pool);
            }
        }
    }

    /// Appends a sampled token to a sequence whose every token is computed.
    pub fn push_token(&mut self, slot: SlotId, token: u32) {
        self.sequence_mut(slot).push_token(token);
    }

    /// Panics if a page is lost, or counted wrongly, or a queue is out of order.
    pub fn check_integrity(&mut self) {
        self.pool.check_integrity(self.slots.iter().flatten().map(|sequence| &sequence.table));
        let taken = self.slots.iter().flatten().count();
        assert_eq!(taken, self.running.len() + self.waiting.len(), "a sequence is in no queue");
        assert_eq!(taken + self.free_slots.len(), self.slots.len(), "a slot is lost");
        let in_order = self.running.iter().chain(&self.waiting).map(|&slot| self.sequence(slot).arrival);
        assert!(in_order.is_sorted_by(|a, b| a < b), "who came first is not served first");
        for &slot in &self.waiting {
            assert!(self.sequence(slot).table.is_empty(), "a waiting sequence holds pages");
        }
        for &slot in &self.running {
            let sequence = self.sequence(slot);
            assert_eq!(sequence.table.len(), self.pages_for(sequence.num_computed), "pages and tokens disagree");
        }
    }

    fn plan_running(&mut self, pass: Pass, plan: &mut StepPlan) {
        let mut at = 0;
        while at < self.running.len() && plan.tokens() < self.limits.max_num_batched_tokens {
            let slot = self.running[at];
            if (self.sequence(slot).remaining() == 1) == (pass == Pass::Decodes) {
                self.plan_one(at, pass, plan);
            }
            at += 1;
        }
    }

    /// Lets sequences in, in order, while there are places, tokens in the budget and pages for all of the prompt: were
    /// it let in with less, it would take what older prompts still need, and lose it again.
    fn plan_waiting(&mut self, plan: &mut StepPlan) {
        let mut reserved: usize = self.running.iter().map(|&slot| self.missing_pages(slot)).sum();
        while self.running.len() < self.limits.max_num_seqs && plan.tokens() < self.limits.max_num_batched_tokens {
            let Some(&slot) = self.waiting.front() else { return };
            // One page beside for each running sequence: it may need it for its very next token.
            let spoken_for = reserved + self.running.len();
            let fits = |needed| spoken_for + needed <= self.pool.available();
            // Hits are looked up only if there is any room at all.
            let enters = fits(1) && fits(self.missing_pages(slot) - self.shared_hits(slot));
            if !enters && !self.running.is_empty() {
                return;
            }
            self.waiting.pop_front();
            self.running.push(slot);
            self.plan_one(self.running.len() - 1, Pass::Prefills, plan);
            reserved = self.running.iter().map(|&slot| self.missing_pages(slot)).sum();
        }
    }

    /// Plans the running sequence at `at`: as many tokens as the budget and the pages allow.
    fn plan_one(&mut self, at: usize, pass: Pass, plan: &mut StepPlan) {
        let slot = self.running[at];
        if pass == Pass::Prefills && self.take_hits(at) == Next::IsBeingComputed {
            return;
        }
        let budget = self.limits.max_num_batched_tokens - plan.tokens();
        let wanted = self.sequence(slot).remaining().min(budget);
        let len = self.reserve(at, wanted, plan);
        if len == 0 {
            return;
        }
        let sequence = self.sequence(slot);
        let start = sequence.num_computed;
        plan.push(PlanEntry {
            slot,
            start,
            len,
            logits_from: sequence.logits_from(start).min(start + len) - start,
            first: !sequence.started,
            decode: pass == Pass::Decodes,
        });
    }

    /// Gives the sequence at `at` every next page that is in the index already, and says whether the one after is on its way.
    fn take_hits(&mut self, at: usize) -> Next {
        let slot = self.running[at];
        let block_size = self.hasher.block_size();
        loop {
            let sequence = self.slots[slot.index()].as_mut().expect("a running sequence has its slot");
            let page = sequence.num_computed / block_size;
            let aligned = sequence.num_computed.is_multiple_of(block_size);
            if !aligned || (page + 1) * block_size > sequence.cacheable_tokens() {
                return Next::IsOurs;
            }
            let Some(&hash) = sequence.hashes.get(page) else { return Next::IsOurs };
            if let Some(hit) = self.pool.find(hash) {
                sequence.table.push_shared(hit);
                sequence.num_computed += block_size;
                continue;
            }
            // Asked anew in every step, so nothing is left behind when the other one is cancelled or preempted. Only
            // older sequences are waited for, so the waiting has an end: the oldest waits for none.
            let promised = self.running[..at].iter().any(|&other| {
                let other = self.sequence(other);
                other.hashes.get(page) == Some(&hash) && other.num_computed < (page + 1) * block_size
            });
            return if promised { Next::IsBeingComputed } else { Next::IsOurs };
        }
    }

    /// Reserves pages for the next `wanted` tokens of the sequence at `at`, from those that arrived after it if need be.
    /// Returns for how many there are pages.
    fn reserve(&mut self, at: usize, wanted: usize, plan: &mut StepPlan) -> usize {
        let slot = self.running[at];
        let block_size = self.hasher.block_size();
        loop {
            let sequence = self.slots[slot.index()].as_mut().expect("a running sequence has its slot");
            let covered = sequence.table.len() * block_size - sequence.num_computed;
            if covered >= wanted {
                return wanted;
            }
            if let Some(page) = self.pool.allocate() {
                sequence.table.push(page);
            } else if at + 1 < self.running.len() {
                self.preempt_youngest(plan);
            } else {
                return covered;
            }
        }
    }

    fn preempt_youngest(&mut self, plan: &mut StepPlan) {
        let Some(slot) = self.running.pop() else { return };
        plan.preempt(slot);
        let sequence = self.slots[slot.index()].as_mut().expect("a running sequence has its slot");
        sequence.table.release(&mut self.pool);
        sequence.restart();
        // It is younger than all that run and older than all that wait.
        self.waiting.push_front(slot);
    }

    /// Pages a sequence still needs for the tokens it has.
    fn missing_pages(&self, slot: SlotId) -> usize {
        let sequence = self.sequence(slot);
        self.pages_for(sequence.tokens().len()) - sequence.table.len()
    }

    /// Pages of a waiting sequence that others use anyway.
    fn shared_hits(&self, slot: SlotId) -> usize {
        let sequence = self.sequence(slot);
        let usable = sequence.cacheable_tokens() / self.hasher.block_size();
        sequence.hashes.iter().take(usable).take_while(|&&hash| self.pool.is_in_use(hash)).count()
    }

    fn pages_for(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.hasher.block_size())
    }

    fn sequence_mut(&mut self, slot: SlotId) -> &mut Sequence {
        self.slots[slot.index()].as_mut().expect("a slot in a plan or queue is taken")
    }
}

/// The next page of a prefill.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// An older sequence is computing the same page: wait for it.
    IsBeingComputed,
    /// Nobody else is.
    IsOurs,
}
