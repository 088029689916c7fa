//! The engine thread: its turns, from what arrived to what readers hear.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::Ordering,
        mpsc::{Receiver, RecvTimeoutError, TryRecvError},
    },
    thread,
    time::{Duration, Instant},
};

use super::{
    ConfigError, EngineConfig, EngineHandle, EngineStatus, FinishReason, Inbox, LendingConfig, LendingPort, Runner,
    RunnerError,
    export::Exports,
    handle::Shared,
    inbox,
    lending::{Lending, Routing},
    pace::Pace,
    post::Message,
    request_state::{RequestState, Terms},
    step::Step,
};
use crate::{
    cache::PageHasher,
    scheduler::{AllLocal, Scheduler, SchedulerLimits, SlotId},
    telemetry::{EngineMetrics, StepKind},
};

/// Between two looks into the mailbox while there is nothing to compute: prefill workers on the same host write to it
/// without waking anybody.
const MAILBOX_PAUSE: Duration = Duration::from_micros(300);

/// For how long nobody has to have come before all pages are looked at, which takes milliseconds.
pub(super) const QUIET: Duration = Duration::from_millis(100);

/// Why an engine ends whose device does not say when adapters' writes are over.
const LOST_PAGES: &str = "the device cannot be made to wait for what RDMA adapters wrote to its memory, so pages could \
                          change under whatever is computed in them; see what its driver says in the log; with \
                          --rdma-device-memory never such pages are staged in host memory";

/// The engine thread: the only one that touches the model, the scheduler and the KV pages.
pub struct Engine<R> {
    pub(super) runner: R,
    pub(super) scheduler: Scheduler,
    /// By slot, as `requests` are.
    pub(super) terms: Box<[Option<Terms>]>,
    requests: Box<[Option<RequestState>]>,
    /// The step that is being planned, and computed.
    pub(super) step: Step,
    /// The one before it, if what it gives is not known yet; see `ahead.rs`.
    pub(super) under_way: Step,
    pub(super) is_under_way: bool,
    /// When the latest step was finished.
    pub(super) finished: Instant,
    pace: Pace,
    lending: Option<Lending>,
    exports: Exports,
    messages: Receiver<Message>,
    shared: Arc<Shared>,
    /// Requests that want log-probabilities of their prompts.
    pub(super) scoring: usize,
    /// Requests with a grammar.
    pub(super) constrained: usize,
    /// Cancellations looked after so far.
    cancellations: usize,
    /// Whether the last plan computed nothing, although somebody is here.
    held_up: bool,
    /// Steps begun, and turns on which somebody was heard.
    begun: u64,
}

/// What a turn that took what arrived goes on with.
#[derive(PartialEq, Eq)]
enum Turn {
    Compute,
    Stop,
}

impl<R: Runner> Engine<R> {
    /// Starts the engine thread, which serves until it is told to stop or every handle is gone.
    pub fn start(runner: R, config: EngineConfig, metrics: EngineMetrics) -> Result<EngineHandle, ConfigError> {
        Self::start_with(runner, config, metrics, inbox().1, None)
    }

    /// The same for an engine that lends pages to prefill workers, whose port has the way into `inbox`.
    pub fn start_lending(
        runner: R,
        config: EngineConfig,
        metrics: EngineMetrics,
        inbox: Inbox,
        lending: LendingConfig,
        port: Box<dyn LendingPort>,
    ) -> Result<EngineHandle, ConfigError> {
        let sequences = config.max_requests();
        let lending = Lending::new(lending, port, sequences, metrics.handoffs.clone());
        Self::start_with(runner, config, metrics, inbox, Some(lending))
    }

