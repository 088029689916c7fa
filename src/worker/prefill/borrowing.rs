//! The prefill worker's handoffs: carries out what the [`Borrower`] decides.
//!
//! The engine thread passes pages on under the same lock under which it is decided to stop: so what was cancelled gets
//! no further write, and what is told to a decode worker about writes under way is true.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
};
use tracing::{Instrument, Span, field::Empty};

use super::grant_exporter::GrantExporter;
use crate::{
    cluster::{Delivery, WorkerSet},
    engine::{EngineHandle, PrefillHandle, PrefillRequest, SubmitError},
    handoff::{
        Borrower, BorrowerAction, BorrowerEvent, DeliveryId, Grant, HandoffId, Job, SessionId, ToDecode, WorkerId,
    },
    telemetry::{HandoffMetrics, HandoffPhase, TraceContext},
    transfer::{Session, WriteError, Writer},
};

/// Unit of the rest: it is twice this after the first session that could not be opened, and doubles with each further
/// one, [`RESTS_GROW`] doublings at most.
const REST: Duration = Duration::from_millis(500);
/// Times that the rest grows. A job that comes back each time is taken for the sixth time, and is dead, after 31 s: its
/// decode worker no longer waits for it then ([`LenderTimeouts::unclaimed`](crate::handoff::LenderTimeouts)).
const RESTS_GROW: u32 = 5;
/// Times that it grows where some decode worker was not tried: it may be within reach, and its jobs wait no longer.
const RESTS_GROW_UNTRIED: u32 = 3;

/// What to do with a delivery of the queue.
#[derive(Debug)]
enum Verdict {
    Ack,
    Nak(Duration),
    InProgress,
    /// Say nothing more about it.
    Forget,
    Bury(String),
}

/// Something for [`Borrowing`] that comes from where its lock must not be taken.
#[derive(Debug)]
pub(super) enum Note {
    /// A write ended; since when its pages were computed.
    Wrote { handoff: HandoffId, result: Result<Instant, WriteError> },
    /// A mailbox word was written, or not.
    Posted { handoff: HandoffId, result: Result<(), WriteError> },
    /// The engine computes no more of a prompt.
    Ended { handoff: HandoffId },
    /// A session is to be opened.
    Connect { decode: WorkerId, addresses: serde_json::Value },
}

/// All handoffs of a prefill worker.
pub(super) struct Borrowing {
    /// Itself, for whoever passes on pages from the engine thread.
    me: Weak<Mutex<Borrowing>>,
    borrower: Borrower,
    engine: EngineHandle,
    actions: Vec<BorrowerAction>,
    /// Events that follow from actions.
    follow_ups: VecDeque<BorrowerEvent>,
    deliveries: HashMap<DeliveryId, Held>,
    /// Tell the queue what becomes of them.
    settling: JoinSet<()>,
    next_delivery: u64,
    sessions: HashMap<SessionId, Writer>,
    /// Decode workers that no session could be opened to, and how often that was so, since one was opened to anybody.
    missed: HashSet<WorkerId>,
    misses: u32,
    /// The last of them had been among them before.
    again: bool,
    /// A session was opened to somebody.
    reached: bool,
    prompts: HashMap<HandoffId, Prompt>,
    notes: mpsc::UnboundedSender<Note>,
    /// Notified whenever there may be room for a job.
    room: Arc<Notify>,
    started: Instant,
    block_size: usize,
    layers: usize,
    metrics: HandoffMetrics,
}

/// A job that the queue delivered.
struct Held {
    verdicts: mpsc::UnboundedSender<Verdict>,
    /// `None` if it cannot be read.
    handoff: Option<HandoffId>,
    /// Tokens still to be computed, at most.
    tokens: usize,
    claimed: Option<Instant>,
    /// Lasts as long as the job is here, and is part of the request's trace.
    span: Span,
}

