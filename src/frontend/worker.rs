//! A decode worker as a frontend knows it: how busy it is, whether it answers, and its idle connections.

use std::{
    io, mem,
    net::SocketAddrV4,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
    time::Duration,
};

use hyper::{Method, Request, header};
use rustix::io::Errno;
use tokio::time::{Instant, sleep, timeout};

use super::upstream::{BrokenError, Connection, Exchange, Payload};
use crate::{
    cluster::{LoadReport, WorkerCard, WorkerId},
    transfer::SessionAddresses,
};

/// Connections kept open to a worker while nobody uses them.
const IDLE_CONNECTIONS_MAX: usize = 256;
/// How long a connection is kept unused: shorter than the worker keeps it.
const IDLE_TIME_MAX: Duration = Duration::from_secs(50);
/// A load report says nothing any more after this long.
const REPORT_TIME_MAX: Duration = Duration::from_secs(5);
/// Tokens that a request in a load report is taken to have left.
const TOKENS_PER_REQUEST: u64 = 256;
/// How often a worker is asked whether it is there, while it matters.
const PROBE_PERIOD: Duration = Duration::from_secs(2);
/// How long it may take to say so. Its answers need none of the threads that compute.
const PROBE_TIME_MAX: Duration = Duration::from_secs(5);
/// Probes in a row that a silent worker has failed. All its answers in progress go elsewhere then, and one probe may be
/// answered late for no worse a reason than a crowd at the door.
const PROBES_FAILED_MIN: u32 = 2;

/// A decode worker in one incarnation. Requests hold on to it while they use it, even after its lease has gone.
pub(super) struct Worker {
    pub(super) lease: WorkerId,
    pub(super) card: Arc<WorkerCard>,
    /// Stands for the run of its process, hence for its cache, where prompts are placed.
    pub(super) instance: u64,
    /// Tokens that requests through this frontend still have before them.
    outstanding: AtomicU64,
    /// Tokens that the worker has before it, as it told last.
    reported: AtomicU64,
    /// When it did, in milliseconds since `started`.
    reported_ms: AtomicU64,
    /// What was outstanding then.
    outstanding_then: AtomicU64,
    /// When this frontend first heard of it.
    pub(super) started: Instant,
    /// Since when others are preferred, in milliseconds since `started`: a connection to it failed, and it has not
    /// answered since. 0: they are not.
    avoided_ms: AtomicU64,
    /// Probes that it has failed in a row. From [`PROBES_FAILED_MIN`] on it does not answer at all: its answers in
    /// progress are continued elsewhere.
    probes_failed: AtomicU32,
    /// Whether another model's worker was found at its address: what answers there says nothing of this one any more.
    /// Its lease will run out, and whoever has a new card is a new [`Worker`].
    is_replaced: AtomicBool,
    /// Whether the last attempt to connect failed for what this process lacks.
    is_out_of_reach: AtomicBool,
    idle: Mutex<Vec<Idle>>,
}

