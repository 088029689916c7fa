//! The prefill worker's side, a state machine.

use std::{collections::BTreeMap, time::Duration};

use super::{
    Epoch, Grant, HandoffId, Job, MailboxSlot, MailboxWord, SessionId, Status, ToDecode, ToPrefill, WorkerId,
    clock::SteadyClock,
};

mod interface;
#[cfg(test)]
mod tests;

pub use interface::{BorrowerAction, BorrowerConfig, BorrowerEvent, BorrowerTimeouts, DeliveryId};

/// The prefill worker's side of all its handoffs: from a job on the queue to a word in the decode worker's mailbox.
///
/// ```text
///  deliver        connected       granted                 all computed         posted
///  ────────▶ Connecting ──▶ Claimed ──▶ Granted, computing ──▶ Granted, posting ──▶ acked
///                 │             │            │
///                 │ failed      │ gone       │ asked to release, failed: cancelled,
///                 ▼             ▼            ▼ until no write is under way
///               nak            ack        released, acked
/// ```
///
/// Two promises keep the decode worker's pages safe. *Complete* goes to the writer behind the last write, and the
/// writer keeps order. *Released* and *Failed* are said only once every write that was begun has ended, for they are
/// what lets the decode worker use its pages again.
///
/// A job is acked when it can do no more good: its word is posted, its claim was refused, or its one grant was used up.
/// Before that it goes back to the queue, for another worker to try.
#[derive(Debug)]
pub struct Borrower {
    config: BorrowerConfig,
    clock: SteadyClock,
    // Sorted, so that the same events give the same actions in the same order, in every run.
    jobs: BTreeMap<HandoffId, Held>,
    peers: BTreeMap<WorkerId, Peer>,
    draining: bool,
    /// Chunks computed so far, of all prompts; begins again at 0.
    chunks: u32,
    /// Writes that ended so far, likewise.
    writes: u32,
    /// Jobs that something happens to; kept to be filled again.
    scratch: Vec<HandoffId>,
}

#[derive(Debug)]
struct Held {
    /// The latest one.
    delivery: DeliveryId,
    attempt: u32,
    decode: WorkerId,
    stage: Stage,
    /// When the next sign of life is due, in steady time.
    alive_due: Duration,
}

#[derive(Debug)]
enum Stage {
    /// Until there is a session to its decode worker.
    Connecting,
    /// Asked, and not yet answered.
    Claimed { session: SessionId, deadline: Duration },
    /// In possession of the grant.
    Granted(Work),
}

#[derive(Debug)]
struct Work {
    session: SessionId,
    slot: MailboxSlot,
    epoch: Epoch,
    /// Tokens to compute, from 0.
    wanted: u32,
    /// Writes given to the writer, the word included, of which it has not said that they ended.
    writing: u64,
    end: Option<End>,
}

/// How the work ends, once that is settled.
#[derive(Debug)]
enum End {
    /// The word is with the writer.
    Posting,
    /// Asked to stop, or unable to go on.
    Released,
    /// The prompt is beyond this worker.
    Failed(String),
}

/// A decode worker, as far as sessions go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Peer {
    Connecting,
    Open(SessionId),
}

impl Borrower {
    /// A worker without jobs.
    pub fn new(config: BorrowerConfig) -> Self {
        let BorrowerTimeouts { claim, keep_alive } = config.timeouts;
        Self {
            clock: SteadyClock::new(claim.min(keep_alive) / 2),
            jobs: BTreeMap::new(),
            peers: BTreeMap::new(),
            draining: false,
            chunks: 0,
            writes: 0,
            scratch: Vec::with_capacity(config.jobs_max),
            config,
        }
    }

    /// How many jobs may be pulled from the queue now.
    pub fn room(&self) -> usize {
        if self.draining { 0 } else { self.config.jobs_max.saturating_sub(self.jobs.len()) }
    }

    /// The key of its jobs.
    pub fn model_key(&self) -> &str {
        &self.config.model_key
    }

    /// Jobs held.
    pub fn held(&self) -> usize {
        self.jobs.len()
    }

    /// Whether it holds a job of this decode worker.
    pub fn holds_of(&self, decode: WorkerId) -> bool {
        self.jobs.values().any(|held| held.decode == decode)
    }

