//! The decode worker's way to its prefill workers: what the engine thread sees of the cluster, and does to it.

use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock, Weak,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::StreamExt;
use tokio::sync::{mpsc, watch};

use super::staging::Staging;
use crate::{
    cluster::{Cluster, LocalView, ModelKey, Role, WorkerCard, WorkerFilter, host_id},
    engine::{LendingPort, Post, Stage, StagedPages},
    handoff::{
        Decision, Epoch, Forecast, HandoffCosts, HandoffId, Job, LenderEvent, LenderTimeouts, Limits, MailboxSlot,
        MailboxWord, Reason, SessionId, Situation, ToDecode, ToPrefill, WorkerId, decide,
    },
    scheduler::{Candidate, Route},
    telemetry::{HandoffMetrics, TraceContext},
    transfer::{Mailbox, SessionEvent, SessionServer, Sink, Transport},
    worker::membership::local_view,
};

/// Between two looks at how long the queue is while it is not empty, or prompts are long enough for it to matter. Jobs
/// of our own are counted as they go.
const DEPTH_PERIOD: Duration = Duration::from_millis(250);
/// As many periods pass between two looks while it does not matter: each look of each decode worker is a question to
/// NATS.
const IDLE_DEPTH_PERIODS: u32 = 8;
/// After this many looks in a row, [`DEPTH_PERIOD`] apart, that find nobody working or waiting, the queue counts as
/// deserted: a worker that is killed, or cannot reach the queue, stays registered until its lease runs out, if it does.
/// After as many failed looks the queue counts as away: that is longer than a connection takes to be made again.
const DESERTED_LOOKS: u32 = 3;
/// After a job that nobody has claimed, others would hardly fare better for as long: whoever takes them is busy, or
/// does not reach this worker.
const UNCLAIMED_PAUSE: Duration = Duration::from_secs(30);
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
    beside: AtomicBool,
    /// One of them has adapters.
    adapters: AtomicBool,
    queue_depth: AtomicU64,
    /// A decision has depended on the depth since it was last looked at.
    depth_mattered: AtomicBool,
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

    fn set_registered(&self, workers: usize) {
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
    fn prefill_workers(&self) -> u32 {
        if self.deserted.load(Ordering::Relaxed) { 0 } else { self.registered() }
    }

    fn set_depth(&self, depth: Option<u64>) {
        self.queue_depth.store(depth.unwrap_or(UNREACHABLE), Ordering::Relaxed);
        self.metrics.set_queue_depth(depth);
    }

    fn depth(&self) -> Option<u64> {
        Some(self.queue_depth.load(Ordering::Relaxed)).filter(|&depth| depth != UNREACHABLE)
    }

    fn enqueued(&self) -> MutexGuard<'_, Vec<HandoffId>> {
        self.enqueued.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn limits(&self) -> Limits {
        *self.limits.read().unwrap_or_else(PoisonError::into_inner)
    }
}

/// [`LendingPort`] over a real cluster.
pub(super) struct ClusterPort {
    pub(super) sessions: Arc<OnceLock<SessionServer>>,
    pub(super) mailbox: Mailbox,
    pub(super) view: Arc<View>,
    pub(super) jobs: mpsc::UnboundedSender<NewJob>,
    /// If the pages are in device memory.
    pub(super) staging: Option<Staging>,
    /// Tokens of a page.
    pub(super) block_size: usize,
    pub(super) costs: HandoffCosts,
    pub(super) started: Instant,
    /// Prompts of the step that is being planned which have left. Their jobs go to the queue when it is planned.
    pub(super) leaving: u64,
    /// When it was last found that nobody has claimed a job, if none was claimed since.
    pub(super) unclaimed: Option<Instant>,
}

/// A job to put on the queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct NewJob {
    handoff: HandoffId,
    tokens: usize,
    trace: Option<TraceContext>,
}

impl LendingPort for ClusterPort {
    fn is_open(&self) -> bool {
        self.view.prefill_workers() > 0 && self.view.depth().is_some() && !self.pauses()
    }

    fn planning(&mut self) {
        self.leaving = 0;
    }

    fn decide(&mut self, candidate: Candidate, local: Option<Forecast>) -> Route {
        let situation = Situation {
            uncached_tokens: (candidate.tokens - candidate.cached) as u32,
            prefill_workers: self.view.prefill_workers(),
            queue_depth: self.view.depth().map(|depth| depth + self.leaving),
            lost_handoffs: candidate.lost,
            local,
        };
        let decision = decide(&self.view.limits(), &situation, &self.costs, self.started.elapsed());
        let (route, depth_mattered) = match decision {
            Decision::Remote if !self.lets_in(candidate) => (Route::Local, false),
            Decision::Remote => (Route::Remote, true),
            Decision::Local(reason) => (Route::Local, matches!(reason, Reason::Busy | Reason::Sooner)),
        };
        if depth_mattered {
            self.view.depth_mattered.store(true, Ordering::Relaxed);
        }
        route
    }

    fn left(&mut self) {
        self.leaving += 1;
    }

    fn jobs_ahead(&self) -> u64 {
        let workers = self.view.prefill_workers().max(1);
        self.view.depth().unwrap_or(0) / u64::from(workers)
    }

