//! How an answer becomes server-sent events, a chunk of it each.

use std::io;

use bytes::{BufMut, BytesMut};
use memchr::memchr2_iter;
use serde::Serialize;
use serde_json::ser::Formatter;

use super::{Answer, Endpoint, unwritable};
use crate::{
    api::{
        logprobs::{ChatLogprobs, CompletionLogprobs},
        parser::Pieces,
        wire::{ChatChunkChoice, CompletionChoice, Delta, Envelope, Usage},
    },
    http::ApiError,
};

impl Answer {
    /// Appends server-sent events with what is new in each choice.
    pub(crate) fn write_chunks(&mut self, buffer: &mut BytesMut) -> Result<(), ApiError> {
        for index in 0..self.choices.len() {
            let choice = &mut self.choices[index];
            let ended = choice.generation.is_none();
            // A step's tokens may show nothing yet, but clients measure latency by chunks: each step gets one, the last
            // one the ending.
            let told_before = std::mem::replace(&mut choice.tokens_told, choice.output.tokens_told());
            let is_step = !ended && choice.tokens_told > told_before;
            let (pieces, tokens) = choice.output.pending();
            let is_shown = !pieces.is_empty() || !tokens.is_empty();
            let finish_reason = choice.output.finish_reason().filter(|_| ended);
            // The last piece tells how the answer ended, or clients would take that for a token that took no time. But
            // a call goes first: OpenAI's clients would not know it to be whole.
            let is_last = finish_reason.is_some() && pieces.calls.is_empty();
            if is_shown || is_step || finish_reason.is_some() {
                self.write_opening(buffer, index)?;
            }
            if is_shown && !is_last || is_step && self.tells_each_step {
                self.write_piece(buffer, index, None)?;
            }
            if finish_reason.is_some() {
                self.write_piece(buffer, index, finish_reason)?;
                // Said once.
                self.choices[index].output.finish = None;
            }
        }
        Ok(())
    }

    /// Appends the chunk with the token counts.
    pub(crate) fn write_usage(&mut self, buffer: &mut BytesMut) -> Result<(), ApiError> {
        let none: [(); 0] = [];
        if let Some(progress) = &mut self.progress {
            progress.usage(buffer);
        }
        write_event(buffer, &self.envelope(self.chunk_object(), none, Some(Some(self.usage()))))
    }

    /// A chat's first chunk tells who speaks.
    fn write_opening(&mut self, buffer: &mut BytesMut, index: usize) -> Result<(), ApiError> {
        if self.endpoint == Endpoint::Completion || self.choices[index].opened {
            return Ok(());
        }
        self.choices[index].opened = true;
        if let Some(progress) = &mut self.progress {
            progress.opening(buffer, index);
        }
        let delta = Delta { role: Some("assistant"), content: Some(""), ..Delta::default() };
        let choice = ChatChunkChoice { index, delta, logprobs: None::<()>, finish_reason: None, token_ids: None };
        // Nothing of the answer is told yet.
        let usage = self.include_usage.then(|| self.chunk_usage(index, 0));
        let envelope = self.envelope(self.chunk_object(), [choice], usage);
        write_event(buffer, &Envelope { prompt_token_ids: self.prompt_ids(index), ..envelope })
    }

    /// What is pending of a choice, and how it ended if this is the last of it, preceded by what a frontend needs to
    /// know about that.
    fn write_piece(
        &mut self,
        buffer: &mut BytesMut,
        index: usize,
        finish_reason: Option<&'static str>,
    ) -> Result<(), ApiError> {
        if let Some(progress) = &mut self.progress {
            progress.choice(buffer, index, &mut self.choices[index].output, finish_reason.is_some());
        }
        let output = &self.choices[index].output;
        let (pieces, tokens) = output.pending();
        let says_something = finish_reason.is_none() || !pieces.is_empty() || !tokens.is_empty();
        let with_logprobs = self.with_logprobs && says_something;
        let names = &*self.serving.config.tokenizer;
        let usage = self.chunk_usage(index, output.tokens_told());
        let token_ids = output.untold();
        match self.endpoint {
            Endpoint::Chat => {
                let delta = if says_something { self.delta(index, pieces) } else { Delta::default() };
                let logprobs = with_logprobs.then_some(ChatLogprobs(tokens, names));
                self.write_chunk(buffer, ChatChunkChoice { index, delta, logprobs, finish_reason, token_ids }, usage)?;
            }
            Endpoint::Completion => {
                let logprobs = with_logprobs.then_some(CompletionLogprobs(tokens, names));
                let (text, prompt_token_ids) = (&*pieces.content, self.prompt_ids_unless_told(index));
                let choice = CompletionChoice { index, text, logprobs, finish_reason, prompt_token_ids, token_ids };
                self.write_chunk(buffer, choice, usage)?;
            }
        }
        let choice = &mut self.choices[index];
        choice.opened = true;
        choice.output.clear();
        Ok(())
    }

