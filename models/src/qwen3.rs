//! Qwen3 (Yang et al. 2025): RMS norms over each query and key head instead of Qwen2's biases, and heads whose width is
//! stated rather than derived.

use crate::Architecture;
use crate::family::Family;

/// `head_dim` is 128 where nothing is said, whatever the hidden size.
pub(crate) const FAMILY: Family = Family {
    architecture: Architecture::Qwen3,
    class: "Qwen3ForCausalLM",
    model_type: "qwen3",
    gguf: Some("qwen3"),
    gguf_interleaved_qk: false,
    qk_norm: true,
    default_head_dim: Some(128),
    from_hf: |fields, config| {
        config.qkv_bias = fields.boolean("attention_bias")?.unwrap_or(false);
        config.o_bias = config.qkv_bias;
        Ok(())
    },
};
