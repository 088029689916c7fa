//! What a model is made of: one [`ModelConfig`], whatever file it came from.

pub(crate) mod gguf;
pub(crate) mod hf;
pub(crate) mod json;
pub(crate) mod quantization;

use std::path::Path;

use crate::ModelError;

/// The decoder families this crate knows; each has a file of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Llama 2 and 3, SmolLM2 and others that declare `LlamaForCausalLM`, and Mistral.
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
        /// Whether the dimensions between which the ramp lies are rounded outwards to whole ones.
        truncate: bool,
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

/// Most of anything a model may have: keeps products of two of them in range, and nonsense out of allocations.
const MAX_EXTENT: usize = 1 << 24;
/// Longest context: beyond it, positions are not all different as f32, which rotary angles are computed in.
const MAX_POSITIONS: usize = 1 << 24;
/// Most layers.
const MAX_LAYERS: usize = 1 << 12;
/// Longest head a kernel handles.
const MAX_HEAD_DIM: usize = 1 << 10;

impl ModelConfig {
    /// Weights a model of this shape has, tied ones counted once.
    pub fn parameters(&self) -> u64 {
        let [vocab, hidden, inner] = [self.vocab_size, self.hidden_size, self.intermediate_size].map(|n| n as u64);
        let [q, kv, head] =
            [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.head_dim].map(|n| n as u64);
        let given = |present: bool, count: u64| if present { count } else { 0 };
        let attention = hidden * (2 * q + 2 * kv) + given(self.qkv_bias, q + 2 * kv) + given(self.o_bias, hidden);
        let mlp = 3 * hidden * inner + given(self.mlp_bias, 2 * inner + hidden);
        let norms = 2 * hidden + given(self.architecture.family().qk_norm, 2 * head);
        let tables = if self.tie_word_embeddings { 1 } else { 2 } * vocab * hidden;
        tables + self.layers as u64 * (attention + mlp + norms) + hidden
    }

    /// Shapes of the layers' projections: of the matrices that tools quantise.
    pub(crate) fn projections(&self) -> impl Iterator<Item = [usize; 2]> {
        let [hidden, inner] = [self.hidden_size, self.intermediate_size];
        let [q, kv] = [self.heads * self.head_dim, self.kv_heads * self.head_dim];
        let attention = [[q, hidden], [kv, hidden], [kv, hidden], [hidden, q]];
        let mlp = [[inner, hidden], [inner, hidden], [hidden, inner]];
        (0..self.layers).flat_map(move |_| attention.into_iter().chain(mlp))
    }

    /// Checks what no model can be without: sizes in range, heads that divide, numbers that are numbers. `path` is for
    /// the message.
    pub(crate) fn validate(&self, path: &Path) -> Result<(), ModelError> {
        let error =
            |field: &str, problem: String| Err(ModelError::Field { path: path.into(), field: field.into(), problem });
        let extents = [
            ("vocab_size", self.vocab_size, MAX_EXTENT),
            ("hidden_size", self.hidden_size, MAX_EXTENT),
            ("intermediate_size", self.intermediate_size, MAX_EXTENT),
            ("num_hidden_layers", self.layers, MAX_LAYERS),
            ("num_attention_heads", self.heads, MAX_EXTENT),
            ("num_key_value_heads", self.kv_heads, MAX_EXTENT),
            ("head_dim", self.head_dim, MAX_HEAD_DIM),
            ("max_position_embeddings", self.max_position_embeddings, MAX_POSITIONS),
        ];
        for (field, value, limit) in extents {
            if value == 0 || value > limit {
                return error(field, format!("is {value}; it must be between 1 and {limit}"));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let (heads, kv_heads) = (self.heads, self.kv_heads);
            return error(
                "num_key_value_heads",
                format!("is {kv_heads}, which does not divide the {heads} attention heads"),
            );
        }
        if self.heads * self.head_dim > MAX_EXTENT {
            return error("num_attention_heads", format!("times head_dim must be at most {MAX_EXTENT}"));
        }
        if !self.head_dim.is_multiple_of(2) {
            return error("head_dim", format!("is {}; rotary embeddings need an even one", self.head_dim));
        }
        if !(self.rms_norm_eps.is_finite() && self.rms_norm_eps >= 0.0) {
            return error("rms_norm_eps", format!("is {}", self.rms_norm_eps));
        }
        if !(self.rope.theta.is_finite() && self.rope.theta > 1.0) {
            return error("rope_theta", format!("is {}; it must be a number above 1", self.rope.theta));
        }
        if let Some(problem) = self.rope.scaling.problem(self.head_dim) {
            return error("rope_scaling", problem);
        }
        Ok(())
    }
}

impl RopeScaling {
    /// Context the scaling was made to reach; 0 where it does not say. Qwen's configurations keep the short one in
    /// `max_position_embeddings` when YaRN is switched on.
    fn extended_context(&self) -> usize {
        match self {
            Self::Yarn { factor, original_max_position, .. } => (*factor * *original_max_position as f32) as usize,
            _ => 0,
        }
    }

    /// What is wrong with the parameters, if anything.
    fn problem(&self, head_dim: usize) -> Option<String> {
        let positive = |name: &str, x: f32| (!(x.is_finite() && x > 0.0)).then(|| format!("has {name} {x}"));
        match self {
            Self::None => None,
            Self::Linear { factor } => positive("factor", *factor),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
                positive("factor", *factor)
                    .or_else(|| positive("low_freq_factor", *low_freq_factor))
                    .or_else(|| positive("high_freq_factor", *high_freq_factor))
                    .or_else(|| {
                        (high_freq_factor <= low_freq_factor)
                            .then(|| "has a high_freq_factor that is not above its low_freq_factor".into())
                    })
                    .or_else(|| (*original_max_position == 0).then(|| "has no original_max_position_embeddings".into()))
            }
            Self::Yarn { factor, beta_fast, beta_slow, attention_factor, original_max_position, .. } => {
                positive("factor", *factor)
                    .or_else(|| positive("beta_fast", *beta_fast))
                    .or_else(|| positive("beta_slow", *beta_slow))
                    .or_else(|| positive("attention_factor", attention_factor.unwrap_or(1.0)))
                    .or_else(|| (*original_max_position == 0).then(|| "has no original_max_position_embeddings".into()))
            }
            Self::PerFrequency { factors } => (factors.len() != head_dim / 2)
                .then(|| format!("has {} frequency factors; the head needs {}", factors.len(), head_dim / 2))
                .or_else(|| factors.iter().find_map(|&x| positive("frequency factor", x))),
        }
    }
}
