//! Pages for somebody who measures how fast pages move.

use std::time::Instant;

use super::{Destination, Lending, Pages};
use crate::{
    handoff::{HandoffId, SessionId, ToPrefill, WorkerId},
    scheduler::Scheduler,
};

/// Pages lent to somebody who measures: enough for any link, and a moment's work to find.
const SCRATCH_PAGES_MAX: usize = 256;

impl Lending {
    /// Lends pages that nobody needs to somebody who measures.
    pub(super) fn lend_scratch(
        &mut self,
        session: SessionId,
        worker: WorkerId,
        wished: usize,
        scheduler: &mut Scheduler,
        now: Instant,
    ) {
        if self.lender.measures() {
            return self.port.send(session, ToPrefill::NoScratch);
        }
        let mut lent = scheduler.lend_scratch(wished.min(SCRATCH_PAGES_MAX)).into_vec();
        let destination = loop {
            match self.port.stage(session, lent.len()) {
                Some(destination) => break destination,
                None if lent.is_empty() => break Destination::InPlace,
                None => scheduler.free_lent(lent.split_off(lent.len() / 2).into()),
            }
        };
        let pages = Pages { lent: lent.into(), destination };
        if pages.lent.is_empty() {
            return self.port.send(session, ToPrefill::NoScratch);
        }
        let numbers = pages.numbers();
        match self.lender.lend_scratch(session, worker, HandoffId(rand::random()), pages, now - self.started) {
            Ok((slot, epoch)) => {
                // First, as with any grant.
                self.port.permit(session, slot, epoch, numbers.as_slice().into());
                self.port.send(session, ToPrefill::Scratch { slot, epoch, pages: numbers });
            }
            Err(pages) => {
                // Nobody was told of them, so nobody wrote there.
                let Pages { lent, destination } = pages;
                if let Destination::Staged(staged) = destination {
                    self.port.unstage(&staged);
                }
                scheduler.free_lent(lent);
                self.port.send(session, ToPrefill::NoScratch);
            }
        }
    }
}
