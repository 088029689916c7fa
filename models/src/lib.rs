//! Model files, tokenizers and architectures, written once against [`engine_kernels::Backend`].
//!
//! [`ModelSource::open`] finds a model (a Hugging Face directory, a GGUF file, a hub id) and reads its configuration;
//! [`ModelSource::load`] hands its weights to a backend and returns a [`Model`], which is one forward pass for all
//! architectures. Nothing here knows a request or a socket.

mod bounded_file;
mod config;
mod defaults;
mod error;
mod family;
mod fingerprint;
pub mod gguf;
mod hub;
mod llama;
mod mistral;
mod model;
mod qwen2;
mod qwen3;
mod rope;
mod source;
pub mod tokenizer;
mod weights;

pub use config::{Architecture, ModelConfig, RopeConfig, RopeScaling};
pub use defaults::{ChatTemplate, GenerationDefaults};
pub use error::ModelError;
pub use hub::HubError;
pub use model::{ForwardLimits, Model};
pub use source::{LoadFormat, LoadedModel, ModelSource, OpenOptions};
pub use tokenizer::{DecodeStream, EncodeError, Tokenizer, TokenizerError};
pub use weights::LoadReport;