    /// Takes in a job from the queue, delivered for the `attempt`th time, counted from 1.
    pub fn deliver(
        &mut self,
        delivery: DeliveryId,
        attempt: u32,
        payload: &[u8],
        now: Duration,
        actions: &mut Vec<BorrowerAction>,
    ) {
        let now = self.clock.advance(now);
        let job = match Job::decode(payload, &self.config.model_key) {
            Ok(job) => job,
            Err(error) => {
                actions.push(BorrowerAction::Refuse { delivery, error });
                actions.push(BorrowerAction::Ack { delivery });
                return;
            }
        };
        if let Some(held) = self.jobs.get_mut(&job.handoff) {
            let delivery = std::mem::replace(&mut held.delivery, delivery);
            actions.push(BorrowerAction::Forget { delivery });
            return;
        }
        if self.room() == 0 {
            actions.push(BorrowerAction::Nak { delivery, delay: Duration::ZERO });
            return;
        }
        let (handoff, decode) = (job.handoff, job.decode);
        let alive_due = now + self.config.timeouts.keep_alive;
        self.jobs.insert(handoff, Held { delivery, attempt, decode, stage: Stage::Connecting, alive_due });
        match self.peers.get(&decode) {
            Some(&Peer::Open(session)) => self.claim(handoff, session, now, actions),
            Some(Peer::Connecting) => {}
            None => {
                self.peers.insert(decode, Peer::Connecting);
                actions.push(BorrowerAction::Connect { decode, addresses: job.addresses });
            }
        }
    }

    /// Takes in what happened, and adds what is to be done about it.
    pub fn on(&mut self, event: BorrowerEvent, now: Duration, actions: &mut Vec<BorrowerAction>) {
        let now = self.clock.advance(now);
        match event {
            BorrowerEvent::Connected { decode, session } => {
                self.peers.insert(decode, Peer::Open(session));
                for handoff in self.select(|held| held.decode == decode && matches!(held.stage, Stage::Connecting)) {
                    self.claim(handoff, session, now, actions);
                }
            }
            BorrowerEvent::ConnectFailed { decode, gone, pause } => {
                self.peers.remove(&decode);
                for handoff in self.select(|held| held.decode == decode && matches!(held.stage, Stage::Connecting)) {
                    if gone { self.ack(handoff, actions) } else { self.nak(handoff, pause, actions) }
                }
            }
            BorrowerEvent::Message { session, message } => self.message(session, message, now, actions),
            BorrowerEvent::SessionClosed { session } => self.session_closed(session, actions),
            BorrowerEvent::Writing { handoff, writes } => {
                if let Some(work) = self.work(handoff) {
                    work.writing += writes;
                }
            }
            BorrowerEvent::Wrote { handoff, writes } => {
                self.writes = self.writes.wrapping_add(writes as u32);
                if let Some(work) = self.work(handoff) {
                    work.writing = work.writing.saturating_sub(writes);
                    self.finish_stopping(handoff, actions);
                }
            }
            BorrowerEvent::Computed { handoff, tokens } => self.computed(handoff, tokens, actions),
            BorrowerEvent::WriteFailed { handoff } => {
                if let Some(work) = self.work(handoff) {
                    work.writing = work.writing.saturating_sub(1);
                    // The word, if it was on its way, will not be posted.
                    work.end.take_if(|end| matches!(end, End::Posting));
                    self.stop(handoff, End::Released, actions);
                    self.finish_stopping(handoff, actions);
                }
            }
            BorrowerEvent::Refused { handoff, reason } => self.stop(handoff, End::Failed(reason), actions),
            BorrowerEvent::ComputeFailed { handoff } => self.stop(handoff, End::Released, actions),
            BorrowerEvent::Posted { handoff } => {
                if self.work(handoff).is_some_and(|work| matches!(work.end, Some(End::Posting))) {
                    self.ack(handoff, actions);
                }
            }
            BorrowerEvent::Drain => {
                self.draining = true;
                for handoff in self.select(|held| !matches!(held.stage, Stage::Granted(_))) {
                    if let Some(Held { delivery, .. }) = self.jobs.remove(&handoff) {
                        actions.push(BorrowerAction::Nak { delivery, delay: Duration::ZERO });
                    }
                }
            }
            BorrowerEvent::Tick => self.tick(now, actions),
        }
    }

