//! A scheduler under random arrivals, losses and loans, beside a cache that holds digests.

use proptest::prelude::*;

use super::super::{Candidate, Loan, PlanEntry, Route, Router, Scheduler, SchedulerLimits, Sequence, SlotId, StepPlan};
use crate::cache::{LentPage, PageHasher};

/// What a cell of the simulated cache holds once the token that `tokens` end with is computed there: a digest of all of
/// them, as keys and values depend on all of them.
fn digest(before: u64, token: u32) -> u64 {
    (before ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23)
}

#[derive(Debug, Clone)]
pub(super) struct Arrival {
    /// Prompts of a family start alike.
    pub(super) family: u32,
    pub(super) common: usize,
    pub(super) own: usize,
    pub(super) max_tokens: usize,
    pub(super) score: bool,
}

/// How a loan ends.
#[derive(Debug, Clone, Copy)]
pub(super) enum End {
    Completed,
    NeverGranted,
    Failed,
    Lost,
}

#[derive(Debug, Clone)]
pub(super) enum Action {
    Arrive(Arrival),
    Step,
    Cancel(prop::sample::Index),
    EndLoan(prop::sample::Index, End),
    EndQuarantine(prop::sample::Index),
    Release(prop::sample::Index),
    CutChunks(usize),
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub(super) block_size: usize,
    pub(super) spare_pages: usize,
    pub(super) max_num_seqs: usize,
    pub(super) spare_tokens: usize,
    /// Prompts with more uncached tokens are computed by another worker.
    pub(super) threshold: Option<usize>,
    /// Whether this is the other worker.
    pub(super) prefill_only: bool,
    /// Whether a step is planned before it is known what the one before gave.
    pub(super) ahead: bool,
    /// Whether pages are kept for others.
    pub(super) keeps: bool,
}

impl Shape {
    fn lends(&self) -> bool {
        self.threshold.is_some()
    }
}

impl Router for Shape {
    fn is_open(&self) -> bool {
        self.lends()
    }

    fn route(&mut self, candidate: Candidate) -> Route {
        assert!(candidate.cached < candidate.tokens && candidate.cached.is_multiple_of(self.block_size));
        match self.threshold {
            Some(threshold) if candidate.tokens - candidate.cached > threshold && candidate.lost < 3 => Route::Remote,
            _ => Route::Local,
        }
    }
}

/// A sequence somebody waits for.
struct Live {
    slot: SlotId,
    max_tokens: usize,
    score: bool,
    /// Prompt positions whose logits came, which must be each once and in order.
    scored: usize,
}

pub(super) struct Simulation {
    scheduler: Scheduler,
    limits: SchedulerLimits,
    shape: Shape,
    block_size: usize,
    cache: Vec<u64>,
    plan: StepPlan,
    /// In order of arrival.
    live: Vec<Live>,
    loans: Vec<Loan>,
    quarantine: Vec<Box<[LentPage]>>,
    /// Prefill-only sequences whose pages are still being read.
    held: Vec<SlotId>,
    /// Entries of the step before, if it is not known yet what it gave.
    under_way: Vec<PlanEntry>,
    arrivals: usize,
    steps: usize,
    chunk: usize,
    pub(super) computed: usize,
}

pub(super) const MAX_LEN: usize = 64;

impl Simulation {
    pub(super) fn new(shape: Shape) -> Self {
        let Shape { block_size, spare_pages, max_num_seqs, spare_tokens, .. } = shape;
        let pages = MAX_LEN.div_ceil(block_size) + spare_pages;
        let limits =
            SchedulerLimits { max_num_seqs, max_num_batched_tokens: max_num_seqs + spare_tokens, max_sequences: 64 };
        Self {
            scheduler: Scheduler::new(limits, block_size, pages),
            limits,
            shape,
            block_size,
            cache: vec![0; pages * block_size],
            plan: StepPlan::with_capacity(max_num_seqs),
            live: Vec::new(),
            loans: Vec::new(),
            quarantine: Vec::new(),
            held: Vec::new(),
            under_way: Vec::new(),
            arrivals: 0,
            steps: 0,
            chunk: usize::MAX - MAX_LEN,
            computed: 0,
        }
    }

    pub(super) fn act(&mut self, action: &Action) {
        match action {
            Action::Arrive(arrival) => self.arrive(arrival),
            Action::Step => self.step(),
            Action::Cancel(index) => self.cancel(*index),
            Action::EndLoan(index, end) if !self.loans.is_empty() => self.end_loan(index.index(self.loans.len()), *end),
            Action::EndQuarantine(index) if !self.quarantine.is_empty() => {
                self.end_quarantine(index.index(self.quarantine.len()));
            }
            Action::Release(index) if !self.held.is_empty() => self.release(index.index(self.held.len())),
            Action::CutChunks(tokens) => {
                self.chunk = *tokens;
                self.scheduler.cut_chunks_beside_decodes(*tokens);
                self.scheduler.cut_chunks_alone(*tokens);
            }
            Action::EndLoan(..) | Action::EndQuarantine(..) | Action::Release(..) => {}
        }
        self.scheduler.check_integrity();
    }

