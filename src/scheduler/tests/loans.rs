//! Prompts that another worker computes, and those computed for another worker.

use super::*;
use crate::cache::LentPage;

/// Sends away whatever has more than so many uncached tokens.
struct Threshold(usize);

impl Router for Threshold {
    fn is_open(&self) -> bool {
        true
    }

    fn route(&mut self, candidate: Candidate) -> Route {
        if candidate.tokens - candidate.cached > self.0 { Route::Remote } else { Route::Local }
    }
}

impl Fixture {
    /// Plans a step with another worker for prompts of more than 8 tokens; returns who takes part and what is lent.
    fn step_with_worker(&mut self) -> (Vec<(SlotId, usize, usize)>, Vec<Loan>) {
        self.scheduler.plan(&mut self.plan, &mut Threshold(8));
        let loans = std::mem::take(&mut self.plan.loans);
        self.commit();
        (self.plan.entries().iter().map(|entry| (entry.slot, entry.start, entry.len)).collect(), loans)
    }
}

#[test]
fn a_long_prompt_leaves_and_comes_back_before_its_last_token_in_order_of_arrival() {
    let mut fixture = Fixture::new(4, 100, 100);
    let a = fixture.add(0..17);
    let b = fixture.add(100..105);
    let (entries, mut loans) = fixture.step_with_worker();
    assert_eq!(entries, [(b, 0, 5)]);
    let loan = loans.pop().unwrap();
    assert_eq!((loan.slot, loan.first, loan.pages.len()), (a, 0, 4));
    assert_eq!((fixture.scheduler.pages().lent, fixture.scheduler.away()), (4, 1));
    assert_eq!(fixture.step_with_worker().0, [(b, 5, 1)]);
    fixture.scheduler.resume(a, loan.pages);
    assert!(fixture.scheduler.sequence(a).is_from_afar());
    assert_eq!(fixture.step_with_worker().0, [(a, 16, 1), (b, 6, 1)]);
    // What another worker computed is found by others.
    let c = fixture.add(0..17);
    assert_eq!(fixture.step_with_worker().0, [(a, 17, 1), (b, 7, 1), (c, 16, 1)]);
}

#[test]
fn without_hashes_what_another_worker_computed_is_used_and_not_kept() {
    let mut fixture = Fixture::new(4, 100, 100);
    fixture.hasher = PageHasher::without_hashes(BLOCK);
    let a = fixture.add(0..17);
    let loan = fixture.step_with_worker().1.pop().unwrap();
    fixture.scheduler.resume(a, loan.pages);
    assert_eq!(fixture.step_with_worker().0, [(a, 16, 1)]);
    // One that begins alike is computed from its beginning.
    let b = fixture.add(0..8);
    assert_eq!(fixture.step_with_worker().0, [(a, 17, 1), (b, 0, 8)]);
    [a, b].into_iter().for_each(|slot| drop(fixture.scheduler.remove(slot)));
    assert_eq!(fixture.scheduler.pages().free, 100);
}

#[test]
fn without_hashes_what_is_computed_for_another_worker_is_kept_while_it_is_read_and_no_longer() {
    let mut fixture = Fixture::new(4, 100, 100);
    fixture.hasher = PageHasher::without_hashes(BLOCK);
    let prompt: Vec<u32> = (0..12).collect();
    for _ in 0..2 {
        let slot = fixture.scheduler.add(Sequence::prefill_only(&prompt, &fixture.hasher)).unwrap();
        assert_eq!(fixture.plan(), [(slot, 0, 12)]);
        fixture.scheduler.commit(&fixture.plan);
        fixture.scheduler.check_integrity();
        assert_eq!(fixture.scheduler.pages().owned, 3);
        fixture.scheduler.remove(slot);
        assert_eq!(fixture.scheduler.pages().free, 100);
    }
}

#[test]
fn only_what_was_not_found_is_lent() {
    let mut fixture = Fixture::new(4, 100, 100);
    let a = fixture.add(0..9);
    fixture.step();
    let b = fixture.add((0..8).chain(50..62));
    let (entries, mut loans) = fixture.step_with_worker();
    assert_eq!(entries, [(a, 9, 1)]);
    let loan = loans.pop().unwrap();
    assert_eq!((loan.slot, loan.first, loan.pages.len()), (b, 8, 3));
    fixture.scheduler.resume(b, loan.pages);
    assert_eq!(fixture.scheduler.sequence(b).cached_tokens(), 8);
    assert_eq!(fixture.step_with_worker().0, [(a, 10, 1), (b, 19, 1)]);
}

