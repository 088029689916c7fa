//! The decode worker's loans, as the engine thread sees them: prompts that leave, and pages that come back.

mod interface;
mod scratch;

pub use interface::{Destination, LendingConfig, LendingPort, StagedPages};

use std::time::{Duration, Instant};

use super::pace::Pace;
use crate::{
    cache::LentPage,
    handoff::{
        Epoch, Grant, HandoffId, Lender, LenderAction, LenderEvent, MailboxSlot, SessionId, ToDecode, ToPrefill,
    },
    scheduler::{Candidate, Loan, Route, Router, Scheduler, SlotId},
    telemetry::{HandoffMetrics, HandoffPhase, TraceContext},
};

/// Between two looks at the clock for handoffs that take too long.
const TICK: Duration = Duration::from_millis(20);

/// The pages of a loan, and what stands in for them while somebody may write there. The two are let go of together.
struct Pages {
    lent: Box<[LentPage]>,
    /// In place while there is no holder, who alone would write.
    destination: Destination,
}

impl Pages {
    /// What the holder is told to write to.
    fn numbers(&self) -> Vec<u32> {
        match &self.destination {
            Destination::Staged(staged) => staged.numbers().to_vec(),
            Destination::InPlace | Destination::ByAdapter => self.own_numbers(),
        }
    }

    /// How many stand in for them.
    fn staged(&self) -> usize {
        match &self.destination {
            Destination::Staged(staged) => staged.numbers().len(),
            Destination::InPlace | Destination::ByAdapter => 0,
        }
    }

    fn own_numbers(&self) -> Vec<u32> {
        self.lent.iter().map(LentPage::number).collect()
    }
}

/// A sequence that is away.
#[derive(Debug, Clone, Copy)]
struct Away {
    slot: SlotId,
    handoff: HandoffId,
    ahead: u64,
    since: Instant,
    granted: Option<Instant>,
}

/// All loans.
pub(super) struct Lending {
    lender: Lender<SlotId, Pages>,
    port: Box<dyn LendingPort>,
    /// By the scheduler's slots.
    away: Box<[Option<Away>]>,
    /// Refilled, so that looking after loans allocates nothing while nothing happens to them.
    actions: Vec<LenderAction<SlotId, Pages>>,
    started: Instant,
    ticked: Instant,
    polled: Instant,
    /// The device could not be made to wait for what adapters had written. Nothing comes back from then on, and nothing
    /// may be computed.
    failed: bool,
    metrics: HandoffMetrics,
}

impl Lending {
    pub(super) fn new(
        config: LendingConfig,
        port: Box<dyn LendingPort>,
        sequences: usize,
        metrics: HandoffMetrics,
    ) -> Self {
        let now = Instant::now();
        Self {
            lender: Lender::new(config.mailbox_slots, config.timeouts),
            port,
            away: vec![None; sequences].into(),
            actions: Vec::with_capacity(2 * config.mailbox_slots as usize),
            started: now,
            ticked: now,
            polled: now,
            failed: false,
            metrics,
        }
    }

    /// Whether anything is lent, or in quarantine.
    pub(super) fn is_open(&self) -> bool {
        self.lender.open() > 0
    }

    /// Whether pages may change under whatever is computed in them, so that nothing may be any more.
    pub(super) fn has_failed(&self) -> bool {
        self.failed
    }

    /// Looks into the mailbox and at the clock. Once a turn of the engine thread.
    pub(super) fn attend(&mut self, scheduler: &mut Scheduler) {
        if !self.is_open() {
            return;
        }
        let now = Instant::now();
        self.poll(now);
        if now - self.ticked >= TICK {
            self.ticked = now;
            self.lender.on(LenderEvent::Tick, now - self.started, &mut self.actions);
        }
        self.perform(scheduler, now);
    }

    /// Takes in what happened.
    pub(super) fn on(&mut self, event: LenderEvent, scheduler: &mut Scheduler) {
        let now = Instant::now();
        // First, as a worker that completes and then leaves does so in this order.
        self.poll(now);
        match event {
            LenderEvent::Message { session, worker, message: ToDecode::Measure { pages } } => {
                self.lend_scratch(session, worker, pages as usize, scheduler, now);
            }
            event => {
                if let LenderEvent::Message { session, message: ToDecode::Claim { handoff }, .. } = event {
                    self.prepare(session, handoff, now);
                }
                self.lender.on(event, now - self.started, &mut self.actions);
            }
        }
        self.perform(scheduler, now);
    }

    /// Finds the place where a session is to write what it claims. Without one the prompt is prefilled here, and the
    /// claim comes too late.
    fn prepare(&mut self, session: SessionId, handoff: HandoffId, now: Instant) {
        let Some(pages) = self.lender.unclaimed_mut(handoff) else { return };
        match self.port.stage(session, pages.lent.len()) {
            Some(destination) => pages.destination = destination,
            None => {
                tracing::debug!(%handoff, "a prompt is prefilled here: no room to stage its pages in");
                self.lender.on(LenderEvent::EnqueueFailed { handoff }, now - self.started, &mut self.actions);
            }
        }
    }

