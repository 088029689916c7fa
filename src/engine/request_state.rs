//! What the engine thread keeps of a request beside its sequence: how it draws, and where the tokens go.

use std::time::Instant;

use engine_kernels::{RowTask, SampleRow, Sampled, SamplingParams, SequenceId};

use super::{FinishReason, Request, constraint::Constraint, generation::Outlet, handle::RequestPermit};
use crate::{
    scheduler::Sequence,
    telemetry::{EngineMetrics, TraceContext},
};

/// How a request's tokens are drawn and when its answer ends. Apart from [`RequestState`] because samplers read it from
/// several threads.
pub(crate) struct Terms {
    sampling: SamplingParams,
    max_tokens: usize,
    min_tokens: usize,
    stop_token_ids: Vec<u32>,
    constraint: Option<Constraint>,
    logprobs: Option<u32>,
    prompt_logprobs: Option<u32>,
}

impl Terms {
    /// `max_tokens` is the request's, cut to the context.
    pub(super) fn new(request: Request, max_tokens: usize, vocab_size: usize) -> Self {
        let mut stop_token_ids = request.stop_token_ids;
        // An id beyond the vocabulary is never drawn, and kernels may index by what is left.
        stop_token_ids.retain(|&token| (token as usize) < vocab_size);
        let constraint = request.grammar.map(|matcher| Constraint::new(matcher, &stop_token_ids));
        Self {
            sampling: request.sampling,
            max_tokens,
            min_tokens: request.min_tokens as usize,
            stop_token_ids,
            constraint,
            logprobs: request.logprobs,
            prompt_logprobs: request.prompt_logprobs,
        }
    }

    /// Whether anything is generated, or only the prompt asked about.
    pub(super) fn generates(&self) -> bool {
        self.max_tokens > 0
    }

    /// Whether log-probabilities of the prompt are wanted.
    pub(super) fn scores_prompt(&self) -> bool {
        self.prompt_logprobs.is_some()
    }

    /// What is wanted of the logits at `position` of `sequence`.
    pub(super) fn row<'a>(&'a self, sequence: &'a Sequence, position: usize) -> SampleRow<'a> {
        let (prompt, output) = (sequence.prompt(), sequence.output());
        let number = SequenceId(sequence.arrival());
        if let Some(&token) = prompt.get(position + 1) {
            let task = RowTask::Score { token };
            return SampleRow { task, sequence: number, prompt, output, logprobs: self.prompt_logprobs };
        }
        let suppress = if output.len() < self.min_tokens { &self.stop_token_ids[..] } else { &[] };
        let mask = self.constraint.as_ref().and_then(|constraint| constraint.mask(suppress));
        let task = RowTask::Sample { params: &self.sampling, suppress, mask };
        SampleRow { task, sequence: number, prompt, output, logprobs: self.logprobs }
    }

    /// Whether the answer has a grammar.
    pub(super) fn is_constrained(&self) -> bool {
        self.constraint.is_some()
    }

    /// Whether the answer has ended with what it has, because nothing could be drawn.
    pub(super) fn ended(&self) -> Option<FinishReason> {
        self.constraint.as_ref().and_then(Constraint::end)
    }

    /// Whether `token`, the `generated`-th, is the last.
    pub(super) fn end(&mut self, token: u32, generated: usize) -> Option<FinishReason> {
        if generated > self.min_tokens && self.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop);
        }
        let end = self.constraint.as_mut().and_then(|constraint| constraint.take(token));
        end.or_else(|| (generated == self.max_tokens).then_some(FinishReason::Length))
    }
}

/// Where a request's tokens go.
pub(crate) struct RequestState {
    outlet: Outlet,
    submitted: Instant,
    /// When its latest token came out.
    last_token: Option<Instant>,
    with_logprobs: bool,
    with_prompt: bool,
    trace: Option<TraceContext>,
    permit: RequestPermit,
}

impl RequestState {
    pub(super) fn new(request: &Request, outlet: Outlet, submitted: Instant, permit: RequestPermit) -> Self {
        Self {
            outlet,
            submitted,
            last_token: None,
            with_logprobs: request.logprobs.is_some(),
            with_prompt: request.prompt_logprobs.is_some(),
            trace: request.trace,
            permit,
        }
    }

    /// The trace that the request is part of.
    pub(super) fn trace(&self) -> Option<TraceContext> {
        self.trace
    }

    /// Whether nobody waits for the answer any more.
    pub(super) fn is_abandoned(&self) -> bool {
        self.outlet.is_abandoned()
    }

    /// The first step that computes some of the sequence is on its way, or done.
    pub(super) fn begin(&mut self, sequence: &Sequence, metrics: &EngineMetrics) {
        let prompt = sequence.prompt();
        // Of an answer that began elsewhere, some of the output may have been found too.
        let cached = sequence.cached_tokens().min(prompt.len());
        metrics.prompt_tokens.inc_by(prompt.len() as u64);
        if sequence.is_from_afar() {
            metrics.prefills_remote.inc()
        } else {
            metrics.prefills_local.inc()
        }
        metrics.prefix_hit_tokens.inc_by(cached as u64);
        self.outlet.set_cached_tokens(cached);
        if self.with_prompt {
            self.outlet.prompt(prompt[0], None);
        }
    }

    /// Passes on a scored token of the prompt.
    pub(super) fn prompt_token(&mut self, token: u32, scored: &Sampled) {
        self.outlet.prompt(token, Some(scored));
    }

    /// Passes on a generated token.
    pub(super) fn token(&mut self, sampled: &Sampled, now: Instant, metrics: &EngineMetrics) {
        self.outlet.token(sampled, self.with_logprobs);
        metrics.generation_tokens.inc();
        match self.last_token.replace(now) {
            None => metrics.time_to_first_token.observe((now - self.submitted).as_secs_f64()),
            Some(last) => metrics.inter_token_latency.observe((now - last).as_secs_f64()),
        }
    }

    /// Wakes the reader, once a step.
    pub(super) fn wake(&self) {
        self.outlet.wake();
    }

    /// Says the last word.
    pub(super) fn finish(self, reason: FinishReason) {
        let Self { outlet, permit, .. } = self;
        // First: whoever hears of the end may send the next request, and is to find a place.
        drop(permit);
        outlet.finish(reason);
    }
}
