//! What a decode worker knows of its cluster, and the tasks that keep it up to date.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, RwLock,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use futures::StreamExt;
use tokio::sync::{mpsc, watch};

use crate::{
    cluster::{Cluster, LocalView, ModelKey, Role, WorkerCard, WorkerFilter, host_id},
    engine::Post,
    handoff::{HandoffId, Job, LenderEvent, LenderTimeouts, Limits, WorkerId},
    telemetry::{HandoffMetrics, TraceContext},
    transfer::Transport,
    worker::membership::local_view,
};

/// Between two looks at how long the queue is while it is not empty, or prompts are long enough for it to matter. Jobs
/// of our own are counted as they go.
const DEPTH_PERIOD: Duration = Duration::from_millis(250);
/// Periods between two looks while it does not matter how long the queue is: each look of each decode worker is a
/// question to NATS.
const IDLE_DEPTH_PERIODS: u32 = 8;
/// After this many looks in a row, [`DEPTH_PERIOD`] apart, that find nobody working or waiting, the queue counts as
/// deserted: a worker that is killed, or cannot reach the queue, stays registered until its lease runs out, if it does.
/// A look that fails closes the queue to new prompts; after as many of these, prompts that are on it are prefilled here
/// too: that is longer than a connection takes to be made again.
const DESERTED_LOOKS: u32 = 3;
/// Jobs on the way to the queue at a time.
const PUBLISHING_MAX: usize = 64;
/// In place of a depth: the queue cannot be reached.
const UNREACHABLE: u64 = u64::MAX;

/// What a decode worker knows of its cluster, kept up to date by tasks and read by the engine thread.
pub(super) struct View {
    /// Those that are registered.
    registered: AtomicU32,
    /// None of them takes jobs.
    deserted: AtomicBool,
    /// The device of one of them is of this host, and may write to one here.
    pub(super) beside: AtomicBool,
    /// One of them has adapters.
    pub(super) adapters: AtomicBool,
    queue_depth: AtomicU64,
    /// A decision has depended on the depth since it was last looked at.
    pub(super) depth_mattered: AtomicBool,
    /// Jobs that the queue has taken since it was last looked at.
    enqueued: Mutex<Vec<HandoffId>>,
    limits: RwLock<Limits>,
    metrics: HandoffMetrics,
}

impl View {
    pub(super) fn new(limits: Limits, metrics: HandoffMetrics) -> Arc<Self> {
        Arc::new(Self {
            registered: AtomicU32::new(0),
            deserted: AtomicBool::new(false),
            beside: AtomicBool::new(false),
            adapters: AtomicBool::new(false),
            queue_depth: AtomicU64::new(UNREACHABLE),
            depth_mattered: AtomicBool::new(false),
            enqueued: Mutex::default(),
            limits: RwLock::new(limits),
            metrics,
        })
    }

    pub(super) fn set_registered(&self, workers: usize) {
        self.registered.store(workers as u32, Ordering::Relaxed);
        self.metrics.workers.set(i64::from(self.prefill_workers()));
    }

    /// Returns whether that is news.
    fn set_deserted(&self, deserted: bool) -> bool {
        let changed = self.deserted.swap(deserted, Ordering::Relaxed) != deserted;
        self.metrics.workers.set(i64::from(self.prefill_workers()));
        changed
    }

    fn registered(&self) -> u32 {
        self.registered.load(Ordering::Relaxed)
    }

    /// Prefill workers that are taken to be alive.
    pub(super) fn prefill_workers(&self) -> u32 {
        if self.deserted.load(Ordering::Relaxed) { 0 } else { self.registered() }
    }

    pub(super) fn set_depth(&self, depth: Option<u64>) {
        self.queue_depth.store(depth.unwrap_or(UNREACHABLE), Ordering::Relaxed);
        self.metrics.set_queue_depth(depth);
    }

    pub(super) fn depth(&self) -> Option<u64> {
        Some(self.queue_depth.load(Ordering::Relaxed)).filter(|&depth| depth != UNREACHABLE)
    }

