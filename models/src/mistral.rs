//! Mistral (Jiang et al. 2023) where no window slides: Llama's decoder without its optional biases.

use crate::family::Family;
use crate::{ModelError, llama};

/// `sliding_window` where nothing is said; `null` is none.
const DEFAULT_WINDOW: usize = 4096;
/// `num_key_value_heads` where nothing is said.
const DEFAULT_KV_HEADS: usize = 8;

/// In GGUF these are Llamas by name too.
pub(crate) const FAMILY: Family = Family {
    class: "MistralForCausalLM",
    model_type: "mistral",
    gguf: None,
    from_hf: |fields, config| {
        let is_absent = |field: &str| !fields.names().any(|name| name == field);
        if is_absent("num_key_value_heads") {
            config.kv_heads = DEFAULT_KV_HEADS;
        }
        let window = match fields.size("sliding_window")? {
            None if is_absent("sliding_window") => Some(DEFAULT_WINDOW),
            given => given,
        };
        match window.filter(|&window| window < config.max_position_embeddings) {
            Some(window) => {
                let what = format!("sliding_window {window} (sliding window attention)");
                Err(ModelError::Unsupported { path: fields.path().into(), what })
            }
            None => Ok(()),
        }
    },
    ..llama::FAMILY
};
