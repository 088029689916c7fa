//! The engine: one OS thread that owns the model, the scheduler and the KV pages.
//!
//! Requests go to it through [`EngineHandle`] and hear from it through a [`Generation`] each; prompts for decode
//! workers through an [`Exporter`]; what happens to lent pages comes through [`Post`]. A step is computed by a
//! [`Runner`]. It knows no socket, no cluster and no command line: workers make one and serve it.

mod ahead;
mod config;
mod constraint;
mod export;
mod generation;
mod handle;
mod lending;
mod mock_runner;
mod pace;
mod post;
mod request;
mod request_state;
mod runner;
mod step;
mod thread;
mod warm_up;

pub use config::{ConfigError, EngineConfig};
pub use export::{Exporter, PrefillHandle, PrefillRequest};
pub use generation::Generation;
pub use handle::{EngineHandle, EngineStatus, Snapshot};
pub use lending::{Destination, LendingConfig, LendingPort, StagedPages};
pub use mock_runner::MockModel;
pub(crate) use mock_runner::MockRunner;
#[cfg(test)]
pub(crate) use post::Message;
pub use post::{Inbox, Post, inbox};
pub use request::{Event, FinishReason, Request, SubmitError, TokenOutput};
pub use runner::{ModelRunner, Runner, RunnerError, RunsAhead};
pub use thread::Engine;

#[cfg(test)]
pub(crate) mod tests;