#[test]
fn lent_pages_come_in_ascending_order_whoever_had_them_before() {
    let mut fixture = Fixture::new(4, 100, 100);
    for _ in 0..3 {
        let slot = fixture.add(0..17);
        let loan = fixture.step_with_worker().1.pop().unwrap();
        assert!(loan.pages.iter().map(LentPage::number).eq(0..4), "{:?}", loan.pages);
        fixture.scheduler.remove(slot);
        fixture.scheduler.free_lent(loan.pages);
    }
}

#[test]
fn pages_lent_to_who_measures_come_in_ascending_order_whoever_had_them_before() {
    let mut fixture = Fixture::new(4, 100, 100);
    for _ in 0..3 {
        let pages = fixture.scheduler.lend_scratch(4);
        assert!(pages.iter().map(LentPage::number).eq(0..4), "{pages:?}");
        fixture.scheduler.free_lent(pages);
    }
}

#[test]
fn a_prompt_found_from_end_to_end_is_not_lent() {
    let mut fixture = Fixture::new(4, 100, 100);
    let a = fixture.add(0..33);
    fixture.step();
    fixture.scheduler.remove(a);
    let b = fixture.add(0..33);
    let (entries, loans) = fixture.step_with_worker();
    assert_eq!(entries, [(b, 32, 1)]);
    assert!(loans.is_empty());
}

#[test]
fn a_prompt_that_no_worker_finished_is_computed_here_and_its_pages_wait() {
    let mut fixture = Fixture::new(4, 100, 100);
    let a = fixture.add(0..17);
    let loan = fixture.step_with_worker().1.pop().unwrap();
    fixture.scheduler.restart(a, None, false);
    let pages = fixture.scheduler.pages();
    assert_eq!((pages.lent, pages.quarantined), (0, 4));
    assert_eq!(fixture.step_with_worker().0, [(a, 0, 17)]);
    fixture.scheduler.free_lent(loan.pages);
    assert_eq!(fixture.scheduler.pages().quarantined, 0);
    fixture.scheduler.check_integrity();
}

#[test]
fn a_prompt_that_a_worker_lost_goes_where_the_router_says_which_hears_of_it() {
    let mut fixture = Fixture::new(4, 100, 100);
    let a = fixture.add(0..17);
    for lost in 0..3 {
        let loan = fixture.step_with_worker().1.pop().unwrap();
        assert_eq!(fixture.scheduler.sequence(a).lost, lost);
        fixture.scheduler.restart(a, Some(loan.pages), true);
    }
    let loan = fixture.step_with_worker().1.pop().unwrap();
    fixture.scheduler.restart(a, Some(loan.pages), false);
    assert_eq!(fixture.step_with_worker().0, [(a, 0, 17)]);
}

#[test]
fn a_prompt_that_came_back_is_sent_away_again_however_full_the_step_is() {
    let mut fixture = Fixture::new(4, 4, 100);
    let a = fixture.add(0..3);
    fixture.step();
    let b = fixture.add(200..208);
    let c = fixture.add(100..117);
    let (entries, mut loans) = fixture.step_with_worker();
    assert_eq!(entries, [(a, 3, 1), (b, 0, 3)]);
    let loan = loans.pop().unwrap();
    assert_eq!(loan.slot, c);
    fixture.scheduler.restart(c, Some(loan.pages), true);
    let (entries, loans) = fixture.step_with_worker();
    assert_eq!(entries, [(a, 4, 1), (b, 3, 3)]);
    assert_eq!(loans[0].slot, c);
}

#[test]
fn equal_prompts_are_lent_once() {
    let mut fixture = Fixture::new(4, 100, 100);
    let slots = [(); 3].map(|()| fixture.add(0..17));
    let (entries, mut loans) = fixture.step_with_worker();
    assert!(entries.is_empty());
    assert_eq!(loans.len(), 1);
    fixture.scheduler.resume(slots[0], loans.pop().unwrap().pages);
    assert_eq!(fixture.step_with_worker().0, slots.map(|slot| (slot, 16, 1)));
}

#[test]
fn one_waits_for_half_of_its_pages_to_come_and_not_for_less() {
    for (common, loans) in [(8, 1), (4, 2)] {
        let mut fixture = Fixture::new(4, 100, 100);
        // Four pages each, but for the last token.
        fixture.add((0..common).chain(100..117 - common));
        fixture.add((0..common).chain(200..217 - common));
        assert_eq!(fixture.step_with_worker().1.len(), loans, "of the first {common} tokens");
    }
}

