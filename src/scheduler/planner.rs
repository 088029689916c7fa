//! Planning: who takes part in the next step, and with how many tokens.

use super::{Candidate, PlanEntry, Route, Router, Scheduler, SlotId, StepPlan, sequence::Place};
use crate::cache::PageCounts;

/// Which part of a step is being planned.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Pass {
    Decodes,
    Prefills,
}

impl Scheduler {
    /// Decides what the next step computes: every sequence that decodes, then chunks of prompts, oldest first, then
    /// whoever waits and fits. The pages for it are reserved. `router` is asked about each prompt of which nothing is
    /// computed yet, and those it sends elsewhere leave in [`StepPlan::loans`]. The plan has no entries only if there
    /// is nothing to do before a page, a sequence or a reader of pages comes back.
    pub fn plan(&mut self, plan: &mut StepPlan, router: &mut dyn Router) {
        plan.clear();
        self.budget = self.limits.max_num_batched_tokens;
        self.plan_running(Pass::Decodes, plan, router);
        if plan.tokens() > 0 {
            self.budget = self.budget.min(plan.tokens().saturating_add(self.chunk_beside_decodes));
        }
        self.plan_running(Pass::Prefills, plan, router);
        self.plan_waiting(plan, router);
        debug_assert!(plan.tokens() <= self.limits.max_num_batched_tokens);
        debug_assert!(
            !plan.entries().is_empty() || self.is_empty() || self.is_held_up(),
            "nothing is computed, though it could be"
        );
    }

    /// Whether pages, sequences or what steps gave are elsewhere, and somebody here may be waiting for them.
    fn is_held_up(&self) -> bool {
        let PageCounts { lent, quarantined, .. } = self.pages();
        let awaits_outcome = |&slot: &SlotId| self.sequence(slot).awaits_outcome();
        let elsewhere = lent + quarantined > 0 || !self.away.is_empty() || !self.held.is_empty();
        elsewhere || self.running.iter().any(awaits_outcome)
    }

    fn plan_running(&mut self, pass: Pass, plan: &mut StepPlan, router: &mut dyn Router) {
        let mut at = 0;
        while at < self.running.len() {
            let slot = self.running[at];
            let sequence = self.sequence(slot);
            // One that may go to another worker needs no budget for it; if it stays, it gets its prefix hits and no more.
            let may_leave = sequence.place == Place::Undecided && router.is_open();
            let takes_part = (plan.tokens() < self.budget || may_leave) && !sequence.awaits_outcome();
            if takes_part && sequence.decodes() == (pass == Pass::Decodes) {
                self.plan_one(at, pass, plan, router);
            }
            // Whoever left has made room for the next one here.
            at += usize::from(self.running.get(at) == Some(&slot));
        }
    }

    /// Lets sequences in while there are places, tokens in the budget and pages for all of the prompt: were one let in
    /// with less, it would take what older prompts still need, and lose it again. They come in order, but for those too
    /// long for the pages beside those in quarantine. A prompt that another worker computes needs no budget.
    fn plan_waiting(&mut self, plan: &mut StepPlan, router: &mut dyn Router) {
        while self.running.len() + self.away.len() < self.limits.max_num_seqs && plan.preempted() == 0 {
            let in_budget = plan.tokens() < self.budget;
            let Some(first) = self.first_that_could_enter() else { return };
            let slot = self.waiting[first];
            // One that was preempted while its last token was on its way is let in when it is known, at the next plan.
            debug_assert!(!self.sequence(slot).is_drawn_ahead() && !self.sequence(slot).awaits_outcome());
            if !in_budget && !router.is_open() || !self.enters(slot) {
                return;
            }
            self.waiting.remove(first);
            self.running.push(slot);
            let at = self.settle_in(slot);
            self.plan_one(at, Pass::Prefills, plan, router);
            if !in_budget && self.running.get(at) == Some(&slot) {
                // It stays here, and there is no budget: it waits on.
                self.running.remove(at);
                self.wait_again(slot);
                return;
            }
        }
    }

    /// The first who waits and is not too long for the pages there are when all that runs is gone. Those in quarantine
    /// are not among them: how long they stay there is up to somebody else.
    fn first_that_could_enter(&self) -> Option<usize> {
        let PageCounts { free, cached, owned, lent, quarantined } = self.pages();
        if quarantined == 0 {
            return (!self.waiting.is_empty()).then_some(0);
        }
        let pages = free + cached + owned + lent;
        self.waiting.iter().position(|&slot| self.missing_pages(slot) <= pages)
    }