/// A connection that nobody uses. It is for requests of its `thread`, whose runtime polls it: used on another, each
/// token would wake both.
struct Idle {
    since: Instant,
    thread: ThreadId,
    connection: Connection,
}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub(super) enum LostError {
    /// No connection.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// No connection, and not for the worker's fault: this process or its host lacks something for it.
    #[error("this frontend lacks something for a connection: {0}")]
    Lacking(io::Error),
    /// A worker of another model has its address since.
    #[error("another model's worker is there in its place")]
    Replaced,
    /// It broke off.
    #[error("the connection broke: {0}")]
    Broken(#[from] BrokenError),
    /// It broke off after the client had kept it waiting for long, as workers do then.
    #[error("the client had not taken what there was, and the connection broke: {0}")]
    SlowClient(BrokenError),
    /// The worker does not answer any more, or ended without saying so.
    #[error("{0}")]
    Silent(&'static str),
}

impl LostError {
    /// Why a connection could not be opened.
    fn connecting(error: io::Error, address: &str) -> Self {
        match Errno::from_io_error(&error) {
            // Open files, memory.
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Self::Lacking(error),
            // Ports. Of IPv6 it may say instead that this host has no address of its own, and of a name, which may have
            // several addresses, only the last one's error is known.
            Some(Errno::ADDRNOTAVAIL) if address.parse::<SocketAddrV4>().is_ok() => Self::Lacking(error),
            _ => Self::Connect(error),
        }
    }

    /// Why a request on a new connection has no answer, after an attempt on a kept one that `broke`.
    fn sending(error: BrokenError, broke: Option<BrokenError>) -> Self {
        match (error, broke) {
            // A process that is ending takes connections, and has had no request on this one.
            (BrokenError::Unsent, None) => Self::Connect(io::ErrorKind::ConnectionReset.into()),
            (BrokenError::Unsent, Some(broke)) => Self::Broken(broke),
            (error, _) => Self::Broken(error),
        }
    }

    /// Whether it says anything against the worker.
    pub(super) fn blames_worker(&self) -> bool {
        !matches!(self, Self::Lacking(_) | Self::SlowClient(_))
    }
}

impl Worker {
    pub(super) fn new(lease: WorkerId, card: Arc<WorkerCard>) -> Arc<Self> {
        Arc::new(Self {
            lease,
            instance: instance(&card),
            card,
            outstanding: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            reported_ms: AtomicU64::new(0),
            outstanding_then: AtomicU64::new(0),
            started: Instant::now(),
            avoided_ms: AtomicU64::new(0),
            probes_failed: AtomicU32::new(0),
            is_replaced: AtomicBool::new(false),
            is_out_of_reach: AtomicBool::new(false),
            idle: Mutex::default(),
        })
    }

    /// Tokens it has to work on: what this frontend has sent it, or what it has said itself, and was sent from here
    /// since, where that is more, because others send it work too.
    pub(super) fn load(&self) -> u64 {
        let outstanding = self.outstanding.load(Ordering::Relaxed);
        let age = self.now_ms().saturating_sub(self.reported_ms.load(Ordering::Relaxed));
        if u128::from(age) >= REPORT_TIME_MAX.as_millis() {
            return outstanding;
        }
        let since = outstanding.saturating_sub(self.outstanding_then.load(Ordering::Relaxed));
        self.reported.load(Ordering::Relaxed).saturating_add(since).max(outstanding)
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// Takes what it tells of itself.
    pub(super) fn note(&self, report: &LoadReport) {
        let requests = u64::from(report.running) + u64::from(report.waiting);
        let tokens = report.prompt_tokens.saturating_add(requests.saturating_mul(TOKENS_PER_REQUEST));
        self.reported.store(tokens, Ordering::Relaxed);
        self.outstanding_then.store(self.outstanding.load(Ordering::Relaxed), Ordering::Relaxed);
        self.reported_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Counts a request's tokens until the booking is dropped: one at least, as a worker that has none before it is not
    /// looked after.
    pub(super) fn book(self: &Arc<Self>, tokens: u64) -> Booking {
        let tokens = tokens.max(1);
        self.outstanding.fetch_add(tokens, Ordering::Relaxed);
        Booking { worker: self.clone(), tokens }
    }

    pub(super) fn is_avoided(&self) -> bool {
        self.avoided_ms.load(Ordering::Relaxed) > 0
    }

    pub(super) fn is_silent(&self) -> bool {
        self.probes_failed.load(Ordering::Relaxed) >= PROBES_FAILED_MIN
    }

    /// Prefers others until it has answered again. Returns whether they are preferred already.
    pub(super) fn avoid(&self) -> bool {
        let now = self.now_ms().max(1);
        self.avoided_ms.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_err()
    }

    /// Lets no probe speak for it any more: another model's worker answers in its place.
    pub(super) fn note_replaced(&self) {
        self.is_replaced.store(true, Ordering::Relaxed);
    }

    /// Notes that this process lacks what a connection to it takes. Returns whether that is known already.
    pub(super) fn is_out_of_reach(&self) -> bool {
        self.is_out_of_reach.swap(true, Ordering::Relaxed)
    }

    /// Whether it has failed no longer ago than this, and not answered since: it, or another in its place, may be back
    /// in a moment.
    pub(super) fn was_lost_within(&self, time: Duration) -> bool {
        let since = self.avoided_ms.load(Ordering::Relaxed);
        since > 0 && u128::from(self.now_ms().saturating_sub(since)) < time.as_millis()
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle>> {
        // Nothing panics with the lock held; the list would be whole anyway.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Closes connections that were kept for long enough.
    fn close_unused(&self) {
        let closed: Vec<Idle> = {
            let mut idle = self.idle();
            // They are in the order of time.
            let old = idle.iter().take_while(|kept| kept.since.elapsed() >= IDLE_TIME_MAX).count();
            idle.drain(..old).collect()
        };
        // Dropped, hence closed, when others may have the list.
        drop(closed);
    }

    /// Sends a request, on a connection that is there or on a new one, and waits for the head of the answer.
    pub(super) async fn send(&self, request: &impl Fn() -> Request<Payload>) -> Result<Exchange, LostError> {
        self.close_unused();
        let kept = {
            let mut idle = self.idle();
            let here = thread::current().id();
            idle.iter().rposition(|kept| kept.thread == here).map(|at| idle.remove(at))
        };
        let mut broken = None;
        if let Some(kept) = kept {
            match kept.connection.send(request()).await {
                Ok(exchange) => return Ok(exchange),
                // Closed by the worker while nobody used it, as others may be; or it has died, which a new one shows.
                Err(error) => {
                    tracing::debug!(worker = %self.lease, %error, "a kept connection was of no use");
                    let closed: Vec<Idle> = self.idle().extract_if(.., |kept| kept.connection.is_closed()).collect();
                    drop(closed);
                    broken = (!matches!(error, BrokenError::Unsent)).then_some(error);
                }
            }
        }
        let mut opened = self.connect().await;
        if matches!(opened, Err(LostError::Lacking(_))) {
            // What is lacking may be what is kept here for others.
            let closed = mem::take(&mut *self.idle());
            if !closed.is_empty() {
                drop(closed);
                opened = self.connect().await;
            }
        }
        let connection = match opened {
            Ok(connection) => connection,
            Err(error @ LostError::Lacking(_)) => return Err(error),
            // A worker that had the request and is there no more may have died of it.
            Err(error) => return Err(broken.map_or(error, LostError::Broken)),
        };
        self.is_out_of_reach.store(false, Ordering::Relaxed);
        connection.send(request()).await.map_err(|error| LostError::sending(error, broken))
    }

    async fn connect(&self) -> Result<Connection, LostError> {
        let address = &self.card.address;
        Connection::open(address).await.map_err(|error| LostError::connecting(error, address))
    }

    /// Keeps a connection whose answer was read to its end.
    pub(super) fn keep(&self, exchange: Exchange) {
        if let Some(connection) = exchange.into_connection() {
            let kept = Idle { since: Instant::now(), thread: thread::current().id(), connection };
            let mut idle = self.idle();
            // The oldest leaves: it may be of a thread that has no use for it any more.
            let oldest = (idle.len() == IDLE_CONNECTIONS_MAX).then(|| idle.remove(0));
            idle.push(kept);
            drop((idle, oldest));
        }
    }

    /// Asks whether it is there.
    async fn probe(&self) {
        let answer = timeout(PROBE_TIME_MAX, self.ask_for_health()).await;
        self.heed(answer.unwrap_or(Err(LostError::Silent("it does not answer"))));
    }

    async fn ask_for_health(&self) -> Result<(), LostError> {
        let request = || {
            let request = Request::builder().method(Method::GET).uri("/health");
            // The parts are constants and an address that has been connected to.
            request.header(header::HOST, &self.card.address).body(Payload::default()).unwrap_or_default()
        };
        let mut exchange = self.send(&request).await?;
        exchange.collect().await?;
        self.keep(exchange);
        Ok(())
    }

    /// Takes what a probe came to.
    fn heed(&self, answer: Result<(), LostError>) {
        let was_silent = self.is_silent();
        match answer {
            Ok(()) => {
                if !self.is_replaced.load(Ordering::Relaxed) {
                    self.avoided_ms.store(0, Ordering::Relaxed);
                }
                self.probes_failed.store(0, Ordering::Relaxed);
            }
            Err(error) if error.blames_worker() => {
                self.avoid();
                self.probes_failed.fetch_add(1, Ordering::Relaxed);
            }
            // It has not been asked.
            Err(_) => {}
        }
        if self.is_silent() != was_silent {
            let state = if was_silent { "answers again" } else { "does not answer" };
            tracing::info!(worker = %self.lease, address = self.card.address, "a worker {state}");
        }
    }
}

/// A number for the run of a worker's process, the same in every frontend. Not the lease's: when etcd stands still for
/// longer than a lease, all workers register under others, with their caches as they were.
fn instance(card: &WorkerCard) -> u64 {
    // A card that says none is known by its address.
    let instance = SessionAddresses::instance_of(&card.session).unwrap_or(&card.address);
    let digest = blake3::hash(instance.as_bytes());
    digest.as_bytes().first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

/// Looks after a worker for as long as anybody knows it.
pub(super) async fn watch_over(worker: Weak<Worker>) {
    loop {
        sleep(PROBE_PERIOD).await;
        let Some(worker) = worker.upgrade() else { return };
        worker.close_unused();
        if worker.is_avoided() || worker.outstanding.load(Ordering::Relaxed) > 0 {
            worker.probe().await;
        }
    }
}

/// A request's tokens, counted as a worker's.
pub(super) struct Booking {
    pub(super) worker: Arc<Worker>,
    tokens: u64,
}

impl Booking {
    /// The prompt is computed: only so many tokens are left.
    pub(super) fn reduce(&mut self, tokens: u64) {
        let done = self.tokens.saturating_sub(tokens.max(1));
        if done > 0 {
            self.worker.outstanding.fetch_sub(done, Ordering::Relaxed);
            self.tokens -= done;
        }
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.worker.outstanding.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
