//! The fields of a chat.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, SeqAccess, Visitor},
};
use serde_json::Value;

use super::{Refused, generating_request};

generating_request! {
    /// Body of `POST /v1/chat/completions`.
    ChatRequest {
        messages: Option<Messages>,
        #[serde(deserialize_with = "super::whole")]
        max_tokens: Option<i64>,
        /// OpenAI's newer name of `max_tokens`.
        #[serde(deserialize_with = "super::whole")]
        max_completion_tokens: Option<i64>,
        logprobs: Option<bool>,
        #[serde(deserialize_with = "super::whole")]
        top_logprobs: Option<i64>,
        /// vLLM's: whether the template opens an assistant message at the end.
        add_generation_prompt: Option<bool>,
        /// vLLM's: whether the answer continues the last message.
        continue_final_message: Option<bool>,
        /// vLLM's: variables for the template.
        chat_template_kwargs: Option<serde_json::Map<String, Value>>,
        /// vLLM's: whether the tokenizer adds its begin-of-sequence token to the rendered text.
        add_special_tokens: Option<bool>,
        modalities: Option<Vec<String>>,
        /// Functions that the model may call, as its template shows them.
        tools: Option<ToolList>,
        tool_choice: Option<Value>,
        parallel_tool_calls: Option<bool>,
        functions: Option<Refused>,
        function_call: Option<Value>,
        audio: Option<Refused>,
        prediction: Option<Refused>,
        /// How long the model is to think; a matter of its template.
        reasoning_effort: Option<String>,
        verbosity: Option<Refused>,
        web_search_options: Option<Refused>,
        moderation: Option<Refused>,
        /// vLLM's, of which there is nothing here.
        echo: Option<Refused>,
        documents: Option<Refused>,
        chat_template: Option<Refused>,
        media_io_kwargs: Option<Refused>,
        mm_processor_kwargs: Option<Refused>,
        return_prompt_text: Option<Refused>,
        /// vLLM's: whether clients see what the model thought.
        include_reasoning: Option<bool>,
        /// Chooses among OpenAI's price classes.
        #[serde(rename = "service_tier")]
        _service_tier: Option<IgnoredAny>,
        /// Whether OpenAI keeps the answer.
        #[serde(rename = "store")]
        _store: Option<IgnoredAny>,
        /// Routing hints and ids for OpenAI's own use.
        #[serde(rename = "prompt_cache_key")]
        _prompt_cache_key: Option<IgnoredAny>,
        #[serde(rename = "prompt_cache_retention")]
        _prompt_cache_retention: Option<IgnoredAny>,
        #[serde(rename = "safety_identifier")]
        _safety_identifier: Option<IgnoredAny>,
    }
}

/// Messages of a conversation at most, and parts of one of them: thousands of turns. Each takes many times the memory
/// of the dozen bytes it can be written in.
pub(crate) const MESSAGES_MAX: usize = 8192;

/// A conversation, of at most [`MESSAGES_MAX`] messages.
#[derive(Debug)]
pub(crate) struct Messages(pub(crate) Vec<Message>);

impl<'de> Deserialize<'de> for Messages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Vec<Message>;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a list of messages")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<Message>, A::Error> {
                at_most(MESSAGES_MAX, "messages", seq)
            }
        }
        deserializer.deserialize_seq(List).map(Self)
    }
}

/// Functions of a request at most.
pub(crate) const TOOLS_MAX: usize = 1024;

/// What a request offers the model to call, of at most [`TOOLS_MAX`].
#[derive(Debug)]
pub(crate) struct ToolList(pub(crate) Vec<Value>);

impl<'de> Deserialize<'de> for ToolList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct List;
        impl<'de> Visitor<'de> for List {
            type Value = Vec<Value>;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a list of tools")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<Value>, A::Error> {
                at_most(TOOLS_MAX, "tools", seq)
            }
        }
        deserializer.deserialize_seq(List).map(Self)
    }
}

/// Reads a list of at most `max` elements, which are called `what`.
fn at_most<'de, T: Deserialize<'de>, A: SeqAccess<'de>>(
    max: usize,
    what: &str,
    mut seq: A,
) -> Result<Vec<T>, A::Error> {
    let mut list = Vec::new();
    while let Some(element) = seq.next_element()? {
        if list.len() == max {
            return Err(de::Error::custom(format_args!("more than {max} {what}")));
        }
        list.push(element);
    }
    Ok(list)
}

/// One message of a conversation. Fields it does not know are passed over, here and in its calls: clients keep notes of
/// their own in messages, and send answers of ours back with what their types have beside.
#[derive(Debug, Deserialize)]
pub(crate) struct Message {
    pub(crate) role: String,
    pub(crate) content: Option<Content>,
    /// What an assistant said instead of content.
    pub(crate) refusal: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) tool_calls: Option<Vec<ToolCall>>,
    pub(crate) tool_call_id: Option<String>,
    /// Thoughts of an earlier answer, which some templates show again.
    pub(crate) reasoning_content: Option<String>,
    /// vLLM's newer name for them. No alias: clients send both, one of them null.
    pub(crate) reasoning: Option<String>,
    /// Things said otherwise than as text, of which no prompt is made. Not passed over: they would be missing from it.
    pub(crate) audio: Option<Refused>,
    pub(crate) function_call: Option<Refused>,
}

/// A call that an earlier assistant message made; templates show it.
#[derive(Debug, Deserialize)]
pub(crate) struct ToolCall {
    pub(crate) id: Option<String>,
    #[serde(rename = "type")]
    pub(crate) kind: Option<String>,
    pub(crate) function: FunctionCall,
}

/// Name and arguments of such a call.
#[derive(Debug, Deserialize)]
pub(crate) struct FunctionCall {
    pub(crate) name: String,
    /// JSON in a string; some clients send the object.
    pub(crate) arguments: Option<Value>,
}

/// A message's content: a string or parts.
#[derive(Debug)]
pub(crate) enum Content {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// One part of a message's content.
#[derive(Debug, Deserialize)]
pub(crate) struct ContentPart {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) text: Option<String>,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TextOrParts;
        impl<'de> Visitor<'de> for TextOrParts {
            type Value = Content;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a string or a list of content parts")
            }
            fn visit_str<E>(self, value: &str) -> Result<Content, E> {
                Ok(Content::Text(value.to_owned()))
            }
            fn visit_string<E>(self, value: String) -> Result<Content, E> {
                Ok(Content::Text(value))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
                at_most(MESSAGES_MAX, "parts", seq).map(Content::Parts)
            }
        }
        deserializer.deserialize_any(TextOrParts)
    }
}
