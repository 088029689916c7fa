//! What the tests of the whole engine share.
#![allow(dead_code, unused_imports, reason = "each test uses some of it")]

mod assets;
mod random;

use std::{
    path::Path,
    sync::{Arc, Mutex},
};

pub(crate) use assets::demo_model;
pub(crate) use random::SplitMix64;

use engine::engine::{ModelRunner, Runner, RunnerError};
use engine_kernels::{Backend, Batch, KvLayout, SampleRow, Sampled};
use engine_models::{ForwardLimits, LoadFormat, ModelSource, OpenOptions};
use serde_json::Value;

/// A request with `fields` put over its own.
pub(crate) fn with(mut request: Value, fields: Value) -> Value {
    for (name, value) in fields.as_object().unwrap() {
        request[name] = value.clone();
    }
    request
}

/// A model with made-up weights of the shape that `config`, a `config.json`, describes.
pub(crate) fn made_up(config: &str) -> ModelSource {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let options = OpenOptions { load_format: LoadFormat::Dummy, dummy_seed: 7, ..OpenOptions::default() };
    ModelSource::open(folder.path().to_str().unwrap(), &options).unwrap()
}

/// A model from its files.
pub(crate) fn open(path: &Path) -> ModelSource {
    ModelSource::open(path.to_str().unwrap(), &OpenOptions::default()).unwrap()
}

/// Loads a model into `backend`, with a KV cache of `blocks` pages.
pub(crate) fn load<B: Backend>(
    source: &ModelSource,
    mut backend: B,
    limits: ForwardLimits,
    block_size: usize,
    blocks: usize,
) -> ModelRunner<B> {
    let loaded = source.load(&mut backend, limits).unwrap();
    let config = source.config();
    let layout = KvLayout {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_size,
        blocks,
        dtype: loaded.kv_dtype,
    };
    ModelRunner::new(backend, loaded.model, layout, limits).unwrap()
}

/// One loaded model for several engines, one after the other.
pub(crate) struct Lent<R>(Arc<Mutex<R>>);

impl<R> Lent<R> {
    pub(crate) fn new(runner: R) -> Self {
        Self(Arc::new(Mutex::new(runner)))
    }

    pub(crate) fn again(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R: Runner> Runner for Lent<R> {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        self.0.lock().unwrap().execute(batch, row, out, layer_done)
    }
}