    fn claim(&mut self, handoff: HandoffId, session: SessionId, now: Duration, actions: &mut Vec<BorrowerAction>) {
        let deadline = now + self.config.timeouts.claim;
        if let Some(held) = self.jobs.get_mut(&handoff) {
            held.stage = Stage::Claimed { session, deadline };
            actions.push(BorrowerAction::Send { session, message: ToDecode::Claim { handoff } });
        }
    }

    fn message(&mut self, from: SessionId, message: ToPrefill, now: Duration, actions: &mut Vec<BorrowerAction>) {
        match message {
            ToPrefill::Grant(grant) => self.granted(from, grant, now, actions),
            ToPrefill::Gone { handoff, .. } => {
                let stage = self.jobs.get(&handoff).map(|held| &held.stage);
                if matches!(stage, Some(Stage::Claimed { session, .. }) if *session == from) {
                    self.ack(handoff, actions);
                }
            }
            ToPrefill::Release { handoff, epoch } => {
                if self.work(handoff).is_some_and(|work| work.session == from && work.epoch == epoch) {
                    self.stop(handoff, End::Released, actions);
                }
            }
            // Sessions with jobs do not measure.
            ToPrefill::Scratch { .. } | ToPrefill::NoScratch => {}
        }
    }

    fn granted(&mut self, session: SessionId, grant: Grant, now: Duration, actions: &mut Vec<BorrowerAction>) {
        let (handoff, epoch) = (grant.handoff, grant.epoch);
        let alive_due = now + self.config.timeouts.keep_alive;
        let wrong = grant.check(self.config.block_size).err();
        match self.jobs.get_mut(&handoff) {
            Some(held) if matches!(held.stage, Stage::Claimed { session: claimed, .. } if claimed == session) => {
                if let Some(wrong) = wrong {
                    let message = ToDecode::Failed { handoff, epoch, reason: wrong.to_string() };
                    actions.push(BorrowerAction::Send { session, message });
                    self.ack(handoff, actions);
                    return;
                }
                let wanted = grant.tokens.len() as u32;
                let work = Work { session, slot: grant.slot, epoch, wanted, writing: 0, end: None };
                held.stage = Stage::Granted(work);
                held.alive_due = alive_due;
                actions.push(BorrowerAction::Prefill { session, grant });
            }
            // To say "released" while writing under the grant would be a lie, and pages would pay for it.
            Some(Held { stage: Stage::Granted(work), .. }) if work.epoch == epoch && work.session == session => {}
            // The claim was given up before its answer came.
            _ => actions.push(BorrowerAction::Send { session, message: ToDecode::Released { handoff, epoch } }),
        }
    }

    fn computed(&mut self, handoff: HandoffId, tokens: u32, actions: &mut Vec<BorrowerAction>) {
        self.chunks = self.chunks.wrapping_add(1);
        let moved = self.moved(false);
        let Some(work @ Work { end: None, .. }) = self.work(handoff) else { return };
        let &mut Work { session, slot, epoch, wanted, .. } = work;
        actions.push(BorrowerAction::Send { session, message: ToDecode::Progress { handoff, epoch, moved } });
        if tokens >= wanted {
            work.end = Some(End::Posting);
            // Until it is answered, the word too is a write that could be under way.
            work.writing += 1;
            let word = MailboxWord::new(epoch, Status::Done);
            actions.push(BorrowerAction::Complete { session, handoff, slot, word });
        }
    }

    /// How far this worker is, as a sign of life says it: another number once anything has moved that the prompt may be
    /// waiting for. Chunks and writes of all prompts count, since a prompt that waits for those before it does not
    /// hang. One whose pages are all with the writer (`posting`) waits for writes alone.
    fn moved(&self, posting: bool) -> u32 {
        if posting { self.writes } else { self.writes.wrapping_add(self.chunks) }
    }