    fn start_with(
        runner: R,
        config: EngineConfig,
        metrics: EngineMetrics,
        Inbox(messages, post): Inbox,
        lending: Option<Lending>,
    ) -> Result<EngineHandle, ConfigError> {
        config.validate()?;
        let hasher = match config.prefix_caching {
            true => PageHasher::new(&rand::random::<[u8; 32]>(), config.block_size),
            false => PageHasher::without_hashes(config.block_size),
        };
        let limits = SchedulerLimits {
            max_num_seqs: config.max_num_seqs,
            max_num_batched_tokens: config.max_num_batched_tokens,
            max_sequences: config.max_requests(),
        };
        let shared = Shared::new(config, metrics);
        let mut engine = Self {
            runner,
            scheduler: Scheduler::new(limits, shared.config.block_size, shared.config.blocks),
            terms: (0..limits.max_sequences).map(|_| None).collect(),
            requests: (0..limits.max_sequences).map(|_| None).collect(),
            step: Step::new(&shared.config),
            under_way: Step::new(&shared.config),
            is_under_way: false,
            finished: Instant::now(),
            pace: Pace::new(shared.config.itl_target, shared.config.max_num_batched_tokens),
            lending,
            exports: Exports::new(limits.max_sequences, shared.config.block_size),
            messages,
            shared: shared.clone(),
            scoring: 0,
            constrained: 0,
            cancellations: 0,
            held_up: false,
            begun: 0,
        };
        engine.scheduler.cut_chunks_beside_decodes(engine.pace.chunk());
        engine.publish_gauges();
        let handle = EngineHandle::new(shared.clone(), hasher, post);
        thread::Builder::new()
            .name("engine".to_owned())
            .spawn(move || serve(engine, &shared))
            .map_err(|source| ConfigError::Thread { reason: source.to_string() })?;
        Ok(handle)
    }

    fn run(&mut self) -> Result<(), RunnerError> {
        while self.take_arrivals() == Turn::Compute {
            self.forget_cancelled();
            if self.has_lost_pages() {
                return Err(RunnerError(LOST_PAGES.to_owned()));
            }
            if self.scheduler.is_empty() {
                self.finish_under_way()?;
                continue;
            }
            self.plan();
            if self.step.plan.entries().is_empty() {
                self.held_up = !self.is_under_way;
                self.publish_gauges();
                self.finish_under_way()?;
                continue;
            }
            self.step.fill(&self.scheduler, &self.terms);
            self.compute()?;
            // A device has this one to go on with while readers hear of the tokens of the one before.
            self.finish_under_way()?;
            self.commit();
            if self.runner.ahead().is_some() {
                self.run_ahead();
            } else {
                self.finish()?;
            }
            if cfg!(debug_assertions) {
                self.check_integrity();
            }
        }
        Ok(())
    }

    /// Whether adapters may still write to pages that came back. Asked before anything is computed.
    fn has_lost_pages(&self) -> bool {
        self.lending.as_ref().is_some_and(Lending::has_failed)
    }

    /// Takes note that the step is computed, or will be before the next.
    fn commit(&mut self) {
        self.scheduler.commit(&self.step.plan);
        // First, so that who hears of something finds in the gauges who runs.
        self.publish_gauges();
        let Self { scheduler, requests, step: Step { plan, .. }, exports, shared, .. } = self;
        exports.step_done(plan.entries(), scheduler);
        for entry in plan.entries().iter().filter(|entry| entry.first && scheduler.has(entry)) {
            if let Some(request) = &mut requests[entry.slot.index()] {
                request.begin(scheduler.sequence(entry.slot), &shared.metrics);
            }
        }
    }

    /// Counts a step, and learns from how long it took.
    pub(super) fn take_note(&mut self, took: Duration) {
        let Self { step: Step { plan, .. }, scheduler, pace, shared, .. } = self;
        let (prompt_tokens, decodes) = (plan.prompt_tokens(), plan.decodes());
        shared.metrics.observe_step(StepKind::of(plan.entries().len(), decodes), took);
        pace.stepped(prompt_tokens, decodes, took);
        scheduler.cut_chunks_beside_decodes(pace.chunk());
        scheduler.cut_chunks_alone(pace.chunk_alone());
    }

    /// Decides what the next step computes, and sends away what others compute.
    fn plan(&mut self) {
        let Self { scheduler, requests, step: Step { plan, .. }, pace, lending, exports, shared, .. } = self;
        let trace = |slot: SlotId| requests[slot.index()].as_ref().and_then(RequestState::trace);
        match lending {
            None => scheduler.plan(plan, &mut AllLocal),
            Some(lending) => {
                lending.make_room(scheduler);
                lending.planning();
                scheduler.plan(plan, &mut Routing { lending, pace });
                lending.lend(&mut plan.loans, scheduler, trace);
            }
        }
        for &slot in &plan.found {
            exports.found(slot, scheduler);
        }
        shared.metrics.preemptions.inc_by(plan.preempted() as u64);
    }

