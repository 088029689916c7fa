use std::{
    future::poll_fn,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{BufMut, BytesMut};
use futures::StreamExt;
use serde::Serialize;
use tokio::time::Instant;
use uuid::Uuid;

use super::{
    ApiError, InFlight, Serving,
    logprobs::{ChatLogprobs, CompletionLogprobs},
    output::{Echo, Finish, Output},
    state::unix_seconds,
    validate::Plan,
    wire::{ChatChoice, ChatChunkChoice, ChatMessage, CompletionChoice, Delta, Envelope, Usage, finish_reason},
};
use crate::worker::Generation;

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
    /// Whether a chunk was sent that tells the role.
    opened: bool,
}

/// An answer being generated: `n` choices of each prompt.
pub(crate) struct Answer {
    serving: Arc<Serving>,
    endpoint: Endpoint,
    id: String,
    created: u64,
    n: usize,
    prompt_tokens: Vec<u32>,
    choices: Vec<Choice>,
    with_logprobs: bool,
    pub(crate) include_usage: bool,
    pub(crate) deadline: Instant,
    _in_flight: InFlight,
}

impl Answer {
    /// Hands all choices of all prompts to the engine; it takes all or none.
    pub(crate) fn start(
        serving: Arc<Serving>,
        in_flight: InFlight,
        endpoint: Endpoint,
        plan: &Plan,
        prompts: Vec<PreparedPrompt>,
        fields: (&'static str, &'static str),
    ) -> Result<Self, ApiError> {
        let max_model_len = serving.max_model_len();
        let mut choices = Vec::with_capacity(prompts.len() * plan.n);
        for prompt in &prompts {
            for choice in 0..plan.n {
                let request = plan.request(prompt.tokens.clone(), choice, max_model_len, fields)?;
                let generation = serving.engine.submit(request)?;
                let (tokenizer, skip_special) = (&serving.config.tokenizer, plan.skip_special_tokens);
                let echo = prompt.echo.as_ref().map(|text| {
                    Echo::new(text.clone(), plan.logprobs.is_some(), tokenizer.decode_stream(skip_special))
                });
                let output = Output::new(plan, tokenizer.continue_stream(skip_special), echo);
                choices.push(Choice { generation: Some(generation), output, opened: false });
            }
        }
        let prefix = match endpoint {
            Endpoint::Chat => "chatcmpl",
            Endpoint::Completion => "cmpl",
        };
        Ok(Self {
            endpoint,
            id: format!("{prefix}-{}", Uuid::new_v4().simple()),
            created: unix_seconds(),
            n: plan.n,
            prompt_tokens: prompts.iter().map(|prompt| prompt.tokens.len() as u32).collect(),
            choices,
            with_logprobs: plan.logprobs.is_some(),
            include_usage: plan.include_usage,
            deadline: Instant::now() + serving.config.request_timeout,
            _in_flight: in_flight,
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
                if choice.output.finish.is_some() {
                    choice.output.cached_tokens = generation.cached_tokens();
                    choice.generation = None;
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
        if self.has_aborted() {
            return Err(ApiError::aborted());
        }
        let outputs = self.choices.iter().map(|choice| &choice.output).enumerate();
        let names = &*self.serving.config.tokenizer;
        let mut body = Vec::with_capacity(1024);
        let usage = Some(Some(self.usage()));
        match self.endpoint {
            Endpoint::Chat => {
                let choices: Vec<_> = outputs
                    .map(|(index, output)| {
                        let (content, tokens) = output.pending();
                        ChatChoice {
                            index,
                            message: ChatMessage { role: "assistant", content, refusal: None },
                            logprobs: self.with_logprobs.then_some(ChatLogprobs(tokens, names)),
                            finish_reason: finish_reason(output.finish),
                        }
                    })
                    .collect();
                write(&mut body, &self.envelope("chat.completion", choices, usage))?;
            }
            Endpoint::Completion => {
                let choices: Vec<_> = outputs
                    .map(|(index, output)| {
                        let (text, tokens) = output.pending();
                        CompletionChoice {
                            index,
                            text,
                            logprobs: self.with_logprobs.then_some(CompletionLogprobs(tokens, names)),
                            finish_reason: finish_reason(output.finish),
                        }
                    })
                    .collect();
                write(&mut body, &self.envelope("text_completion", choices, usage))?;
            }
        }
        Ok(body)
    }

    /// Whether some choice broke off on our side.
    pub(crate) fn has_aborted(&self) -> bool {
        self.choices.iter().any(|choice| choice.output.finish == Some(Finish::Aborted))
    }

    /// Appends server-sent events with what is new in each choice.
    pub(crate) fn write_chunks(&mut self, buffer: &mut BytesMut) -> Result<(), ApiError> {
        for index in 0..self.choices.len() {
            let choice = &self.choices[index];
            let (text, tokens) = choice.output.pending();
            let ended = choice.generation.is_none();
            if !text.is_empty() || !tokens.is_empty() {
                if !choice.opened {
                    self.write_opening(buffer, index)?;
                }
                self.write_piece(buffer, index)?;
                let choice = &mut self.choices[index];
                choice.opened = true;
                choice.output.clear();
            }
            let choice = &self.choices[index];
            if let Some(finish) = choice.output.finish
                && ended
            {
                if !choice.opened {
                    self.write_opening(buffer, index)?;
                }
                self.write_ending(buffer, index, finish)?;
                let choice = &mut self.choices[index];
                choice.opened = true;
                // Said once.
                choice.output.finish = None;
            }
        }
        Ok(())
    }

    /// Appends the chunk with the token counts.
    pub(crate) fn write_usage(&self, buffer: &mut BytesMut) -> Result<(), ApiError> {
        let none: [(); 0] = [];
        write_event(buffer, &self.envelope(self.chunk_object(), none, Some(Some(self.usage()))))
    }

    /// A chat's first chunk tells who speaks.
    fn write_opening(&self, buffer: &mut BytesMut, index: usize) -> Result<(), ApiError> {
        if self.endpoint == Endpoint::Completion {
            return Ok(());
        }
        let delta = Delta { role: Some("assistant"), content: Some("") };
        let choice = ChatChunkChoice { index, delta, logprobs: None::<()>, finish_reason: None };
        self.write_chunk(buffer, [choice])
    }

    fn write_piece(&self, buffer: &mut BytesMut, index: usize) -> Result<(), ApiError> {
        let (text, tokens) = self.choices[index].output.pending();
        let names = &*self.serving.config.tokenizer;
        match self.endpoint {
            Endpoint::Chat => {
                let delta = Delta { role: None, content: Some(text) };
                let logprobs = self.with_logprobs.then_some(ChatLogprobs(tokens, names));
                self.write_chunk(buffer, [ChatChunkChoice { index, delta, logprobs, finish_reason: None }])
            }
            Endpoint::Completion => {
                let logprobs = self.with_logprobs.then_some(CompletionLogprobs(tokens, names));
                self.write_chunk(buffer, [CompletionChoice { index, text, logprobs, finish_reason: None }])
            }
        }
    }

    fn write_ending(&self, buffer: &mut BytesMut, index: usize, finish: Finish) -> Result<(), ApiError> {
        let (finish_reason, logprobs) = (Some(finish.as_str()), None::<()>);
        match self.endpoint {
            Endpoint::Chat => {
                let delta = Delta::default();
                self.write_chunk(buffer, [ChatChunkChoice { index, delta, logprobs, finish_reason }])
            }
            Endpoint::Completion => {
                self.write_chunk(buffer, [CompletionChoice { index, text: "", logprobs, finish_reason }])
            }
        }
    }

    fn write_chunk<C: Serialize>(&self, buffer: &mut BytesMut, choices: [C; 1]) -> Result<(), ApiError> {
        let usage = self.include_usage.then_some(None);
        write_event(buffer, &self.envelope(self.chunk_object(), choices, usage))
    }

    fn chunk_object(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }

    fn envelope<C>(&self, object: &'static str, choices: C, usage: Option<Option<Usage>>) -> Envelope<'_, C> {
        let model = self.serving.model_name();
        Envelope { id: &self.id, object, created: self.created, model, choices, usage }
    }

    fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for (choices, &tokens) in self.choices.chunks(self.n).zip(&self.prompt_tokens) {
            usage.add_prompt(tokens, choices.iter().map(|choice| &choice.output));
        }
        usage
    }
}

fn write_event(buffer: &mut BytesMut, event: &impl Serialize) -> Result<(), ApiError> {
    buffer.extend_from_slice(b"data: ");
    write(buffer.writer(), event)?;
    buffer.extend_from_slice(b"\n\n");
    Ok(())
}

fn write(writer: impl std::io::Write, value: &impl Serialize) -> Result<(), ApiError> {
    serde_json::to_writer(writer, value).map_err(|_| ApiError::internal("The answer could not be written as JSON"))
}