/// A prompt that is being computed, or whose pages are being written.
struct Prompt {
    /// Keeps the pages.
    pages: PrefillHandle,
    granted: Instant,
    /// Since when all pages are computed whose writes were answered.
    computed: Instant,
    /// Whether all are with the writer, and the word behind them.
    is_passed_on: bool,
    /// Whether nothing more is to be written.
    over: bool,
    /// Writes under way.
    writing: u64,
}

/// The same for the engine thread and the tasks.
pub(super) type SharedBorrowing = Arc<Mutex<Borrowing>>;

pub(super) fn lock(borrowing: &Mutex<Borrowing>) -> MutexGuard<'_, Borrowing> {
    // A panic while holding it fails that handoff, which times out; the others are whole.
    borrowing.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Borrowing {
    pub(super) fn new(
        borrower: Borrower,
        engine: EngineHandle,
        layers: usize,
        metrics: HandoffMetrics,
    ) -> (SharedBorrowing, mpsc::UnboundedReceiver<Note>) {
        let (notes, received) = mpsc::unbounded_channel();
        let borrowing = Arc::new_cyclic(|me| {
            Mutex::new(Self {
                me: me.clone(),
                borrower,
                block_size: engine.config().block_size,
                engine,
                actions: Vec::new(),
                follow_ups: VecDeque::new(),
                deliveries: HashMap::new(),
                settling: JoinSet::new(),
                next_delivery: 0,
                sessions: HashMap::new(),
                missed: HashSet::new(),
                misses: 0,
                again: false,
                reached: false,
                prompts: HashMap::new(),
                notes,
                room: Arc::default(),
                started: Instant::now(),
                layers,
                metrics,
            })
        });
        (borrowing, received)
    }

    /// Notified whenever there may be room for a job.
    pub(super) fn room_changed(&self) -> Arc<Notify> {
        self.room.clone()
    }

    /// Whether to take another job: one at a time, unless they are so short that several fit one step. What waits in
    /// the queue can go to any worker; what is here cannot. And one at a time as long as it is in doubt whether any
    /// can be done here, as it is before the first session.
    pub(super) fn has_room(&self) -> bool {
        let tokens: usize = self.deliveries.values().map(|held| held.tokens).sum();
        let room = self.borrower.room() > 0 && tokens < self.engine.config().max_num_batched_tokens;
        room && (self.reached && !self.is_in_doubt() || self.deliveries.is_empty())
    }

    /// How long not to ask for a job, those decode workers being alive. Who reaches none of them gives each job back at
    /// once, and being the only one with nothing to do would get it again and again, until it is taken for one that
    /// kills its workers. Some decode workers may never have jobs to be tried by: that one was missed twice is enough.
    pub(super) fn rest(&self, alive: &WorkerSet) -> Duration {
        let missed_all = alive.keys().all(|lease| self.missed.contains(lease));
        let grows = if missed_all { RESTS_GROW } else { RESTS_GROW_UNTRIED };
        let rests = self.is_in_doubt() && (missed_all || self.again);
        if rests { REST * (1_u32 << self.misses.min(grows)) } else { Duration::ZERO }
    }

    /// Whether this worker has a session to nobody, and could not open one when it last tried.
    fn is_in_doubt(&self) -> bool {
        self.misses > 0 && self.sessions.is_empty()
    }

    /// No session could be opened to a decode worker that is alive, for all that is known.
    pub(super) fn miss(&mut self, decode: WorkerId) {
        self.again = !self.missed.insert(decode);
        self.misses = self.misses.saturating_add(1);
    }

    /// Whether it holds a job of this decode worker.
    pub(super) fn holds_of(&self, decode: WorkerId) -> bool {
        self.borrower.holds_of(decode)
    }

    /// Jobs held.
    pub(super) fn held(&self) -> usize {
        self.borrower.held()
    }
}