    /// Pages that those who run or are away still need, and one beside for each: it may need it for its very next
    /// token.
    pub(super) fn spoken_for(&self) -> usize {
        let all = self.running.iter().chain(&self.away);
        all.map(|&slot| self.missing_pages(slot) + 1).sum()
    }

    /// Whether there are pages for all of a waiting sequence's prompt.
    fn enters(&self, slot: SlotId) -> bool {
        let spoken_for = self.spoken_for();
        let fits = |needed| spoken_for + needed <= self.pool.available();
        // Hits are looked up only if there is any room at all.
        let missing = self.missing_pages(slot);
        fits(missing) || fits(1) && !self.sequence(slot).prefill_only && fits(missing - self.shared_hits(slot))
    }

    /// Moves the last of the running sequences to where its arrival puts it: one that was preempted may be older than
    /// one that was away.
    fn settle_in(&mut self, slot: SlotId) -> usize {
        let arrival = self.sequence(slot).arrival;
        let at =
            self.running[..self.running.len() - 1].partition_point(|&other| self.sequence(other).arrival < arrival);
        self.running[at..].rotate_right(1);
        at
    }

    /// Plans the running sequence at `at`: as many tokens as the budget and the pages allow. It may leave: for another
    /// worker, or because all of it was found.
    fn plan_one(&mut self, at: usize, pass: Pass, plan: &mut StepPlan, router: &mut dyn Router) {
        let slot = self.running[at];
        if pass == Pass::Prefills {
            let next = self.take_hits(at);
            self.sequence_mut(slot).awaits_away = false;
            if next == Next::BeingComputed {
                return;
            }
            if self.sequence(slot).remaining() == 0 {
                plan.found.push(slot);
                self.hold(slot);
                return;
            }
            if self.leaves(at, router) {
                // It waits for the page that comes from there. One that is computed here is done sooner, and may be short.
                self.sequence_mut(slot).awaits_away = next == Next::Elsewhere;
                if next == Next::Elsewhere || self.send_away(at, plan, router) {
                    return;
                }
            }
        }
        let budget = self.budget - plan.tokens();
        let wanted = self.sequence(slot).remaining().min(budget);
        let len = self.reserve(at, wanted, plan);
        if len == 0 {
            return;
        }
        let sequence = self.sequence_mut(slot);
        sequence.cached.get_or_insert(sequence.num_computed);
        if sequence.place == Place::Undecided {
            sequence.place = Place::Here;
        }
        let start = sequence.num_computed;
        let arrival = sequence.arrival;
        plan.push(PlanEntry {
            slot,
            arrival,
            start,
            len,
            logits_from: sequence.logits_from(start).min(start + len) - start,
            first: !sequence.started,
            decode: pass == Pass::Decodes,
        });
    }

    /// Asks whether another worker is to compute the prompt of the sequence at `at`: not if some of it is computed
    /// here.
    fn leaves(&self, at: usize, router: &mut dyn Router) -> bool {
        let slot = self.running[at];
        let sequence = self.sequence(slot);
        let all_but_last = sequence.tokens().len() - 1;
        let may_leave = sequence.place == Place::Undecided && router.is_open();
        if !may_leave || sequence.cacheable_tokens() < all_but_last || self.pages_to_lend(slot) == 0 {
            return false;
        }
        let unfinished = |&&other: &&SlotId| !self.sequence(other).decodes();
        let candidate = Candidate {
            tokens: sequence.tokens().len(),
            cached: sequence.num_computed,
            decoding: self.running.iter().filter(|other| !unfinished(other)).count(),
            queued: self.running[..at].iter().filter(unfinished).map(|&other| self.sequence(other).remaining()).sum(),
            lost: sequence.lost,
        };
        router.route(candidate) == Route::Remote
    }

    /// Lends the pages of the sequence at `at` to another worker. Without pages to lend it stays, and takes them one by
    /// one.
    fn send_away(&mut self, at: usize, plan: &mut StepPlan, router: &mut dyn Router) -> bool {
        let slot = self.running[at];
        let Some(loan) = self.lend(at) else { return false };
        router.left();
        let sequence = self.sequence_mut(slot);
        sequence.cached.get_or_insert(sequence.num_computed);
        plan.loans.push(loan);
        true
    }

