//! From a checked plan to the engine and back: all choices of one HTTP answer.

mod chunks;

use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

use futures::StreamExt;
use serde::Serialize;
use tokio::{
    runtime::{Handle, RuntimeFlavor},
    time::Instant,
};
use uuid::Uuid;

use super::{
    Serving,
    logprobs::{ChatLogprobs, CompletionLogprobs},
    output::{Echo, Finish, Output},
    parser::Pieces,
    progress::{self, FrontendContext, Head, Past, ProgressWriter},
    validate::Plan,
    wire::{ChatChoice, ChatMessage, CompletionChoice, Envelope, ToolCall, Usage},
};
use crate::{
    engine::{FinishReason, Generation, Request},
    grammar::{LostTrack, Matcher},
    http::{ApiError, InFlight},
};

/// Which of the two generating endpoints answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Endpoint {
    Chat,
    Completion,
}

/// A prompt ready for the engine.
pub(crate) struct PreparedPrompt {
    pub(crate) tokens: Vec<u32>,
    /// The prompt as text, if the answer begins with it.
    pub(crate) echo: Option<String>,
}

/// One of the texts that are generated.
struct Choice {
    /// `None` once it ended: dropping it frees its pages.
    generation: Option<Generation>,
    output: Output,
    /// Whether a chunk of it was sent; a chat's first one tells the role.
    opened: bool,
    /// Tokens that had come when chunks were last written.
    tokens_told: u32,
}

/// An answer being generated: `n` choices of each prompt.
pub(crate) struct Answer {
    serving: Arc<Serving>,
    endpoint: Endpoint,
    id: String,
    created: u64,
    n: usize,
    prompt_tokens: Vec<u32>,
    /// The prompts, if clients want the ids of tokens.
    prompt_ids: Option<Vec<Vec<u32>>>,
    choices: Vec<Choice>,
    with_logprobs: bool,
    /// Whether a step whose tokens show nothing gets a chunk too. Not where answers are looked through: most such
    /// tokens are part of a call or of thoughts.
    tells_each_step: bool,
    /// For a frontend, which alone hears of it.
    progress: Option<ProgressWriter>,
    pub(crate) include_usage: bool,
    continuous_usage: bool,
    pub(crate) deadline: Instant,
    in_flight: InFlight,
}

impl Answer {
    /// Hands all choices of all prompts to the engine; it takes all or none. Those that were begun elsewhere go on
    /// where they were.
    pub(crate) fn start(
        serving: Arc<Serving>,
        in_flight: InFlight,
        context: FrontendContext,
        endpoint: Endpoint,
        plan: &Plan,
        prompts: Vec<PreparedPrompt>,
        prompt_field: &'static str,
    ) -> Result<Self, ApiError> {
        let max_model_len = serving.max_model_len();
        let wanted = prompts.len() * plan.n;
        let config = serving.engine.config();
        let places = config.max_num_seqs + config.max_waiting_requests;
        if wanted > places {
            // However often it is sent again: not a matter of the moment.
            let field = if plan.n > 1 { "n" } else { prompt_field };
            let message = format!("'{field}' asks for {wanted} answers at once; this server takes {places} at most");
            return Err(ApiError::invalid(field, message));
        }
        let (created, trace, journal) = (context.created(), context.trace, context.journal);
        if journal.is_some() && !plan.stream {
            return Err(progress::malformed());
        }
        let (head, progress) = if context.progress || journal.is_some() {
            let echoed: Vec<_> = prompts.iter().map(|prompt| prompt.echo.is_some()).collect();
            let model = (serving.model_name(), &config.model_key);
            let digest = progress::digest(&prompts, &(endpoint, plan, max_model_len, model, echoed));
            if journal.as_ref().is_some_and(|journal| journal.head.digest != digest) {
                return Err(progress::incompatible());
            }
            let head = match &journal {
                Some(journal) => journal.head.clone(),
                None => Head { id: endpoint.new_id(), created, seed: plan.sampling.seed, digest },
            };
            let writer = match &journal {
                Some(_) => ProgressWriter::continuing(),
                None => ProgressWriter::beginning(head.clone()),
            };
            (head, context.progress.then_some(writer))
        } else {
            (Head { id: endpoint.new_id(), created, seed: plan.sampling.seed, digest: String::new() }, None)
        };
        let mut choices = Vec::with_capacity(prompts.len() * plan.n);
        for prompt in &prompts {
            for choice in 0..plan.n {
                let index = (choice, choices.len());
                let request = plan.request(prompt.tokens.clone(), index, max_model_len, prompt_field)?;
                let request = Request { trace, ..request };
                let (tokenizer, skip_special) = (&serving.config.tokenizer, plan.skip_special_tokens);
                let echo = prompt.echo.as_ref().map(|text| {
                    Echo::new(text.clone(), plan.logprobs.is_some(), tokenizer.decode_stream(skip_special))
                });
                let mut output = Output::new(plan, tokenizer.continue_stream(skip_special), echo);
                let past = journal.as_ref().and_then(|journal| journal.choice(choices.len()));
                let request = match past {
                    Some(past) => continued(request, past, &mut output)?,
                    None => Some(request),
                };
                if progress.is_some() {
                    output.keep_unreported();
                }
                if plan.token_ids {
                    output.keep_untold();
                }
                let generation = request.map(|request| serving.engine.submit(request)).transpose();
                let generation = generation.map_err(|error| ApiError::not_taken(error, prompt_field))?;
                let tokens_told = output.tokens_told();
                choices.push(Choice { generation, output, opened: past.is_some(), tokens_told });
            }
        }
        let usage_told = journal.is_some_and(|journal| journal.usage_told);
        Ok(Self {
            endpoint,
            id: head.id,
            created,
            n: plan.n,
            prompt_tokens: prompts.iter().map(|prompt| prompt.tokens.len() as u32).collect(),
            prompt_ids: plan.token_ids.then(|| prompts.into_iter().map(|prompt| prompt.tokens).collect()),
            choices,
            with_logprobs: plan.logprobs.is_some(),
            tells_each_step: plan.token_ids || !plan.wanted.is_any(),
            progress,
            include_usage: plan.include_usage && !usage_told,
            continuous_usage: plan.continuous_usage,
            deadline: Instant::now() + serving.config.request_timeout,
            in_flight,
            serving,
        })
    }