    fn enqueue(&mut self, handoff: HandoffId, tokens: usize, trace: Option<TraceContext>) {
        if let Some(depth) = self.view.depth() {
            // Until somebody has it, or the next look, it counts as waiting.
            self.view.set_depth(Some(depth + 1));
        }
        // The task that takes them ends with the process.
        let _ = self.jobs.send(NewJob { handoff, tokens, trace });
    }

    fn word(&self, slot: MailboxSlot) -> MailboxWord {
        self.mailbox.load(slot)
    }

    fn claimed(&mut self) {
        self.unclaimed = None;
        if let Some(depth) = self.view.depth() {
            self.view.set_depth(Some(depth.saturating_sub(1)));
        }
    }

    fn unclaimed(&mut self) -> bool {
        let news = !self.pauses();
        self.unclaimed = Some(Instant::now());
        news
    }

    fn permit(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch, pages: Arc<[u32]>) {
        self.with_sessions(|sessions| sessions.lend(session, slot, epoch, pages));
    }

    fn stage(&mut self, session: SessionId, pages: usize) -> Stage {
        let Some(staging) = &mut self.staging else { return Stage::Direct };
        let transport = self.sessions.get().and_then(|sessions| sessions.transport(session));
        staging.stage(transport, pages)
    }

    fn staged(&self) -> usize {
        self.staging.as_ref().map_or(0, Staging::lent)
    }

    fn flush(&mut self) -> bool {
        self.staging.as_ref().is_none_or(Staging::flush)
    }

    fn take_up(&mut self, staged: StagedPages, pages: &[u32]) -> bool {
        self.staging.as_mut().is_some_and(|staging| staging.take_up(staged, pages))
    }

    fn unstage(&mut self, staged: &StagedPages) {
        if let Some(staging) = &mut self.staging {
            staging.give_back(staged);
        }
    }

    fn send(&mut self, session: SessionId, message: ToPrefill) {
        self.with_sessions(|sessions| sessions.send(session, Bytes::from(message.encode())));
    }

    fn revoke(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        self.with_sessions(|sessions| sessions.revoke(session, slot, epoch));
    }

    fn forget(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        self.with_sessions(|sessions| sessions.forget(session, slot, epoch));
    }

    fn fence(&mut self, session: SessionId) {
        self.with_sessions(|sessions| sessions.fence(session));
    }

    fn handed_off(&mut self, ahead: u64, queued: Duration, tokens: usize, computing: Duration) {
        self.costs.observe(ahead, queued, tokens as u32, computing, self.started.elapsed());
    }
}

impl ClusterPort {
    /// Whether nothing is handed off for a while, since nobody has claimed what was.
    fn pauses(&self) -> bool {
        self.unclaimed.is_some_and(|since| since.elapsed() < UNCLAIMED_PAUSE)
    }

    /// Whether all that a prompt lacks could come from another worker at once.
    fn lets_in(&mut self, candidate: Candidate) -> bool {
        let Self { staging: Some(staging), block_size, view, .. } = self else { return true };
        // The last token stays here.
        let pages = (candidate.tokens - 1).div_ceil(*block_size) - candidate.cached / *block_size;
        staging.lets_in(pages, view.beside.load(Ordering::Relaxed), view.adapters.load(Ordering::Relaxed))
    }

    /// The server is there before anything is lent, since it hears the claims.
    fn with_sessions(&self, act: impl FnOnce(&SessionServer)) {
        if let Some(sessions) = self.sessions.get() {
            act(sessions);
        }
    }
}

/// Passes on what happens on sessions to the engine thread. A peer that says what cannot be read is cut off. The server
/// holds what this gives, so this does not hold the server.
pub(super) fn sink(post: Post, sessions: Weak<OnceLock<SessionServer>>) -> Sink {
    let peers: Mutex<HashMap<SessionId, WorkerId>> = Mutex::default();
    Arc::new(move |event| {
        let mut peers = peers.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            SessionEvent::Opened { session, peer } => {
                let transport = peer.transport.name();
                tracing::info!(worker = %peer.worker, transport, "a prefill worker opened a session");
                peers.insert(session, peer.worker);
            }
            SessionEvent::Message { session, message } => {
                let Some(&worker) = peers.get(&session) else { return };
                match ToDecode::decode(&message) {
                    Ok(message) => {
                        if let ToDecode::Failed { handoff, reason, .. } = &message {
                            tracing::warn!(
                                %worker, %handoff, %reason,
                                "a prompt is prefilled here: it is beyond a prefill worker"
                            );
                        }
                        post.lender(LenderEvent::Message { session, worker, message });
                    }
                    Err(error) => {
                        tracing::warn!(%worker, %error, "a prefill worker is cut off");
                        if let Some(server) = sessions.upgrade().as_ref().and_then(|sessions| sessions.get()) {
                            server.fence(session);
                        }
                    }
                }
            }
            SessionEvent::Revoked { session, slot, epoch } => {
                post.lender(LenderEvent::Revoked { session, slot, epoch });
            }
            SessionEvent::Closed { session } => {
                if let Some(worker) = peers.get(&session) {
                    tracing::info!(%worker, "a prefill worker's session ended");
                }
                post.lender(LenderEvent::SessionClosed { session });
            }
            SessionEvent::Fenced { session } => {
                peers.remove(&session);
                post.lender(LenderEvent::SessionFenced { session });
            }
        }
    })
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
mod tests;