    /// Gives the sequence at `at` every next page that is in the index already, and says whether the one after is on
    /// its way.
    fn take_hits(&mut self, at: usize) -> Next {
        let slot = self.running[at];
        let block_size = self.hasher.block_size();
        loop {
            let sequence = self.slots[slot.index()].as_mut().expect("a running sequence has its slot");
            let page = sequence.num_computed / block_size;
            let aligned = sequence.num_computed.is_multiple_of(block_size);
            // A page of ours that could not be published is followed by none from the index.
            let in_line = aligned && sequence.table.published() == page;
            if !in_line || (page + 1) * block_size > sequence.cacheable_tokens() {
                return Next::Ours;
            }
            let Some(&hash) = sequence.hashes.get(page) else { return Next::Ours };
            if let Some(hit) = self.pool.find(hash) {
                sequence.table.push_shared(hit);
                sequence.num_computed += block_size;
                continue;
            }
            // Asked anew in every step, so nothing is left behind when the other one is cancelled or preempted. Only
            // older sequences are waited for, so the waiting has an end: the oldest waits for none, and those away come
            // back.
            let arrival = sequence.arrival;
            let promises = |&other: &SlotId| {
                let other = self.sequence(other);
                let due = other.num_computed < (page + 1) * block_size && !other.awaits_away;
                other.arrival < arrival && due && other.hashes.get(page) == Some(&hash)
            };
            return if self.running[..at].iter().any(promises) {
                Next::BeingComputed
            } else if self.away.iter().any(promises) {
                Next::Elsewhere
            } else {
                Next::Ours
            };
        }
    }

    /// Reserves pages for the next `wanted` tokens of the sequence at `at`, from those that arrived after it if need
    /// be. Returns for how many there are pages.
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
            } else if let Some(youngest) = self.youngest_after(at) {
                self.preempt(youngest, plan);
            } else {
                return covered;
            }
        }
    }

    /// The last sequence after `at` that may lose its pages, or one for which they are of no use any more. Those of a
    /// prefill-only sequence are being read; such sequences were let in with room for all of their pages, so they lack
    /// none.
    fn youngest_after(&self, at: usize) -> Option<usize> {
        let later = &self.running[at + 1..];
        let is_done = |&slot: &SlotId| self.sequence(slot).awaits_outcome();
        let may_lose = |&slot: &SlotId| !self.sequence(slot).prefill_only;
        let youngest = later.iter().rposition(is_done).or_else(|| later.iter().rposition(may_lose));
        youngest.map(|offset| at + 1 + offset)
    }

    fn preempt(&mut self, at: usize, plan: &mut StepPlan) {
        let slot = self.running.remove(at);
        plan.preempt(slot);
        self.wait_again(slot);
    }

    /// Has one that runs, and holds no pages yet, wait until there are pages for all of it.
    pub fn step_back(&mut self, slot: SlotId) {
        self.running.retain(|&other| other != slot);
        self.wait_again(slot);
    }

    /// Takes a sequence's pages and queues it where its arrival puts it.
    fn wait_again(&mut self, slot: SlotId) {
        let sequence = self.slots[slot.index()].as_mut().expect("a running sequence has its slot");
        sequence.table.release(&mut self.pool);
        sequence.restart();
        let arrival = sequence.arrival;
        let at = self.waiting.partition_point(|&other| self.sequence(other).arrival < arrival);
        self.waiting.insert(at, slot);
    }

    /// Pages a sequence still needs for the tokens it has.
    fn missing_pages(&self, slot: SlotId) -> usize {
        let sequence = self.sequence(slot);
        self.pages_for(sequence.tokens().len()) - sequence.table.len() - sequence.lent.len()
    }

    /// Pages of a waiting sequence that others use anyway.
    fn shared_hits(&self, slot: SlotId) -> usize {
        let sequence = self.sequence(slot);
        let usable = sequence.cacheable_tokens() / self.hasher.block_size();
        sequence.hashes.iter().take(usable).take_while(|&&hash| self.pool.is_in_use(hash)).count()
    }
}

/// The next page of a prefill.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// An older sequence is computing the same page: wait for it.
    BeingComputed,
    /// Another worker is, for an older sequence, and all of its prompt comes at once.
    Elsewhere,
    /// Nobody else is.
    Ours,
}
