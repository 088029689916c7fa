//! Planning: who takes part in the next step, and with how many tokens.

use super::{Candidate, PlanEntry, Route, Router, Scheduler, SlotId, StepPlan, sequence::PrefillAt};
use crate::cache::{PageCounts, PageHash};

impl Scheduler {
    /// Decides what the next step computes: one token of every sequence that decodes, then chunks of prompts. The pages
    /// for it are reserved. `router` is asked about each prompt of which nothing is computed yet, and those it sends
    /// elsewhere leave in [`StepPlan::loans`]. The plan has no entries only if there is nothing to do before a page, a
    /// sequence or a reader of pages comes back.
    pub fn plan(&mut self, plan: &mut StepPlan, router: &mut dyn Router) {
        plan.clear();
        // First, since one that is found from end to end makes room.
        self.find_prompts(plan);
        self.let_in(plan);
        self.plan_decodes(plan);
        let chunk = if plan.tokens() > 0 { self.chunk_beside_decodes } else { self.chunk_alone };
        let budget = chunk.min(self.limits.max_num_batched_tokens - plan.tokens());
        self.plan_prompts(budget, plan, router);
        debug_assert!(plan.tokens() <= self.limits.max_num_batched_tokens);
        debug_assert!(
            !plan.entries().is_empty() || self.is_empty() || self.is_held_up(),
            "nothing is computed, though it could be"
        );
    }

    /// Whether an empty plan is legitimate: pages are lent or in quarantine, sequences are away or held, or one waits
    /// for what the step under way gives.
    fn is_held_up(&self) -> bool {
        let PageCounts { lent, quarantined, .. } = self.pages();
        let awaits_outcome = |&slot: &SlotId| self.sequence(slot).awaits_outcome();
        let elsewhere = lent + quarantined > 0 || !self.away.is_empty() || !self.held.is_empty();
        elsewhere || self.running.iter().any(awaits_outcome)
    }

    /// Lets sequences in while there are places, and pages for all of the prompt: were one let in with less, it would
    /// take what older prompts still need, and lose it again. They come in order, but for those too long for the pages
    /// beside those in quarantine.
    fn let_in(&mut self, plan: &mut StepPlan) {
        while self.running.len() + self.away.len() < self.limits.max_num_seqs {
            let Some(slot) = self.first_that_could_enter() else { return };
            // What was on its way when one was preempted is known by the next plan.
            debug_assert!(!self.sequence(slot).has_placeholder() && !self.sequence(slot).awaits_outcome());
            if !self.enters(slot) {
                return;
            }
            self.stop_waiting(slot);
            self.run(slot);
            // It was let in with what it shares with others.
            self.take_hits(slot, plan);
        }
    }

    /// A token for each that decodes. For lack of pages, the youngest may lose theirs to those before them.
    fn plan_decodes(&mut self, plan: &mut StepPlan) {
        let mut at = 0;
        while at < self.running.len() {
            let sequence = self.sequence(self.running[at]);
            if sequence.decodes() && !sequence.awaits_outcome() {
                self.plan_tokens(at, 1, true, plan);
            }
            at += 1;
        }
    }

    /// The first who waits and is not too long for the pages within reach.
    fn first_that_could_enter(&self) -> Option<SlotId> {
        let pages = self.pages_within_reach();
        self.waiting.iter().copied().find(|&slot| self.missing_pages(slot) <= pages)
    }

    /// Pages there are when all that runs is gone. Those in quarantine are not among them: how long they stay there is
    /// up to somebody else.
    pub(super) fn pages_within_reach(&self) -> usize {
        let PageCounts { free, cached, owned, lent, quarantined: _ } = self.pages();
        free + cached + owned + lent
    }

    /// Pages that those who run or are away and came before `arrival` still need, and one beside for each: it may need
    /// it for its very next token.
    pub(super) fn spoken_for(&self, arrival: u64) -> usize {
        let before = |slot: &&SlotId| self.sequence(**slot).arrival < arrival;
        let older = self.running.iter().chain(&self.away).filter(before);
        older.map(|&slot| self.missing_pages(slot) + 1).sum()
    }

