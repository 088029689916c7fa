//! The two roles, decode and prefill, and what they share: loading a model, and a worker's place in its cluster.
//!
//! Either serves an [`engine`](crate::engine): `decode` through the OpenAI API, lending its pages, and `prefill` for
//! the cluster's decode workers.

mod bare_engine;
pub mod decode;
mod device;
mod membership;
mod model;
mod notice;
pub mod prefill;
mod role;
mod sizing;
mod watchdog;
mod ways;

pub use bare_engine::BareEngine;
pub(crate) use device::{Chosen, choose};
pub use prefill::measure::{Gauge, MeasureError, Measured};
pub use sizing::{KvRequest, KvSizing, SizingError, available_memory, default_kv_bytes, size_kv};
pub use ways::Ways;
