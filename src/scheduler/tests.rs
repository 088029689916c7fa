use super::*;
use crate::cache::PageHasher;

const BLOCK: usize = 4;

struct Fixture {
    scheduler: Scheduler,
    hasher: PageHasher,
    plan: StepPlan,
}

impl Fixture {
    fn new(max_num_seqs: usize, max_num_batched_tokens: usize, pages: usize) -> Self {
        let limits = SchedulerLimits { max_num_seqs, max_num_batched_tokens, max_sequences: 16 };
        let hasher = PageHasher::new(b"", BLOCK);
        Self { scheduler: Scheduler::new(limits, hasher, pages), hasher, plan: StepPlan::with_capacity(max_num_seqs) }
    }

    fn add(&mut self, prompt: impl IntoIterator<Item = u32>) -> SlotId {
        let prompt: Vec<u32> = prompt.into_iter().collect();
        self.scheduler.add(Sequence::new(&prompt, 100, false, &self.hasher)).unwrap()
    }

    /// Plans a step and returns who takes part, from where, with how many tokens.
    fn plan(&mut self) -> Vec<(SlotId, usize, usize)> {
        self.scheduler.plan(&mut self.plan);
        self.plan.entries().iter().map(|entry| (entry.slot, entry.start, entry.len)).collect()
    }

    /// Ends the planned step; whoever is fully computed gets a token.
    fn commit(&mut self) {
        self.scheduler.commit(&self.plan);
        for entry in self.plan.entries() {
            if self.scheduler.sequence(entry.slot).remaining() == 0 {
                self.scheduler.push_token(entry.slot, 9999);
            }
        }
        self.scheduler.check_integrity();
    }

    fn step(&mut self) -> Vec<(SlotId, usize, usize)> {
        let entries = self.plan();
        self.commit();
        entries
    }
}

#[test]
fn decodes_come_first_and_chunks_share_the_rest_oldest_first() {
    let mut fixture = Fixture::new(4, 10, 100);
    let a = fixture.add(0..3);
    assert_eq!(fixture.step(), [(a, 0, 3)]);
    let b = fixture.add(100..115);
    let c = fixture.add(200..205);
    assert_eq!(fixture.step(), [(a, 3, 1), (b, 0, 9)]);
    assert_eq!(fixture.plan.kind(), crate::telemetry::StepKind::Mixed);
    assert_eq!(fixture.step(), [(a, 4, 1), (b, 9, 6), (c, 0, 3)]);
    assert_eq!(fixture.step(), [(a, 5, 1), (b, 15, 1), (c, 3, 2)]);
    assert_eq!(fixture.step(), [(a, 6, 1), (b, 16, 1), (c, 5, 1)]);
    assert_eq!(fixture.plan.kind(), crate::telemetry::StepKind::Decode);
}

#[test]
fn a_full_prefix_hit_leaves_the_last_prompt_token() {
    let mut fixture = Fixture::new(4, 100, 100);
    let a = fixture.add(0..9);
    fixture.step();
    fixture.scheduler.remove(a);
    let b = fixture.add(0..9);
    assert_eq!(fixture.step(), [(b, 8, 1)]);
    assert!(fixture.plan.entries()[0].first);
    fixture.scheduler.remove(b);
    // The last page is full here, and still one token of it has to be computed: all of the page is.
    let c = fixture.add(0..8);
    assert_eq!(fixture.step(), [(c, 4, 4)]);
}

#[test]
fn a_prompt_to_score_takes_no_hits() {
    let mut fixture = Fixture::new(4, 100, 100);
    let a = fixture.add(0..9);
    fixture.step();
    fixture.scheduler.remove(a);
    let prompt: Vec<u32> = (0..9).collect();
    let b = fixture.scheduler.add(Sequence::new(&prompt, 1, true, &fixture.hasher)).unwrap();
    assert_eq!(fixture.step(), [(b, 0, 9)]);
    assert_eq!(fixture.plan.entries()[0].logits_from, 0);
}

#[test]
fn a_page_that_an_older_prompt_computes_is_waited_for() {
    let mut fixture = Fixture::new(4, 8, 100);
    let a = fixture.add(0..13);
    let b = fixture.add((0..12).chain([77, 78]));
    assert_eq!(fixture.step(), [(a, 0, 8)]);
    assert_eq!(fixture.step(), [(a, 8, 5)]);
    assert_eq!(fixture.step(), [(a, 13, 1), (b, 12, 2)]);
}

#[test]
fn waiting_for_a_page_ends_when_the_other_is_cancelled() {
    let mut fixture = Fixture::new(4, 8, 100);
    let a = fixture.add(0..30);
    let b = fixture.add(0..30);
    assert_eq!(fixture.step(), [(a, 0, 8)]);
    assert_eq!(fixture.step(), [(a, 8, 8)]);
    fixture.scheduler.remove(a);
    assert_eq!(fixture.step(), [(b, 16, 8)]);
}

#[test]
fn the_youngest_gives_its_pages_and_returns_before_later_arrivals() {
    let mut fixture = Fixture::new(4, 100, 5);
    let a = fixture.add(0..7);
    let b = fixture.add(100..106);
    assert_eq!(fixture.step(), [(a, 0, 7), (b, 0, 6)]);
    let c = fixture.add(200..203);
    // Two pages each and one kept in reserve: `c` waits.
    for step in 0..2 {
        assert_eq!(fixture.step(), [(a, 7 + step, 1), (b, 6 + step, 1)]);
    }
    // `a` took the last page; `b` needs its third now and nobody is younger, so it pauses.
    assert_eq!(fixture.step(), [(a, 9, 1)]);
    for step in 10..12 {
        assert_eq!(fixture.step(), [(a, step, 1)]);
    }
    // And `a` its fourth: `b` gives way.
    assert_eq!(fixture.step(), [(a, 12, 1)]);
    assert_eq!(fixture.plan.preempted(), 1);
    assert_eq!((fixture.scheduler.running(), fixture.scheduler.waiting()), (1, 2));
    fixture.scheduler.remove(a);
    // `b` comes back first, and its published page was evicted or is found again; either way its tokens are all there.
    let entries = fixture.step();
    assert_eq!(entries[0].0, b);
    assert_eq!(entries[0].1 + entries[0].2, 9);
    assert_eq!(entries[1], (c, 0, 3));
}

#[test]
fn a_prompt_is_let_in_when_there_are_pages_for_all_of_it() {
    let mut fixture = Fixture::new(4, 6, 8);
    let a = fixture.add(0..20);
    let b = fixture.add(100..112);
    assert_eq!(fixture.step(), [(a, 0, 6)]);
    // Five pages are `a`'s in the end; three do not hold `b` and a page in reserve.
    for start in [6, 12] {
        assert_eq!(fixture.step(), [(a, start, 6)]);
    }
    assert_eq!(fixture.step(), [(a, 18, 2)]);
    assert_eq!(fixture.scheduler.waiting(), 1);
    fixture.scheduler.remove(a);
    assert_eq!(fixture.step(), [(b, 0, 6)]);
}
