//! A cluster inside one process.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, future::BoxFuture};
use tokio::sync::{Notify, broadcast, oneshot, watch};

use super::{
    Consumer, Delivery, Discovery, Lease, LoadReport, LoadStream, Loads, ModelKey, Queue, QueueDepth, QueueError,
    Settle, WorkerCard, WorkerFilter, WorkerId, WorkerSet, queue::Supplier,
};

/// Reports a reader may lag behind before it misses some.
const LOADS_KEPT: usize = 256;
/// Times a job is delivered before it is given up, as over NATS.
const DELIVERIES_MAX: u32 = 5;

/// A cluster inside one process: for tests, and for a frontend that has no NATS its queue and load reports.
pub struct Local {
    state: Arc<Mutex<State>>,
    queues: Arc<Queues>,
    loads: broadcast::Sender<(WorkerId, LoadReport)>,
}

#[derive(Default)]
struct State {
    leases: u64,
    workers: WorkerSet,
    watchers: Vec<(WorkerFilter, watch::Sender<Arc<WorkerSet>>)>,
    configs: HashMap<ModelKey, watch::Sender<Option<Bytes>>>,
}

impl State {
    fn tell(&mut self) {
        let Self { workers, watchers, .. } = self;
        watchers.retain(|(_, sender)| !sender.is_closed());
        for (filter, sender) in watchers {
            let matching = select(workers, filter);
            sender.send_if_modified(|known| {
                let changed = **known != matching;
                if changed {
                    *known = Arc::new(matching);
                }
                changed
            });
        }
    }
}

fn select(workers: &WorkerSet, filter: &WorkerFilter) -> WorkerSet {
    workers.iter().filter(|(_, card)| filter.matches(card)).map(|(id, card)| (*id, card.clone())).collect()
}

/// Nothing panics while holding these locks; if something did, the data would still be whole.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Local {
    /// A cluster without members.
    pub fn new() -> Self {
        Self { state: Arc::default(), queues: Arc::default(), loads: broadcast::channel(LOADS_KEPT).0 }
    }

    /// Puts, changes or takes away the live limits of a model.
    pub fn set_config(&self, key: ModelKey, config: Option<Bytes>) {
        lock(&self.state).configs.entry(key).or_insert_with(|| watch::channel(None).0).send_replace(config);
    }
}

impl Default for Local {
    fn default() -> Self {
        Self::new()
    }
}

impl Discovery for Local {
    fn register(&self, card: WorkerCard) -> Lease {
        let mut state = lock(&self.state);
        state.leases += 1;
        let id = WorkerId(state.leases);
        state.workers.insert(id, Arc::new(card));
        state.tell();
        drop(state);
        let (sender, receiver) = watch::channel(Some(id));
        let (stop, stopped) = oneshot::channel::<()>();
        let state = self.state.clone();
        let task = tokio::spawn(async move {
            let _ = stopped.await;
            let mut state = lock(&state);
            state.workers.remove(&id);
            state.tell();
            // Held until now: a closed channel says that the lease is gone.
            drop(sender);
        });
        Lease::new(receiver, stop, task)
    }

    fn workers(&self, filter: WorkerFilter) -> watch::Receiver<Arc<WorkerSet>> {
        let mut state = lock(&self.state);
        let (sender, receiver) = watch::channel(Arc::new(select(&state.workers, &filter)));
        state.watchers.push((filter, sender));
        receiver
    }

    fn config(&self, key: ModelKey) -> watch::Receiver<Option<Bytes>> {
        lock(&self.state).configs.entry(key).or_insert_with(|| watch::channel(None).0).subscribe()
    }
}

#[derive(Default)]
struct Queues {
    jobs: Mutex<BTreeMap<ModelKey, JobQueue>>,
    arrived: Notify,
    dead: AtomicU64,
}

#[derive(Default)]
struct JobQueue {
    waiting: VecDeque<Job>,
    delivered: u64,
    asking: u64,
}

#[derive(Clone)]
struct Job {
    id: String,
    payload: Bytes,
    attempt: u32,
}

impl Queues {
    fn put(&self, key: ModelKey, job: Job) {
        let mut jobs = lock(&self.jobs);
        let queue = jobs.entry(key).or_default();
        if !queue.waiting.iter().any(|known| known.id == job.id) {
            queue.waiting.push_back(job);
        }
        drop(jobs);
        self.arrived.notify_waiters();
    }

    fn take(&self, key: ModelKey) -> Option<Job> {
        let mut jobs = lock(&self.jobs);
        let queue = jobs.get_mut(&key)?;
        let mut job = queue.waiting.pop_front()?;
        queue.delivered += 1;
        job.attempt += 1;
        Some(job)
    }