    fn enqueued(&self) -> MutexGuard<'_, Vec<HandoffId>> {
        self.enqueued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn limits(&self) -> Limits {
        *self.limits.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A job to put on the queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewJob {
    pub(super) handoff: HandoffId,
    pub(super) tokens: usize,
    pub(super) trace: Option<TraceContext>,
}

/// Follows which prefill workers are alive.
pub(super) async fn follow_workers(cluster: Cluster, key: ModelKey, view: Arc<View>, post: Post) {
    let mut workers = cluster.discovery.workers(WorkerFilter::of(key, Role::Prefill));
    let (host, own) = (host_id(), local_view());
    let mut known: Vec<WorkerId> = Vec::new();
    loop {
        let cards = workers.borrow_and_update().clone();
        let alive: Vec<WorkerId> = cards.keys().copied().collect();
        for gone in known.iter().filter(|&lease| !alive.contains(lease)) {
            tracing::info!(worker = %gone, "a prefill worker has gone");
            post.lender(LenderEvent::WorkerGone { worker: *gone });
        }
        for new in alive.iter().filter(|&lease| !known.contains(lease)) {
            tracing::info!(worker = %new, "a prefill worker is there");
            // If the queue counts as deserted, the new worker may be at it.
            view.depth_mattered.store(true, Ordering::Relaxed);
        }
        // First: nobody counts as there whose ways are not known.
        view.beside.store(cards.values().any(|card| is_beside(card, &host, own.as_ref())), Ordering::Relaxed);
        view.adapters.store(cards.values().any(|card| speaks(card, Transport::Rdma)), Ordering::Relaxed);
        view.set_registered(alive.len());
        if alive.is_empty() && !known.is_empty() {
            post.no_prefill_workers();
        }
        known = alive;
        if workers.changed().await.is_err() {
            return;
        }
    }
}

/// Whether a worker moves pages from its device to another's of this host, which it finds there for all that is known.
fn is_beside(card: &WorkerCard, host: &str, own: Option<&LocalView>) -> bool {
    let apart = card.local.as_ref().zip(own).is_some_and(|(other, own)| !other.meets(own));
    card.host_id == host && !apart && speaks(card, Transport::CudaIpc)
}

fn speaks(card: &WorkerCard, transport: Transport) -> bool {
    card.transports.iter().any(|name| name == transport.name())
}

/// Follows how long the queue is and whether anybody works on it, while somebody should, and which jobs are gone from
/// it.
pub(super) async fn follow_queue(cluster: Cluster, key: ModelKey, view: Arc<View>, post: Post) {
    let mut ticks = tokio::time::interval(DEPTH_PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut idle_periods = 0;
    let (mut deserted_looks, mut failed_looks) = (0, 0_u32);
    // Jobs that are on the queue, as far as is known, and since when.
    let mut there: Vec<(Instant, HandoffId)> = Vec::new();
    let patience = LenderTimeouts::default().unclaimed;
    loop {
        ticks.tick().await;
        if view.registered() == 0 {
            deserted_looks = 0;
            view.set_deserted(false);
            continue;
        }
        idle_periods += 1;
        let mattered = view.depth_mattered.swap(false, Ordering::Relaxed);
        let in_doubt = (1..DESERTED_LOOKS).contains(&deserted_looks);
        // A queue that has run empty unseen would keep the next prompt here.
        if !mattered && !in_doubt && view.depth() == Some(0) && idle_periods < IDLE_DEPTH_PERIODS {
            continue;
        }
        idle_periods = 0;
        // First: what the queue takes from now on, the look may miss.
        let (taken, since) = (std::mem::take(&mut *view.enqueued()), Instant::now());
        let depth = match cluster.queue.depth(key).await {
            Ok(depth) => {
                failed_looks = 0;
                Some(depth)
            }
            Err(error) => {
                if view.depth().is_some() {
                    tracing::warn!(%error, "prompts are prefilled here until the queue is back");
                }
                failed_looks = failed_looks.saturating_add(1);
                if failed_looks == DESERTED_LOOKS {
                    // Prompts whose jobs are on it would wait for it as well.
                    post.no_prefill_workers();
                }
                None
            }
        };
        view.set_depth(depth.map(|depth| depth.waiting));
        if depth.is_some_and(|depth| depth.is_empty()) {
            // Given up, as after too many deliveries, or lost with the queue's storage. Most were done, of course.
            there.drain(..).for_each(|(_, handoff)| post.lender(LenderEvent::JobGone { handoff }));
        }
        // Only now: NATS says that it has taken a job before it counts it.
        there.retain(|(since, _)| since.elapsed() < patience);
        there.extend(taken.into_iter().map(|handoff| (since, handoff)));
        // Whoever cannot be asked says nothing of who asks it.
        let Some(depth) = depth else { continue };
        deserted_looks = if depth.is_deserted() { DESERTED_LOOKS.min(deserted_looks + 1) } else { 0 };
        let deserted = deserted_looks == DESERTED_LOOKS;
        match view.set_deserted(deserted) {
            true if deserted => {
                tracing::warn!(
                    "no prefill worker asks for jobs, though some are registered: prompts are prefilled here"
                );
                post.no_prefill_workers();
            }
            true => tracing::info!("prefill workers ask for jobs again"),
            false => {}
        }
    }
}

/// Follows the live limits, `base` being those of the command line.
pub(super) async fn follow_limits(cluster: Cluster, key: ModelKey, view: Arc<View>, base: Limits, post: Post) {
    let mut config = cluster.discovery.config(key);
    loop {
        let json = config.borrow_and_update().clone();
        match json.as_deref().map_or(Ok(base), |json| base.overridden_by(json)) {
            Ok(limits) => {
                // The engine thread reads them and does not wait for a log.
                let mut current = view.limits.write().unwrap_or_else(PoisonError::into_inner);
                let before = std::mem::replace(&mut *current, limits);
                drop(current);
                if before != limits {
                    tracing::info!(%limits, model_key = %key, "the limits of disaggregation have changed");
                    post.itl_target(limits.itl_target());
                }
            }
            Err(error) => {
                tracing::warn!(
                    %error, model_key = %key, "the cluster's limits cannot be used; the last good ones stay"
                );
            }
        }
        if config.changed().await.is_err() {
            return;
        }
    }
}

/// Puts jobs on the queue, and notes those that are there. `addresses` is where this worker takes sessions.
pub(super) async fn publish_jobs(
    cluster: Cluster,
    key: ModelKey,
    jobs: mpsc::UnboundedReceiver<NewJob>,
    lease: watch::Receiver<Option<WorkerId>>,
    addresses: serde_json::Value,
    view: Arc<View>,
    post: Post,
) {
    let jobs = futures::stream::unfold(jobs, |mut jobs| async move { Some((jobs.recv().await?, jobs)) });
    let publish = |NewJob { handoff, tokens, trace }| {
        let lease = *lease.borrow();
        let (cluster, addresses, view, post) = (&cluster, addresses.clone(), &view, &post);
        async move {
            let published = match lease {
                None => Err("this worker is not registered".to_owned()),
                Some(lease) => {
                    let job = Job {
                        handoff,
                        decode: lease,
                        model_key: key.to_string(),
                        addresses,
                        prompt_tokens: tokens as u32,
                        traceparent: trace.map(|trace| trace.to_string()),
                    };
                    let published = cluster.queue.publish(key, handoff.to_string(), job.encode().into()).await;
                    published.map_err(|error| error.to_string())
                }
            };
            match published {
                Ok(()) => view.enqueued().push(handoff),
                Err(error) => {
                    tracing::warn!(%error, "a prompt is prefilled here: its job could not be put on the queue");
                    post.lender(LenderEvent::EnqueueFailed { handoff });
                }
            }
        }
    };
    jobs.for_each_concurrent(PUBLISHING_MAX, publish).await;
}

#[cfg(test)]
pub(super) mod tests;
