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
    cluster::{LeaseId, LoadReport, WorkerCard},
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
    pub(super) lease: LeaseId,
    pub(super) card: Arc<WorkerCard>,
    /// Stands for the run of its process, hence for its cache, where prompts are placed.
    pub(super) instance: u64,
    /// Tokens that requests through this frontend still have before them.
    outstanding: AtomicU64,
    /// As the worker told last, in tokens, and when, in milliseconds since `started`; and what was outstanding then.
    reported: AtomicU64,
    reported_ms: AtomicU64,
    outstanding_then: AtomicU64,
    started: Instant,
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
    pub(super) fn new(lease: LeaseId, card: Arc<WorkerCard>) -> Arc<Self> {
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
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use tokio::{task::yield_now, time::advance};

    use super::*;
    use crate::{
        cluster::{ModelKey, Role, tests::card},
        frontend::{
            dispatch::Attempts,
            fake::{bound, is_asked, request, say_ok},
        },
    };

    /// What is known of a worker that serves connections side by side.
    #[derive(Clone, Default)]
    struct Served {
        connections: Arc<AtomicUsize>,
        /// It breaks a connection off over its next request.
        fails: Arc<AtomicBool>,
    }

    async fn served() -> (Arc<Worker>, Served) {
        let ((listener, worker), served) = (bound().await, Served::default());
        let serving = served.clone();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                serving.connections.fetch_add(1, Ordering::Relaxed);
                let fails = serving.fails.clone();
                tokio::spawn(async move {
                    while is_asked(&mut stream).await && !fails.load(Ordering::Relaxed) {
                        say_ok(&mut stream).await;
                    }
                });
            }
        });
        (worker, served)
    }

    #[tokio::test]
    async fn a_connection_is_kept_for_its_own_thread() {
        let (worker, Served { connections, .. }) = served().await;
        worker.probe().await;
        worker.probe().await;
        assert_eq!(connections.load(Ordering::Relaxed), 1, "the second went where the first had been");
        let elsewhere = worker.clone();
        let probe = move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(elsewhere.probe());
        };
        tokio::task::spawn_blocking(probe).await.unwrap();
        assert_eq!(connections.load(Ordering::Relaxed), 2);
        worker.probe().await;
        assert_eq!(connections.load(Ordering::Relaxed), 2, "this thread's is still there");
        assert!(!worker.is_silent());
    }

    #[tokio::test]
    async fn a_worker_is_avoided_after_one_failed_probe_and_silent_after_two_in_a_row() {
        let (worker, Served { fails, .. }) = served().await;
        for (answers, avoided, silent) in [
            (false, true, false),
            (true, false, false),
            (false, true, false),
            (false, true, true),
            (false, true, true),
            (true, false, false),
        ] {
            fails.store(!answers, Ordering::Relaxed);
            worker.probe().await;
            assert_eq!((worker.is_avoided(), worker.is_silent()), (avoided, silent));
        }
    }

    #[tokio::test]
    async fn a_worker_that_was_replaced_stays_avoided_whoever_answers_there() {
        let (worker, _served) = served().await;
        Attempts::default().lost(&worker, &LostError::Replaced).unwrap();
        worker.probe().await;
        assert!(worker.is_avoided());
        assert!(!worker.is_silent());
    }

    #[tokio::test]
    async fn what_the_frontend_itself_lacks_says_nothing_of_a_worker() {
        let (_, worker) = bound().await;
        let failed = |errno: Errno| LostError::connecting(io::Error::from(errno), "10.0.0.7:8000");
        for errno in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL] {
            for _ in 0..PROBES_FAILED_MIN {
                worker.heed(Err(failed(errno)));
            }
            assert_eq!((worker.is_avoided(), worker.is_silent()), (false, false), "{errno}");
        }
        // Of a name, it may be the last of several addresses that there is no way to.
        assert!(LostError::connecting(io::Error::from(Errno::ADDRNOTAVAIL), "worker-7:8000").blames_worker());
        worker.heed(Err(failed(Errno::CONNREFUSED)));
        assert!(worker.is_avoided());
        // Nor does it take back what is known.
        worker.heed(Err(failed(Errno::MFILE)));
        assert!(worker.is_avoided());
    }

    #[tokio::test]
    async fn with_a_kept_connection_go_those_that_are_closed_too_and_no_others() {
        let (listener, worker) = bound().await;
        let answer = async || {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(is_asked(&mut stream).await);
            say_ok(&mut stream).await;
            stream
        };
        let (mut streams, mut exchanges) = (Vec::new(), Vec::new());
        for _ in 0..3 {
            let (stream, exchange) = tokio::join!(answer(), worker.send(&request));
            let mut exchange = exchange.unwrap();
            assert_eq!(exchange.collect().await.unwrap(), "ok");
            streams.push(stream);
            exchanges.push(exchange);
        }
        exchanges.into_iter().for_each(|exchange| worker.keep(exchange));
        // The one that is used next, and the one before it.
        streams.truncate(1);
        // The poller hears of it.
        while !worker.idle().iter().skip(1).all(|kept| kept.connection.is_closed()) {
            yield_now().await;
        }
        let (_stream, exchange) = tokio::join!(answer(), worker.send(&request));
        assert!(exchange.is_ok());
        let kept = worker.idle();
        assert_eq!(kept.len(), 1);
        assert!(!kept[0].connection.is_closed());
    }

    #[tokio::test]
    async fn a_worker_that_dies_over_a_request_is_told_from_one_that_was_gone_before_it() {
        for dies_over_it in [true, false] {
            let (listener, worker) = bound().await;
            let serving = tokio::spawn(async move {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert!(is_asked(&mut stream).await);
                // From now on nobody gets a new connection.
                drop(listener);
                say_ok(&mut stream).await;
                if dies_over_it {
                    assert!(is_asked(&mut stream).await);
                }
            });
            worker.probe().await;
            if !dies_over_it {
                serving.await.unwrap();
                // The poller hears of it.
                yield_now().await;
            }
            let error = worker.send(&request).await.err().unwrap();
            assert_eq!(matches!(error, LostError::Broken(_)), dies_over_it, "{error}");
            assert_eq!(matches!(error, LostError::Connect(_)), !dies_over_it, "{error}");
        }
    }

    #[test]
    fn a_worker_that_never_had_a_request_is_not_lost_over_it() {
        let cut = || BrokenError::Io(io::ErrorKind::UnexpectedEof.into());
        assert!(matches!(LostError::sending(BrokenError::Unsent, None), LostError::Connect(_)));
        assert!(matches!(LostError::sending(BrokenError::Unsent, Some(cut())), LostError::Broken(BrokenError::Io(_))));
        assert!(matches!(LostError::sending(cut(), None), LostError::Broken(BrokenError::Io(_))));
    }

    #[tokio::test]
    async fn a_kept_connection_that_its_worker_has_closed_is_replaced() {
        let (listener, worker) = bound().await;
        let serving = tokio::spawn(async move {
            for _ in 0..2 {
                let (mut stream, _) = listener.accept().await.unwrap();
                assert!(is_asked(&mut stream).await);
                say_ok(&mut stream).await;
            }
        });
        for _ in 0..2 {
            let mut exchange = worker.send(&request).await.unwrap();
            assert_eq!(exchange.collect().await.unwrap(), "ok");
            worker.keep(exchange);
        }
        serving.await.unwrap();
    }

    #[test]
    fn a_run_of_a_worker_has_the_same_number_under_any_lease_and_its_successor_another() {
        let run = |instance: &str, address: &str| {
            let mut card = card(Role::Decode, ModelKey::of(b"model"), address);
            card.session["instance"] = instance.into();
            Arc::new(card)
        };
        let instance = |lease, card: &Arc<WorkerCard>| Worker::new(LeaseId(lease), card.clone()).instance;
        let first = run("i", "127.0.0.1:1");
        assert_eq!(instance(1, &first), instance(2, &first));
        assert_ne!(instance(1, &first), instance(1, &run("j", "127.0.0.1:1")), "its cache is another");
        let unnamed = |address| Arc::new(card(Role::Decode, ModelKey::of(b"model"), address));
        assert_eq!(instance(1, &unnamed("127.0.0.1:1")), instance(2, &unnamed("127.0.0.1:1")));
        assert_ne!(instance(1, &unnamed("127.0.0.1:1")), instance(1, &unnamed("127.0.0.1:2")));
    }

    #[tokio::test]
    async fn a_worker_has_something_to_do_as_long_as_anything_is_asked_of_it() {
        let (_, worker) = bound().await;
        let mut unread = worker.book(0);
        assert_eq!(worker.load(), 1);
        let mut booking = worker.book(1000);
        for tokens in [100, 0, 0] {
            booking.reduce(tokens);
            unread.reduce(tokens);
            assert_eq!(worker.load(), tokens.max(1) + 1);
        }
        drop((unread, booking));
        assert_eq!(worker.load(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_sent_after_a_report_is_added_to_it() {
        let worker = Worker::new(LeaseId(1), Arc::new(card(Role::Decode, ModelKey::of(b"model"), "127.0.0.1:1")));
        let before = worker.book(100);
        worker.note(&LoadReport { prompt_tokens: 1000, ..LoadReport::default() });
        assert_eq!(worker.load(), 1000);
        let after = worker.book(10);
        assert_eq!(worker.load(), 1010);
        drop(before);
        assert_eq!(worker.load(), 1000, "until it says otherwise");
        let much = worker.book(5000);
        assert_eq!(worker.load(), 1000 + 5010 - 100);
        worker.note(&LoadReport::default());
        assert_eq!(worker.load(), 5010);
        advance(REPORT_TIME_MAX).await;
        drop((after, much));
        assert_eq!(worker.load(), 0);
    }

    #[tokio::test]
    async fn any_load_may_be_told() {
        let (_, worker) = bound().await;
        let report =
            LoadReport { running: u32::MAX, waiting: u32::MAX, prompt_tokens: u64::MAX, ..LoadReport::default() };
        worker.note(&report);
        let _booking = worker.book(1);
        assert_eq!(worker.load(), u64::MAX);
    }
}
