//! From a command line to a loaded model: what both roles begin with.

use anyhow::{Context, Result, bail};
use engine_kernels::{
    KvDType, KvLayout, KvRegion,
    cpu::{CpuBackend, CpuOptions},
};
use engine_models::{ForwardLimits, ModelSource, OpenOptions};

use super::{EngineConfig, KvRequest, ModelRunner, Runner, available_memory, mock_runner::MockRunner, size_kv};
use crate::{
    cli::WorkerArgs,
    cluster::{ModelCard, ModelKey},
};

/// Rows of logits held at a time. More only cost memory: a vocabulary of 150,000 takes 0.6 MB a row.
const LOGIT_ROWS_MAX: usize = 64;
/// How the CPU backend orders the elements of a page; part of what workers agree on.
const CPU_PAGE_ORDER: &str = "keys [head_dim][token], values [token][head_dim]";

/// A model that is ready to compute.
pub(super) struct Loaded {
    pub(super) runner: Box<dyn Runner>,
    pub(super) config: EngineConfig,
    /// Where its pages are.
    pub(super) region: KvRegion,
    /// What other workers have to have in common with it.
    pub(super) key: ModelKey,
    layout: KvLayout,
    /// Of weights and shape.
    fingerprint: [u8; 32],
}

/// Finds the model's files. Blocks, for minutes if they have to be downloaded.
pub(super) fn open(cli: &WorkerArgs) -> Result<ModelSource> {
    let options = OpenOptions {
        load_format: cli.load_format.into(),
        revision: cli.revision.clone(),
        progress: true,
        ..OpenOptions::default()
    };
    let Some(model) = &cli.model else { bail!("--model is missing") };
    ModelSource::open(model, &options).with_context(|| format!("cannot open the model {model}"))
}

/// Reads the weights and reserves the KV cache, if `shared` in memory that prefill workers of this host can map. Blocks
/// for seconds to minutes.
pub(super) fn load(cli: &WorkerArgs, source: &ModelSource, shared: bool) -> Result<Loaded> {
    let model = source.config();
    let threads = cli.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |cores| cores.get()));
    if threads == 0 {
        bail!("--threads must be at least 1");
    }
    let mut layout = KvLayout {
        layers: model.layers,
        kv_heads: model.kv_heads,
        head_dim: model.head_dim,
        block_size: cli.block_size,
        blocks: 0,
        dtype: cli.kv_cache_dtype.or(source.kv_dtype()),
    };
    if cli.block_size == 0 {
        bail!("--block-size must be at least 1");
    }
    let fingerprint = source.fingerprint()?;
    let key = ModelKey::new(&fingerprint, &layout, CPU_PAGE_ORDER);
    // Before loading: what cannot be is said at once, and the model's tables are no longer than what is served.
    let wish = KvRequest { blocks: cli.kv_blocks, bytes: cli.kv_cache_memory, max_model_len: cli.max_model_len };
    let weights = usize::try_from(source.weight_bytes()).unwrap_or(usize::MAX);
    let available = available_memory().unwrap_or(0).saturating_sub(weights);
    let sizing = size_kv(wish, layout, model.max_position_embeddings, cli.max_num_seqs, available)?;
    tracing::info!("{}", sizing.explanation);
    layout.blocks = sizing.blocks;
    let config = EngineConfig {
        max_num_seqs: cli.max_num_seqs,
        max_num_batched_tokens: cli.max_num_batched_tokens,
        itl_target: cli.disagg.itl_target,
        max_waiting_requests: cli.max_waiting_requests,
        max_model_len: sizing.max_model_len,
        vocab_size: model.vocab_size,
        block_size: layout.block_size,
        blocks: sizing.blocks,
        model_key: key.as_bytes().to_vec(),
    };
    config.validate()?;
    let limits = ForwardLimits {
        max_tokens: cli.max_num_batched_tokens,
        max_logit_rows: LOGIT_ROWS_MAX.min(cli.max_num_batched_tokens).max(1),
        max_positions: sizing.max_model_len,
    };
    if let Some(model) = &cli.mock {
        let region = KvRegion::shared(layout.region_shape()).context("cannot reserve a mock's pages")?;
        let runner = Box::new(MockRunner::new(model.clone(), region.clone(), layout.block_size));
        return Ok(Loaded { runner, config, region, key, layout, fingerprint });
    }
    let mut backend = CpuBackend::new(CpuOptions { threads, level: None });
    if shared {
        backend.share_kv_cache();
    }
    let loaded = source.load(&mut backend, limits)?;
    let runner = ModelRunner::new(backend, loaded.model, layout, limits.max_logit_rows)?;
    let Some(region) = runner.region() else { bail!("this backend's KV cache cannot be reached") };
    Ok(Loaded { runner: Box::new(runner), config, region, key, layout, fingerprint })
}

impl Loaded {
    /// What others are told of the model, so that they can list it, and load it too.
    pub(super) fn card(&self, cli: &WorkerArgs, names: Vec<String>) -> ModelCard {
        let given = cli.model.clone().unwrap_or_default();
        // Another process may have another working directory.
        let source = std::fs::canonicalize(&given).map_or(given, |path| path.display().to_string());
        let dtype = match self.layout.dtype {
            KvDType::F32 => "f32",
            KvDType::F16 => "f16",
            KvDType::BF16 => "bf16",
        };
        ModelCard {
            names,
            max_model_len: self.config.max_model_len,
            source,
            revision: cli.revision.clone(),
            load_format: cli.load_format.as_str().to_owned(),
            kv_cache_dtype: dtype.to_owned(),
            block_size: self.layout.block_size,
            layers: self.region.shape().layers,
            page_bytes: self.region.shape().page_bytes,
            page_order: CPU_PAGE_ORDER.to_owned(),
            weights: self.fingerprint[..8].iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}
