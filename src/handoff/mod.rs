//! Remote prefill: who may write to whose pages, and until when.
//!
//! A decode worker lends KV pages to whichever prefill worker takes the job from the queue; that worker writes into
//! them directly. What must never happen is a late write: one that lands after the pages have moved on to another
//! request. The rule that excludes it: *the decode worker alone says who may write; a lent page is used for nothing
//! else until its loan is resolved; and a loan is resolved by completion, by its holder's release, or by a fence, never
//! by a clock.*
//!
//! [`Lender`] is the decode worker's side and [`Borrower`] the prefill worker's. Both are state machines without I/O
//! and without a clock: something happens, `on(event, now, &mut actions)`, and somebody else carries out the actions.
//! So a simulation (`tests/simulation`) can drive them through schedules no network would ever produce.
//!
//! They rely on this of the transport:
//!
//! - What is said on a session arrives in the order it was said, or not at all once the session is closed. Nothing of
//!   a session is reported after `SessionClosed` but `SessionFenced`, which always follows, sooner or later.
//! - A writer performs the writes and the word of a grant in order, and nothing of a grant of which a write failed. A
//!   word that is visible in the mailbox vouches that all data before it is.
//! - A session is *fenced* once nothing written on it can land: over TCP when the receiver, who does the writing, has
//!   stopped; over RDMA when the queue pair is destroyed and, if pages are a device's, its memory has been read; over
//!   shared memory when the peer's process has unmapped the memory, which it does as soon as it learns that the session
//!   is closed, or has ended; over CUDA IPC when it has closed the device's memory, or has ended. A loan is *revoked*
//!   once that holds for this loan.
//!
//! And this of the queue: a job that was taken is delivered at least once, or given up after `max_deliver` attempts.
//! Nothing else: duplicates, losses and delays cost time only.

mod borrower;
mod clock;
mod cost;
mod decide;
mod ids;
mod job;
mod lender;
mod limits;
mod mailbox_word;
mod message;

pub use borrower::{Borrower, BorrowerAction, BorrowerConfig, BorrowerEvent, BorrowerTimeouts, DeliveryId};
pub use cost::HandoffCosts;
pub use decide::{Decision, Forecast, HANDOFFS_MAX, Reason, Situation, decide};
pub use ids::{BadId, Epoch, HandoffId, MailboxSlot, SessionId, WorkerId};
pub use job::{Job, JobError};
pub use lender::{Lender, LenderAction, LenderEvent, LenderTimeouts, Outcome};
pub use limits::{Limits, LimitsError, Policy};
pub use mailbox_word::{MailboxWord, Status};
pub use message::{Gone, Grant, MessageError, ToDecode, ToPrefill};
