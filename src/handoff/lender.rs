//! The decode worker's side, a state machine.

use std::{collections::HashMap, time::Duration};

use super::{
    Epoch, Gone, HandoffId, MailboxSlot, MailboxWord, SessionId, Status, ToDecode, WorkerId, clock::SteadyClock,
};

mod interface;
#[cfg(test)]
mod tests;

pub use interface::{LenderAction, LenderEvent, LenderTimeouts, Outcome};

/// The decode worker's side of all its handoffs: what is lent to whom, and when it comes back.
///
/// `R` names the request that waits, `P` is its lent pages. Pages are *moved* in by [`lend`](Self::lend) and moved out
/// in an action; in between nobody else has them, so nobody can reuse them. A loan goes one of these ways:
///
/// ```text
///            lend                       claimed                      resolved
///  pages ─────────▶ Queued ────────────────────────▶ Granted ───────────────────────▶ Resume or Restart, with the pages
///                     │                                 │
///                     │ withdrawn, not claimed          │ withdrawn, silent, stalled, session closed, lease lost
///                     ▼                                 ▼                       resolved
///         pages back at once:               Quarantined ────────────────────────────▶ Free, with the pages
///         nobody ever could write           (the request itself goes on without)
/// ```
///
/// A granted loan is *resolved* by exactly three things: its holder completed it (the mailbox word), its holder
/// released it (a message, or a failed word, or the transport revoked it), or its session was fenced. The three call
/// `resolve`, the only function that lets go of pages somebody could write to. Time resolves nothing: a
/// timeout moves a loan into quarantine and asks, first the holder, then the transport.
///
/// Nothing here allocates while loans are merely open: [`poll`](Self::poll) and ticks walk an array of slots.
#[derive(Debug)]
pub struct Lender<R, P> {
    timeouts: LenderTimeouts,
    clock: SteadyClock,
    entries: Box<[MailboxEntry<R, P>]>,
    /// Slots without a loan.
    free: Vec<MailboxSlot>,
    /// Slots with one, in no order.
    open: Vec<MailboxSlot>,
    by_handoff: HashMap<HandoffId, MailboxSlot>,
}

/// A slot of the mailbox.
#[derive(Debug)]
struct MailboxEntry<R, P> {
    /// Of its present loan, or else of its next.
    epoch: Epoch,
    loan: Option<Loan<R, P>>,
}

#[derive(Debug)]
struct Loan<R, P> {
    handoff: HandoffId,
    pages: P,
    state: State<R>,
    /// When patience ends, in steady time.
    deadline: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State<R> {
    /// The job is on the queue. Nobody may write.
    Queued { request: R },
    /// The holder may write, and the request waits for it.
    Granted { request: R, holder: Holder, moved: Moved },
    /// The holder may write, or may be about to, and nobody waits for it.
    Quarantined { holder: Holder },
    /// The holder may write, and nobody ever waited for it: it measures.
    Scratch { holder: Holder },
}

/// How far things were where the holder is, and when they must be further, in steady time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Moved {
    mark: u32,
    due: Duration,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Holder {
    session: SessionId,
    worker: WorkerId,
}

impl<R: Copy, P> Lender<R, P> {
    /// A lender with a mailbox of `slots` words: so many loans can be open, those in quarantine included.
    pub fn new(slots: u32, timeouts: LenderTimeouts) -> Self {
        let LenderTimeouts { unclaimed, silent, release, stalled } = timeouts;
        Self {
            timeouts,
            clock: SteadyClock::new(unclaimed.min(silent).min(release).min(stalled) / 4),
            entries: (0..slots).map(|_| MailboxEntry { epoch: Epoch::FIRST, loan: None }).collect(),
            free: (0..slots).rev().map(MailboxSlot).collect(),
            open: Vec::with_capacity(slots as usize),
            by_handoff: HashMap::with_capacity(slots as usize),
        }
    }

