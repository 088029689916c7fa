use std::time::Duration;

use anyhow::Result;

use super::model::{self, Purpose};
use crate::{
    cli::EngineArgs,
    engine::{Engine, EngineHandle},
    telemetry::Metrics,
};

/// A model and its engine thread without anything around them, for whoever measures.
pub struct BareEngine {
    /// The way to the engine thread.
    pub engine: EngineHandle,
    /// What the model is called.
    pub name: String,
    /// What computes it.
    pub device: String,
    /// Bytes of weights that each step reads.
    pub step_bytes: u64,
    /// Bytes of keys and values that a token has.
    pub token_bytes: usize,
}

impl BareEngine {
    /// Loads the model. Blocks for seconds to minutes.
    pub fn start(args: &EngineArgs) -> Result<Self> {
        let source = model::open(args)?;
        // Prompts are cut by `--max-num-batched-tokens` alone.
        let itl_target = Duration::from_secs(60);
        let purpose =
            Purpose { shared: false, decodes: true, itl_target, max_waiting_requests: 1024, prefix_caching: true };
        let loaded = model::load(args, &source, &purpose)?;
        let (device, step_bytes, token_bytes) = (loaded.device.clone(), loaded.step_bytes, loaded.token_bytes());
        let engine = Engine::start(loaded.runner, loaded.config, Metrics::new().engine)?;
        Ok(Self { engine, name: source.name().to_owned(), device, step_bytes, token_bytes })
    }
}