    fn settled(&self, key: ModelKey) {
        if let Some(queue) = lock(&self.jobs).get_mut(&key) {
            queue.delivered = queue.delivered.saturating_sub(1);
        }
    }

    /// Gives a delivered job to another, or gives it up.
    fn give_back(&self, key: ModelKey, job: Job) {
        self.settled(key);
        if job.attempt < DELIVERIES_MAX {
            self.put(key, job);
        } else {
            self.bury(&job, "it was delivered too often");
        }
    }

    fn bury(&self, job: &Job, reason: &str) {
        self.dead.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(job = job.id, attempt = job.attempt, reason, "gave up a prefill job");
    }

    fn asks(&self, key: ModelKey) -> Asking<'_> {
        lock(&self.jobs).entry(key).or_default().asking += 1;
        Asking { queues: self, key }
    }

    async fn supply(self: Arc<Self>, key: ModelKey, mut supplier: Supplier) {
        while supplier.demand.recv().await.is_some() {
            let asking = self.asks(key);
            let job = loop {
                let arrived = self.arrived.notified();
                tokio::pin!(arrived);
                // Registers before looking, so that no arrival in between is missed.
                arrived.as_mut().enable();
                if let Some(job) = self.take(key) {
                    break job;
                }
                tokio::select! {
                    () = arrived => {}
                    () = supplier.jobs.closed() => return,
                }
            };
            drop(asking);
            let settle = LocalSettle { queues: self.clone(), key, job: job.clone() };
            let delivery = Delivery::new(job.payload, job.attempt, Box::new(settle));
            if supplier.jobs.send(delivery).await.is_err() {
                return;
            }
        }
    }
}

/// A consumer waits for a job, until this is dropped.
struct Asking<'a> {
    queues: &'a Queues,
    key: ModelKey,
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if let Some(queue) = lock(&self.queues.jobs).get_mut(&self.key) {
            queue.asking -= 1;
        }
    }
}

impl Queue for Local {
    fn publish(&self, key: ModelKey, id: String, payload: Bytes) -> BoxFuture<'_, Result<(), QueueError>> {
        self.queues.put(key, Job { id, payload, attempt: 0 });
        async { Ok(()) }.boxed()
    }

    fn consume(&self, key: ModelKey) -> Consumer {
        let (consumer, supplier) = Consumer::new();
        tokio::spawn(self.queues.clone().supply(key, supplier));
        consumer
    }

    fn depth(&self, key: ModelKey) -> BoxFuture<'_, Result<QueueDepth, QueueError>> {
        let depth = lock(&self.queues.jobs)
            .get(&key)
            .map(|queue| {
                let JobQueue { waiting, delivered, asking } = queue;
                QueueDepth { waiting: waiting.len() as u64, delivered: *delivered, asking: *asking }
            })
            .unwrap_or_default();
        async move { Ok(depth) }.boxed()
    }

    fn flush(&self) -> BoxFuture<'_, ()> {
        async {}.boxed()
    }

    fn dead_jobs(&self) -> u64 {
        self.queues.dead.load(Ordering::Relaxed)
    }
}

/// A delivered job of [`Local`]. There is no acknowledgement time: a consumer in the same process either settles a job
/// or drops it.
struct LocalSettle {
    queues: Arc<Queues>,
    key: ModelKey,
    job: Job,
}

impl Settle for LocalSettle {
    fn ack(&self) -> BoxFuture<'_, Result<(), QueueError>> {
        self.queues.settled(self.key);
        async { Ok(()) }.boxed()
    }

    fn in_progress(&self) -> BoxFuture<'_, Result<(), QueueError>> {
        async { Ok(()) }.boxed()
    }

    fn nak(&self, delay: Duration) -> BoxFuture<'_, Result<(), QueueError>> {
        let (queues, key, job) = (self.queues.clone(), self.key, self.job.clone());
        tokio::spawn(async move {
            tokio::time::sleep(delay).await;
            queues.give_back(key, job);
        });
        async { Ok(()) }.boxed()
    }

    fn bury(&self, reason: &str) -> BoxFuture<'_, Result<(), QueueError>> {
        self.queues.settled(self.key);
        self.queues.bury(&self.job, reason);
        async { Ok(()) }.boxed()
    }

    fn abandon(&self) {
        self.queues.give_back(self.key, self.job.clone());
    }
}

impl Loads for Local {
    fn report(&self, lease: WorkerId, report: &LoadReport) {
        // Nobody may be listening.
        let _ = self.loads.send((lease, *report));
    }

    fn reports(&self) -> LoadStream {
        let receiver = self.loads.subscribe();
        futures::stream::unfold(receiver, |mut receiver| async {
            loop {
                match receiver.recv().await {
                    Ok(report) => return Some((report, receiver)),
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return None,
                }
            }
        })
        .boxed()
    }
}

#[cfg(test)]
mod tests;