    /// Whether there are pages for all of a waiting sequence's prompt.
    fn enters(&self, slot: SlotId) -> bool {
        let spoken_for = self.spoken_for(u64::MAX);
        let fits = |needed| spoken_for + needed <= self.pool.available();
        // Hits are looked up only if there is any room at all.
        let missing = self.missing_pages(slot);
        fits(missing) || fits(1) && fits(missing - self.shared_hits(slot))
    }

    /// Puts a sequence among those that run, where its arrival puts it.
    pub(super) fn run(&mut self, slot: SlotId) {
        let arrival = self.sequence(slot).arrival;
        let at = self.running.partition_point(|&other| self.sequence(other).arrival < arrival);
        self.running.insert(at, slot);
    }

    /// Shares out `budget` tokens among the prompts. Half are for the oldest, so that it gets on whatever comes after
    /// it, and the rest for those with the least left, so that a short one is not kept waiting by a long one. Where the
    /// oldest has the least left, as among equals, all are for it. What somebody leaves is the next one's. A prompt
    /// that another worker computes needs none.
    fn plan_prompts(&mut self, mut budget: usize, plan: &mut StepPlan, router: &mut dyn Router) {
        let mut prompts = std::mem::take(&mut self.prompts);
        self.list_prompts(&mut prompts);
        let decoding = self.running.len() - prompts.len();
        let first = (0..prompts.len()).find(|&at| {
            // While it gets its half, those with less left get the other.
            let left = self.sequence(prompts[at]).remaining();
            let later = prompts[at + 1..].iter().map(|&slot| self.sequence(slot).remaining());
            let queued = left.min(later.filter(|&other| other < left).sum());
            self.stays(prompts[at], Ahead { decoding, queued, oldest: None }, plan, router)
        });
        if let Some(first) = first {
            let oldest = prompts[first];
            let in_turn = &mut prompts[first..];
            in_turn.sort_unstable_by_key(|&slot| (self.sequence(slot).remaining(), self.sequence(slot).arrival));
            let oldest_left = self.sequence(oldest).remaining();
            let mut kept = oldest_left.min(budget - budget / 2);
            let mut shorter = 0;
            for &slot in &*in_turn {
                let left = self.sequence(slot).remaining();
                if slot == oldest {
                    kept = 0;
                } else if budget == kept && !router.is_open() {
                    continue;
                } else {
                    let queued = shorter + oldest_left.min(shorter + left);
                    if !self.stays(slot, Ahead { decoding, queued, oldest: Some(oldest) }, plan, router) {
                        continue;
                    }
                    shorter += left;
                }
                if let Some(at) = self.index_in_running(slot) {
                    budget -= self.plan_tokens(at, budget - kept, false, plan);
                }
            }
        }
        self.prompts = prompts;
    }

    /// Gives the prompts that run what has come into the index since.
    fn find_prompts(&mut self, plan: &mut StepPlan) {
        let mut prompts = std::mem::take(&mut self.prompts);
        self.list_prompts(&mut prompts);
        for &slot in &prompts {
            self.take_hits(slot, plan);
        }
        self.prompts = prompts;
    }

    /// Those that run and do not decode, in order of arrival.
    fn list_prompts(&self, prompts: &mut Vec<SlotId>) {
        prompts.clear();
        prompts.extend(self.running.iter().filter(|&&slot| {
            let sequence = self.sequence(slot);
            !sequence.awaits_outcome() && !sequence.decodes()
        }));
    }

    /// Where among those that run a sequence is, unless it has left them.
    fn index_in_running(&self, slot: SlotId) -> Option<usize> {
        let arrival = self.sequence(slot).arrival;
        let found = self.running.binary_search_by_key(&arrival, |&other| self.sequence(other).arrival);
        found.ok()
    }

