//! The scheduler against a model of the KV cache, under random arrivals, lengths, cancellations and too few pages.

use proptest::prelude::*;

use super::{Scheduler, SchedulerLimits, Sequence, SlotId, StepPlan};
use crate::cache::PageHasher;

/// What a cell of the simulated cache holds once the token that `tokens` end with is computed there: a digest of all of them, as keys
/// and values depend on all of them.
fn digest(before: u64, token: u32) -> u64 {
    (before ^ u64::from(token)).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23)
}

#[derive(Debug, Clone)]
struct Arrival {
    /// Prompts of a family start alike.
    family: u32,
    common: usize,
    own: usize,
    max_tokens: usize,
    score: bool,
}

#[derive(Debug, Clone)]
enum Action {
    Arrive(Arrival),
    Step,
    Cancel(prop::sample::Index),
}

#[derive(Debug, Clone, Copy)]
struct Shape {
    block_size: usize,
    spare_pages: usize,
    max_num_seqs: usize,
    spare_tokens: usize,
}

/// A sequence somebody waits for.
struct Live {
    slot: SlotId,
    number: usize,
    max_tokens: usize,
    score: bool,
    /// Prompt positions whose logits came, which must be each once and in order.
    scored: usize,
}

struct Simulation {
    scheduler: Scheduler,
    limits: SchedulerLimits,
    block_size: usize,
    cache: Vec<u64>,
    plan: StepPlan,
    /// In order of arrival.
    live: Vec<Live>,
    arrivals: usize,
    steps: usize,
    computed: usize,
}

const MAX_LEN: usize = 64;

impl Simulation {
    fn new(shape: Shape) -> Self {
        let Shape { block_size, spare_pages, max_num_seqs, spare_tokens } = shape;
        let pages = MAX_LEN.div_ceil(block_size) + spare_pages;
        let limits =
            SchedulerLimits { max_num_seqs, max_num_batched_tokens: max_num_seqs + spare_tokens, max_sequences: 64 };
        Self {
            scheduler: Scheduler::new(limits, PageHasher::new(b"test", block_size), pages),
            limits,
            block_size,
            cache: vec![0; pages * block_size],
            plan: StepPlan::with_capacity(max_num_seqs),
            live: Vec::new(),
            arrivals: 0,
            steps: 0,
            computed: 0,
        }
    }

    fn arrive(&mut self, arrival: &Arrival) {
        let Arrival { family, common, own, max_tokens, score } = *arrival;
        let number = self.arrivals;
        self.arrivals += 1;
        let common = (0..common as u32).map(|i| family * 1000 + i);
        let own = (0..own as u32).map(|i| 100_000 + number as u32 * 1000 + i);
        let prompt: Vec<u32> = common.chain(own).collect();
        let sequence = Sequence::new(&prompt, max_tokens, score, &PageHasher::new(b"test", self.block_size));
        if let Some(slot) = self.scheduler.add(sequence) {
            self.live.push(Live { slot, number, max_tokens, score, scored: 1 });
        }
    }

    fn cancel(&mut self, index: prop::sample::Index) {
        if !self.live.is_empty() {
            let live = self.live.remove(index.index(self.live.len()));
            self.scheduler.remove(live.slot);
            self.scheduler.check_integrity();
        }
    }

    fn step(&mut self) {
        self.scheduler.plan(&mut self.plan);
        self.check_plan();
        for at in 0..self.plan.entries().len() {
            self.compute(at);
        }
        self.scheduler.commit(&self.plan);
        for at in 0..self.plan.entries().len() {
            self.sample(at);
        }
        self.scheduler.check_integrity();
        self.steps += 1;
    }