    /// The pages of a loan to which nobody can write any more. What stood in for them is free. None if what was written
    /// there may still land, over whatever is computed next: then they stay where they are.
    fn let_go(&mut self, pages: Pages) -> Option<Box<[LentPage]>> {
        let Pages { lent, destination } = pages;
        match destination {
            Destination::InPlace => {}
            Destination::ByAdapter => self.failed |= !self.port.flush(),
            Destination::Staged(staged) => self.port.unstage(&staged),
        }
        (!self.failed).then_some(lent)
    }

    /// A step is about to be planned.
    pub(super) fn planning(&mut self) {
        self.port.planning();
    }

    /// Lends what a plan sends away. `trace` is what a sequence is part of.
    pub(super) fn lend(
        &mut self,
        loans: &mut Vec<Loan>,
        scheduler: &mut Scheduler,
        trace: impl Fn(SlotId) -> Option<TraceContext>,
    ) {
        for Loan { slot, pages, .. } in loans.drain(..) {
            let now = Instant::now();
            let handoff = HandoffId(rand::random());
            let pages = Pages { lent: pages, destination: Destination::InPlace };
            match self.lender.lend(handoff, slot, pages, now - self.started) {
                Ok(_) => {
                    let ahead = self.port.jobs_ahead();
                    self.away[slot.index()] = Some(Away { slot, handoff, ahead, since: now, granted: None });
                    self.port.enqueue(handoff, scheduler.sequence(slot).tokens().len(), trace(slot));
                }
                // The router knew that there was a slot, and lent several.
                Err(pages) => scheduler.restart(slot, Some(pages.lent), false),
            }
        }
    }

    /// Nobody is there to take what is on the queue: it is prefilled here. If somebody took it just now, that counts.
    pub(super) fn recall_queued(&mut self, scheduler: &mut Scheduler) {
        let queued: Vec<HandoffId> =
            self.away.iter().flatten().filter(|away| away.granted.is_none()).map(|away| away.handoff).collect();
        for handoff in queued {
            self.on(LenderEvent::EnqueueFailed { handoff }, scheduler);
        }
    }

    /// Takes back the pages of the youngest prompt that nobody has claimed yet, if those before it run out of pages:
    /// nothing is lost with it, as there is with one that runs. It waits until there are enough for all of them. The
    /// mailbox is not looked into: what comes back may not be computed with before [`Lending::has_failed`] was asked.
    pub(super) fn make_room(&mut self, scheduler: &mut Scheduler) {
        if !self.is_open() || !scheduler.is_short(u64::MAX) {
            return;
        }
        let arrival = |away: &&Away| scheduler.sequence(away.slot).arrival();
        let queued = self.away.iter().flatten().filter(|away| away.granted.is_none());
        let Some(&Away { slot, handoff, .. }) = queued.max_by_key(arrival) else { return };
        // If those before the youngest have enough, so have those before any other.
        if !scheduler.is_short(scheduler.sequence(slot).arrival()) {
            return;
        }
        let now = Instant::now();
        self.lender.on(LenderEvent::EnqueueFailed { handoff }, now - self.started, &mut self.actions);
        self.perform(scheduler, now);
        if self.away[slot.index()].is_none() {
            scheduler.stay_for_now(slot);
        }
    }

    /// Nobody waits for this sequence any more, which has been removed. The mailbox is not looked into before: should
    /// the word have come since the last look, there would be nobody to resume.
    pub(super) fn withdraw(&mut self, slot: SlotId, scheduler: &mut Scheduler) {
        if let Some(Away { handoff, .. }) = self.away[slot.index()].take() {
            let now = Instant::now();
            self.lender.on(LenderEvent::Withdraw { handoff }, now - self.started, &mut self.actions);
            self.perform(scheduler, now);
        }
    }

    /// Panics unless what is lent here is what the scheduler thinks is lent.
    pub(super) fn check_integrity(&self, scheduler: &Scheduler) {
        if self.failed {
            // Some pages are nobody's.
            return;
        }
        let pages = |wanted: bool| -> usize {
            self.lender
                .lent()
                .filter(|&(_, quarantined)| quarantined == wanted)
                .map(|(pages, _)| pages.lent.len())
                .sum()
        };
        let counts = scheduler.pages();
        assert_eq!((pages(false), pages(true)), (counts.lent, counts.quarantined), "loans and pages disagree");
        let staged: usize = self.lender.lent().map(|(pages, _)| pages.staged()).sum();
        assert_eq!(staged, self.port.staged(), "loans and the pages that stand in for theirs disagree");
        assert_eq!(self.away.iter().flatten().count(), scheduler.away(), "a sequence is away without a loan");
    }

