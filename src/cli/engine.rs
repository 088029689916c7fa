use clap::Args;

use super::values::{
    DeviceArg, KvDTypeArg, LoadFormatArg, parse_device, parse_share, parse_size, parse_tokens, parse_within,
};
use crate::engine::MockModel;

/// Flags of whoever computes a model: which, on what, and within which limits.
#[derive(Debug, Args)]
pub struct EngineArgs {
    /// A directory with config.json and safetensors, a .gguf file, or a model of the Hugging Face hub
    /// (Qwen/Qwen3-0.6B, or Qwen/Qwen3-0.6B-GGUF:Q8_0 for a GGUF file of one); a prefill worker can take it from the
    /// cluster
    #[arg(short, long, value_name = "PATH|ID", help_heading = "Model")]
    pub model: Option<String>,

    /// Branch, tag or commit of a model on the hub
    #[arg(long, value_name = "REVISION", help_heading = "Model")]
    pub revision: Option<String>,

    /// Where the weights come from
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "auto", help_heading = "Model")]
    pub load_format: LoadFormatArg,

    /// Tokens of a prompt and its answer together, as 32768 or 32K [default: what the model was made for, or what the
    /// KV cache holds]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens, help_heading = "Engine")]
    pub max_model_len: Option<usize>,

    /// Sequences computed at the same time [default: 64, on a CUDA device 256]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    pub max_num_seqs: Option<usize>,

    /// Tokens computed in one step at most: longer prompts are prefilled in several, between which others generate
    /// [default: 512, on a CUDA device 2048, and no less than --max-num-seqs]
    #[arg(long, value_name = "TOKENS", value_parser = parse_tokens, help_heading = "Engine")]
    pub max_num_batched_tokens: Option<usize>,

    /// What computes: cpu, cuda:N, or auto for the first CUDA device if there is one
    #[arg(long, value_name = "DEVICE", value_parser = parse_device, default_value = "auto", help_heading = "Engine")]
    pub device: DeviceArg,

    /// Record no steps as CUDA graphs: starts sooner, takes less memory, and decodes slower
    #[arg(long, help_heading = "Engine")]
    pub enforce_eager: bool,

    /// Threads that compute on a CPU [default: one a hardware thread]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    pub threads: Option<usize>,

    /// Tokens of a KV page [default: 16, on a CUDA device 64]
    #[arg(long, value_name = "TOKENS", value_parser = parse_within::<1, 4096>, help_heading = "KV cache")]
    pub block_size: Option<usize>,

    /// KV pages [default: as --kv-cache-memory says]
    #[arg(
        long,
        visible_alias = "num-gpu-blocks-override",
        value_name = "PAGES",
        value_parser = parse_within::<1, 268_435_456>,
        help_heading = "KV cache"
    )]
    pub kv_blocks: Option<usize>,

    /// Part of a CUDA device's memory that is used, by others too; what weights leave of it becomes KV pages
    #[arg(long, value_name = "PART", value_parser = parse_share, default_value_t = 0.9, help_heading = "KV cache")]
    pub gpu_memory_utilization: f64,

    /// Memory of the KV cache, as 2GiB or 512MiB [default: on a CPU a quarter of what is free, at most 4 GiB]
    #[arg(
        long,
        visible_alias = "kv-cache-memory-bytes",
        value_name = "SIZE",
        value_parser = parse_size,
        conflicts_with = "kv_blocks",
        help_heading = "KV cache"
    )]
    pub kv_cache_memory: Option<usize>,

    /// Element type of the KV cache; auto: that of the weights that are not quantised, f16 for GGUF's quantised ones
    #[arg(long, value_enum, value_name = "TYPE", default_value = "auto", help_heading = "KV cache")]
    pub kv_cache_dtype: KvDTypeArg,

    /// In place of a model, for workers of a mock.
    #[arg(skip)]
    pub mock: Option<MockModel>,
}