    /// Takes what the engine has produced. Ready with whether all choices ended, as soon as there is anything new.
    pub(crate) fn poll_events(&mut self, context: &mut Context<'_>) -> Poll<bool> {
        let (mut news, mut ended) = (false, true);
        for choice in &mut self.choices {
            while let Some(generation) = &mut choice.generation {
                match generation.poll_next_unpin(context) {
                    Poll::Pending => break,
                    Poll::Ready(Some(event)) => choice.output.push(event),
                    Poll::Ready(None) => choice.output.abort(),
                }
                news = true;
                choice.output.cached_tokens.get_or_insert_with(|| generation.cached_tokens());
                if let Some(reason) = choice.output.finish_reason() {
                    choice.generation = None;
                    self.serving.metrics.answers.with_label_values(&[reason]).inc();
                }
            }
            ended &= choice.generation.is_none();
        }
        if news || ended { Poll::Ready(ended) } else { Poll::Pending }
    }

    /// Waits for the end of all choices and returns the whole answer as JSON.
    pub(crate) async fn collect(mut self) -> Result<Vec<u8>, ApiError> {
        let deadline = self.deadline;
        let ended = async { while !poll_fn(|context| self.poll_events(context)).await {} };
        tokio::time::timeout_at(deadline, ended).await.map_err(|_| ApiError::timeout())?;
        if let Some(error) = self.failure() {
            return Err(error);
        }
        let outputs = self.choices.iter().map(|choice| &choice.output).enumerate();
        let names = &*self.serving.config.tokenizer;
        let mut body = Vec::with_capacity(1024);
        let usage = Some(Some(self.usage()));
        match self.endpoint {
            Endpoint::Chat => {
                let choices: Vec<_> = outputs
                    .map(|(index, output)| {
                        let (pieces, tokens) = output.pending();
                        ChatChoice {
                            index,
                            message: self.message(index, pieces),
                            logprobs: self.with_logprobs.then_some(ChatLogprobs(tokens, names)),
                            finish_reason: output.finish_reason(),
                            token_ids: output.untold(),
                        }
                    })
                    .collect();
                let envelope = self.envelope("chat.completion", choices, usage);
                write(&mut body, &Envelope { prompt_token_ids: self.prompt_ids(0), ..envelope })?;
            }
            Endpoint::Completion => {
                let choices: Vec<_> = outputs
                    .map(|(index, output)| {
                        let (pieces, tokens) = output.pending();
                        CompletionChoice {
                            index,
                            text: &pieces.content,
                            logprobs: self.with_logprobs.then_some(CompletionLogprobs(tokens, names)),
                            finish_reason: output.finish_reason(),
                            prompt_token_ids: self.prompt_ids(index),
                            token_ids: output.untold(),
                        }
                    })
                    .collect();
                write(&mut body, &self.envelope("text_completion", choices, usage))?;
            }
        }
        Ok(body)
    }

