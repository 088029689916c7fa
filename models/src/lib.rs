//! Model files, tokenizers and architectures, written once against [`engine_kernels::Backend`].
//!
//! Nothing here knows a request or a socket.

mod config;
pub mod gguf;
mod model;

pub use config::{Architecture, ModelConfig, RopeConfig, RopeScaling};
pub use model::{ForwardLimits, Model};