    /// Plans the running sequence at `at`: as many tokens, `most` at most, as there are pages for. Returns how many.
    fn plan_tokens(&mut self, at: usize, most: usize, decode: bool, plan: &mut StepPlan) -> usize {
        let slot = self.running[at];
        let wanted = self.sequence(slot).remaining().min(most);
        let len = self.reserve(at, wanted, plan);
        if len == 0 {
            return 0;
        }
        let sequence = self.sequence_mut(slot);
        sequence.cached.get_or_insert(sequence.num_computed);
        if sequence.prefill_at == PrefillAt::Undecided {
            sequence.prefill_at = PrefillAt::Here;
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
            decode,
        });
        len
    }

    /// Whether a prompt is to be computed here, and now. It may leave for another worker, or wait for a page.
    fn stays(&mut self, slot: SlotId, ahead: Ahead, plan: &mut StepPlan, router: &mut dyn Router) -> bool {
        let Some(at) = self.index_in_running(slot) else { return false };
        let next = self.next_page(slot, ahead.oldest, plan);
        if next == Next::BeingComputed {
            return false;
        }
        // It waits for the pages that come from there. One that is computed here is done sooner, and may be short.
        let leaves = self.leaves(slot, ahead, router);
        !(leaves && (next == Next::Elsewhere || self.send_away(at, plan, router)))
    }

    /// Asks whether another worker is to compute a prompt: not if some of it is computed here.
    fn leaves(&self, slot: SlotId, ahead: Ahead, router: &mut dyn Router) -> bool {
        let sequence = self.sequence(slot);
        let all_but_last = sequence.tokens().len() - 1;
        let may_leave = sequence.prefill_at == PrefillAt::Undecided && router.is_open();
        if !may_leave || sequence.cacheable_tokens() < all_but_last || self.pages_to_lend(slot) == 0 {
            return false;
        }
        let candidate = Candidate {
            tokens: sequence.tokens().len(),
            cached: sequence.num_computed,
            decoding: ahead.decoding,
            queued: ahead.queued,
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

    /// Gives a prompt every next page that is in the index already. All of it may be found.
    fn take_hits(&mut self, slot: SlotId, plan: &mut StepPlan) {
        while let Some((_, hash)) = self.next_hash(slot)
            && let Some(hit) = self.pool.find(hash)
        {
            let block_size = self.block_size;
            let sequence = self.sequence_mut(slot);
            sequence.table.push_shared(hit);
            sequence.num_computed += block_size;
        }
        if self.sequence(slot).remaining() == 0 {
            plan.found.push(slot);
            self.hold(slot);
        }
    }

    /// The next page of a prompt and its hash, if it may come from the index.
    fn next_hash(&self, slot: SlotId) -> Option<(usize, PageHash)> {
        let sequence = self.sequence(slot);
        let block_size = self.block_size;
        let page = sequence.num_computed / block_size;
        let aligned = sequence.num_computed.is_multiple_of(block_size);
        // A page of ours that could not be published is followed by none from the index.
        let in_line = aligned && sequence.table.published() == page;
        let may_come = in_line && (page + 1) * block_size <= sequence.cacheable_tokens();
        let hash = sequence.hashes.get(page).filter(|_| may_come)?;
        Some((page, *hash))
    }

    /// Who computes the next page of a prompt. Asked anew in every step, so nothing is left behind when another one is
    /// cancelled or preempted. Only those that take part in this step are waited for, the oldest among them, so the
    /// waiting has an end; and those away come back.
    fn next_page(&self, slot: SlotId, oldest: Option<SlotId>, plan: &StepPlan) -> Next {
        let Some((page, hash)) = self.next_hash(slot) else { return Next::Ours };
        let mut prompts = plan.entries().iter().filter(|entry| !entry.decode).map(|entry| entry.slot).chain(oldest);
        if prompts.any(|other| self.promises(other, page, hash)) {
            Next::BeingComputed
        } else if self.away.iter().any(|&other| self.brings_half(other, slot, page)) {
            Next::Elsewhere
        } else {
            Next::Ours
        }
    }

    /// Whether a page will be there once this prompt is computed, and is not yet.
    fn promises(&self, slot: SlotId, page: usize, hash: PageHash) -> bool {
        let sequence = self.sequence(slot);
        sequence.num_computed < (page + 1) * self.block_size && sequence.hashes.get(page) == Some(&hash)
    }

    /// Whether a prompt that is away brings half at least of the full pages that another one still lacks, from `page`
    /// on. Hashes are chained: who has the page in the middle has those before it.
    fn brings_half(&self, away: SlotId, slot: SlotId, page: usize) -> bool {
        let sequence = self.sequence(slot);
        let end = sequence.cacheable_tokens() / self.block_size;
        let middle = (page + end - 1) / 2;
        sequence.hashes.get(middle).is_some_and(|&hash| self.promises(away, middle, hash))
    }

    /// Reserves pages for the next `wanted` tokens of the sequence at `at`, from those that arrived after it if need
    /// be. Returns for how many there are pages.
    fn reserve(&mut self, at: usize, wanted: usize, plan: &mut StepPlan) -> usize {
        let slot = self.running[at];
        let block_size = self.block_size;
        let held = self.sequence(slot).table.len();
        let reserved = loop {
            let sequence = self.slots[slot.index()].as_mut().expect("a running sequence has its slot");
            let covered = sequence.table.len() * block_size - sequence.num_computed;
            if covered >= wanted {
                break wanted;
            }
            if let Some(page) = self.pool.allocate() {
                sequence.table.push(page);
            } else if let Some(youngest) = self.youngest_after(at) {
                self.preempt(youngest, plan);
            } else {
                break covered;
            }
        };
        // The pool may give them in reverse; in order, neighbours are written to a decode worker in one go.
        self.sequence_mut(slot).table.sort_from(held);
        reserved
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
        let sequence = self.sequence(slot);
        // One that was let in and not begun has nothing, and one whose last token is on its way never starts again.
        plan.preempt(slot, !sequence.table.is_empty() && !sequence.awaits_outcome());
        self.wait_again(slot);
    }

    /// Has one that runs, and holds no pages yet, wait until there are pages for all of it.
    pub(super) fn step_back(&mut self, slot: SlotId) {
        self.running.retain(|&other| other != slot);
        self.wait_again(slot);
    }

    /// The same with one that was to leave for another worker, and now may again.
    pub fn stay_for_now(&mut self, slot: SlotId) {
        // It waits already if it is too long for the pages within reach.
        if self.index_in_running(slot).is_some() {
            self.step_back(slot);
        }
        self.sequence_mut(slot).prefill_at = PrefillAt::Undecided;
    }

    /// Takes a sequence's pages and queues it where its arrival puts it.
    fn wait_again(&mut self, slot: SlotId) {
        let sequence = self.slots[slot.index()].as_mut().expect("a running sequence has its slot");
        sequence.table.release(&mut self.pool);
        sequence.restart();
        self.waiting_tokens += sequence.remaining();
        let arrival = sequence.arrival;
        let at = self.waiting.partition_point(|&other| self.sequence(other).arrival < arrival);
        self.waiting.insert(at, slot);
    }

    /// Pages a sequence still needs for the tokens it has.
    pub(super) fn missing_pages(&self, slot: SlotId) -> usize {
        let sequence = self.sequence(slot);
        self.pages_for(sequence.tokens().len()) - sequence.table.len() - sequence.lent.len()
    }

    /// Pages of a waiting sequence that others use anyway.
    fn shared_hits(&self, slot: SlotId) -> usize {
        let sequence = self.sequence(slot);
        let usable = sequence.cacheable_tokens() / self.block_size;
        sequence.hashes.iter().take(usable).take_while(|&&hash| self.pool.is_in_use(hash)).count()
    }
}

/// What comes before a prompt.
#[derive(Clone, Copy)]
struct Ahead {
    /// Sequences that decode.
    decoding: usize,
    /// Tokens of other prompts that are computed before all of it is, at most.
    queued: usize,
    /// The oldest that is computed here, if that is another one: it takes part in the step in any case.
    oldest: Option<SlotId>,
}

/// The next page of a prompt.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Next {
    /// Another sequence's step computes the same page: wait for it.
    BeingComputed,
    /// A remote prefill under way brings it, with at least half of the full pages that this prompt lacks: they come all
    /// at once.
    Elsewhere,
    /// Nobody else computes it.
    Ours,
}