/// What of this worker's log belongs to a job, and to its request's trace if it names one.
fn span(job: &Job) -> Span {
    let trace = job.traceparent.as_ref().and_then(|text| text.parse::<TraceContext>().ok());
    let span = tracing::info_span!("prefill", handoff = %job.handoff, worker = %job.decode, traceparent = Empty);
    if let Some(trace) = trace {
        span.record("traceparent", tracing::field::display(trace));
    }
    span
}

impl Borrowing {
    /// Takes in a job from the queue.
    pub(super) fn deliver(&mut self, delivery: Delivery) {
        let id = DeliveryId(self.next_delivery);
        self.next_delivery += 1;
        let (payload, attempt) = (delivery.payload().clone(), delivery.attempt());
        let job = Job::decode(&payload, self.borrower.model_key()).ok();
        let span = job.as_ref().map_or_else(Span::none, span);
        let (handoff, tokens) = job.map_or((None, 0), |job| (Some(job.handoff), job.prompt_tokens as usize));
        let (verdicts, received) = mpsc::unbounded_channel();
        while self.settling.try_join_next().is_some() {}
        self.settling.spawn(settle(delivery, received).instrument(span.clone()));
        let now = self.started.elapsed();
        let _entered = span.clone().entered();
        tracing::debug!(attempt, "a job");
        self.deliveries.insert(id, Held { verdicts, handoff, tokens, claimed: None, span });
        let Borrowing { borrower, actions, .. } = self;
        borrower.deliver(id, attempt, &payload, now, actions);
        self.perform();
    }

    /// A session is open.
    pub(super) fn connected(&mut self, decode: WorkerId, session: &Session) {
        self.sessions.insert(session.id(), session.writer());
        self.missed.clear();
        self.misses = 0;
        self.again = false;
        self.reached = true;
        self.room.notify_one();
        self.on(BorrowerEvent::Connected { decode, session: session.id() });
    }

    /// A session has ended.
    pub(super) fn disconnected(&mut self, session: SessionId) {
        self.on(BorrowerEvent::SessionClosed { session });
        self.sessions.remove(&session);
    }

    /// Takes in a note, except one that asks for a session.
    pub(super) fn take(&mut self, note: Note) {
        match note {
            Note::Wrote { handoff, result } => self.wrote(handoff, result),
            // The session's end is reported by itself, and ends the job.
            Note::Posted { result: Err(WriteError::Closed), .. } => {}
            Note::Posted { handoff, result: Ok(()) } => self.posted(handoff),
            // Such as of a loan that was taken back.
            Note::Posted { handoff, result: Err(error) } => {
                self.log(handoff, &error);
                self.on(BorrowerEvent::WriteFailed { handoff });
            }
            Note::Ended { handoff } => self.ended(handoff),
            Note::Connect { .. } => {}
        }
    }

    /// Takes in what happened.
    pub(super) fn on(&mut self, event: BorrowerEvent) {
        self.borrower.on(event, self.started.elapsed(), &mut self.actions);
        self.perform();
    }

    fn perform(&mut self) {
        loop {
            for action in std::mem::take(&mut self.actions) {
                self.act(action);
            }
            let Some(event) = self.follow_ups.pop_front() else { return };
            self.borrower.on(event, self.started.elapsed(), &mut self.actions);
        }
    }

