//! From a command line to a loaded model: what both roles begin with.

use std::time::Duration;

use anyhow::{Context, Result, bail};
use engine_kernels::{
    Backend, KvLayout, KvPages, KvRegion,
    cpu::{CpuBackend, CpuOptions},
};
use engine_models::{ForwardLimits, ModelSource, OpenOptions};

use super::{
    KvRequest, available_memory,
    device::{self, Chosen},
    size_kv,
};
use crate::{
    cli::{DeviceArg, EngineArgs, KvDTypeArg, WorkerArgs},
    cluster::{ModelCard, ModelKey, Versions},
    engine::{EngineConfig, MockRunner, ModelRunner, Runner},
    handoff::Job,
    transfer::SESSION_VERSION,
};

/// Rows of logits held at a time. A vocabulary of 150,000 takes 0.6 MB a row.
const LOGIT_ROWS_MAX: usize = 64;
/// The same on a device that decodes more sequences: each time it reads the whole output matrix.
#[cfg(feature = "cuda")]
const DEVICE_LOGIT_ROWS_MAX: usize = 256;
/// How the CPU backend orders the elements of a page; part of what workers agree on.
const CPU_PAGE_ORDER: &str = "keys [head_dim][token], values [token][head_dim]";
/// Tokens of a page there, if nobody says: few, because of a sequence's last page half is empty.
const CPU_BLOCK_SIZE: usize = 16;
/// How the CUDA backend does.
#[cfg(any(feature = "cuda", test))]
const CUDA_PAGE_ORDER: &str = "keys and values [token][head_dim]";
/// Tokens of a page there: more, because copies between devices pay by the piece.
#[cfg(feature = "cuda")]
const CUDA_BLOCK_SIZE: usize = 64;

/// What a model is loaded for.
pub(super) struct Purpose {
    /// Prefill workers of this host are to map the memory of its pages.
    pub(super) shared: bool,
    /// It generates: steps that decode are prepared for too, so that the first requests do not wait for that.
    pub(super) decodes: bool,
    /// As [`EngineConfig`] has it.
    pub(super) itl_target: Duration,
    /// As [`EngineConfig`] has it.
    pub(super) max_waiting_requests: usize,
    /// As [`EngineConfig`] has it.
    pub(super) prefix_caching: bool,
}

impl Purpose {
    /// What a worker's command line says of it. It shares no pages, and decodes nothing.
    pub(super) fn of(cli: &WorkerArgs) -> Self {
        Self {
            shared: false,
            decodes: false,
            itl_target: cli.disagg.itl_target,
            max_waiting_requests: cli.max_waiting_requests,
            prefix_caching: !cli.no_prefix_caching,
        }
    }
}

/// A model that is ready to compute.
pub(super) struct Loaded {
    pub(super) runner: Box<dyn Runner>,
    pub(super) config: EngineConfig,
    /// What computes it, for people.
    pub(super) device: String,
    /// Bytes of weights that each step reads.
    pub(super) step_bytes: u64,
    /// Where its pages are, if others can reach them.
    pages: Option<KvPages>,
    /// What other workers have to have in common with it.
    pub(super) key: ModelKey,
    layout: KvLayout,
    page_order: &'static str,
    /// Of weights and shape.
    fingerprint: [u8; 32],
}

/// Finds the model's files. Blocks, for minutes if they have to be downloaded.
pub(super) fn open(cli: &EngineArgs) -> Result<ModelSource> {
    let options = OpenOptions {
        load_format: cli.load_format.into(),
        revision: cli.revision.clone(),
        progress: true,
        ..OpenOptions::default()
    };
    let Some(model) = &cli.model else { bail!("--model is missing") };
    ModelSource::open(model, &options).with_context(|| format!("cannot open the model {model}"))
}