    /// Looks after what is lent and takes in what arrived; sleeps if there is nothing else to do.
    fn take_arrivals(&mut self) -> Turn {
        if let Some(lending) = &mut self.lending {
            lending.attend(&mut self.scheduler);
        }
        if self.has_lost_pages() {
            return Turn::Compute;
        }
        if (self.scheduler.is_empty() || self.held_up) && !self.is_under_way {
            self.held_up = false;
            self.shared.step.store(0, Ordering::Relaxed);
            self.publish_gauges();
            // With nothing lent any more, what the others waited for has just come back.
            if self.lending.as_ref().is_some_and(Lending::is_open) {
                let received = self.messages.recv_timeout(MAILBOX_PAUSE);
                self.begin();
                match received {
                    Ok(message) => self.take(message),
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Turn::Stop,
                }
            } else if self.scheduler.is_empty() || self.lending.is_none() {
                let mut received = self.messages.recv_timeout(QUIET);
                if matches!(received, Err(RecvTimeoutError::Timeout)) {
                    self.check_integrity();
                    received = self.messages.recv().map_err(RecvTimeoutError::from);
                }
                self.begin();
                match received {
                    Ok(message) => self.take(message),
                    Err(_) => return Turn::Stop,
                }
            }
        }
        loop {
            if self.shared.stopping.load(Ordering::Acquire) {
                return Turn::Stop;
            }
            match self.messages.try_recv() {
                Ok(message) => self.take(message),
                Err(TryRecvError::Empty | TryRecvError::Disconnected) => return Turn::Compute,
            }
        }
    }

    fn take(&mut self, message: Message) {
        let Self { scheduler, pace, exports, lending, .. } = self;
        let request = match message {
            Message::Request(request) => request,
            Message::Prefill(task) => return exports.add(*task, scheduler),
            Message::Cancel(id) => return exports.cancel(id, scheduler),
            Message::Release(id) => return exports.release(id, scheduler),
            Message::Lender(event) => {
                if let Some(lending) = lending {
                    lending.on(event, scheduler);
                }
                return;
            }
            Message::NoPrefillWorkers => {
                if let Some(lending) = lending {
                    lending.recall_queued(scheduler);
                }
                return;
            }
            Message::ItlTarget(target) => {
                pace.set_target(target);
                return scheduler.cut_chunks_beside_decodes(pace.chunk());
            }
            Message::Wake => return,
        };
        let (sequence, terms, state) = *request;
        // If its reader had left already, `forget_cancelled` may have counted that, and would not look again.
        if state.is_abandoned() {
            return;
        }
        // There are as many slots as places, so this succeeds; if not, dropping the state aborts the request.
        if let Some(slot) = self.scheduler.add(sequence) {
            self.scoring += usize::from(terms.scores_prompt());
            self.constrained += usize::from(terms.is_constrained());
            self.terms[slot.index()] = Some(terms);
            self.requests[slot.index()] = Some(state);
        }
    }

    /// Frees everything of requests whose readers have gone.
    fn forget_cancelled(&mut self) {
        let cancellations = self.shared.cancellations.load(Ordering::Acquire);
        if cancellations == self.cancellations {
            return;
        }
        self.cancellations = cancellations;
        for slot in self.scheduler.slots() {
            let request = &self.requests[slot.index()];
            if request.as_ref().is_some_and(|request| request.is_abandoned()) {
                self.retire(slot, FinishReason::Aborted);
            }
        }
    }

    /// Tells that there is something to do, other than what was to do before.
    fn begin(&mut self) {
        self.begun += 1;
        self.shared.step.store(self.begun, Ordering::Relaxed);
    }

    fn compute(&mut self) -> Result<(), RunnerError> {
        self.begin();
        let launched = Instant::now();
        let Self { runner, scheduler, terms, exports, step: Step { plan, batch, rows, out, .. }, .. } = self;
        let (scheduler, plan) = (&*scheduler, &*plan);
        let mut layer_done = |layer| exports.layer(layer, plan.entries(), scheduler);
        match runner.ahead() {
            Some(ahead) => {
                ahead.launch(batch, &mut layer_done)?;
                self.draw()?;
            }
            None => {
                let (terms, rows) = (&**terms, &*rows);
                let row = |i| rows.task(i, scheduler, terms);
                runner.execute(batch, &row, &mut out[..rows.len()], &mut layer_done)?;
            }
        }
        self.step.times = launched..Instant::now();
        Ok(())
    }