#[test]
fn a_short_prompt_does_not_wait_for_a_page_of_one_that_is_away() {
    let mut fixture = Fixture::new(4, 100, 100);
    let long = fixture.add((0..4).chain(100..117));
    let short = fixture.add((0..4).chain([77]));
    let (entries, mut loans) = fixture.step_with_worker();
    assert_eq!((loans[0].slot, entries), (long, vec![(short, 0, 5)]));
    // And what comes back has a page that is there already.
    fixture.scheduler.resume(long, loans.pop().unwrap().pages);
    assert_eq!(fixture.step_with_worker().0, [(long, 20, 1), (short, 5, 1)]);
}

#[test]
fn nor_for_one_that_waits_for_it() {
    let mut fixture = Fixture::new(4, 100, 100);
    let away = fixture.add(0..21);
    // It would be sent away as well, once it is known what it finds.
    fixture.add((0..16).chain(200..205));
    let short = fixture.add((0..4).chain([77]));
    let (entries, loans) = fixture.step_with_worker();
    assert_eq!((loans.len(), loans[0].slot, entries), (1, away, vec![(short, 0, 5)]));
}

#[test]
fn a_prompt_too_long_beside_pages_in_quarantine_keeps_nobody_out() {
    let mut fixture = Fixture::new(4, 100, 10);
    let lost = fixture.add(0..17);
    let loan = fixture.step_with_worker().1.pop().unwrap();
    fixture.scheduler.remove(lost);
    let long = fixture.add(100..130);
    let short = fixture.add(200..205);
    assert_eq!(fixture.step(), [(short, 0, 5)]);
    fixture.scheduler.remove(short);
    assert_eq!(fixture.step(), []);
    fixture.scheduler.free_lent(loan.pages);
    assert_eq!(fixture.step(), [(long, 0, 30)]);
}

#[test]
fn nor_does_one_that_came_back_without_its_pages() {
    let mut fixture = Fixture::new(4, 100, 10);
    let lost = fixture.add(0..25);
    let loan = fixture.step_with_worker().1.pop().unwrap();
    fixture.scheduler.restart(lost, None, true);
    let short = fixture.add(200..205);
    assert_eq!(fixture.step(), [(short, 0, 5)]);
    assert_eq!((fixture.scheduler.running(), fixture.scheduler.waiting()), (1, 1));
    fixture.scheduler.free_lent(loan.pages);
    assert_eq!(fixture.step(), [(short, 5, 1), (lost, 0, 25)]);
}

#[test]
fn pages_that_an_older_one_needs_are_not_lent() {
    let mut fixture = Fixture::new(4, 100, 10);
    let older = fixture.add(0..4);
    fixture.step();
    let lost = fixture.add(100..117);
    let _loan = fixture.step_with_worker().1.pop();
    fixture.scheduler.restart(lost, None, true);
    // Four pages are in quarantine, and were four more lent, nobody could take them back for the older one.
    for _ in 0..10 {
        let (entries, loans) = fixture.step_with_worker();
        assert!(loans.is_empty() && entries.iter().any(|entry| entry.0 == older));
    }
}

#[test]
fn pages_are_not_called_back_for_those_that_came_later() {
    let mut fixture = Fixture::new(4, 100, 9);
    fixture.add(0..4);
    let away = fixture.add(100..117);
    fixture.add(200..203);
    let _loan = fixture.step_with_worker().1.pop();
    for _ in 0..5 {
        fixture.step();
    }
    // The oldest has just got its third page, the youngest needs its third.
    assert_eq!((fixture.scheduler.pages().free, fixture.scheduler.pages().cached), (0, 0));
    assert!(fixture.scheduler.is_short(u64::MAX));
    assert!(!fixture.scheduler.is_short(fixture.scheduler.sequence(away).arrival()));
}

#[test]
fn one_whose_pages_are_called_back_may_leave_again_when_there_is_room() {
    let mut fixture = Fixture::new(4, 100, 10);
    let a = fixture.add(0..7);
    fixture.step();
    let b = fixture.add(100..117);
    let loan = fixture.step_with_worker().1.pop().unwrap();
    assert_eq!(loan.slot, b);
    fixture.scheduler.restart(b, Some(loan.pages), false);
    fixture.scheduler.stay_for_now(b);
    fixture.scheduler.check_integrity();
    assert_eq!((fixture.scheduler.running(), fixture.scheduler.waiting()), (1, 1));
    let (entries, loans) = fixture.step_with_worker();
    assert_eq!((entries, loans[0].slot), (vec![(a, 8, 1)], b));
}

