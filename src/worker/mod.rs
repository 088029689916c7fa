//! The two roles, decode and prefill, and the engine thread they share.
//!
//! One OS thread owns the model, the scheduler and the KV pages. Requests go to it through [`EngineHandle`] and hear
//! from it through a [`Generation`] each; prompts for decode workers through an [`Exporter`]; what happens to lent
//! pages comes through [`Post`].

mod ahead;
mod bare_engine;
mod constraint;
mod courier;
pub mod decode;
mod desk;
mod device;
mod engine;
mod export;
mod generation;
mod handle;
mod lender;
mod lending;
mod measure;
mod membership;
mod mock_runner;
mod model;
mod notice;
mod pace;
mod port;
mod post;
pub mod prefill;
mod ready;
mod rehearsal;
mod request;
mod request_state;
mod runner;
mod signals;
mod sizing;
mod staging;
mod step;
mod watchdog;
mod ways;

pub use bare_engine::BareEngine;
pub(crate) use device::{Chosen, choose};
pub use engine::Engine;
pub use export::{Exporter, PrefillHandle, PrefillRequest};
pub use generation::Generation;
pub use handle::{ConfigError, EngineConfig, EngineHandle, EngineStatus, Snapshot};
pub use lending::{LendingConfig, LendingPort, Stage};
pub use measure::{Gauge, MeasureError, Measured};
pub use mock_runner::MockModel;
pub use post::{Inbox, Post, inbox};
pub use ready::Ready;
pub use request::{Event, FinishReason, Request, SubmitError, TokenOutput};
pub use runner::{ModelRunner, Runner, RunnerError, RunsAhead};
pub(crate) use signals::Signals;
pub use sizing::{KvRequest, KvSizing, SizingError, available_memory, default_kv_bytes, size_kv};
pub use staging::StagedPages;
pub use ways::Ways;

#[cfg(test)]
mod ahead_tests;
#[cfg(test)]
mod constrained_tests;
#[cfg(test)]
mod ending_tests;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod remote_tests;
#[cfg(test)]
mod resumed_tests;
#[cfg(test)]
mod tests;
