//! The way to the engine thread, for any number of other threads, and what it shares with them.

use std::{
    num::NonZeroU64,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Instant,
};

use engine_kernels::MAX_TOP_LOGPROBS;
use tokio::sync::watch;

use super::{
    EngineConfig, Post, PrefillHandle, PrefillRequest, Request, SubmitError,
    export::PrefillTask,
    generation::{self, EventBounds, Generation},
    post::Message,
    request_state::{RequestState, Terms},
};
use crate::{cache::PageHasher, scheduler::Sequence, telemetry::EngineMetrics};

/// Whether the engine serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EngineStatus {
    /// It does.
    Running,
    /// It finishes what it has and takes nothing new.
    Draining,
    /// It has gone, as it was told to.
    Stopped,
    /// It has gone, and its requests were aborted.
    Failed {
        /// What happened.
        reason: String,
    },
}

/// What the engine is doing, as of its latest step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// Requests taking part in steps.
    pub running: usize,
    /// Requests accepted and not running.
    pub waiting: usize,
    /// Pages holding nothing.
    pub pages_free: usize,
    /// Pages kept for prefix hits.
    pub pages_cached: usize,
    /// Pages in use.
    pub pages_owned: usize,
    /// Pages lent to prefill workers.
    pub pages_lent: usize,
    /// Pages that a prefill worker may still write to, and nobody wants.
    pub pages_quarantined: usize,
    /// Tokens of all requests that are still to be computed.
    pub pending_tokens: usize,
    /// Tokens of all requests whose keys and values are in the cache.
    pub computed_tokens: usize,
}

/// What handles and the engine thread share.
pub(super) struct Shared {
    pub(super) config: EngineConfig,
    pub(super) metrics: EngineMetrics,
    /// Counts generations that were dropped; the engine looks for them when it changes.
    pub(super) cancellations: Arc<AtomicUsize>,
    pub(super) stopping: AtomicBool,
    /// Another number whenever the engine goes on with something else, a step or what somebody said; 0 while it waits
    /// for work.
    pub(super) step: AtomicU64,
    /// As of the latest step.
    pub(super) pending_tokens: AtomicUsize,
    pub(super) computed_tokens: AtomicUsize,
    pub(super) status: watch::Sender<EngineStatus>,
    /// Whether the engine thread has let go of everything.
    pub(super) gone: watch::Sender<bool>,
    draining: AtomicBool,
    /// Requests in the engine or on the way to it.
    live: watch::Sender<usize>,
    next_prefill: AtomicU64,
}

impl Shared {
    pub(super) fn new(config: EngineConfig, metrics: EngineMetrics) -> Arc<Self> {
        Arc::new(Self {
            config,
            metrics,
            cancellations: Arc::default(),
            stopping: AtomicBool::new(false),
            step: AtomicU64::new(0),
            pending_tokens: AtomicUsize::new(0),
            computed_tokens: AtomicUsize::new(0),
            status: watch::Sender::new(EngineStatus::Running),
            gone: watch::Sender::new(false),
            draining: AtomicBool::new(false),
            live: watch::Sender::new(0),
            next_prefill: AtomicU64::new(1),
        })
    }

    /// Takes a place among the live requests, if there is one.
    fn enter(self: &Arc<Self>) -> Result<RequestPermit, SubmitError> {
        let mut entry = Ok(());
        self.live.send_if_modified(|live| {
            entry = self.check_place(*live);
            *live += usize::from(entry.is_ok());
            entry.is_ok()
        });
        entry.map(|()| RequestPermit(self.clone()))
    }

    /// Whether there is one for a further request beside so many.
    fn check_place(&self, live: usize) -> Result<(), SubmitError> {
        if self.draining.load(Ordering::Acquire) {
            return Err(SubmitError::ShuttingDown);
        }
        if live >= self.config.max_requests() {
            let running = self.metrics.running.get().max(0) as usize;
            return Err(SubmitError::QueueFull { waiting: live.saturating_sub(running) });
        }
        Ok(())
    }
}

/// A request's place among the live ones, given up when this is dropped.
pub(super) struct RequestPermit(Arc<Shared>);

impl Drop for RequestPermit {
    fn drop(&mut self) {
        self.0.live.send_modify(|live| *live -= 1);
    }
}

/// The way to the engine thread, for any number of threads. When all handles are gone, the engine finishes what it has
/// and ends.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Shared>,
    hasher: PageHasher,
    post: Post,
}

impl EngineHandle {
    pub(super) fn new(shared: Arc<Shared>, hasher: PageHasher, post: Post) -> Self {
        Self { shared, hasher, post }
    }

    /// Hands a request to the engine. Never waits. `max_tokens` beyond the context length is cut to it.
    pub fn submit(&self, request: Request) -> Result<Generation, SubmitError> {
        let submitted = Instant::now();
        let max_tokens = self.check(&request)?;
        let permit = self.shared.enter()?;
        let alternatives = |wanted: Option<u32>| (wanted.unwrap_or(0) as usize).min(MAX_TOP_LOGPROBS);
        let bounds = EventBounds {
            prompt_tokens: if request.prompt_logprobs.is_some() { request.prompt.len() } else { 0 },
            prompt_top: alternatives(request.prompt_logprobs),
            tokens: max_tokens - request.output.len(),
            top: alternatives(request.logprobs),
        };
        let (outlet, generation) = generation::channel(bounds, self.shared.cancellations.clone());
        let hasher = self.hasher.salted(request.salt);
        let mut sequence = Sequence::new(&request.prompt, max_tokens, request.prompt_logprobs.is_some(), &hasher);
        sequence.resume(&request.output);
        let state = RequestState::new(&request, outlet, submitted, permit);
        let terms = Terms::new(request, max_tokens, self.shared.config.vocab_size);
        match self.post.send(Message::Request(Box::new((sequence, terms, state)))) {
            true => Ok(generation),
            false => Err(SubmitError::ShuttingDown),
        }
    }

