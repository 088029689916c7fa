//! Qwen2 and Qwen2.5 (Yang et al. 2024): Llama's decoder with biases on q, k and v.

use crate::Architecture;
use crate::family::Family;

/// The biases are part of the family: no field announces them.
pub(crate) const FAMILY: Family = Family {
    architecture: Architecture::Qwen2,
    class: "Qwen2ForCausalLM",
    model_type: "qwen2",
    gguf: Some("qwen2"),
    gguf_interleaved_qk: false,
    qk_norm: false,
    default_head_dim: None,
    from_hf: |_, config| {
        config.qkv_bias = true;
        Ok(())
    },
};