/// Reads the weights and reserves the KV cache. Blocks for seconds to minutes.
pub(super) fn load(cli: &EngineArgs, source: &ModelSource, purpose: &Purpose) -> Result<Loaded> {
    let model = source.config();
    let threads = cli.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, |cores| cores.get()));
    if threads == 0 {
        bail!("--threads must be at least 1");
    }
    // A mock computes nothing.
    let device = device::choose(if cli.mock.is_some() { DeviceArg::Cpu } else { cli.device })?;
    tracing::info!("device: {device}");
    let (page_order, block_size) = match device {
        Chosen::Cpu => (CPU_PAGE_ORDER, CPU_BLOCK_SIZE),
        #[cfg(feature = "cuda")]
        Chosen::Cuda { .. } => (CUDA_PAGE_ORDER, CUDA_BLOCK_SIZE),
    };
    let mut layout = KvLayout {
        layers: model.layers,
        kv_heads: model.kv_heads,
        head_dim: model.head_dim,
        block_size: cli.block_size.unwrap_or(block_size),
        blocks: 0,
        dtype: cli.kv_cache_dtype.or(source.kv_dtype()),
    };
    let fingerprint = source.fingerprint()?;
    let key =
        ModelKey::new(&fingerprint, &layout, page_order, Versions { sessions: SESSION_VERSION, jobs: Job::SCHEMA });
    // Before loading: what cannot be is said at once, and the model's tables are no longer than what is served.
    let weights = match device {
        Chosen::Cpu => source.weight_bytes(engine_kernels::cpu::weight_bytes),
        #[cfg(feature = "cuda")]
        Chosen::Cuda { .. } => source.weight_bytes(engine_kernels::cuda::weight_bytes),
    };
    let weights = usize::try_from(weights).unwrap_or(usize::MAX);
    let wish = KvRequest {
        blocks: cli.kv_blocks,
        bytes: cli.kv_cache_memory,
        max_model_len: cli.max_model_len,
        device_bytes: device.bytes_for_pages(cli.gpu_memory_utilization, weights)?,
    };
    let (max_num_seqs, max_num_batched_tokens) = device.step_limits(cli);
    let available = available_memory().unwrap_or(0).saturating_sub(weights);
    let sizing = size_kv(wish, layout, model.max_position_embeddings, max_num_seqs, available)?;
    tracing::info!("{}", sizing.explanation);
    layout.blocks = sizing.blocks;
    let config = EngineConfig {
        max_num_seqs,
        max_num_batched_tokens,
        itl_target: purpose.itl_target,
        max_waiting_requests: purpose.max_waiting_requests,
        max_model_len: sizing.max_model_len,
        vocab_size: model.vocab_size,
        block_size: layout.block_size,
        blocks: sizing.blocks,
        prefix_caching: purpose.prefix_caching,
        model_key: key.as_bytes().to_vec(),
    };
    config.validate()?;
    let name = device.to_string();
    let (runner, pages, step_bytes) = runner(cli, threads, device, source, layout, &config, purpose)?;
    Ok(Loaded { runner, config, device: name, step_bytes, pages, key, layout, page_order, fingerprint })
}

/// What computes steps, where its pages are, if others can reach them, and the bytes of weights that each step reads.
type Computing = (Box<dyn Runner>, Option<KvPages>, u64);

