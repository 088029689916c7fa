//! What goes into the prefill worker's state machine, and what comes out.

use std::time::Duration;

use crate::handoff::{Grant, HandoffId, JobError, MailboxSlot, MailboxWord, SessionId, ToDecode, ToPrefill, WorkerId};

/// What a [`Borrower`](super::Borrower) needs to know about its worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BorrowerConfig {
    /// Jobs of other keys are refused.
    pub model_key: String,
    /// Tokens of a page.
    pub block_size: u32,
    /// Jobs held at the same time.
    pub jobs_max: usize,
    /// How long to wait for what.
    pub timeouts: BorrowerTimeouts,
}

/// How long a prefill worker waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BorrowerTimeouts {
    /// An answer to a claim. Then the job goes back to the queue.
    pub claim: Duration,
    /// Between signs of life, to the queue and to decode workers: a fraction of the queue's `ack_wait` and of
    /// [`silent`](crate::handoff::LenderTimeouts::silent).
    pub keep_alive: Duration,
}

/// One delivery of a job by the queue, numbered by whoever pulls.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeliveryId(pub u64);

/// What a [`Borrower`](super::Borrower) is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BorrowerEvent {
    /// The session asked for is open.
    Connected {
        /// To whom.
        decode: WorkerId,
        /// Its number here.
        session: SessionId,
    },
    /// It could not be opened.
    ConnectFailed {
        /// To whom.
        decode: WorkerId,
        /// Certainly for ever: discovery has no such worker, and has others.
        gone: bool,
        /// For how long it will not be tried again.
        pause: Duration,
    },
    /// Something was said on a session.
    Message {
        /// Where.
        session: SessionId,
        /// What.
        message: ToPrefill,
    },
    /// A session ended.
    SessionClosed {
        /// Which.
        session: SessionId,
    },
    /// Writes were given to the writer.
    Writing {
        /// Under whose grant.
        handoff: HandoffId,
        /// How many.
        writes: u64,
    },
    /// Writes ended, done or discarded: they will touch nothing any more.
    Wrote {
        /// Under whose grant.
        handoff: HandoffId,
        /// How many.
        writes: u64,
    },
    /// So much of the prompt is computed, and all its writes are with the writer.
    Computed {
        /// Which.
        handoff: HandoffId,
        /// From the first one on, those found in the prefix index included.
        tokens: u32,
    },
    /// A write, or the word, ended unperformed. Nothing that the writer still has for this grant will be performed
    /// either.
    WriteFailed {
        /// Under whose grant.
        handoff: HandoffId,
    },
    /// The prompt is beyond this worker, now and later.
    Refused {
        /// Which.
        handoff: HandoffId,
        /// For the log.
        reason: String,
    },
    /// The prompt is not computed here any further, for a reason that is not its own.
    ComputeFailed {
        /// Which.
        handoff: HandoffId,
    },
    /// The mailbox word is written.
    Posted {
        /// Which.
        handoff: HandoffId,
    },
    /// The worker is to leave: hand back what is not begun, finish the rest.
    Drain,
    /// Time passed.
    Tick,
}

/// What a [`Borrower`](super::Borrower) wants done, in order.
#[derive(Debug)]
pub enum BorrowerAction {
    /// Open a session; answered by `Connected` or `ConnectFailed`.
    Connect {
        /// To whom.
        decode: WorkerId,
        /// Where, from the job.
        addresses: serde_json::Value,
    },
    /// Say something.
    Send {
        /// Where.
        session: SessionId,
        /// What.
        message: ToDecode,
    },
    /// Compute this prompt and write its pages, telling of `Writing`, `Wrote` and `Computed`.
    Prefill {
        /// Where to write.
        session: SessionId,
        /// Which tokens, which pages.
        grant: Grant,
    },
    /// Stop computing, and give the writer nothing more; it may discard what it has. Nothing under way is no error.
    Cancel {
        /// Which.
        handoff: HandoffId,
    },
    /// Give the writer this word, behind all writes before it; answered by `Posted` or `WriteFailed`.
    Complete {
        /// Where to write.
        session: SessionId,
        /// Which.
        handoff: HandoffId,
        /// Which word of the mailbox.
        slot: MailboxSlot,
        /// Its value.
        word: MailboxWord,
    },
    /// Take the job off the queue.
    Ack {
        /// Which.
        delivery: DeliveryId,
    },
    /// Let the queue deliver the job again, to anybody, but not before.
    Nak {
        /// Which.
        delivery: DeliveryId,
        /// Zero: at once.
        delay: Duration,
    },
    /// Tell the queue that the job is being worked on.
    InProgress {
        /// Which.
        delivery: DeliveryId,
    },
    /// Say nothing about this delivery: a later one of the same job has taken its place.
    Forget {
        /// Which.
        delivery: DeliveryId,
    },
    /// Count and log a job that cannot be read. Its ack follows.
    Refuse {
        /// Which.
        delivery: DeliveryId,
        /// Why.
        error: JobError,
    },
}

impl Default for BorrowerTimeouts {
    fn default() -> Self {
        Self { claim: Duration::from_secs(5), keep_alive: Duration::from_secs(2) }
    }
}