    /// Begins to stop, unless the end is settled. A word that is with the writer already says the same as a release.
    fn stop(&mut self, handoff: HandoffId, end: End, actions: &mut Vec<BorrowerAction>) {
        let Some(work @ Work { end: None, .. }) = self.work(handoff) else { return };
        work.end = Some(end);
        actions.push(BorrowerAction::Cancel { handoff });
        self.finish_stopping(handoff, actions);
    }

    /// Gives the pages back, if the work was stopped and none of its writes is under way.
    fn finish_stopping(&mut self, handoff: HandoffId, actions: &mut Vec<BorrowerAction>) {
        let Some(Work { session, epoch, writing: 0, end: Some(end), .. }) = self.work(handoff) else { return };
        let (session, epoch) = (*session, *epoch);
        let message = match end {
            End::Posting => return,
            End::Released => ToDecode::Released { handoff, epoch },
            End::Failed(reason) => ToDecode::Failed { handoff, epoch, reason: std::mem::take(reason) },
        };
        actions.push(BorrowerAction::Send { session, message });
        self.ack(handoff, actions);
    }

    fn session_closed(&mut self, closed: SessionId, actions: &mut Vec<BorrowerAction>) {
        self.peers.retain(|_, peer| *peer != Peer::Open(closed));
        for handoff in self.select(|held| held.session() == Some(closed)) {
            if self.work(handoff).is_some() {
                // The grant went with the session, and there will be no other.
                actions.push(BorrowerAction::Cancel { handoff });
                self.ack(handoff, actions);
            } else {
                self.nak(handoff, Duration::ZERO, actions);
            }
        }
    }

    fn tick(&mut self, now: Duration, actions: &mut Vec<BorrowerAction>) {
        let (computing, posting) = (self.moved(false), self.moved(true));
        for (&handoff, held) in &mut self.jobs {
            match &held.stage {
                Stage::Claimed { deadline, .. } if now >= *deadline => self.scratch.push(handoff),
                _ if now < held.alive_due => {}
                stage => {
                    actions.push(BorrowerAction::InProgress { delivery: held.delivery });
                    // Whoever stops says so when the last write has ended; until then there is nothing to wait for.
                    if let Stage::Granted(Work { session, epoch, end: end @ (None | Some(End::Posting)), .. }) = stage {
                        let moved = if end.is_some() { posting } else { computing };
                        let message = ToDecode::Progress { handoff, epoch: *epoch, moved };
                        actions.push(BorrowerAction::Send { session: *session, message });
                    }
                    held.alive_due = now + self.config.timeouts.keep_alive;
                }
            }
        }
        while let Some(handoff) = self.scratch.pop() {
            self.nak(handoff, Duration::ZERO, actions);
        }
    }

    fn ack(&mut self, handoff: HandoffId, actions: &mut Vec<BorrowerAction>) {
        if let Some(Held { delivery, .. }) = self.jobs.remove(&handoff) {
            actions.push(BorrowerAction::Ack { delivery });
        }
    }

    /// Back to the queue, for longer each time, and for `pause` at least: the queue delivers a job only so often, and
    /// no delivery is to be wasted.
    fn nak(&mut self, handoff: HandoffId, pause: Duration, actions: &mut Vec<BorrowerAction>) {
        if let Some(Held { delivery, attempt, .. }) = self.jobs.remove(&handoff) {
            let delay = pause.max(Duration::from_millis(100 << attempt.clamp(1, 6)));
            actions.push(BorrowerAction::Nak { delivery, delay });
        }
    }

    fn work(&mut self, handoff: HandoffId) -> Option<&mut Work> {
        match &mut self.jobs.get_mut(&handoff)?.stage {
            Stage::Granted(work) => Some(work),
            _ => None,
        }
    }

    fn select(&self, like: impl Fn(&Held) -> bool) -> Vec<HandoffId> {
        self.jobs.iter().filter(|(_, held)| like(held)).map(|(&handoff, _)| handoff).collect()
    }
}

impl Held {
    fn session(&self) -> Option<SessionId> {
        match &self.stage {
            Stage::Connecting => None,
            Stage::Claimed { session, .. } | Stage::Granted(Work { session, .. }) => Some(*session),
        }
    }
}
