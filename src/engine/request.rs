use engine_kernels::SamplingParams;

use crate::{cache::Salt, grammar::Matcher, telemetry::TraceContext};

/// A request as the engine thread sees it: token ids in, token ids out. Text, templates and stop strings stay in `api`.
#[derive(Debug, Clone)]
pub struct Request {
    /// The prompt, at least one token.
    pub prompt: Vec<u32>,
    /// The beginning of the answer, where another worker has generated it: fewer than `max_tokens`. It counts as output
    /// in every respect, but is not reported again.
    pub output: Vec<u32>,
    /// How tokens are drawn.
    pub sampling: SamplingParams,
    /// Tokens to generate at most. 0 only with `prompt_logprobs`: score the prompt and stop.
    pub max_tokens: u32,
    /// Tokens to generate before one of `stop_token_ids` may be drawn.
    pub min_tokens: u32,
    /// Tokens that end the answer, end-of-sequence included unless the request ignores it. The stopping token is
    /// reported like any other, followed by [`FinishReason::Stop`].
    pub stop_token_ids: Vec<u32>,
    /// What the answer may be made of; it has taken `output`.
    pub grammar: Option<Matcher>,
    /// Alternatives to report with each generated token; `Some(0)`: only the token's own log-probability.
    pub logprobs: Option<u32>,
    /// The same for the prompt's tokens (`echo`). Such a request takes no prefix hits: every position is computed.
    pub prompt_logprobs: Option<u32>,
    /// What its pages are kept apart by: it finds those of requests with the same, and is found by no others.
    pub salt: Option<Salt>,
    /// The trace it is part of, which goes on at whoever prefills it.
    pub trace: Option<TraceContext>,
}

/// A token and, if asked for, its log-probability and the likeliest alternatives.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenOutput {
    /// Its id.
    pub token: u32,
    /// Natural logarithm of its probability in the model's own distribution; `None` if not asked for, and for the first
    /// token of a prompt, which nothing predicts.
    pub logprob: Option<f32>,
    /// Alternatives, best first.
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// One of the stop tokens was drawn, or the answer is all that its grammar describes.
    Stop,
    /// `max_tokens` or the context length was reached.
    Length,
    /// The engine is going away: a second SIGTERM, a failed device. Another may answer.
    Aborted,
    /// The model gave nothing a token could be drawn from, as others with the same model would.
    Impossible,
    /// The request's grammar became too much to follow, as it would for others.
    LostTrack,
}

/// What a [`Generation`](super::Generation) yields: the prompt's tokens if their log-probabilities were asked for, each
/// generated token, and exactly one `Finished`, last.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token of the prompt, in order.
    Prompt(TokenOutput),
    /// The next generated token.
    Token(TokenOutput),
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// Prompt tokens whose keys and values were found in the cache when the request was first scheduled.
        cached_tokens: u32,
    },
}

/// Why a request was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// The prompt is empty.
    #[error("the prompt has no tokens")]
    EmptyPrompt,
    /// Prompt and answer do not fit the context.
    #[error("the prompt has {prompt} tokens and the context length is {limit}")]
    PromptTooLong {
        /// Tokens of the prompt.
        prompt: usize,
        /// `--max-model-len`.
        limit: usize,
    },
    /// A token id outside the vocabulary.
    #[error("token id {token} is outside the vocabulary of {vocab_size}")]
    UnknownToken {
        /// The id.
        token: u32,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
    /// The answer to continue is complete.
    #[error("the answer has all of its {tokens} tokens already")]
    NothingLeft {
        /// Tokens it has.
        tokens: usize,
    },
    /// Too many requests wait already: answer 429.
    #[error("{waiting} requests are waiting already; try again later")]
    QueueFull {
        /// Requests waiting.
        waiting: usize,
    },
    /// The engine drains or has stopped: answer 503.
    #[error("the engine is shutting down")]
    ShuttingDown,
}