    pub(super) fn arrive(&mut self, arrival: &Arrival) {
        let Arrival { family, common, own, max_tokens, score } = *arrival;
        let number = self.arrivals;
        self.arrivals += 1;
        let common = (0..common as u32).map(|i| family * 1000 + i);
        let own = (0..own as u32).map(|i| 100_000 + number as u32 * 1000 + i);
        let prompt: Vec<u32> = common.chain(own).collect();
        let hasher = match self.shape.keeps {
            true => PageHasher::new(b"test", self.block_size),
            false => PageHasher::without_hashes(self.block_size),
        };
        let sequence = match self.shape.prefill_only {
            true => Sequence::prefill_only(&prompt, &hasher),
            false => Sequence::new(&prompt, max_tokens, score, &hasher),
        };
        if let Some(slot) = self.scheduler.add(sequence) {
            self.live.push(Live { slot, max_tokens, score, scored: 1 });
        }
    }

    fn cancel(&mut self, index: prop::sample::Index) {
        if self.live.is_empty() {
            return;
        }
        let live = self.live.remove(index.index(self.live.len()));
        if self.shape.prefill_only {
            self.scheduler.hold(live.slot);
            self.held.push(live.slot);
            return;
        }
        self.scheduler.remove(live.slot);
        if let Some(at) = self.loans.iter().position(|loan| loan.slot == live.slot) {
            self.quarantine.push(self.loans.remove(at).pages);
        }
    }

    fn end_loan(&mut self, index: usize, end: End) {
        let Loan { slot, first, pages } = self.loans.remove(index);
        match end {
            End::Completed => {
                let tokens = self.scheduler.sequence(slot).tokens();
                let mut state = 0;
                for (position, &token) in tokens[..tokens.len() - 1].iter().enumerate() {
                    state = digest(state, token);
                    if position >= first {
                        let page = pages[(position - first) / self.block_size].number() as usize;
                        self.cache[page * self.block_size + position % self.block_size] = state;
                    }
                }
                self.scheduler.resume(slot, pages);
            }
            End::NeverGranted => self.scheduler.restart(slot, Some(pages), false),
            End::Failed => self.scheduler.restart(slot, Some(pages), true),
            End::Lost => {
                self.scheduler.restart(slot, None, true);
                self.quarantine.push(pages);
            }
        }
    }

    fn end_quarantine(&mut self, index: usize) {
        let pages = self.quarantine.remove(index);
        self.scheduler.free_lent(pages);
    }

    /// The reader of a prefill-only sequence's pages is done, and has read nothing but the sequence.
    fn release(&mut self, index: usize) {
        let slot = self.held.remove(index);
        let sequence = self.scheduler.sequence(slot);
        let mut state = 0;
        for (position, &token) in sequence.tokens()[..sequence.num_computed()].iter().enumerate() {
            state = digest(state, token);
            let page = sequence.block_table()[position / self.block_size] as usize;
            assert_eq!(self.cache[page * self.block_size + position % self.block_size], state, "a page was reused");
        }
        self.scheduler.remove(slot);
    }

    /// Other workers write what they like to the pages they have, wanted or not.
    fn scribble(&mut self) {
        let lent = self.loans.iter().map(|loan| &loan.pages).chain(&self.quarantine);
        for page in lent.flat_map(|pages| pages.iter()) {
            let start = page.number() as usize * self.block_size;
            self.cache[start..start + self.block_size].fill(u64::MAX);
        }
    }

    fn step(&mut self) {
        self.scheduler.plan(&mut self.plan, &mut self.shape);
        self.loans.append(&mut self.plan.loans);
        self.scribble();
        self.check_plan();
        std::mem::take(&mut self.under_way).into_iter().for_each(|entry| self.sample(entry));
        let entries = self.plan.entries().to_vec();
        for &entry in &entries {
            if self.scheduler.has(&entry) {
                self.compute(entry);
            }
        }
        self.scheduler.commit(&self.plan);
        for (row, entry) in entries.into_iter().enumerate() {
            if !self.shape.ahead || self.shape.prefill_only {
                self.sample(entry);
                continue;
            }
            let generates = |live: &Live| live.slot == entry.slot && live.max_tokens > 0;
            let generates = self.scheduler.has(&entry) && self.live.iter().any(generates);
            if generates && self.scheduler.sequence(entry.slot).is_computed() {
                self.scheduler.push_placeholder(entry.slot, row);
            }
            self.under_way.push(entry);
        }
        for &slot in &self.plan.found {
            self.live.retain(|live| live.slot != slot);
            self.held.push(slot);
        }
        self.scheduler.check_integrity();
        self.steps += 1;
    }

