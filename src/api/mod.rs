//! The OpenAI API: HTTP in, tokens out.
//!
//! A request goes through `extract` (bytes to JSON, bounded), `types` (JSON to fields, unknown ones refused),
//! `validate` (fields to a `Plan`), `prompt` (text to tokens) and `answer` (to the engine and back). What comes back
//! becomes text in `output`, behind the stop strings of `stop`, is taken apart by `parser` (thoughts, calls of
//! `tools`), and goes out whole or through `stream`.

mod answer;
mod chat;
mod completions;
mod defaults;
mod drain;
mod error;
mod extract;
mod form;
mod http_token;
mod info;
mod logprobs;
mod middleware;
mod output;
mod parser;
mod patient;
mod places;
pub mod progress;
mod prompt;
mod router;
mod server;
mod state;
mod stop;
mod stream;
mod template;
mod threads;
mod tokenize;
mod tools;
mod types;
mod validate;
mod wire;

pub use defaults::Defaults;
pub(crate) use drain::{Drain, InFlight};
pub use error::ApiError;
pub(crate) use extract::{MemoryBudget, Received, discard, read_body};
pub use http_token::{CLUSTER_TOKEN_HEADER, HttpToken};
pub(crate) use info::{ListedModel, ModelList, exposition, live};
pub(crate) use middleware::{MODEL_KEY_HEADER, request_id, require_key};
pub use parser::{CallFormat, Parsers};
pub(crate) use prompt::refuse_reserved;
pub(crate) use router::{SERVED, cors, fallbacks, probes};
pub use server::{Bound, ServerConfig, ServerError, bind, serve};
pub(crate) use server::{CONNECTIONS_BESIDE_REQUESTS, WRITE_STALL_MAX, serve_router};
pub use state::ApiConfig;
pub(crate) use state::unix_seconds;
pub use template::{ChatTemplate, RESERVED_NAMES, RenderOptions, TemplateError};
pub use threads::ConnectionThreads;
pub(crate) use wire::Json;

use state::Serving;
