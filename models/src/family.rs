use crate::config::json::Fields;
use crate::{Architecture, ModelConfig, ModelError, llama, mistral, qwen2, qwen3};

/// What one decoder family declares; everything else is common to all. Each has a file of its own.
pub(crate) struct Family {
    /// Its name in a [`ModelConfig`].
    pub(crate) architecture: Architecture,
    /// `architectures` of `config.json`.
    pub(crate) class: &'static str,
    /// `model_type` of `config.json`.
    pub(crate) model_type: &'static str,
    /// `general.architecture` of GGUF; `None`: that of another family.
    pub(crate) gguf: Option<&'static str>,
    /// Whether GGUF stores query and key rows in the order of interleaved rotation.
    pub(crate) gguf_interleaved_qk: bool,
    /// Whether query and key heads are normed.
    pub(crate) qk_norm: bool,
    /// Width of a head where `config.json` does not say; `None`: the hidden size over the heads.
    pub(crate) default_head_dim: Option<usize>,
    /// Completes a configuration with what only this family's `config.json` says (or leaves unsaid).
    pub(crate) from_hf: fn(&Fields<'_>, &mut ModelConfig) -> Result<(), ModelError>,
}

/// All families.
pub(crate) const FAMILIES: [&Family; 4] = [&llama::FAMILY, &mistral::FAMILY, &qwen2::FAMILY, &qwen3::FAMILY];

impl Architecture {
    /// What the family declares that gave it its name.
    pub(crate) fn family(self) -> &'static Family {
        match self {
            Self::Llama => &llama::FAMILY,
            Self::Qwen2 => &qwen2::FAMILY,
            Self::Qwen3 => &qwen3::FAMILY,
        }
    }
}