    /// Whether there is a place for a request at the moment: without one, it need not be prepared. Whether there still
    /// is one then, [`EngineHandle::submit`] says.
    pub fn check_place(&self) -> Result<(), SubmitError> {
        self.shared.check_place(*self.shared.live.borrow())
    }

    /// Hands the engine a prompt to compute for a decode worker. Never waits. The pages are kept until the handle is
    /// dropped.
    pub fn prefill(&self, request: PrefillRequest) -> Result<PrefillHandle, SubmitError> {
        let PrefillRequest { tokens, salt, first_page, exporter } = request;
        self.check_prompt(&tokens)?;
        let permit = self.shared.enter()?;
        let id = self.shared.next_prefill.fetch_add(1, Ordering::Relaxed);
        let sequence = Sequence::prefill_only(&tokens, &self.hasher.salted(salt));
        let task = PrefillTask { id, sequence, first_page, exporter, permit };
        match self.post.send(Message::Prefill(Box::new(task))) {
            true => Ok(PrefillHandle { id, post: self.post.clone() }),
            false => Err(SubmitError::ShuttingDown),
        }
    }

    /// What the engine was started with.
    pub fn config(&self) -> &EngineConfig {
        &self.shared.config
    }

    /// Whether it serves.
    pub fn status(&self) -> EngineStatus {
        let status = self.shared.status.borrow().clone();
        match status {
            EngineStatus::Running if self.shared.draining.load(Ordering::Acquire) => EngineStatus::Draining,
            other => other,
        }
    }

    /// What it is doing.
    pub fn snapshot(&self) -> Snapshot {
        let read = |gauge: &prometheus::IntGauge| gauge.get().max(0) as usize;
        let metrics = &self.shared.metrics;
        Snapshot {
            running: read(&metrics.running),
            waiting: read(&metrics.waiting),
            pages_free: read(&metrics.pages_free),
            pages_cached: read(&metrics.pages_cached),
            pages_owned: read(&metrics.pages_owned),
            pages_lent: read(&metrics.pages_lent),
            pages_quarantined: read(&metrics.pages_quarantined),
            pending_tokens: self.shared.pending_tokens.load(Ordering::Relaxed),
            computed_tokens: self.shared.computed_tokens.load(Ordering::Relaxed),
        }
    }

    /// What the engine is at, a step or what somebody said, if anything: another number each time.
    pub(crate) fn step_under_way(&self) -> Option<NonZeroU64> {
        NonZeroU64::new(self.shared.step.load(Ordering::Relaxed))
    }

    /// Refuses new requests from now on, for good, and returns when the last one has finished.
    pub async fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
        // The sender lives in `shared`, so waiting cannot fail.
        let _ = self.shared.live.subscribe().wait_for(|&live| live == 0).await;
    }

    /// Ends the engine now: every request is aborted.
    pub fn stop(&self) {
        self.shared.draining.store(true, Ordering::Release);
        self.shared.stopping.store(true, Ordering::Release);
        // If it has gone there is nobody to tell.
        let _ = self.post.send(Message::Wake);
    }

    /// Returns when the engine thread has released the model: after [`EngineHandle::stop`] or a failure.
    pub async fn stopped(&self) -> EngineStatus {
        // The sender lives in `shared`, so waiting cannot fail.
        let _ = self.shared.gone.subscribe().wait_for(|&gone| gone).await;
        self.status()
    }

    /// Refuses what the engine could not work on; returns how many tokens the answer may have.
    fn check(&self, request: &Request) -> Result<usize, SubmitError> {
        let EngineConfig { max_model_len: limit, vocab_size, .. } = self.shared.config;
        let prompt = request.prompt.len();
        let room = self.check_prompt(&request.prompt)?;
        if room == 0 && request.max_tokens > 0 {
            return Err(SubmitError::PromptTooLong { prompt, limit });
        }
        let biased = request.sampling.logit_bias.iter().map(|&(token, _)| token);
        let mut given = request.output.iter().copied().chain(biased);
        if let Some(token) = given.find(|&token| token as usize >= vocab_size) {
            return Err(SubmitError::UnknownToken { token, vocab_size });
        }
        let (max_tokens, tokens) = (room.min(request.max_tokens as usize), request.output.len());
        if tokens > 0 && tokens >= max_tokens {
            return Err(SubmitError::NothingLeft { tokens });
        }
        Ok(max_tokens)
    }

    /// Returns how many tokens may follow.
    fn check_prompt(&self, prompt: &[u32]) -> Result<usize, SubmitError> {
        let EngineConfig { max_model_len: limit, vocab_size, .. } = self.shared.config;
        if prompt.is_empty() {
            return Err(SubmitError::EmptyPrompt);
        }
        if let Some(&token) = prompt.iter().find(|&&token| token as usize >= vocab_size) {
            return Err(SubmitError::UnknownToken { token, vocab_size });
        }
        limit.checked_sub(prompt.len()).ok_or(SubmitError::PromptTooLong { prompt: prompt.len(), limit })
    }
}