    /// All that a choice says.
    fn message<'a>(&self, index: usize, pieces: &'a Pieces) -> ChatMessage<'a> {
        ChatMessage {
            role: "assistant",
            content: pieces.content(),
            reasoning: pieces.thoughts(),
            reasoning_content: pieces.thoughts(),
            tool_calls: self.tool_calls(index, pieces, false),
            refusal: None,
        }
    }

    /// The calls that a choice makes.
    fn tool_calls<'a>(&self, index: usize, pieces: &'a Pieces, in_chunk: bool) -> Vec<ToolCall<'a>> {
        let format = self.serving.config.parsers.calls;
        pieces.calls.iter().map(|call| ToolCall::new(&self.id, index, call, format, in_chunk)).collect()
    }

    /// What to say if some choice broke off.
    pub(crate) fn failure(&self) -> Option<ApiError> {
        if self.any_ended(Finish::Impossible) {
            return Some(ApiError::impossible());
        }
        if self.any_ended(Finish::LostTrack) {
            return Some(ApiError::lost_track());
        }
        self.any_ended(Finish::Aborted).then(ApiError::aborted)
    }

    /// Whether it broke off where another worker could go on, and whoever reads it can have that done.
    pub(crate) fn can_move(&self) -> bool {
        let would_end_there = [Finish::Impossible, Finish::LostTrack].into_iter().any(|finish| self.any_ended(finish));
        self.progress.is_some() && self.any_ended(Finish::Aborted) && !would_end_there
    }

    fn any_ended(&self, finish: Finish) -> bool {
        self.choices.iter().any(|choice| choice.output.finish == Some(finish))
    }

    /// Ids of the tokens that a choice follows, if they are wanted.
    fn prompt_ids(&self, index: usize) -> Option<&[u32]> {
        self.prompt_ids.as_ref().map(|prompts| prompts[index / self.n].as_slice())
    }

    fn envelope<C>(&self, object: &'static str, choices: C, usage: Option<Option<Usage>>) -> Envelope<'_, C> {
        let model = self.serving.model_name();
        Envelope { id: &self.id, object, created: self.created, model, choices, usage, prompt_token_ids: None }
    }

    fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for (choices, &tokens) in self.choices.chunks(self.n).zip(&self.prompt_tokens) {
            usage.add_prompt(tokens, choices.iter().map(|choice| &choice.output));
        }
        usage
    }
}

impl Drop for Answer {
    /// Counts what has not ended by itself, or else how long it all took.
    fn drop(&mut self) {
        let metrics = &self.serving.metrics;
        let unfinished = self.choices.iter().filter(|choice| choice.generation.is_some()).count();
        let failed = self.failure().is_some();
        if unfinished > 0 {
            let timed_out = Instant::now() >= self.deadline;
            let outcome = match (failed, timed_out) {
                (true, _) => "error",
                (false, true) => "timeout",
                (false, false) => "cancelled",
            };
            metrics.answers.with_label_values(&[outcome]).inc_by(unfinished as u64);
        } else if !failed {
            metrics.request_latency.observe(self.in_flight.since.elapsed().as_secs_f64());
        }
    }
}

impl Endpoint {
    fn new_id(self) -> String {
        let prefix = match self {
            Self::Chat => "chatcmpl",
            Self::Completion => "cmpl",
        };
        format!("{prefix}-{}", Uuid::new_v4().simple())
    }
}

/// Brings `output` to where the choice was, and returns what is left for the engine to do, if anything is.
fn continued(mut request: Request, past: &Past, output: &mut Output) -> Result<Option<Request>, ApiError> {
    let (max_tokens, generated) = (request.max_tokens as usize, past.tokens.len());
    if generated > max_tokens {
        return Err(progress::malformed());
    }
    let stopped = past.tokens.last().is_some_and(|last| request.stop_token_ids.contains(last))
        && generated > request.min_tokens as usize;
    if let (false, Some(matcher)) = (stopped, &mut request.grammar) {
        replayed(matcher, &past.tokens).map_err(|_| progress::incompatible())?;
    }
    let complete = stopped || request.grammar.as_ref().is_some_and(Matcher::is_complete);
    let end = match complete {
        true => Some(FinishReason::Stop),
        false => (generated == max_tokens).then_some(FinishReason::Length),
    };
    output.replay(past, end);
    if past.ended || output.finish.is_some() {
        return Ok(None);
    }
    request.output.clone_from(&past.tokens);
    // The prompt went out with the first event.
    request.prompt_logprobs = None;
    Ok(Some(request))
}

/// Takes the tokens of an answer so far. Each is asked for first, as it was: what a token may take is counted from
/// there. That may be long, so other tasks of this thread do not wait for it.
fn replayed(matcher: &mut Matcher, tokens: &[u32]) -> Result<(), LostTrack> {
    let mut replay = || {
        tokens.iter().try_for_each(|&token| {
            matcher.allowed()?;
            matcher.take(token)
        })
    };
    match Handle::try_current().map(|handle| handle.runtime_flavor()) {
        Ok(RuntimeFlavor::MultiThread) => tokio::task::block_in_place(replay),
        _ => replay(),
    }
}

fn write(writer: impl std::io::Write, value: &impl Serialize) -> Result<(), ApiError> {
    serde_json::to_writer(writer, value).map_err(unwritable)
}

fn unwritable(_: serde_json::Error) -> ApiError {
    ApiError::internal("The answer could not be written as JSON")
}
