//! Mistral (Jiang et al. 2023) as long as no window slides: Llama's decoder without its optional biases.

use crate::config::hf::end_at_window;
use crate::family::Family;
use crate::llama;

/// `num_key_value_heads` where nothing is said.
const DEFAULT_KV_HEADS: usize = 8;

/// In GGUF these are Llamas by name too.
pub(crate) const FAMILY: Family = Family {
    class: "MistralForCausalLM",
    model_type: "mistral",
    gguf: None,
    from_hf: |fields, config| {
        if !fields.names().any(|name| name == "num_key_value_heads") {
            config.kv_heads = DEFAULT_KV_HEADS;
        }
        end_at_window(fields, config)
    },
    ..llama::FAMILY
};