    /// Passes on what the step computed.
    pub(super) fn deliver(&mut self, now: Instant) {
        let mut next_row = 0;
        for at in 0..self.step.plan.entries().len() {
            let entry = self.step.plan.entries()[at];
            let rows = next_row..next_row + self.step.rows.counts()[at];
            next_row = rows.end;
            let Self { scheduler, terms, requests, step, shared, .. } = self;
            // It may have ended since the step was planned.
            if !scheduler.has(&entry) {
                continue;
            }
            let slot = entry.slot.index();
            let (Some(terms), Some(request)) = (&mut terms[slot], &mut requests[slot]) else { continue };
            let mut end = None;
            for (position, sampled) in (entry.start + entry.logits_from..).zip(&step.out[rows]) {
                let known = scheduler.sequence(entry.slot).prompt().get(position + 1).copied();
                end = terms.ended().filter(|_| known.is_none());
                if end.is_some() {
                    break;
                }
                if sampled.impossible {
                    // Anything said now would be made up.
                    tracing::error!(position, "the model gave no possible token (NaN?): the request is aborted");
                    end = Some(FinishReason::Impossible);
                    break;
                }
                if let Some(token) = known {
                    request.prompt_token(token, sampled);
                } else {
                    if scheduler.sequence(entry.slot).has_placeholder() {
                        scheduler.reveal(entry.slot, sampled.token);
                    } else {
                        scheduler.push_token(entry.slot, sampled.token);
                    }
                    request.token(sampled, now, &shared.metrics);
                    end = terms.end(sampled.token, scheduler.sequence(entry.slot).output().len());
                }
            }
            let prompt_done = entry.start + entry.len == scheduler.sequence(entry.slot).prompt().len();
            if end.is_none() && prompt_done && !terms.generates() {
                end = Some(FinishReason::Length);
            }
            match end {
                Some(reason) => self.retire(entry.slot, reason),
                None => request.wake(),
            }
        }
    }

    /// Ends a request. Its pages are free before its reader hears of it.
    fn retire(&mut self, slot: SlotId, reason: FinishReason) {
        self.scheduler.remove(slot);
        if let Some(lending) = &mut self.lending {
            lending.withdraw(slot, &mut self.scheduler);
        }
        self.publish_counts();
        if let Some(terms) = self.terms[slot.index()].take() {
            self.scoring -= usize::from(terms.scores_prompt());
            self.constrained -= usize::from(terms.is_constrained());
        }
        if let Some(request) = self.requests[slot.index()].take() {
            request.finish(reason);
        }
    }

    fn check_integrity(&mut self) {
        self.scheduler.check_integrity();
        if let Some(lending) = &self.lending {
            lending.check_integrity(&self.scheduler);
        }
    }

    /// What is known of those that run or wait: how many, and of how many tokens.
    fn publish_gauges(&self) {
        self.publish_counts();
        let (pending, computed) = self.scheduler.tokens();
        self.shared.pending_tokens.store(pending, Ordering::Relaxed);
        self.shared.computed_tokens.store(computed, Ordering::Relaxed);
    }

    /// The part of it that adds up no tokens: many may end in one step.
    fn publish_counts(&self) {
        let metrics = &self.shared.metrics;
        let pages = self.scheduler.pages();
        let unstarted = self.scheduler.unstarted();
        metrics.running.set((self.scheduler.running() - unstarted) as i64);
        metrics.waiting.set((self.scheduler.waiting() + self.scheduler.away() + unstarted) as i64);
        metrics.pages_free.set(pages.free as i64);
        metrics.pages_cached.set(pages.cached as i64);
        metrics.pages_owned.set(pages.owned as i64);
        metrics.pages_lent.set(pages.lent as i64);
        metrics.pages_quarantined.set(pages.quarantined as i64);
    }
}

/// The thread's main function: whatever happens inside, every request ends and everybody learns of it.
fn serve<R: Runner>(mut engine: Engine<R>, shared: &Shared) {
    let outcome = catch_unwind(AssertUnwindSafe(|| engine.run()));
    let failure = match outcome {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(panic) => Some(format!("the engine thread panicked: {}", panic_message(&*panic))),
    };
    if let Some(reason) = failure {
        tracing::error!(%reason, "the engine failed; all requests are aborted");
        // First, so that whoever is aborted below finds it said already.
        shared.status.send_replace(EngineStatus::Failed { reason });
    }
    // Dropping these aborts all requests and prompts, and whoever comes later is refused. First: the model may have to
    // wait for its device, and a step that failed is under way until it has.
    let Engine { messages, requests, exports, runner, lending, .. } = engine;
    drop((messages, requests, exports));
    drop((runner, lending));
    shared.step.store(0, Ordering::Relaxed);
    shared.status.send_if_modified(|status| {
        let running = *status == EngineStatus::Running;
        if running {
            *status = EngineStatus::Stopped;
        }
        running
    });
    shared.gone.send_replace(true);
}

fn panic_message(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("?")
}