    fn act(&mut self, action: BorrowerAction) {
        match action {
            BorrowerAction::Connect { decode, addresses } => self.note(Note::Connect { decode, addresses }),
            BorrowerAction::Send { session, message } => self.send(session, &message),
            BorrowerAction::Prefill { session, grant } => self.prefill(session, grant),
            BorrowerAction::Cancel { handoff } => {
                if let Some(prompt) = self.prompts.get_mut(&handoff) {
                    prompt.over = true;
                    prompt.pages.cancel();
                }
                self.let_go(handoff);
            }
            BorrowerAction::Complete { session, handoff, slot, word } => {
                if let Some(prompt) = self.prompts.get_mut(&handoff) {
                    prompt.is_passed_on = true;
                }
                let (Some(writer), Some(epoch)) = (self.sessions.get(&session), word.epoch()) else { return };
                let notes = self.notes.clone();
                writer.complete(slot, epoch, word, move |result| drop(notes.send(Note::Posted { handoff, result })));
            }
            BorrowerAction::Ack { delivery } => self.settle(delivery, Verdict::Ack),
            BorrowerAction::Nak { delivery, delay } => self.settle(delivery, Verdict::Nak(delay)),
            BorrowerAction::Forget { delivery } => self.settle(delivery, Verdict::Forget),
            BorrowerAction::InProgress { delivery } => {
                if let Some(held) = self.deliveries.get(&delivery) {
                    let _ = held.verdicts.send(Verdict::InProgress);
                }
            }
            BorrowerAction::Refuse { delivery, error } => self.settle(delivery, Verdict::Bury(error.to_string())),
        }
    }

    /// Says the last word about a delivery.
    fn settle(&mut self, delivery: DeliveryId, verdict: Verdict) {
        if let Some(held) = self.deliveries.remove(&delivery) {
            let _ = held.verdicts.send(verdict);
            self.room.notify_one();
        }
    }

    fn send(&mut self, session: SessionId, message: &ToDecode) {
        if let ToDecode::Claim { handoff } = message
            && let Some(held) = self.held_for(*handoff)
        {
            held.claimed = Some(Instant::now());
        }
        if let Some(writer) = self.sessions.get(&session) {
            let bytes = Bytes::from(message.encode());
            // If the session has ended, that is reported by itself.
            let _ = if message.lets_go() { writer.send(bytes) } else { writer.send_ahead(bytes) };
        }
    }

    fn prefill(&mut self, session: SessionId, grant: Grant) {
        // Whoever calls this has it.
        let Some(borrowing) = self.me.upgrade() else { return };
        let Some(writer) = self.sessions.get(&session).cloned() else { return };
        let Grant { handoff, slot, epoch, tokens, salt, first, pages } = grant;
        let held = self.held_for(handoff).map(|held| (held.claimed, held.span.clone()));
        let (claimed, span) = held.unwrap_or((None, Span::none()));
        if let Some(claimed) = claimed {
            self.metrics.observe(HandoffPhase::Claim, claimed.elapsed());
        }
        span.in_scope(|| tracing::debug!(tokens = tokens.len(), first, "granted"));
        let first_page = first as usize / self.block_size;
        let exporter = GrantExporter {
            borrowing,
            notes: self.notes.clone(),
            writer,
            handoff,
            slot,
            epoch,
            first_page,
            pages,
            tokens: tokens.len(),
            layers: self.layers,
        };
        match self.engine.prefill(PrefillRequest { tokens, salt, first_page, exporter: Box::new(exporter) }) {
            Ok(pages) => {
                let now = Instant::now();
                let prompt =
                    Prompt { pages, granted: now, computed: now, is_passed_on: false, over: false, writing: 0 };
                self.prompts.insert(handoff, prompt);
            }
            Err(SubmitError::QueueFull { .. } | SubmitError::ShuttingDown) => {
                self.follow_ups.push_back(BorrowerEvent::ComputeFailed { handoff });
            }
            Err(error) => {
                self.follow_ups.push_back(BorrowerEvent::Refused { handoff, reason: error.to_string() });
            }
        }
    }

    /// Whether a write may be given to the writer, under the lock under which this was asked: nothing is written of
    /// what was cancelled. If so it counts as under way.
    pub(super) fn begin_write(&mut self, handoff: HandoffId) -> bool {
        match self.prompts.get_mut(&handoff) {
            Some(prompt) if !prompt.over => prompt.writing += 1,
            _ => return false,
        }
        self.on(BorrowerEvent::Writing { handoff, writes: 1 });
        true
    }