    fn check_plan(&self) {
        let entries = self.plan.entries();
        let total: usize = entries.iter().map(|entry| entry.len).sum();
        assert_eq!(total, self.plan.tokens());
        assert!(total <= self.limits.max_num_batched_tokens, "the budget is exceeded");
        assert!(entries.len() <= self.scheduler.running() && self.scheduler.running() <= self.limits.max_num_seqs);
        let number = |slot| self.live.iter().find(|live| live.slot == slot).expect("only live sequences run").number;
        let order: Vec<_> = entries.iter().map(|entry| (!entry.decode, number(entry.slot))).collect();
        assert!(order.is_sorted_by(|a, b| a < b), "decodes first, then prefills, oldest first: {order:?}");
        if let Some(oldest) = self.live.first() {
            assert!(entries.iter().any(|entry| entry.slot == oldest.slot), "the oldest does not progress");
        }
    }

    /// Writes the entry's tokens to its pages, after checking that everything before them is there.
    fn compute(&mut self, at: usize) {
        let entry = self.plan.entries()[at];
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

    fn sample(&mut self, at: usize) {
        let entry = self.plan.entries()[at];
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
        if end < sequence.tokens().len() {
            return;
        }
        assert!(entry.logits_from < entry.len, "the last token's logits are wanted");
        assert!(!live.score || live.scored == prompt_len, "a prompt position was not scored");
        let token = sequence.tokens().iter().fold(0, |state, &token| digest(state, token)) as u32 % 1000;
        if sequence.output().len() < live.max_tokens {
            self.scheduler.push_token(entry.slot, token);
        }
        if self.scheduler.sequence(entry.slot).output().len() == live.max_tokens {
            self.scheduler.remove(entry.slot);
            self.live.remove(index);
        }
    }

    /// Steps until nobody is left; the oldest progresses in each, which bounds how long that takes.
    fn finish(&mut self) {
        let bound = self.steps + self.live.len() * MAX_LEN;
        while !self.live.is_empty() {
            self.step();
            assert!(self.steps <= bound, "sequences do not finish");
        }
        assert!(self.scheduler.is_empty());
        assert_eq!(self.scheduler.pages().owned, 0, "pages are left behind");
    }
}

fn arrival() -> impl Strategy<Value = Arrival> {
    (0..3u32, 0..40usize, 1..12usize, 1..12usize, prop::bool::weighted(0.15)).prop_map(
        |(family, common, own, max_tokens, score)| {
            // A fifth of the prompts are common from end to end.
            let own = if own > 9 && common > 0 { 0 } else { own };
            Arrival { family, common, own, max_tokens, score }
        },
    )
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        3 => arrival().prop_map(Action::Arrive),
        4 => Just(Action::Step),
        1 => any::<prop::sample::Index>().prop_map(Action::Cancel),
    ]
}

fn shape() -> impl Strategy<Value = Shape> {
    (1..9usize, 0..20usize, 1..9usize, 0..40usize).prop_map(|(block_size, spare_pages, max_num_seqs, spare_tokens)| {
        Shape { block_size, spare_pages, max_num_seqs, spare_tokens }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn everybody_finishes_and_nobody_reads_anothers_pages(
        shape in shape(),
        actions in prop::collection::vec(action(), 1..80),
    ) {
        let mut simulation = Simulation::new(shape);
        for action in &actions {
            match action {
                Action::Arrive(arrival) => simulation.arrive(arrival),
                Action::Step => simulation.step(),
                Action::Cancel(index) => simulation.cancel(*index),
            }
        }
        simulation.finish();
    }

    #[test]
    fn with_pages_for_all_a_common_prompt_is_computed_once(
        block_size in 1..9usize,
        spare_tokens in 0..40usize,
        common in 1..40usize,
        copies in 2..8usize,
    ) {
        let shape = Shape { block_size, spare_pages: 8 * MAX_LEN, max_num_seqs: 8, spare_tokens };
        let mut simulation = Simulation::new(shape);
        let arrival = Arrival { family: 0, common, own: 0, max_tokens: 1, score: false };
        (0..copies).for_each(|_| simulation.arrive(&arrival));
        simulation.finish();
        let shared = (common - 1) / block_size * block_size;
        prop_assert_eq!(simulation.computed, common + (copies - 1) * (common - shared));
    }
}
