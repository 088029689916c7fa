//! What there is. Reads, and judges nothing: what cannot be read is `None` or an error to be judged elsewhere.

mod gpu;
mod host;
mod http;
mod pairs;
mod rdma;
mod services;

pub(super) use gpu::GpuFacts;
pub(super) use host::{Container, HostFacts};
pub(super) use pairs::{Pair, measure_pairs};
pub(super) use rdma::RdmaFacts;
#[cfg(test)]
pub(super) use services::Health;
pub(super) use services::{ServiceState, ServicesFacts, Worker};

use std::path::Path;

/// A file's text without the space around it.
fn text(path: impl AsRef<Path>) -> Option<String> {
    let text = std::fs::read_to_string(path).ok()?;
    Some(text.trim().to_owned())
}