    /// What a choice says next.
    fn delta<'a>(&self, index: usize, pieces: &'a Pieces) -> Delta<'a> {
        Delta {
            role: None,
            content: pieces.content(),
            reasoning: pieces.thoughts(),
            reasoning_content: pieces.thoughts(),
            tool_calls: self.tool_calls(index, pieces, true),
        }
    }

    /// Ids of the prompt's tokens for a completion's next chunk: the first one tells them.
    fn prompt_ids_unless_told(&self, index: usize) -> Option<&[u32]> {
        self.prompt_ids(index).filter(|_| !self.choices[index].opened)
    }

    fn write_chunk<C: Serialize>(
        &self,
        buffer: &mut BytesMut,
        choice: C,
        usage: Option<Usage>,
    ) -> Result<(), ApiError> {
        let usage = self.include_usage.then_some(usage);
        write_event(buffer, &self.envelope(self.chunk_object(), [choice], usage))
    }

    /// Token counts so far, if each chunk tells them: as vLLM has it, those of the chunk's own choice.
    fn chunk_usage(&self, index: usize, completion_tokens: u32) -> Option<Usage> {
        let cached = self.choices[index].output.cached_tokens.unwrap_or(0);
        let prompt = self.prompt_tokens[index / self.n];
        self.continuous_usage.then(|| Usage::of_choice(prompt, cached, completion_tokens))
    }

    fn chunk_object(&self) -> &'static str {
        match self.endpoint {
            Endpoint::Chat => "chat.completion.chunk",
            Endpoint::Completion => "text_completion",
        }
    }
}

fn write_event(buffer: &mut BytesMut, event: &impl Serialize) -> Result<(), ApiError> {
    buffer.extend_from_slice(b"data: ");
    let mut json = serde_json::Serializer::with_formatter(buffer.writer(), OneLine);
    event.serialize(&mut json).map_err(unwritable)?;
    buffer.extend_from_slice(b"\n\n");
    Ok(())
}

/// JSON with three characters escaped that it need not escape: Python takes them for ends of lines, and clients in
/// Python split streams into lines as it does.
struct OneLine;

impl Formatter for OneLine {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()> {
        let bytes = fragment.as_bytes();
        let mut written = 0;
        // What these three begin with, as other characters do.
        for at in memchr2_iter(0xc2, 0xe2, bytes) {
            let (escape, length) = match &bytes[at..] {
                [0xc2, 0x85, ..] => (b"\\u0085", 2),
                [0xe2, 0x80, 0xa8, ..] => (b"\\u2028", 3),
                [0xe2, 0x80, 0xa9, ..] => (b"\\u2029", 3),
                _ => continue,
            };
            writer.write_all(&bytes[written..at])?;
            writer.write_all(escape)?;
            written = at + length;
        }
        writer.write_all(&bytes[written..])
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn an_event_is_one_line_to_clients_in_python_too() {
        let text = "a\u{2028}b\u{2028}\u{2029}\u{85}c\n\u{a0}é — “ü”\u{2027}\u{202a}🙂\u{2029}";
        let mut buffer = BytesMut::new();
        write_event(&mut buffer, &json!({ "text": text, text: "" })).unwrap();
        let event = std::str::from_utf8(&buffer).unwrap();
        let data = event.strip_prefix("data: ").and_then(|event| event.strip_suffix("\n\n")).unwrap();
        assert!(!data.contains(['\u{85}', '\u{2028}', '\u{2029}', '\n']), "{data:?}");
        assert!(data.contains("\u{a0}é — “ü”\u{2027}\u{202a}🙂"), "what is no end of a line is as it was: {data:?}");
        assert_eq!(serde_json::from_str::<Value>(data).unwrap(), json!({ "text": text, text: "" }));
    }
}
