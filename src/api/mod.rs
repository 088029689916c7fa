//! The OpenAI API: HTTP in, tokens out.
//!
//! A request goes through `extract` (bytes to JSON, bounded), `types` (JSON to fields, unknown ones refused),
//! `validate` (fields to a `Plan`), `prompt` (text to tokens) and `answer` (to the engine and back). What comes back
//! becomes text in `output`, behind the stop strings of `stop`, is taken apart by `parser` (thoughts, calls of
//! `tools`), and goes out whole or through `stream`.
//!
//! The server under it all, and how bodies are read, are in [`crate::http`].

mod answer;
mod chat;
mod completions;
mod defaults;
mod error;
mod extract;
mod form;
mod info;
mod logprobs;
mod middleware;
mod output;
mod parser;
pub mod progress;
mod prompt;
mod router;
mod state;
mod stop;
mod stream;
mod template;
mod tokenize;
mod tools;
mod types;
mod validate;
mod wire;

pub use defaults::Defaults;
pub(crate) use info::{ListedModel, ModelList};
pub(crate) use middleware::MODEL_KEY_HEADER;
pub use parser::{CallFormat, Parsers};
pub(crate) use prompt::refuse_reserved;
pub(crate) use router::SERVED;
pub use router::serve;
pub use state::ApiConfig;
pub(crate) use state::unix_seconds;
pub use template::{ChatTemplate, RESERVED_NAMES, RenderOptions, TemplateError};

use state::Serving;
