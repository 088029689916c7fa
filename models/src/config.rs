/// The decoder families this crate knows; each has a file of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2 and others that declare `LlamaForCausalLM`.
    Llama,
    /// Qwen2 and 2.5: biases on the q, k and v projections.
    Qwen2,
    /// Qwen3: RMS norms over each query and key head.
    Qwen3,
}

/// How rotary frequencies are stretched beyond the context a model was trained on.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// All frequencies divided by a factor (Chen et al. 2023).
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3.1: low frequencies divided, high ones kept, a smooth ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths longer than `original / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths shorter than `original / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context length of the original training.
        original_max_position: usize,
    },
    /// YaRN (Peng et al. 2023).
    Yarn {
        /// Ratio of the new context to the original one.
        factor: f32,
        /// Rotations above which a dimension is kept.
        beta_fast: f32,
        /// Rotations below which a dimension is fully interpolated.
        beta_slow: f32,
        /// Multiplies cos and sin; `None`: `0.1 ln(factor) + 1`.
        attention_factor: Option<f32>,
        /// Context length of the original training.
        original_max_position: usize,
    },
    /// One divisor a frequency, as GGUF's `rope_freqs.weight` has it.
    PerFrequency {
        /// `[head_dim / 2]`.
        factors: Vec<f32>,
    },
}

/// Rotary position embedding of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of frequencies.
    pub theta: f32,
    /// Stretching beyond the original context.
    pub scaling: RopeScaling,
}

/// Everything about a model's shape that the engine needs, from `config.json` or GGUF metadata.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Tokens in the vocabulary: rows of the embedding.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Inner width of the MLP.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Elements of one head; not always `hidden_size / heads`.
    pub head_dim: usize,
    /// Added to the mean square in RMS norms.
    pub rms_norm_eps: f32,
    /// Rotary position embedding.
    pub rope: RopeConfig,
    /// Whether the output projection is the embedding table.
    pub tie_word_embeddings: bool,
    /// Whether q, k and v projections have biases (Llama's `attention_bias` too).
    pub qkv_bias: bool,
    /// Whether the attention output projection has a bias (Llama's `attention_bias`).
    pub o_bias: bool,
    /// Whether the three MLP projections have biases (Llama's `mlp_bias`).
    pub mlp_bias: bool,
    /// Longest context the model was made for.
    pub max_position_embeddings: usize,
}