    /// Lends pages under a fresh `handoff`; then put the job on the queue. With no slot free they come back at once.
    pub fn lend(&mut self, handoff: HandoffId, request: R, pages: P, now: Duration) -> Result<MailboxSlot, P> {
        debug_assert!(!self.by_handoff.contains_key(&handoff), "{handoff} was lent before");
        let Some(slot) = self.free.pop() else { return Err(pages) };
        let deadline = self.clock.advance(now) + self.timeouts.unclaimed;
        self.entry(slot).loan = Some(Loan { handoff, pages, state: State::Queued { request }, deadline });
        self.open.push(slot);
        self.by_handoff.insert(handoff, slot);
        Ok(slot)
    }

    /// Lends pages to a session that measures: it may write to them at once, nobody reads them, and they come back as
    /// those of a loan in quarantine do. One such loan at a time, and none if no slot is free: then they come back.
    pub fn lend_scratch(
        &mut self,
        session: SessionId,
        worker: WorkerId,
        handoff: HandoffId,
        pages: P,
        now: Duration,
    ) -> Result<(MailboxSlot, Epoch), P> {
        debug_assert!(!self.by_handoff.contains_key(&handoff), "{handoff} was lent before");
        if self.measures() {
            return Err(pages);
        }
        let Some(slot) = self.free.pop() else { return Err(pages) };
        let deadline = self.clock.advance(now) + self.timeouts.silent;
        let state = State::Scratch { holder: Holder { session, worker } };
        let entry = self.entry(slot);
        entry.loan = Some(Loan { handoff, pages, state, deadline });
        let epoch = entry.epoch;
        self.open.push(slot);
        self.by_handoff.insert(handoff, slot);
        Ok((slot, epoch))
    }

    /// Whether pages are lent to somebody who measures.
    pub fn measures(&self) -> bool {
        let loans = self.open.iter().filter_map(|slot| self.entries[slot.0 as usize].loan.as_ref());
        loans.into_iter().any(|loan| matches!(loan.state, State::Scratch { .. }))
    }

    /// The pages lent under `slot`, whose numbers go into the grant.
    pub fn pages(&self, slot: MailboxSlot) -> Option<&P> {
        self.entries.get(slot.0 as usize)?.loan.as_ref().map(|loan| &loan.pages)
    }

    /// The pages of a loan that nobody has claimed yet, to add to what goes with them.
    pub fn unclaimed_mut(&mut self, handoff: HandoffId) -> Option<&mut P> {
        let &slot = self.by_handoff.get(&handoff)?;
        let loan = self.entry(slot).loan.as_mut()?;
        matches!(loan.state, State::Queued { .. }).then_some(&mut loan.pages)
    }

    /// Every lent page, for the integrity check: `true` for those in quarantine, as are those of who measures.
    pub fn lent(&self) -> impl Iterator<Item = (&P, bool)> {
        self.open.iter().filter_map(|slot| self.entries[slot.0 as usize].loan.as_ref()).map(|loan| {
            let quarantined = matches!(loan.state, State::Quarantined { .. } | State::Scratch { .. });
            (&loan.pages, quarantined)
        })
    }

    /// Loans that are open, those in quarantine included.
    pub fn open(&self) -> usize {
        self.open.len()
    }

    /// Whether [`lend`](Self::lend) has a slot left.
    pub fn can_lend(&self) -> bool {
        !self.free.is_empty()
    }

    /// Looks into the mailbox: `load` reads a slot's word, with acquire ordering, so that the data it vouches for is
    /// visible too. Between any two steps of the engine; best before [`on`](Self::on), since a worker that completes
    /// and leaves does so in this order.
    pub fn poll(
        &mut self,
        load: impl Fn(MailboxSlot) -> MailboxWord,
        now: Duration,
        actions: &mut Vec<LenderAction<R, P>>,
    ) {
        self.clock.advance(now);
        // Backwards, because resolving takes the slot out of the list.
        for place in (0..self.open.len()).rev() {
            let slot = self.open[place];
            let MailboxEntry { epoch, loan: Some(loan) } = &self.entries[slot.0 as usize] else { continue };
            // Nobody was granted a queued loan, so no word can be its own.
            if matches!(loan.state, State::Queued { .. }) {
                continue;
            }
            match load(slot).status_of(*epoch) {
                Some(Status::Done) => self.resolve(slot, Outcome::Completed, actions),
                Some(Status::Failed) => self.resolve(slot, Outcome::Failed, actions),
                None => {}
            }
        }
    }

