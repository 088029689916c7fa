use serde::Deserialize;
use serde_json::Value;

use super::{Messages, Refused, ToolList};

/// Body of `POST /tokenize` (vLLM's): a text or a conversation.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct TokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) prompt: Option<String>,
    pub(crate) messages: Option<Messages>,
    pub(crate) tools: Option<ToolList>,
    /// Default: true for a text, false for a conversation, whose template writes special tokens itself.
    pub(crate) add_special_tokens: Option<bool>,
    /// Whether the answer also has each token's name in the vocabulary.
    pub(crate) return_token_strs: Option<bool>,
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) continue_final_message: Option<bool>,
    pub(crate) chat_template_kwargs: Option<serde_json::Map<String, Value>>,
    /// Of which there is nothing here.
    pub(crate) chat_template: Option<Refused>,
    pub(crate) media_io_kwargs: Option<Refused>,
    pub(crate) mm_processor_kwargs: Option<Refused>,
}

/// Body of `POST /detokenize` (vLLM's).
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct DetokenizeRequest {
    pub(crate) model: Option<String>,
    pub(crate) tokens: Vec<u32>,
}
