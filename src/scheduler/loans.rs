//! Sequences whose prompt another worker computes, and those computed for another worker.

use super::{Loan, Scheduler, SlotId, sequence::PrefillAt};
use crate::cache::LentPage;

impl Scheduler {
    /// Takes back a sequence whose prompt another worker has prefilled: `pages` hold everything but the last token. It
    /// runs again, where its arrival puts it, and its full pages can be found by others.
    pub fn resume(&mut self, slot: SlotId, pages: Box<[LentPage]>) {
        let sequence = self.slots[slot.index()].as_mut().expect("a sequence that is away has its slot");
        debug_assert!(pages.iter().map(LentPage::number).eq(sequence.lent.iter().copied()), "these are not its pages");
        sequence.lent.clear();
        for page in pages {
            sequence.table.push(self.pool.take_back(page));
        }
        sequence.num_computed = sequence.tokens().len() - 1;
        sequence.from_afar = true;
        sequence.prefill_at = PrefillAt::Here;
        self.publish(slot);
        self.come_back(slot);
    }

    /// Takes back a sequence whose prompt no other worker has prefilled. It runs again from the start: here for good,
    /// or, if it may be tried `again`, wherever the router then says, which is told how often that has happened.
    /// Without `pages` they are in quarantine from now on, until [`Scheduler::free_lent`].
    pub fn restart(&mut self, slot: SlotId, pages: Option<Box<[LentPage]>>, again: bool) {
        self.recall(slot);
        if let Some(pages) = pages {
            self.free_lent(pages);
        }
        let sequence = self.slots[slot.index()].as_mut().expect("a sequence that is away has its slot");
        sequence.table.release(&mut self.pool);
        sequence.restart();
        sequence.lost += u32::from(again);
        sequence.prefill_at = if again { PrefillAt::Undecided } else { PrefillAt::HereForGood };
        self.come_back(slot);
        // Were it to run, it would take the pages of all that came after it, and wait for those it lacks.
        if self.missing_pages(slot) > self.pages_within_reach() {
            self.step_back(slot);
        }
    }

    /// Takes pages that nobody needs, at most `wished` and an eighth of those that are to be had, for somebody who
    /// measures. They are in quarantine until [`Scheduler::free_lent`].
    pub fn lend_scratch(&mut self, wished: usize) -> Box<[LentPage]> {
        let count = wished.min(self.pool.available().saturating_sub(self.spoken_for(u64::MAX)) / 8);
        let Self { pool, .. } = self;
        let mut pages: Box<[_]> = (0..count).filter_map(|_| pool.allocate().map(|page| pool.lend(page))).collect();
        // In the order of a prompt's pages, so that what is measured is what moving a prompt takes.
        pages.sort_unstable_by_key(LentPage::number);
        for page in &pages {
            self.pool.quarantine(page.number());
        }
        pages
    }

    /// Frees pages of a loan that has ended, when no write can reach them any more.
    pub fn free_lent(&mut self, pages: Box<[LentPage]>) {
        for page in pages {
            self.pool.free_lent(page);
        }
    }

    /// Stops computing a prefill-only sequence and keeps its pages, which somebody may still be reading, until
    /// [`Scheduler::remove`].
    pub fn hold(&mut self, slot: SlotId) {
        debug_assert!(self.sequence(slot).prefill_only, "only what is computed for another worker is held");
        if !self.held.contains(&slot) {
            self.running.retain(|&other| other != slot);
            self.stop_waiting(slot);
            self.held.push(slot);
        }
    }

    /// Sequences whose prompt another worker computes.
    pub fn away(&self) -> usize {
        self.away.len()
    }

    /// Lends the running sequence at `at` all pages that its prompt still needs, and sends it away, if there are as
    /// many beside those that older ones need: once somebody has claimed them, nobody can take them back.
    pub(super) fn lend(&mut self, at: usize) -> Option<Loan> {
        let slot = self.running[at];
        let needed = self.pages_to_lend(slot);
        if self.pool.available() < needed + self.spoken_for(self.sequence(slot).arrival) {
            return None;
        }
        let Self { pool, slots, .. } = self;
        let mut pages: Box<[_]> = (0..needed).filter_map(|_| pool.allocate().map(|page| pool.lend(page))).collect();
        // The pool gives what was freed last first, so in reverse; in order, neighbours are written in one go.
        pages.sort_unstable_by_key(LentPage::number);
        let sequence = slots[slot.index()].as_mut()?;
        sequence.lent = pages.iter().map(LentPage::number).collect();
        let first = sequence.num_computed;
        self.running.remove(at);
        self.away.push(slot);
        Some(Loan { slot, first, pages })
    }

    /// Pages another worker would have to fill for a sequence that holds nothing but prefix hits.
    pub(super) fn pages_to_lend(&self, slot: SlotId) -> usize {
        let sequence = self.sequence(slot);
        self.pages_for(sequence.tokens().len() - 1) - sequence.table.len()
    }

    /// Gives up the pages of a sequence that is away, which whoever watches over the loan still has. They are in
    /// quarantine until that ends.
    pub(super) fn recall(&mut self, slot: SlotId) {
        let Some(sequence) = &mut self.slots[slot.index()] else { return };
        for page in sequence.lent.drain(..) {
            self.pool.quarantine(page);
        }
    }

    /// A sequence that was away runs again. There is a place for it: those away count as running when others are let
    /// in.
    fn come_back(&mut self, slot: SlotId) {
        self.away.retain(|&other| other != slot);
        self.run(slot);
    }
}
