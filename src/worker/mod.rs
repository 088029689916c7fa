//! The engine thread and the way to it.
//!
//! One OS thread owns the model, the scheduler and the KV pages. Everything else talks to it through [`EngineHandle`],
//! and hears from it through one [`Generation`] a request.

mod engine;
mod generation;
mod handle;
mod request;
mod runner;
mod session;
mod sizing;
mod step;

pub use engine::Engine;
pub use generation::Generation;
pub use handle::{ConfigError, EngineConfig, EngineHandle, EngineStatus, Snapshot};
pub use request::{Event, FinishReason, Request, SubmitError, TokenOutput};
pub use runner::{ModelRunner, Runner, RunnerError};
pub use sizing::{KvRequest, KvSizing, SizingError, available_memory, size_kv};

#[cfg(test)]
mod fake;
#[cfg(test)]
mod resumed;
#[cfg(test)]
mod tests;
