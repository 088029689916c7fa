//! Answers and chunks as they are written to clients.

use serde::Serialize;

use super::{CallFormat, output::Output, parser::Call};

/// Token counts of an answer.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Usage {
    prompt_tokens: u32,
    completion_tokens: u32,
    total_tokens: u32,
    prompt_tokens_details: PromptDetails,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
struct PromptDetails {
    /// Of the prompt, how much was found in the cache.
    cached_tokens: u32,
}

impl Usage {
    /// Of a single choice, so far.
    pub(crate) fn of_choice(prompt_tokens: u32, cached_tokens: u32, completion_tokens: u32) -> Self {
        let prompt_tokens_details = PromptDetails { cached_tokens };
        let total_tokens = prompt_tokens + completion_tokens;
        Self { prompt_tokens, completion_tokens, total_tokens, prompt_tokens_details }
    }

    /// Counts a prompt once and all of its choices' tokens. The first choice tells what was cached: the others find
    /// what it computed.
    pub(crate) fn add_prompt<'a>(&mut self, prompt_tokens: u32, choices: impl Iterator<Item = &'a Output>) {
        self.prompt_tokens += prompt_tokens;
        for (index, choice) in choices.enumerate() {
            self.completion_tokens += choice.completion_tokens;
            if index == 0 {
                self.prompt_tokens_details.cached_tokens += choice.cached_tokens.unwrap_or(0);
            }
        }
        self.total_tokens = self.prompt_tokens + self.completion_tokens;
    }
}

/// What all answers and chunks have around their choices.
#[derive(Serialize)]
pub(crate) struct Envelope<'a, C> {
    pub(crate) id: &'a str,
    pub(crate) object: &'static str,
    pub(crate) created: u64,
    pub(crate) model: &'a str,
    pub(crate) choices: C,
    /// `Some(None)` is null: chunks before the last of a stream that will tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) usage: Option<Option<Usage>>,
    /// Of a chat whose client wants ids of tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [u32]>,
}

/// A choice of a completion, whole or the next piece of it.
#[derive(Serialize)]
pub(crate) struct CompletionChoice<'a, L> {
    pub(crate) index: usize,
    pub(crate) text: &'a str,
    pub(crate) logprobs: Option<L>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) prompt_token_ids: Option<&'a [u32]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<&'a [u32]>,
}

/// A choice of a chat.
#[derive(Serialize)]
pub(crate) struct ChatChoice<'a, L> {
    pub(crate) index: usize,
    pub(crate) message: ChatMessage<'a>,
    pub(crate) logprobs: Option<L>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<&'a [u32]>,
}

/// The answer of a chat.
#[derive(Serialize)]
pub(crate) struct ChatMessage<'a> {
    pub(crate) role: &'static str,
    /// Null where there is something else instead.
    pub(crate) content: Option<&'a str>,
    /// vLLM's name of the thoughts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning: Option<&'a str>,
    /// DeepSeek's and older vLLM's, with the same text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCall<'a>>,
    pub(crate) refusal: Option<()>,
}

/// A function that is called.
#[derive(Serialize)]
pub(crate) struct ToolCall<'a> {
    /// Of chunks, which may tell of a call each.
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    id: String,
    r#type: &'static str,
    function: FunctionCall<'a>,
}

#[derive(Serialize)]
struct FunctionCall<'a> {
    name: &'a str,
    arguments: &'a str,
}

impl<'a> ToolCall<'a> {
    /// A call of the answer `answer`, in its choice `choice`. Whoever goes on with the answer elsewhere gives calls the
    /// same ids, by their `format`.
    pub(crate) fn new(answer: &str, choice: usize, call: &'a Call, format: Option<CallFormat>, in_chunk: bool) -> Self {
        let Call { index, name, arguments } = call;
        let digest = blake3::hash(format!("{answer}/{choice}/{index}").as_bytes()).to_hex();
        let id = match format {
            // Which come back in the conversation: Mistral's templates refuse what is not nine letters and digits.
            Some(CallFormat::Mistral) => digest[..9].to_owned(),
            _ => format!("call_{}", &digest[..24]),
        };
        Self { index: in_chunk.then_some(*index), id, r#type: "function", function: FunctionCall { name, arguments } }
    }
}

/// The next piece of a chat's choice.
#[derive(Serialize)]
pub(crate) struct ChatChunkChoice<'a, L> {
    pub(crate) index: usize,
    pub(crate) delta: Delta<'a>,
    pub(crate) logprobs: Option<L>,
    pub(crate) finish_reason: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_ids: Option<&'a [u32]>,
}

/// What is new in a chat's answer.
#[derive(Default, Serialize)]
pub(crate) struct Delta<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) content: Option<&'a str>,
    /// vLLM's name of the thoughts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning: Option<&'a str>,
    /// DeepSeek's and older vLLM's, with the same text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(crate) tool_calls: Vec<ToolCall<'a>>,
}
