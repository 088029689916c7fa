//! What clients send and what they are sent, as JSON. Requests name every field they know; an unknown one is an error,
//! except inside messages, their parts and calls.

mod chat;
mod common;
mod completion;
mod form;
mod instead;
mod tokenize;
mod whole;

#[cfg(test)]
pub(crate) use chat::TOOLS_MAX;
pub(crate) use chat::{ChatRequest, Content, ContentPart, MESSAGES_MAX, Message, Messages, ToolCall, ToolList};
pub(crate) use common::{LogitBias, Nvext, Refused, SamplingFields, StreamOptions, Strings, generating_request};
pub(crate) use completion::{CompletionRequest, Prompt};
pub(crate) use form::{ResponseFormat, StructuredOutputs};
pub(crate) use instead::instead_of;
pub(crate) use tokenize::{DetokenizeRequest, TokenizeRequest};
pub(crate) use whole::{whole, wholes};
