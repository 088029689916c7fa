//! The queue of prefill jobs, whatever it is kept in.

use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tokio::sync::mpsc;

use super::ModelKey;

/// The work queue between decode and prefill workers: each job goes to one prefill worker of its model, and stays in
/// the queue until that one has acknowledged it.
pub trait Queue: Send + Sync {
    /// Puts a job on a model's queue. `id` names it: the same id twice within two minutes is one job. Returns within a
    /// few seconds, whatever state the service is in; after an error the job may be on the queue all the same.
    fn publish(&self, key: ModelKey, id: String, payload: Bytes) -> BoxFuture<'_, Result<(), QueueError>>;

    /// Takes jobs of a model off the queue, one at a time.
    fn consume(&self, key: ModelKey) -> Consumer;

    /// How much is on a model's queue.
    fn depth(&self, key: ModelKey) -> BoxFuture<'_, Result<QueueDepth, QueueError>>;

    /// Returns when whatever was said of jobs is on its way, or cannot be within a few seconds: what a process waits
    /// for before it ends.
    fn flush(&self) -> BoxFuture<'_, ()>;

    /// Jobs given up so far by consumers of this process: delivered too often, or refused by [`Delivery::bury`].
    fn dead_jobs(&self) -> u64;
}

/// What is on a model's queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct QueueDepth {
    /// Jobs that no worker has yet.
    pub waiting: u64,
    /// Jobs delivered and not acknowledged, those included that were given back and are to be delivered again.
    pub delivered: u64,
    /// Workers that wait for a job.
    pub asking: u64,
}

impl QueueDepth {
    /// Whether nothing is on the queue: every job that was has been taken off it.
    pub fn is_empty(&self) -> bool {
        self.waiting == 0 && self.delivered == 0
    }

    /// Whether nobody works on the queue: none does a job and none waits for one. True for a moment now and then, since
    /// workers ask again after each job, and whenever they have waited for some seconds.
    pub fn is_deserted(&self) -> bool {
        self.delivered == 0 && self.asking == 0
    }
}

/// Why the queue did not do what it was asked. None of them is a reason to stop: the decode worker prefills itself.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// There is no connection. It is being made again in the background.
    #[error("the queue cannot be reached: {0}")]
    Unavailable(String),
    /// The service did not answer in time.
    #[error("the queue did not answer within {0:?}")]
    Timeout(Duration),
    /// The service refused: no space left, limits reached, not allowed.
    #[error("the queue refused: {0}")]
    Refused(String),
}

/// Takes jobs off a queue.
#[derive(Debug)]
pub struct Consumer {
    /// One unit for each job wanted.
    demand: mpsc::Sender<()>,
    jobs: mpsc::Receiver<Delivery>,
    asked: bool,
}

/// The other end of a [`Consumer`], for implementations.
pub(crate) struct Supplier {
    /// Yields when a job is wanted; `None` when the consumer is gone.
    pub(crate) demand: mpsc::Receiver<()>,
    /// Takes the job. A job that cannot be handed over comes back as the error, and goes back to the queue when
    /// dropped.
    pub(crate) jobs: mpsc::Sender<Delivery>,
}

impl Consumer {
    /// A consumer and its supplier. No more than one job is under way at a time.
    pub(crate) fn new() -> (Self, Supplier) {
        let (demand, wanted) = mpsc::channel(1);
        let (supply, jobs) = mpsc::channel(1);
        (Self { demand, jobs, asked: false }, Supplier { demand: wanted, jobs: supply })
    }

    /// The next job, whenever there is one. `None` if the queue is shut for good. A worker asks only when it has room
    /// for a job: none is taken from the others before.
    ///
    /// Cancel-safe: if the future is dropped, a job that arrives meanwhile is what the next call returns. Dropping the
    /// consumer gives such a job back to the queue.
    pub async fn next(&mut self) -> Option<Delivery> {
        if !self.asked {
            self.demand.send(()).await.ok()?;
            self.asked = true;
        }
        let job = self.jobs.recv().await;
        self.asked = false;
        job
    }
}

/// What an implementation does with a delivered job, for [`Delivery`].
pub trait Settle: Send + Sync {
    /// Done: take it off the queue.
    fn ack(&self) -> BoxFuture<'_, Result<(), QueueError>>;
    /// Still at it: do not deliver it to another.
    fn in_progress(&self) -> BoxFuture<'_, Result<(), QueueError>>;
    /// Give it to another, after a while.
    fn nak(&self, delay: Duration) -> BoxFuture<'_, Result<(), QueueError>>;
    /// Take it off the queue and count it as dead.
    fn bury(&self, reason: &str) -> BoxFuture<'_, Result<(), QueueError>>;
    /// Nobody settled it: give it to another, without waiting for anything.
    fn abandon(&self);
}

/// A job taken from the queue. It stays there until it is acknowledged; if it is dropped instead, or no
/// [`Delivery::in_progress`] comes for the queue's acknowledgement time (8 s), another worker gets it.
pub struct Delivery {
    payload: Bytes,
    attempt: u32,
    settle: Option<Box<dyn Settle>>,
}

impl Delivery {
    /// A job, and what to do when it is settled.
    pub fn new(payload: Bytes, attempt: u32, settle: Box<dyn Settle>) -> Self {
        Self { payload, attempt, settle: Some(settle) }
    }

    /// The job.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// How many times it has been delivered, this time included.
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Done. If this fails the job is delivered again, which the claim that follows finds out.
    pub async fn ack(mut self) -> Result<(), QueueError> {
        match self.settle.take() {
            Some(settle) => settle.ack().await,
            None => Ok(()),
        }
    }

    /// Keeps the job from being delivered to another for the acknowledgement time, from now on.
    pub async fn in_progress(&self) -> Result<(), QueueError> {
        match &self.settle {
            Some(settle) => settle.in_progress().await,
            None => Ok(()),
        }
    }

    /// Gives the job back; another worker, or this one again, gets it after `delay`.
    pub async fn nak(mut self, delay: Duration) -> Result<(), QueueError> {
        match self.settle.take() {
            Some(settle) => settle.nak(delay).await,
            None => Ok(()),
        }
    }

    /// Leaves the job to a later delivery of it: this one is settled neither way.
    pub fn forget(mut self) {
        self.settle = None;
    }

    /// Takes a job nobody can do off the queue, counts and logs it.
    pub async fn bury(mut self, reason: &str) -> Result<(), QueueError> {
        match self.settle.take() {
            Some(settle) => settle.bury(reason).await,
            None => Ok(()),
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some(settle) = self.settle.take() {
            settle.abandon();
        }
    }
}

impl std::fmt::Debug for Delivery {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Delivery")
            .field("payload", &self.payload)
            .field("attempt", &self.attempt)
            .finish_non_exhaustive()
    }
}
