use std::{
    collections::{BTreeMap, HashMap},
    io, mem,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread::{self, ThreadId},
    time::Duration,
};

use futures::StreamExt;
use hyper::{Method, Request, header};
use tokio::{
    sync::watch,
    time::{Instant, sleep, timeout},
};

use super::{
    FrontendMetrics,
    upstream::{Connection, Exchange, Payload},
};
use crate::cluster::{LeaseId, LoadReport, LoadStream, ModelKey, Role, WorkerCard, WorkerSet};

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
    /// Tokens that requests through this frontend still have before them.
    outstanding: AtomicU64,
    /// As the worker told last, in tokens, and when, in milliseconds since `started`.
    reported: AtomicU64,
    reported_ms: AtomicU64,
    started: Instant,
    /// Since when others are preferred, in milliseconds since `started`: a connection to it failed, and it has not
    /// answered since. 0: they are not.
    avoided_ms: AtomicU64,
    /// Probes that it has failed in a row. From [`PROBES_FAILED_MIN`] on it does not answer at all: its answers in
    /// progress are continued elsewhere.
    probes_failed: AtomicU32,
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
    Connect(#[from] io::Error),
    /// It broke off.
    #[error("the connection broke: {0}")]
    Broken(#[from] hyper::Error),
    /// The worker does not answer any more, or ended without saying so.
    #[error("{0}")]
    Silent(&'static str),
}

impl Worker {
    fn new(lease: LeaseId, card: Arc<WorkerCard>) -> Arc<Self> {
        Arc::new(Self {
            lease,
            card,
            outstanding: AtomicU64::new(0),
            reported: AtomicU64::new(0),
            reported_ms: AtomicU64::new(0),
            started: Instant::now(),
            avoided_ms: AtomicU64::new(0),
            probes_failed: AtomicU32::new(0),
            idle: Mutex::default(),
        })
    }

    /// Tokens it has to work on: what this frontend has sent it, or what it says itself where that is more, because
    /// others send it work too.
    pub(super) fn load(&self) -> u64 {
        let age = self.now_ms().saturating_sub(self.reported_ms.load(Ordering::Relaxed));
        let fresh = u128::from(age) < REPORT_TIME_MAX.as_millis();
        let reported = if fresh { self.reported.load(Ordering::Relaxed) } else { 0 };
        reported.max(self.outstanding.load(Ordering::Relaxed))
    }

    fn now_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    fn note(&self, report: &LoadReport) {
        let requests = u64::from(report.running) + u64::from(report.waiting);
        let tokens = report.prompt_tokens.saturating_add(requests.saturating_mul(TOKENS_PER_REQUEST));
        self.reported.store(tokens, Ordering::Relaxed);
        self.reported_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    /// Counts a request's tokens until the booking is dropped.
    pub(super) fn book(self: &Arc<Self>, tokens: u64) -> Booking {
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

    /// Sends a request, on a connection that is there or on a new one, and waits for the head of the answer.
    pub(super) async fn send(&self, request: &impl Fn() -> Request<Payload>) -> Result<Exchange, LostError> {
        let (old, kept) = {
            let mut idle = self.idle();
            // They are in the order of time.
            let old = idle.iter().take_while(|kept| kept.since.elapsed() >= IDLE_TIME_MAX).count();
            let old: Vec<Idle> = idle.drain(..old).collect();
            let here = thread::current().id();
            (old, idle.iter().rposition(|kept| kept.thread == here).map(|at| idle.remove(at)))
        };
        // Closed when others may have the list.
        drop(old);
        let mut broken = None;
        if let Some(kept) = kept {
            match kept.connection.send(request()).await {
                Ok(exchange) => return Ok(exchange),
                // Closed by the worker while nobody used it, as the others may be; or it has died, which a new one
                // shows.
                Err(error) => {
                    tracing::debug!(worker = %self.lease, %error, "a kept connection was of no use");
                    drop(mem::take(&mut *self.idle()));
                    let never_sent = error.is_canceled() || error.is_closed();
                    broken = (!never_sent).then_some(error);
                }
            }
        }
        let opened = Connection::open(&self.card.address).await;
        // A worker that had the request and is there no more may have died of it.
        let connection = opened.map_err(|error| broken.map_or(LostError::Connect(error), LostError::Broken))?;
        Ok(connection.send(request()).await?)
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
        let request = || {
            let request = Request::builder().method(Method::GET).uri("/health");
            // The parts are constants and an address that has been connected to.
            request.header(header::HOST, &self.card.address).body(Payload::default()).unwrap_or_default()
        };
        let ask = async {
            let mut exchange = self.send(&request).await?;
            exchange.collect().await?;
            self.keep(exchange);
            Ok::<_, LostError>(())
        };
        let was_silent = self.is_silent();
        if matches!(timeout(PROBE_TIME_MAX, ask).await, Ok(Ok(()))) {
            self.avoided_ms.store(0, Ordering::Relaxed);
            self.probes_failed.store(0, Ordering::Relaxed);
        } else {
            self.avoid();
            self.probes_failed.fetch_add(1, Ordering::Relaxed);
        }
        if self.is_silent() != was_silent {
            let state = if was_silent { "answers again" } else { "does not answer" };
            tracing::info!(worker = %self.lease, address = self.card.address, "a worker {state}");
        }
    }
}

/// Looks after a worker for as long as anybody knows it.
async fn watch_over(worker: Weak<Worker>) {
    loop {
        sleep(PROBE_PERIOD).await;
        let Some(worker) = worker.upgrade() else { return };
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
        let done = self.tokens.saturating_sub(tokens);
        self.worker.outstanding.fetch_sub(done, Ordering::Relaxed);
        self.tokens -= done;
    }
}

impl Drop for Booking {
    fn drop(&mut self) {
        self.worker.outstanding.fetch_sub(self.tokens, Ordering::Relaxed);
    }
}

/// The decode workers that are alive.
pub(super) struct Table {
    workers: BTreeMap<LeaseId, Arc<Worker>>,
    by_name: HashMap<String, Vec<Arc<Worker>>>,
    /// Models that nobody serves any more, and since when. They may be back in a moment: a worker is started anew, or an
    /// etcd that stood still for longer than a lease goes on, lets go of all workers, and they register again. Those
    /// that went longer ago than `patience` are forgotten.
    gone: HashMap<String, Instant>,
    /// How long requests wait for a model to come back.
    patience: Duration,
}

impl Table {
    pub(super) fn new(patience: Duration) -> Self {
        Self { workers: BTreeMap::new(), by_name: HashMap::new(), gone: HashMap::new(), patience }
    }

    /// The table for `live`, with the workers that were known before.
    fn next(&self, live: &WorkerSet) -> Self {
        let mut table = Self::new(self.patience);
        for (&lease, card) in live.iter().filter(|(_, card)| card.role == Role::Decode) {
            let known = self.workers.get(&lease).filter(|worker| worker.card == *card).cloned();
            let worker = known.unwrap_or_else(|| {
                tracing::info!(worker = %lease, address = card.address, model = card.model.names[..].join(","), "a decode worker");
                let worker = Worker::new(lease, card.clone());
                tokio::spawn(watch_over(Arc::downgrade(&worker)));
                worker
            });
            for name in &card.model.names {
                table.by_name.entry(name.clone()).or_default().push(worker.clone());
            }
            table.workers.insert(lease, worker);
        }
        for (lease, _) in self.workers.iter().filter(|(lease, _)| !table.workers.contains_key(lease)) {
            tracing::info!(worker = %lease, "a decode worker has gone");
        }
        let now = Instant::now();
        let before = self.gone.iter().map(|(name, &since)| (name, since));
        let gone = before.chain(self.by_name.keys().map(|name| (name, now)));
        let missed = gone.filter(|(name, since)| !table.by_name.contains_key(*name) && self.is_expected(*since));
        table.gone = missed.map(|(name, since)| (name.clone(), since)).collect();
        table
    }

    /// Whether those who went then may be back in a moment.
    fn is_expected(&self, since: Instant) -> bool {
        since.elapsed() < self.patience
    }

    /// Whether the last worker of `model` went a moment ago and none has come since; without a name, the last of all.
    pub(super) fn misses(&self, model: Option<&str>) -> bool {
        match model {
            Some(model) => self.gone.get(model).is_some_and(|&since| self.is_expected(since)),
            None => self.workers.is_empty() && self.gone.values().any(|&since| self.is_expected(since)),
        }
    }

    /// The workers that serve `model`, or, without a name, the only model there is.
    pub(super) fn serving(&self, model: Option<&str>) -> Serving<'_> {
        if self.workers.is_empty() {
            return Serving::Nobody;
        }
        match model {
            Some(model) => match self.by_name.get(model) {
                Some(workers) => Serving::By(workers),
                None if self.misses(Some(model)) => Serving::Nobody,
                None => Serving::Unknown,
            },
            None => {
                let mut keys = self.workers.values().map(|worker| worker.card.model_key);
                let first: Option<ModelKey> = keys.next();
                let name = self.workers.values().next().and_then(|worker| worker.card.model.names.first());
                match name.and_then(|name| self.by_name.get(name)) {
                    Some(workers) if keys.all(|key| Some(key) == first) => Serving::By(workers),
                    _ => Serving::Ambiguous,
                }
            }
        }
    }

    /// Any worker, to tell a client what is wrong with its request.
    pub(super) fn anybody(&self) -> Vec<Arc<Worker>> {
        self.workers.values().cloned().collect()
    }

    /// The models served, by name, each with one of the cards.
    pub(super) fn models(&self) -> BTreeMap<&str, &WorkerCard> {
        let cards = self.by_name.iter().filter_map(|(name, workers)| Some((name.as_str(), &*workers.first()?.card)));
        cards.collect()
    }

    /// How many workers there are.
    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }
}

/// Who serves a model.
pub(super) enum Serving<'a> {
    /// These do.
    By(&'a [Arc<Worker>]),
    /// There are workers, for other models.
    Unknown,
    /// The request names no model, and there are several.
    Ambiguous,
    /// There is no worker at all, or those of this model went a moment ago.
    Nobody,
}

/// Keeps a table of the live workers, and of how busy they are, until the last reader is gone.
pub(super) fn follow(
    mut live: watch::Receiver<Arc<WorkerSet>>,
    mut loads: LoadStream,
    patience: Duration,
    metrics: FrontendMetrics,
) -> watch::Receiver<Arc<Table>> {
    let first = Arc::new(Table::new(patience).next(&live.borrow_and_update()));
    metrics.workers.set(first.len() as i64);
    let (sender, receiver) = watch::channel(first);
    tokio::spawn(async move {
        let mut reports_end = false;
        loop {
            tokio::select! {
                changed = live.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let table = sender.borrow().next(&live.borrow_and_update());
                    metrics.workers.set(table.len() as i64);
                    sender.send_replace(Arc::new(table));
                }
                report = loads.next(), if !reports_end => match report {
                    Some((lease, report)) => {
                        if let Some(worker) = sender.borrow().workers.get(&lease) {
                            worker.note(&report);
                        }
                    }
                    None => reports_end = true,
                },
                () = sender.closed() => return,
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicUsize};

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
        task::yield_now,
    };

    use super::*;
    use crate::cluster::{ModelKey, tests::card};

    /// Where a worker is to be, and that worker.
    async fn bound() -> (TcpListener, Arc<Worker>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let card = card(Role::Decode, ModelKey::of(b"model"), &listener.local_addr().unwrap().to_string());
        (listener, Worker::new(LeaseId(1), Arc::new(card)))
    }

    /// Reads a request without a body. Returns whether one came.
    async fn is_asked(stream: &mut TcpStream) -> bool {
        let mut asked = Vec::new();
        while !asked.ends_with(b"\r\n\r\n") {
            if stream.read_buf(&mut asked).await.unwrap_or(0) == 0 {
                return false;
            }
        }
        true
    }

    async fn say_ok(stream: &mut TcpStream) {
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
    }

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

    fn request() -> Request<Payload> {
        Request::builder().uri("/").header(header::HOST, "a").body(Payload::default()).unwrap()
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

    #[tokio::test]
    async fn any_load_may_be_told() {
        let (_, worker) = bound().await;
        let report =
            LoadReport { running: u32::MAX, waiting: u32::MAX, prompt_tokens: u64::MAX, ..LoadReport::default() };
        worker.note(&report);
        assert_eq!(worker.load(), u64::MAX);
    }

    #[tokio::test(start_paused = true)]
    async fn a_model_is_missed_for_a_while_after_its_last_worker_went() {
        const PATIENCE: Duration = Duration::from_secs(10);
        let live = |workers: &[(u64, &str)]| -> WorkerSet {
            let card = |model: &str| {
                let mut card = card(Role::Decode, ModelKey::of(model.as_bytes()), "127.0.0.1:1");
                card.model.names = vec![model.into()];
                Arc::new(card)
            };
            workers.iter().map(|&(lease, model)| (LeaseId(lease), card(model))).collect()
        };
        let table = Table::new(PATIENCE).next(&live(&[(1, "a"), (2, "a"), (3, "b")]));
        let table = table.next(&live(&[(2, "a"), (3, "b")]));
        assert!(!table.misses(Some("a")), "one is left");
        let table = table.next(&live(&[(3, "b")]));
        assert!(table.misses(Some("a")) && !table.misses(Some("x")) && !table.misses(None));
        assert!(matches!(table.serving(Some("a")), Serving::Nobody));
        assert!(matches!(table.serving(Some("x")), Serving::Unknown));
        tokio::time::advance(PATIENCE / 2).await;
        let table = table.next(&live(&[]));
        assert!(table.misses(Some("a")) && table.misses(Some("b")) && table.misses(None));
        tokio::time::advance(PATIENCE / 2).await;
        assert!(!table.misses(Some("a")) && table.misses(Some("b")) && table.misses(None));
        let table = table.next(&live(&[(4, "b")]));
        assert!(matches!(table.serving(Some("a")), Serving::Unknown));
        assert!(table.gone.is_empty(), "one is back, the other forgotten");
    }
}