    fn check_plan(&self) {
        let entries = self.plan.entries();
        let total: usize = entries.iter().map(|entry| entry.len).sum();
        assert_eq!(total, self.plan.tokens());
        assert!(total <= self.limits.max_num_batched_tokens, "the budget is exceeded");
        let decodes = entries.iter().filter(|entry| entry.decode).count();
        assert!(total <= decodes + self.plan.preempted() + self.chunk, "a step is longer than it may be");
        assert!(entries.len() <= self.scheduler.running() && self.scheduler.running() <= self.limits.max_num_seqs);
        if self.shape.prefill_only {
            assert_eq!(self.plan.preempted(), 0, "pages that are being read were taken");
        }
        let left = |entry: &PlanEntry| self.scheduler.sequence(entry.slot).tokens().len() - entry.start;
        let order: Vec<_> = entries.iter().map(|entry| (!entry.decode, left(entry))).collect();
        assert!(order.is_sorted(), "decodes first, then those with the least left: {order:?}");
        if self.shape.lends() || !self.held.is_empty() {
            return;
        }
        if let Some(oldest) = self.live.first()
            && !self.plan.found.contains(&oldest.slot)
            && !self.scheduler.sequence(oldest.slot).awaits_outcome()
        {
            assert!(entries.iter().any(|entry| entry.slot == oldest.slot), "the oldest does not progress");
        }
    }

    /// Writes the entry's tokens to its pages, after checking that everything before them is there.
    fn compute(&mut self, entry: PlanEntry) {
        let sequence = self.scheduler.sequence(entry.slot);
        let end = entry.start + entry.len;
        let pages = sequence.block_table();
        assert!(entry.len > 0 && end <= sequence.tokens().len());
        assert!(pages.len() * self.block_size >= end, "no page for a planned token");
        assert!(sequence.table.published() * self.block_size <= entry.start, "a shared page would be written");
        let mut state = 0;
        for (position, &token) in sequence.tokens()[..end].iter().enumerate() {
            state = digest(state, token);
            let cell = &mut self.cache
                [pages[position / self.block_size] as usize * self.block_size + position % self.block_size];
            if position < entry.start {
                assert_eq!(*cell, state, "sequence at position {position} reads what is not its own");
            }
            *cell = state;
        }
        self.computed += entry.len;
    }

    fn sample(&mut self, entry: PlanEntry) {
        if !self.scheduler.has(&entry) {
            return;
        }
        if self.shape.prefill_only {
            assert_eq!(entry.logits_from, entry.len, "logits that nobody wants");
            if entry.start + entry.len == self.scheduler.sequence(entry.slot).tokens().len() {
                self.live.retain(|live| live.slot != entry.slot);
                self.held.push(entry.slot);
            }
            return;
        }
        let index = self.live.iter().position(|live| live.slot == entry.slot).unwrap();
        let live = &mut self.live[index];
        let sequence = self.scheduler.sequence(entry.slot);
        let (prompt_len, end) = (sequence.prompt().len(), entry.start + entry.len);
        for position in entry.start + entry.logits_from..end {
            if position + 1 < prompt_len {
                assert!(live.score, "logits that nobody wants");
                assert_eq!(position + 1, live.scored, "each prompt position is scored once, in order");
                live.scored += 1;
            }
        }
        let drawn = sequence.has_placeholder();
        let known = &sequence.tokens()[..sequence.tokens().len() - usize::from(drawn)];
        if end < known.len() {
            return;
        }
        assert!(entry.logits_from < entry.len, "the last token's logits are wanted");
        assert!(!live.score || live.scored == prompt_len, "a prompt position was not scored");
        let token = known.iter().fold(0, |state, &token| digest(state, token)) as u32 % 1000;
        if drawn {
            self.scheduler.reveal(entry.slot, token);
        } else if sequence.output().len() < live.max_tokens {
            self.scheduler.push_token(entry.slot, token);
        }
        if self.scheduler.sequence(entry.slot).output().len() == live.max_tokens {
            self.scheduler.remove(entry.slot);
            self.live.remove(index);
        }
    }

    /// Steps until nobody is left; once every loan and reader has ended the oldest progresses in each, which bounds how
    /// long that takes.
    pub(super) fn finish(&mut self) {
        let bound = self.steps + 2 * self.live.len() * MAX_LEN;
        while !self.live.is_empty() {
            (0..self.held.len()).for_each(|_| self.release(0));
            (0..self.loans.len()).for_each(|_| self.end_loan(0, End::Completed));
            (0..self.quarantine.len()).for_each(|_| self.end_quarantine(0));
            self.step();
            assert!(self.steps <= bound, "sequences do not finish");
        }
        (0..self.held.len()).for_each(|_| self.release(0));
        (0..self.quarantine.len()).for_each(|_| self.end_quarantine(0));
        assert!(self.scheduler.is_empty() && self.scheduler.away() == 0);
        let pages = self.scheduler.pages();
        assert_eq!((pages.owned, pages.lent, pages.quarantined), (0, 0, 0), "pages are left behind");
        assert!(self.shape.keeps || pages.cached == 0, "pages are kept");
        self.scheduler.check_integrity();
    }
}