    /// Takes in what happened, and adds what is to be done about it.
    pub fn on(&mut self, event: LenderEvent, now: Duration, actions: &mut Vec<LenderAction<R, P>>) {
        let now = self.clock.advance(now);
        match event {
            // It may be on the queue nevertheless: then its claim is refused, or it has been claimed and all is well.
            LenderEvent::EnqueueFailed { handoff } => self.expire(handoff, true, actions),
            LenderEvent::JobGone { handoff } => self.not_claimed(handoff, actions),
            LenderEvent::Withdraw { handoff } => self.withdraw(handoff, now, actions),
            LenderEvent::Message { session, worker, message } => {
                self.message(Holder { session, worker }, message, now, actions);
            }
            LenderEvent::Revoked { session, slot, epoch } => {
                if self.is_lent(slot, epoch, session) {
                    self.resolve(slot, Outcome::Released, actions);
                }
            }
            LenderEvent::SessionClosed { session } => {
                for slot in self.held_by(|holder| holder.session == session) {
                    self.quarantine(slot, actions);
                    // The transport is fencing it already.
                    self.set_deadline(slot, Duration::MAX);
                }
            }
            LenderEvent::SessionFenced { session } => {
                for slot in self.held_by(|holder| holder.session == session) {
                    self.resolve(slot, Outcome::Fenced, actions);
                }
            }
            LenderEvent::WorkerGone { worker } => {
                for slot in self.held_by(|holder| holder.worker == worker) {
                    self.give_up(slot, now, actions);
                }
            }
            LenderEvent::Tick => self.tick(now, actions),
        }
    }

    fn message(&mut self, from: Holder, message: ToDecode, now: Duration, actions: &mut Vec<LenderAction<R, P>>) {
        match message {
            ToDecode::Claim { handoff } => self.claim(from, handoff, now, actions),
            // The pages would have to come from somewhere: see `lend_scratch`.
            ToDecode::Measure { .. } => {}
            ToDecode::Progress { handoff, epoch, moved: mark } => {
                let Some(slot) = self.granted(handoff, epoch, from) else { return };
                let LenderTimeouts { silent, stalled, .. } = self.timeouts;
                let Some(Loan { state: State::Granted { moved, .. }, deadline, .. }) = &mut self.entry(slot).loan
                else {
                    return;
                };
                if mark != moved.mark {
                    *moved = Moved { mark, due: now + stalled };
                }
                *deadline = moved.due.min(now + silent);
            }
            ToDecode::Released { handoff, epoch } => {
                self.given_back(from, handoff, epoch, Outcome::Released, actions);
            }
            ToDecode::Failed { handoff, epoch, .. } => {
                self.given_back(from, handoff, epoch, Outcome::Failed, actions);
            }
        }
    }

    /// The holder says that it writes no more. A transport that writes for it has not heard that, and is told.
    fn given_back(
        &mut self,
        from: Holder,
        handoff: HandoffId,
        epoch: Epoch,
        outcome: Outcome,
        actions: &mut Vec<LenderAction<R, P>>,
    ) {
        if let Some(slot) = self.granted(handoff, epoch, from) {
            actions.push(LenderAction::Forget { session: from.session, slot, epoch });
            self.resolve(slot, outcome, actions);
        }
    }

