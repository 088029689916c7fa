//! Llama 2 and 3, SmolLM2, and every other model that declares `LlamaForCausalLM` (Touvron et al. 2023; Grattafiori et
//! al. 2024): pre-norm, rotary positions, grouped query heads, SwiGLU.

use crate::Architecture;
use crate::family::Family;

/// Biases only where the configuration asks for them. GGUF keeps q and k as Meta published them, for interleaved
/// rotation.
pub(crate) const FAMILY: Family = Family {
    architecture: Architecture::Llama,
    class: "LlamaForCausalLM",
    model_type: "llama",
    gguf: Some("llama"),
    gguf_interleaved_qk: true,
    qk_norm: false,
    default_head_dim: None,
    from_hf: |fields, config| {
        config.qkv_bias = fields.boolean("attention_bias")?.unwrap_or(false);
        config.o_bias = config.qkv_bias;
        config.mlp_bias = fields.boolean("mlp_bias")?.unwrap_or(false);
        Ok(())
    },
};
