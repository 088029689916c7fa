mod loans;

use super::*;
use crate::cache::{PageHasher, Salt};

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
        Self { scheduler: Scheduler::new(limits, BLOCK, pages), hasher, plan: StepPlan::with_capacity(max_num_seqs) }
    }

    fn add(&mut self, prompt: impl IntoIterator<Item = u32>) -> SlotId {
        self.add_salted(prompt, None)
    }

    fn add_salted(&mut self, prompt: impl IntoIterator<Item = u32>, salt: Option<Salt>) -> SlotId {
        let prompt: Vec<u32> = prompt.into_iter().collect();
        self.scheduler.add(Sequence::new(&prompt, 100, false, &self.hasher.salted(salt))).unwrap()
    }

    /// Plans a step and returns who takes part, from where, with how many tokens.
    fn plan(&mut self) -> Vec<(SlotId, usize, usize)> {
        self.scheduler.plan(&mut self.plan, &mut AllLocal);
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
fn decodes_come_first_and_equal_prompts_in_order_of_arrival() {
    let mut fixture = Fixture::new(4, 10, 100);
    let a = fixture.add(0..3);
    assert_eq!(fixture.step(), [(a, 0, 3)]);
    let b = fixture.add(100..115);
    let c = fixture.add(200..215);
    assert_eq!(fixture.step(), [(a, 3, 1), (b, 0, 9)]);
    assert_eq!(fixture.plan.decodes(), 1);
    assert_eq!(fixture.step(), [(a, 4, 1), (b, 9, 6), (c, 0, 3)]);
    assert_eq!(fixture.step(), [(a, 5, 1), (b, 15, 1), (c, 3, 8)]);
    assert_eq!(fixture.step(), [(a, 6, 1), (b, 16, 1), (c, 11, 4)]);
    assert_eq!(fixture.step(), [(a, 7, 1), (b, 17, 1), (c, 15, 1)]);
    assert_eq!(fixture.plan.decodes(), 3);
}

#[test]
fn half_of_a_step_goes_to_those_with_the_least_left_and_what_they_leave_to_the_oldest() {
    let mut fixture = Fixture::new(4, 16, 100);
    let long = fixture.add(0..100);
    let middle = fixture.add(100..150);
    assert_eq!(fixture.step(), [(middle, 0, 8), (long, 0, 8)]);
    let short = fixture.add(200..205);
    assert_eq!(fixture.step(), [(short, 0, 5), (middle, 8, 3), (long, 8, 8)]);
    fixture.scheduler.remove(middle);
    assert_eq!(fixture.step(), [(short, 5, 1), (long, 16, 15)]);
}

#[test]
fn what_is_left_of_a_prompt_is_what_was_not_found() {
    let mut fixture = Fixture::new(4, 8, 100);
    let first = fixture.add(0..41);
    while fixture.scheduler.sequence(first).output().is_empty() {
        fixture.step();
    }
    fixture.scheduler.remove(first);
    let long = fixture.add(100..130);
    let found = fixture.add((0..40).chain([77]));
    assert_eq!(fixture.step(), [(found, 40, 1), (long, 0, 7)]);
}

#[test]
fn a_page_is_not_waited_for_from_one_that_waits_itself() {
    let mut fixture = Fixture::new(4, 8, 100);
    let long = fixture.add(0..30);
    let longer = fixture.add(100..200);
    let short = fixture.add((100..104).chain([77, 78]));
    assert_eq!(fixture.step(), [(short, 0, 4), (long, 0, 4)]);
    assert_eq!(fixture.step(), [(short, 4, 2), (long, 4, 6)]);
    fixture.scheduler.remove(long);
    fixture.scheduler.remove(short);
    assert_eq!(fixture.step(), [(longer, 4, 8)]);
}

#[test]
fn pages_for_one_step_come_in_ascending_order_whoever_had_them_before() {
    let mut fixture = Fixture::new(4, 100, 9);
    for prompt in 0..3 {
        let slot = fixture.add(100 * prompt..100 * prompt + 32);
        fixture.step();
        let pages = fixture.scheduler.sequence(slot).block_table();
        assert!(pages.len() == 8 && pages.is_sorted(), "{pages:?}");
        fixture.scheduler.remove(slot);
    }
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
fn pages_are_found_under_their_salt_alone_and_so_are_those_that_began_with_a_prompt_of_less_than_one() {
    let mut fixture = Fixture::new(4, 100, 100);
    let [tea, coffee] = ["tea", "coffee"].map(|words| Some(Salt::of(words)));
    let first = fixture.add_salted(0..3, tea);
    (0..2).for_each(|_| drop(fixture.step()));
    fixture.scheduler.remove(first);
    assert_eq!(fixture.scheduler.pages().cached, 1);
    let longer = [0, 1, 2, 9999, 77];
    let others = [fixture.add(longer), fixture.add_salted(longer, coffee)];
    assert_eq!(fixture.step(), others.map(|other| (other, 0, 5)));
    let same = fixture.add_salted(longer, tea);
    assert_eq!(fixture.step(), [(others[0], 5, 1), (others[1], 5, 1), (same, 4, 1)]);
}

#[test]
fn a_page_of_another_salt_is_not_waited_for() {
    let mut fixture = Fixture::new(4, 20, 100);
    let a = fixture.add(0..13);
    let b = fixture.add_salted((0..12).chain([77, 78]), Some(Salt::of("tea")));
    assert_eq!(fixture.step(), [(a, 0, 13), (b, 0, 7)]);
}

#[test]
fn without_hashes_nothing_is_found_or_kept_and_who_gave_its_pages_starts_again() {
    let mut fixture = Fixture::new(4, 100, 5);
    fixture.hasher = PageHasher::without_hashes(BLOCK);
    let a = fixture.add(0..7);
    let b = fixture.add(0..6);
    assert_eq!(fixture.step(), [(b, 0, 6), (a, 0, 7)]);
    // Until `a` needs a page and there is none.
    while fixture.plan.preempted() == 0 {
        fixture.step();
    }
    assert_eq!((fixture.scheduler.pages().owned, fixture.scheduler.pages().cached), (4, 0));
    fixture.scheduler.remove(a);
    let tokens = fixture.scheduler.sequence(b).tokens().len();
    assert_eq!(fixture.step(), [(b, 0, tokens)]);
    assert_eq!(fixture.scheduler.sequence(b).cached_tokens(), 0);
    fixture.scheduler.remove(b);
    assert_eq!(fixture.scheduler.pages().free, 5);
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
    assert_eq!(fixture.step(), [(b, 0, 6), (a, 0, 7)]);
    fixture.add(200..215);
    // Two pages each and one kept in reserve: the third waits.
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
    assert_eq!((entries.len(), fixture.scheduler.waiting()), (1, 1));
}

#[test]
fn one_whose_last_token_is_on_its_way_gives_its_pages_and_loses_nothing() {
    let mut fixture = Fixture::new(4, 100, 3);
    let a = fixture.add(0..3);
    let prompt: Vec<u32> = (100..104).collect();
    let b = fixture.scheduler.add(Sequence::new(&prompt, 2, false, &fixture.hasher)).unwrap();
    assert_eq!(fixture.step(), [(a, 0, 3), (b, 0, 4)]);
    assert_eq!(fixture.plan(), [(a, 3, 1), (b, 4, 1)]);
    fixture.scheduler.commit(&fixture.plan);
    fixture.scheduler.push_token(a, 9999);
    fixture.scheduler.push_placeholder(b, 1);
    // `a` needs a second page, and `b` has two.
    assert_eq!(fixture.step(), [(a, 4, 1)]);
    assert_eq!((fixture.scheduler.waiting(), fixture.plan.preempted()), (1, 0));
}

#[test]
fn nor_does_it_need_a_page_for_that_token() {
    let mut fixture = Fixture::new(4, 100, 1);
    let ends = fixture.scheduler.add(Sequence::new(&[0, 1, 2], 2, false, &fixture.hasher)).unwrap();
    fixture.step();
    fixture.plan();
    fixture.scheduler.commit(&fixture.plan);
    fixture.scheduler.push_placeholder(ends, 0);
    assert!(!fixture.scheduler.is_short(u64::MAX));
}

#[test]
fn tokens_are_counted_of_those_that_wait_too() {
    let mut fixture = Fixture::new(1, 100, 100);
    fixture.add(0..5);
    let b = fixture.add(100..120);
    let c = fixture.add(200..230);
    assert_eq!(fixture.scheduler.tokens(), (55, 0));
    fixture.step();
    assert_eq!(fixture.scheduler.tokens(), (1 + 50, 5));
    fixture.scheduler.remove(b);
    assert_eq!(fixture.scheduler.tokens(), (1 + 30, 5));
    fixture.scheduler.remove(c);
    assert_eq!(fixture.scheduler.tokens(), (1, 5));
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

/// Computes everything here, and notes what it was asked.
#[derive(Default)]
struct Asked(Vec<Candidate>);

impl Router for Asked {
    fn is_open(&self) -> bool {
        true
    }

    fn route(&mut self, candidate: Candidate) -> Route {
        self.0.push(candidate);
        Route::Local
    }
}

#[test]
fn the_router_hears_what_is_computed_here_before_a_prompt_ends_the_oldest_too() {
    let mut fixture = Fixture::new(4, 16, 100);
    fixture.add(0..100);
    fixture.add(100..130);
    fixture.add(200..220);
    let mut asked = Asked::default();
    fixture.scheduler.plan(&mut fixture.plan, &mut asked);
    let heard: Vec<_> = asked.0.iter().map(|candidate| (candidate.tokens, candidate.queued)).collect();
    assert_eq!(heard, [(100, 50), (20, 20), (30, 70)]);
}

#[test]
fn alone_a_prompt_gets_the_chunk_it_is_given_for_that() {
    let mut fixture = Fixture::new(4, 20, 100);
    fixture.scheduler.cut_chunks_alone(6);
    let a = fixture.add(0..10);
    assert_eq!(fixture.step(), [(a, 0, 6)]);
    assert_eq!(fixture.step(), [(a, 6, 4)]);
    let b = fixture.add(100..140);
    assert_eq!(fixture.step(), [(a, 10, 1), (b, 0, 19)]);
}

#[test]
fn beside_decodes_a_prompt_gets_the_chunk_it_is_given_and_alone_all_of_the_step() {
    let mut fixture = Fixture::new(4, 20, 100);
    fixture.scheduler.cut_chunks_beside_decodes(6);
    let a = fixture.add(0..23);
    assert_eq!(fixture.step(), [(a, 0, 20)]);
    assert_eq!(fixture.step(), [(a, 20, 3)]);
    let (b, c) = (fixture.add(100..120), fixture.add(200..220));
    assert_eq!(fixture.step(), [(a, 23, 1), (b, 0, 6)]);
    assert_eq!(fixture.step(), [(a, 24, 1), (b, 6, 6)]);
    fixture.scheduler.cut_chunks_beside_decodes(12);
    assert_eq!(fixture.step(), [(a, 25, 1), (b, 12, 8), (c, 0, 4)]);
    fixture.scheduler.remove(a);
    fixture.scheduler.remove(b);
    assert_eq!(fixture.step(), [(c, 4, 16)]);
}

#[test]
fn those_let_in_together_share_what_is_found() {
    let mut fixture = Fixture::new(4, 100, 13);
    let first = fixture.add(0..33);
    fixture.step();
    // Eight pages of eleven are shared: each of these lacks one, and has one beside for its next token.
    let (a, b) = (fixture.add((0..32).chain([77])), fixture.add((0..32).chain([78])));
    assert_eq!(fixture.step(), [(first, 33, 1), (a, 32, 1), (b, 32, 1)]);
}