    /// So many `of` a prompt's tokens are computed, and their pages are with the writer.
    pub(super) fn computed(&mut self, handoff: HandoffId, tokens: usize, of: usize) {
        if let Some(held) = self.held_for(handoff) {
            held.tokens = of - tokens;
            self.room.notify_one();
        }
        self.on(BorrowerEvent::Computed { handoff, tokens: tokens as u32 });
    }

    fn wrote(&mut self, handoff: HandoffId, result: Result<Instant, WriteError>) {
        if let Some(prompt) = self.prompts.get_mut(&handoff) {
            prompt.writing -= 1;
            prompt.computed = result.map_or(prompt.computed, |computed| prompt.computed.max(computed));
        }
        let event = match result {
            Ok(_) => BorrowerEvent::Wrote { handoff, writes: 1 },
            Err(error) => {
                self.log(handoff, &error);
                BorrowerEvent::WriteFailed { handoff }
            }
        };
        self.on(event);
        self.let_go(handoff);
    }

    fn posted(&mut self, handoff: HandoffId) {
        // All writes were answered before.
        if let Some(prompt) = self.prompts.get(&handoff) {
            self.metrics.observe(HandoffPhase::Compute, prompt.computed - prompt.granted);
            self.metrics.observe(HandoffPhase::Transfer, prompt.computed.elapsed());
        }
        if let Some(held) = self.held_for(handoff) {
            held.span.in_scope(|| tracing::debug!("done"));
        }
        self.on(BorrowerEvent::Posted { handoff });
        if let Some(prompt) = self.prompts.get_mut(&handoff) {
            prompt.over = true;
        }
        self.let_go(handoff);
    }

    /// The engine has passed on everything, or has failed.
    fn ended(&mut self, handoff: HandoffId) {
        if self.prompts.get(&handoff).is_some_and(|prompt| !prompt.is_passed_on && !prompt.over) {
            self.on(BorrowerEvent::ComputeFailed { handoff });
        }
    }

    /// Gives the pages back to the engine, if nobody reads them and nobody will.
    fn let_go(&mut self, handoff: HandoffId) {
        if self.prompts.get(&handoff).is_some_and(|prompt| prompt.over && prompt.writing == 0) {
            self.prompts.remove(&handoff);
        }
    }

    fn log(&mut self, handoff: HandoffId, error: &WriteError) {
        if let Some(held) = self.held_for(handoff) {
            held.span.in_scope(|| tracing::debug!(%error, "not written"));
        }
    }

    fn held_for(&mut self, handoff: HandoffId) -> Option<&mut Held> {
        self.deliveries.values_mut().find(|held| held.handoff == Some(handoff))
    }

    fn note(&self, note: Note) {
        // The task that takes them ends with the process.
        let _ = self.notes.send(note);
    }
}

/// Returns when the queue has been told what became of all jobs. None is held any more.
pub(super) async fn settled(borrowing: &SharedBorrowing) {
    let mut settling = std::mem::take(&mut lock(borrowing).settling);
    while settling.join_next().await.is_some() {}
}

/// Says of one delivery what is decided about it, in order. Left without a last word, the job goes back to the queue.
async fn settle(delivery: Delivery, mut verdicts: mpsc::UnboundedReceiver<Verdict>) {
    while let Some(verdict) = verdicts.recv().await {
        let settled = match verdict {
            Verdict::InProgress => {
                if let Err(error) = delivery.in_progress().await {
                    tracing::debug!(%error, "the queue was not told that a job is being worked on");
                }
                continue;
            }
            Verdict::Ack => delivery.ack().await,
            Verdict::Nak(delay) => delivery.nak(delay).await,
            Verdict::Bury(reason) => delivery.bury(&reason).await,
            Verdict::Forget => {
                delivery.forget();
                return;
            }
        };
        if let Err(error) = settled {
            tracing::debug!(%error, "the queue was not told what became of a job, and will deliver it again");
        }
        return;
    }
}

#[cfg(test)]
mod tests;
