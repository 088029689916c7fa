//! What the engine thread needs of a cluster to lend pages.

use std::{sync::Arc, time::Duration};

use crate::{
    handoff::{Epoch, Forecast, HandoffId, LenderTimeouts, MailboxSlot, MailboxWord, SessionId, ToPrefill},
    scheduler::{Candidate, Route},
    telemetry::TraceContext,
};

/// The engine thread's way to prefill workers. Nothing in it waits.
pub trait LendingPort: Send {
    /// Whether any prompt could be prefilled elsewhere now. Asked in every step.
    fn is_open(&self) -> bool;

    /// A step is about to be planned: [`LendingPort::decide`] is asked about its prompts, before any is enqueued.
    fn planning(&mut self) {}

    /// Where a prompt is prefilled; `local` is what it would take here, if that is known.
    fn decide(&mut self, candidate: Candidate, local: Option<Forecast>) -> Route;

    /// One that is prefilled elsewhere has left: the next ones come behind it.
    fn left(&mut self) {}

    /// Jobs that wait before one put on the queue now, for each prefill worker.
    fn jobs_ahead(&self) -> u64;

    /// Puts a job for this handoff, of a prompt of so many tokens, on the queue. If that fails the engine is told
    /// [`LenderEvent::EnqueueFailed`](crate::handoff::LenderEvent::EnqueueFailed).
    fn enqueue(&mut self, handoff: HandoffId, tokens: usize, trace: Option<TraceContext>);

    /// A word of the mailbox, with acquire ordering.
    fn word(&self, slot: MailboxSlot) -> MailboxWord;

    /// Somebody has claimed a job: it does not wait any more.
    fn claimed(&mut self);

    /// Nobody has claimed a job in time, or at all. Returns whether that is news: it is not while no more are handed
    /// off for that.
    fn unclaimed(&mut self) -> bool {
        true
    }

    /// Lets a session write to `pages` under this slot and epoch.
    fn permit(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch, pages: Arc<[u32]>);

    /// Where a session is to write so many pages that it will be lent; none if there is no room for them now. If it may
    /// write to the pages themselves, nothing that was computed before still uses them when this returns.
    fn stage(&mut self, _session: SessionId, _pages: usize) -> Option<Destination> {
        Some(Destination::InPlace)
    }

    /// Returns when what adapters wrote to pages in device memory is there for whatever is computed next, and can
    /// change nothing that is written there from now on. False if that cannot be had, which is the end of the engine.
    fn flush(&mut self) -> bool {
        true
    }

    /// Brings what was written there to `pages`, before whatever is computed next. False if that cannot be done.
    fn take_up(&mut self, _staged: StagedPages, _pages: &[u32]) -> bool {
        false
    }

    /// Nobody can write there any more, and nobody wants what was written.
    fn unstage(&mut self, _staged: &StagedPages) {}

    /// Pages that loans have in the place of theirs.
    fn staged(&self) -> usize {
        0
    }

    /// Says something on a session, after everything permitted on it before.
    fn send(&mut self, session: SessionId, message: ToPrefill);

    /// Takes such a permission back, if the transport can do that by itself.
    fn revoke(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch);

    /// The session has given up such a permission by itself.
    fn forget(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch);

    /// Ends a session so that nothing more is written on it.
    fn fence(&mut self, session: SessionId);

    /// A handoff was claimed `queued` after it was put behind `ahead` others, and its `tokens` were there `computing`
    /// later.
    fn handed_off(&mut self, ahead: u64, queued: Duration, tokens: usize, computing: Duration);
}

/// Where a session writes the pages that it is lent.
#[derive(Debug, PartialEq, Eq)]
pub enum Destination {
    /// To the pages themselves.
    InPlace,
    /// To the pages themselves, in device memory, by an adapter: the device is to wait for it before it uses them.
    ByAdapter,
    /// To these in their place.
    Staged(StagedPages),
}

/// Pages of host memory that stand in for those of one loan. They are given back by value, once.
#[derive(Debug, PartialEq, Eq)]
pub struct StagedPages(pub(crate) Box<[u32]>);

impl StagedPages {
    /// Their numbers, as peers have to know them.
    pub(crate) fn numbers(&self) -> &[u32] {
        &self.0
    }
}

/// How pages are lent, fixed at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LendingConfig {
    /// Words of the mailbox: loans open at a time, those in quarantine included.
    pub mailbox_slots: u32,
    /// How long to wait for what.
    pub timeouts: LenderTimeouts,
}