    /// The one place where somebody is allowed to write.
    fn claim(&mut self, holder: Holder, handoff: HandoffId, now: Duration, actions: &mut Vec<LenderAction<R, P>>) {
        let Holder { session, .. } = holder;
        let Some(&slot) = self.by_handoff.get(&handoff) else {
            actions.push(LenderAction::Gone { session, handoff, why: Gone::Unknown });
            return;
        };
        let LenderTimeouts { silent, stalled, .. } = self.timeouts;
        let MailboxEntry { epoch, loan: Some(loan) } = &mut self.entries[slot.0 as usize] else { return };
        let State::Queued { request } = loan.state else {
            actions.push(LenderAction::Gone { session, handoff, why: Gone::Claimed });
            return;
        };
        loan.state = State::Granted { request, holder, moved: Moved { mark: 0, due: now + stalled } };
        loan.deadline = now + silent.min(stalled);
        actions.push(LenderAction::Grant { session, handoff, slot, epoch: *epoch, request });
    }

    fn withdraw(&mut self, handoff: HandoffId, now: Duration, actions: &mut Vec<LenderAction<R, P>>) {
        let Some(&slot) = self.by_handoff.get(&handoff) else { return };
        let Some(loan) = &mut self.entry(slot).loan else { return };
        match loan.state {
            State::Queued { .. } => self.expire(handoff, false, actions),
            State::Granted { holder, .. } => {
                // Nobody to restart: the request is forgotten before the loan is given up.
                loan.state = State::Quarantined { holder };
                self.reclaim(slot, holder.session, now, actions);
            }
            State::Quarantined { .. } | State::Scratch { .. } => {}
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<LenderAction<R, P>>) {
        for place in (0..self.open.len()).rev() {
            let slot = self.open[place];
            let Some(loan) = &mut self.entries[slot.0 as usize].loan else { continue };
            if now < loan.deadline {
                continue;
            }
            match loan.state {
                State::Queued { .. } => {
                    let handoff = loan.handoff;
                    self.not_claimed(handoff, actions);
                }
                State::Granted { .. } => self.give_up(slot, now, actions),
                State::Quarantined { holder } | State::Scratch { holder } => {
                    loan.deadline = Duration::MAX;
                    actions.push(LenderAction::Fence { session: holder.session });
                }
            }
        }
    }

    /// Ends a loan that somebody should have claimed, unless somebody has.
    fn not_claimed(&mut self, handoff: HandoffId, actions: &mut Vec<LenderAction<R, P>>) {
        if self.unclaimed_mut(handoff).is_some() {
            actions.push(LenderAction::Unclaimed { handoff });
            self.expire(handoff, true, actions);
        }
    }

    /// Ends a loan that nobody was granted; its pages are as good as never lent.
    fn expire(&mut self, handoff: HandoffId, restart: bool, actions: &mut Vec<LenderAction<R, P>>) {
        let Some(&slot) = self.by_handoff.get(&handoff) else { return };
        let Some(Loan { state: State::Queued { request }, .. }) = self.entry(slot).loan else { return };
        let Some(Loan { pages, .. }) = self.close(slot) else { return };
        actions.push(match restart {
            true => LenderAction::Restart { request, pages: Some(pages), again: false },
            false => LenderAction::Free { pages },
        });
        actions.push(LenderAction::Count(Outcome::Expired));
    }

    /// The request goes on without its holder, whose pages are asked back.
    fn give_up(&mut self, slot: MailboxSlot, now: Duration, actions: &mut Vec<LenderAction<R, P>>) {
        if let Some(holder) = self.quarantine(slot, actions) {
            self.reclaim(slot, holder.session, now, actions);
        }
    }

    /// Parts a granted loan from its request: the latter restarts, the pages stay. `None` if that was done before.
    fn quarantine(&mut self, slot: MailboxSlot, actions: &mut Vec<LenderAction<R, P>>) -> Option<Holder> {
        let loan = self.entry(slot).loan.as_mut()?;
        let State::Granted { request, holder, .. } = loan.state else { return None };
        loan.state = State::Quarantined { holder };
        actions.push(LenderAction::Restart { request, pages: None, again: true });
        Some(holder)
    }

    fn reclaim(&mut self, slot: MailboxSlot, session: SessionId, now: Duration, actions: &mut Vec<LenderAction<R, P>>) {
        self.set_deadline(slot, now + self.timeouts.release);
        let MailboxEntry { epoch, loan: Some(loan) } = &self.entries[slot.0 as usize] else { return };
        actions.push(LenderAction::Reclaim { session, handoff: loan.handoff, slot, epoch: *epoch });
    }

    /// The end of a granted loan, and the one place where pages that somebody could write to are let go. Its callers
    /// are the three resolutions: a mailbox word of the loan's epoch or a message of its holder (who then writes no
    /// more), a revocation, and a fence (after which it cannot).
    fn resolve(&mut self, slot: MailboxSlot, outcome: Outcome, actions: &mut Vec<LenderAction<R, P>>) {
        let Some(Loan { pages, state, .. }) = self.close(slot) else { return };
        actions.push(match state {
            State::Granted { request, .. } if outcome == Outcome::Completed => LenderAction::Resume { request, pages },
            State::Granted { request, .. } | State::Queued { request } => {
                LenderAction::Restart { request, pages: Some(pages), again: outcome != Outcome::Failed }
            }
            State::Quarantined { .. } | State::Scratch { .. } => LenderAction::Free { pages },
        });
        if matches!(state, State::Scratch { .. }) {
            // No handoff has ended.
            return;
        }
        // Pages that nobody waited for served nobody, however their holder ended.
        let ended = matches!(outcome, Outcome::Completed | Outcome::Failed);
        let abandoned = matches!(state, State::Quarantined { .. }) && ended;
        actions.push(LenderAction::Count(if abandoned { Outcome::Released } else { outcome }));
    }

    /// Takes the loan out of its slot, whose next loan is of another epoch.
    fn close(&mut self, slot: MailboxSlot) -> Option<Loan<R, P>> {
        let entry = self.entry(slot);
        let loan = entry.loan.take()?;
        entry.epoch = entry.epoch.next();
        self.by_handoff.remove(&loan.handoff);
        self.open.retain(|&open| open != slot);
        self.free.push(slot);
        Some(loan)
    }

    fn entry(&mut self, slot: MailboxSlot) -> &mut MailboxEntry<R, P> {
        &mut self.entries[slot.0 as usize]
    }

    fn set_deadline(&mut self, slot: MailboxSlot, deadline: Duration) {
        if let Some(loan) = &mut self.entry(slot).loan {
            loan.deadline = deadline;
        }
    }

    /// The slot of a loan that `holder` was granted under this name and epoch.
    fn granted(&self, handoff: HandoffId, epoch: Epoch, holder: Holder) -> Option<MailboxSlot> {
        let slot = *self.by_handoff.get(&handoff)?;
        self.is_lent(slot, epoch, holder.session).then_some(slot)
    }

    /// Whether the slot's present loan is of this epoch and was granted on this session.
    fn is_lent(&self, slot: MailboxSlot, epoch: Epoch, session: SessionId) -> bool {
        let Some(entry) = self.entries.get(slot.0 as usize) else { return false };
        entry.epoch == epoch
            && entry.loan.as_ref().and_then(Loan::holder).is_some_and(|holder| holder.session == session)
    }

    /// Slots of the loans whose holder is like this.
    fn held_by(&self, like: impl Fn(Holder) -> bool) -> Vec<MailboxSlot> {
        let holder = |slot: &MailboxSlot| self.entries[slot.0 as usize].loan.as_ref().and_then(Loan::holder);
        self.open.iter().copied().filter(|slot| holder(slot).is_some_and(&like)).collect()
    }
}

impl<R: Copy, P> Loan<R, P> {
    /// Who may write to its pages.
    fn holder(&self) -> Option<Holder> {
        match self.state {
            State::Queued { .. } => None,
            State::Granted { holder, .. } | State::Quarantined { holder } | State::Scratch { holder } => Some(holder),
        }
    }
}