#[test]
fn nor_is_it_in_the_queue_twice_if_there_are_too_few_pages_within_reach() {
    let mut fixture = Fixture::new(4, 100, 14);
    let a = fixture.add(0..13);
    let b = fixture.add(100..133);
    let loans = fixture.step_with_worker().1;
    let mut pages: Vec<_> = loans.into_iter().map(|loan| (loan.slot, loan.pages)).collect();
    let of_b = pages.remove(pages.iter().position(|(slot, _)| *slot == b).unwrap()).1;
    // The other one is lost twice: six pages of fourteen are in quarantine, and this one needs nine.
    fixture.scheduler.restart(a, None, true);
    pages.extend(fixture.step_with_worker().1.into_iter().map(|loan| (loan.slot, loan.pages)));
    fixture.scheduler.restart(a, None, false);
    assert_eq!(fixture.scheduler.pages().quarantined, 6);
    fixture.scheduler.restart(b, Some(of_b), false);
    fixture.scheduler.stay_for_now(b);
    fixture.scheduler.check_integrity();
    assert_eq!(fixture.step(), [(a, 0, 13)]);
    pages.into_iter().for_each(|(_, pages)| fixture.scheduler.free_lent(pages));
    assert_eq!(fixture.step_with_worker().1[0].slot, b);
}

#[test]
fn one_found_from_end_to_end_makes_room_for_the_next_at_once() {
    let mut fixture = Fixture::new(4, 100, 20);
    let prompt = |start: u32| -> Vec<u32> { (start..start + 32).collect() };
    let mut add = |tokens: &[u32]| fixture.scheduler.add(Sequence::prefill_only(tokens, &fixture.hasher)).unwrap();
    let slots = [add(&prompt(0)), add(&prompt(0)), add(&prompt(100))];
    assert_eq!(fixture.plan(), [(slots[0], 0, 32)]);
    fixture.scheduler.commit(&fixture.plan);
    assert_eq!(fixture.plan(), [(slots[2], 0, 32)]);
    assert_eq!(fixture.plan.found, [slots[1]]);
}

#[test]
fn whoever_measures_gets_no_page_that_a_prompt_still_needs() {
    let mut fixture = Fixture::new(4, 4, 32);
    fixture.add(0..100);
    fixture.step();
    // 24 are spoken for, and one for the token after.
    assert_eq!(fixture.scheduler.pages().free, 31);
    assert!(fixture.scheduler.lend_scratch(100).is_empty());
}

#[test]
fn one_that_leaves_while_away_leaves_its_pages_in_quarantine() {
    let mut fixture = Fixture::new(4, 100, 100);
    let a = fixture.add(0..17);
    let loan = fixture.step_with_worker().1.pop().unwrap();
    fixture.scheduler.remove(a);
    assert_eq!(fixture.scheduler.pages().quarantined, 4);
    fixture.scheduler.free_lent(loan.pages);
    assert_eq!(fixture.scheduler.pages().free, 100);
}

#[test]
fn one_computed_for_another_worker_keeps_its_pages_until_it_is_removed() {
    let mut fixture = Fixture::new(4, 8, 100);
    let prompt: Vec<u32> = (0..13).collect();
    let a = fixture.scheduler.add(Sequence::prefill_only(&prompt, &fixture.hasher)).unwrap();
    assert_eq!(fixture.plan(), [(a, 0, 8)]);
    assert_eq!(fixture.plan.entries()[0].logits_from, 8);
    fixture.scheduler.commit(&fixture.plan);
    assert_eq!(fixture.plan(), [(a, 8, 5)]);
    assert_eq!(fixture.plan.entries()[0].logits_from, 5);
    fixture.scheduler.commit(&fixture.plan);
    assert!(fixture.plan().is_empty() && fixture.scheduler.is_empty());
    assert_eq!(fixture.scheduler.pages().owned, 4);
    fixture.scheduler.remove(a);
    assert_eq!((fixture.scheduler.pages().owned, fixture.scheduler.pages().cached), (0, 3));
    // All of the pages are found again: there is nothing to compute.
    let again = fixture.scheduler.add(Sequence::prefill_only(&prompt[..12], &fixture.hasher)).unwrap();
    assert!(fixture.plan().is_empty());
    assert_eq!(fixture.plan.found, [again]);
    fixture.scheduler.remove(again);
    fixture.scheduler.check_integrity();
}