/// Makes what computes on `device`, or in place of a model.
fn runner(
    cli: &EngineArgs,
    threads: usize,
    device: Chosen,
    source: &ModelSource,
    layout: KvLayout,
    config: &EngineConfig,
    purpose: &Purpose,
) -> Result<Computing> {
    let logit_rows = match device {
        Chosen::Cpu => LOGIT_ROWS_MAX,
        #[cfg(feature = "cuda")]
        Chosen::Cuda { .. } if purpose.decodes => config.max_num_seqs.clamp(LOGIT_ROWS_MAX, DEVICE_LOGIT_ROWS_MAX),
        #[cfg(feature = "cuda")]
        Chosen::Cuda { .. } => LOGIT_ROWS_MAX,
    };
    let limits = ForwardLimits {
        max_tokens: config.max_num_batched_tokens,
        max_logit_rows: logit_rows.min(config.max_num_batched_tokens).max(1),
        max_positions: config.max_model_len,
    };
    match (&cli.mock, device) {
        (Some(model), _) => {
            let region = KvRegion::shared(layout.region_shape()).context("cannot reserve a mock's pages")?;
            let runner: Box<dyn Runner> = Box::new(MockRunner::new(model.clone(), region.clone(), layout.block_size));
            Ok((runner, Some(KvPages::from(region)), 0))
        }
        (None, Chosen::Cpu) => {
            if cli.enforce_eager {
                tracing::warn!("--enforce-eager does nothing on a CPU, which records no steps");
            }
            let mut backend = CpuBackend::new(CpuOptions { threads, level: None });
            if purpose.shared {
                backend.share_kv_cache();
            }
            load_into(backend, source, limits, layout, config, purpose.decodes)
        }
        #[cfg(feature = "cuda")]
        (None, Chosen::Cuda { device, .. }) => {
            device.load_kernels()?;
            let mut backend = engine_kernels::cuda::CudaBackend::new(device);
            if cli.enforce_eager {
                backend = backend.with_graphs_max(0);
            }
            load_into(backend, source, limits, layout, config, purpose.decodes)
        }
    }
}

fn load_into<B: Backend>(
    mut backend: B,
    source: &ModelSource,
    limits: ForwardLimits,
    layout: KvLayout,
    config: &EngineConfig,
    decodes: bool,
) -> Result<Computing> {
    let loaded = source.load(&mut backend, limits)?;
    let mut runner = ModelRunner::new(backend, loaded.model, layout, limits)?;
    runner.warm_up(config, decodes)?;
    let pages = runner.pages();
    Ok((Box::new(runner), pages, loaded.report.step_bytes))
}

impl Loaded {
    /// Where its pages are, for others to read or write.
    pub(super) fn pages(&self) -> Result<KvPages> {
        self.pages.clone().context("this backend's KV pages cannot be moved between workers: run with --standalone")
    }

    /// Whether they are in device memory.
    pub(super) fn is_on_device(&self) -> bool {
        matches!(self.pages, Some(KvPages::Device(_)))
    }

    /// Bytes of keys and values that a token has.
    pub(super) fn token_bytes(&self) -> usize {
        self.layout.block_bytes() / self.layout.block_size
    }

    /// What others are told of the model, so that they can list it, and load it too.
    pub(super) fn card(&self, cli: &EngineArgs, names: Vec<String>) -> ModelCard {
        let given = cli.model.clone().unwrap_or_default();
        // Another process may have another working directory.
        let source = std::fs::canonicalize(&given).map_or(given, |path| path.display().to_string());
        ModelCard {
            names,
            max_model_len: self.config.max_model_len,
            source,
            revision: cli.revision.clone(),
            load_format: cli.load_format.as_str().to_owned(),
            kv_cache_dtype: KvDTypeArg::name_of(self.layout.dtype).to_owned(),
            block_size: self.layout.block_size,
            layers: self.layout.region_shape().layers,
            page_bytes: self.layout.region_shape().page_bytes,
            page_order: self.page_order.to_owned(),
            weights: self.fingerprint[..8].iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use engine_kernels::KvDType;

    use super::*;

    #[test]
    fn workers_on_cpus_and_on_devices_never_share_a_key() {
        let layout = KvLayout { layers: 2, kv_heads: 2, head_dim: 64, block_size: 16, blocks: 9, dtype: KvDType::F16 };
        let key = |order| ModelKey::new(&[7; 32], &layout, order, Versions { sessions: 1, jobs: 1 });
        assert_ne!(key(CPU_PAGE_ORDER), key(CUDA_PAGE_ORDER));
    }
}
