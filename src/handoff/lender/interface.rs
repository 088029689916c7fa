//! What goes into the decode worker's state machine, and what comes out.

use std::time::Duration;

use crate::handoff::{Epoch, Gone, HandoffId, MailboxSlot, SessionId, ToDecode, WorkerId};

/// How long to wait for what. None of them frees a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LenderTimeouts {
    /// A job that nobody claims: prefill here instead.
    pub unclaimed: Duration,
    /// A holder that gives no sign of life: start the request again and ask for the pages back. Several times the
    /// [`keep_alive`](crate::handoff::BorrowerTimeouts::keep_alive) of the prefill workers.
    pub silent: Duration,
    /// One that gives signs of life, but says in all of them that nothing moves where it is, as its device hangs: the
    /// same. Longer than anything takes there that is computed or written in one go.
    pub stalled: Duration,
    /// A holder that does not answer when asked for the pages: fence its session.
    pub release: Duration,
}

/// What a [`Lender`](super::Lender) is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LenderEvent {
    /// The queue did not take the job, or did not say that it had.
    EnqueueFailed {
        /// Which.
        handoff: HandoffId,
    },
    /// The queue had the job and has it no more: who took it off has claimed it before, or nobody will.
    JobGone {
        /// Which.
        handoff: HandoffId,
    },
    /// Nobody wants the answer any more.
    Withdraw {
        /// Of whom.
        handoff: HandoffId,
    },
    /// Something was said on a session.
    Message {
        /// Where.
        session: SessionId,
        /// By whom.
        worker: WorkerId,
        /// What.
        message: ToDecode,
    },
    /// The transport vouches that no write under this grant can land any more.
    Revoked {
        /// The holder's.
        session: SessionId,
        /// The grant's.
        slot: MailboxSlot,
        /// The grant's.
        epoch: Epoch,
    },
    /// A session ended. Writes made on it may still land.
    SessionClosed {
        /// Which.
        session: SessionId,
    },
    /// The transport vouches that no write made on this session can land any more.
    SessionFenced {
        /// Which.
        session: SessionId,
    },
    /// A worker's lease ended. It may be alive, and writing.
    WorkerGone {
        /// Whose.
        worker: WorkerId,
    },
    /// Time passed.
    Tick,
}

/// What a [`Lender`](super::Lender) wants done, in order.
#[derive(Debug, PartialEq, Eq)]
pub enum LenderAction<R, P> {
    /// Let the transport accept writes to the [`pages`](super::Lender::pages) of `slot` under `epoch` from this
    /// session, then send the [`Grant`](crate::handoff::Grant) on it.
    Grant {
        /// The claimant's.
        session: SessionId,
        /// Claimed.
        handoff: HandoffId,
        /// The loan's.
        slot: MailboxSlot,
        /// The loan's.
        epoch: Epoch,
        /// Whose prompt it is.
        request: R,
    },
    /// Nobody has claimed a job, in time or at all, and others may fare no better. What is done about it follows.
    Unclaimed {
        /// Which.
        handoff: HandoffId,
    },
    /// Answer a claim with [`ToPrefill::Gone`](crate::handoff::ToPrefill::Gone).
    Gone {
        /// The claimant's.
        session: SessionId,
        /// Claimed.
        handoff: HandoffId,
        /// For the log.
        why: Gone,
    },
    /// Send [`ToPrefill::Release`](crate::handoff::ToPrefill::Release), and have the transport revoke the grant if it
    /// can. Either may answer.
    Reclaim {
        /// The holder's.
        session: SessionId,
        /// Granted.
        handoff: HandoffId,
        /// The loan's.
        slot: MailboxSlot,
        /// The loan's.
        epoch: Epoch,
    },
    /// The holder has given the pages back by itself, and writes no more: have the transport strike the grant off its
    /// record, so that nothing is accepted under it from now on. Comes before whoever gets the pages.
    Forget {
        /// The holder's.
        session: SessionId,
        /// The loan's.
        slot: MailboxSlot,
        /// The loan's.
        epoch: Epoch,
    },
    /// Have the transport end this session and make sure that nothing more is written on it. Possibly repeated.
    Fence {
        /// Which.
        session: SessionId,
    },
    /// The pages hold the keys and values of the whole prompt but its last token: go on from there.
    Resume {
        /// Which.
        request: R,
        /// Its pages.
        pages: P,
    },
    /// The handoff came to nothing.
    Restart {
        /// Which.
        request: R,
        /// Its pages, content undefined; `None` if they are in quarantine, to follow as [`Free`](Self::Free).
        pages: Option<P>,
        /// Whether another prefill worker may do better. Not if nobody took the job, which says that the queue or the
        /// workers are of no use now, nor if its holder said that this prompt is beyond it.
        again: bool,
    },
    /// Nobody waits for these pages, and nobody can write to them any more: give them back to the pool.
    Free {
        /// Content undefined.
        pages: P,
    },
    /// A handoff ended, in this way. Exactly one for each that was lent.
    Count(Outcome),
}

/// How a handoff ended: label of `engine_handoffs_total`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The request went on with the pages.
    Completed,
    /// The holder stopped, or was stopped, before or after the request gave it up.
    Released,
    /// The prompt was beyond its holder.
    Failed,
    /// The holder's session was cut off.
    Fenced,
    /// It was never granted.
    Expired,
}

impl Outcome {
    /// All, to register metrics by.
    pub const ALL: [Self; 5] = [Self::Completed, Self::Released, Self::Failed, Self::Fenced, Self::Expired];

    /// Lower case.
    pub fn label(self) -> &'static str {
        match self {
            Self::Completed => "completed",
            Self::Released => "released",
            Self::Failed => "failed",
            Self::Fenced => "fenced",
            Self::Expired => "expired",
        }
    }
}

impl Default for LenderTimeouts {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { unclaimed: seconds(30), silent: seconds(10), stalled: seconds(60), release: seconds(5) }
    }
}