    fn poll(&mut self, now: Instant) {
        if self.is_open() {
            let Self { lender, port, actions, .. } = self;
            let before = actions.len();
            lender.poll(|slot| port.word(slot), now - self.started, actions);
            if actions.len() > before {
                // The word was not there at the last look.
                self.metrics.observe(HandoffPhase::Pickup, now - self.polled);
            }
        }
        self.polled = now;
    }

    fn perform(&mut self, scheduler: &mut Scheduler, now: Instant) {
        if self.actions.is_empty() {
            return;
        }
        let mut actions = std::mem::take(&mut self.actions);
        for action in actions.drain(..) {
            if self.failed {
                // The engine ends.
                break;
            }
            match action {
                LenderAction::Grant { session, handoff, slot, epoch, request } => {
                    self.grant(session, handoff, (slot, epoch), request, scheduler, now);
                }
                LenderAction::Unclaimed { handoff } => self.unclaimed(handoff),
                LenderAction::Gone { session, handoff, why } => {
                    self.port.send(session, ToPrefill::Gone { handoff, why });
                }
                LenderAction::Reclaim { session, handoff, slot, epoch } => {
                    self.port.send(session, ToPrefill::Release { handoff, epoch });
                    self.port.revoke(session, slot, epoch);
                }
                LenderAction::Forget { session, slot, epoch } => self.port.forget(session, slot, epoch),
                LenderAction::Fence { session } => self.port.fence(session),
                LenderAction::Resume { request, pages } => {
                    let own = pages.own_numbers();
                    let Pages { lent, destination } = pages;
                    let there = match destination {
                        Destination::InPlace => true,
                        Destination::ByAdapter => {
                            self.failed |= !self.port.flush();
                            !self.failed
                        }
                        Destination::Staged(staged) => self.port.take_up(staged, &own),
                    };
                    if self.failed {
                        continue;
                    }
                    if !there {
                        self.away[request.index()] = None;
                        scheduler.restart(request, Some(lent), false);
                        continue;
                    }
                    if let Some(Away { ahead, since, granted: Some(granted), .. }) = self.away[request.index()].take() {
                        self.metrics.observe(HandoffPhase::Remote, now - granted);
                        let sequence = scheduler.sequence(request);
                        let tokens = sequence.tokens().len() - 1 - sequence.num_computed();
                        self.port.handed_off(ahead, granted - since, tokens, now - granted);
                    }
                    scheduler.resume(request, lent);
                }
                LenderAction::Restart { request, pages, again } => {
                    let lent = match pages {
                        None => None,
                        Some(pages) => match self.let_go(pages) {
                            None => continue,
                            lent => lent,
                        },
                    };
                    self.away[request.index()] = None;
                    scheduler.restart(request, lent, again);
                }
                LenderAction::Free { pages } => {
                    if let Some(lent) = self.let_go(pages) {
                        scheduler.free_lent(lent);
                    }
                }
                LenderAction::Count(outcome) => self.metrics.count(outcome),
            }
        }
        self.actions = actions;
    }

    /// Says so of the first; others that were handed off before it may follow.
    fn unclaimed(&mut self, handoff: HandoffId) {
        if self.port.unclaimed() {
            tracing::warn!(
                %handoff,
                "no prefill worker claimed a prompt's job in time: it is prefilled here, as others are for a while; \
                 they are busy, or do not reach this worker: see their log, and 'engine doctor'"
            );
        }
    }

    fn grant(
        &mut self,
        session: SessionId,
        handoff: HandoffId,
        (slot, epoch): (MailboxSlot, Epoch),
        request: SlotId,
        scheduler: &Scheduler,
        now: Instant,
    ) {
        if let Some(away) = &mut self.away[request.index()] {
            away.granted = Some(now);
            self.metrics.observe(HandoffPhase::Queue, now - away.since);
        }
        let sequence = scheduler.sequence(request);
        let tokens = sequence.tokens();
        let pages = self.lender.pages(slot).map_or_else(Vec::new, Pages::numbers);
        self.port.claimed();
        // First: whoever has the grant may write at once.
        self.port.permit(session, slot, epoch, pages.as_slice().into());
        let grant = Grant {
            handoff,
            slot,
            epoch,
            tokens: tokens[..tokens.len() - 1].to_vec(),
            salt: sequence.salt(),
            first: sequence.num_computed() as u32,
            pages,
        };
        self.port.send(session, ToPrefill::Grant(grant));
    }
}

/// Asks where prompts go, knowing how fast they are computed here.
pub(super) struct Routing<'a> {
    pub(super) lending: &'a mut Lending,
    pub(super) pace: &'a Pace,
}

impl Router for Routing<'_> {
    fn is_open(&self) -> bool {
        self.lending.lender.can_lend() && self.lending.port.is_open()
    }

    fn route(&mut self, candidate: Candidate) -> Route {
        self.lending.port.decide(candidate, self.pace.forecast(candidate))
    }

    fn left(&mut self) {
        self.lending.port.left();
    }
}
