//! A model's shape from GGUF metadata. Keys begin with the architecture's name (`llama.block_count`).

use std::path::Path;

use engine_kernels::DType;

use super::{ModelConfig, RopeConfig, RopeScaling};
use crate::ModelError;
use crate::family::FAMILIES;
use crate::gguf::{Gguf, GgufError, ggml_type_name};
use crate::weights::floats;

/// Reads the metadata of the first of `parts`, a file or the parts of a split one, any of which may hold the tensors
/// that are looked for; `path` is for messages.
pub(crate) fn parse(parts: &[Gguf], path: &Path) -> Result<ModelConfig, ModelError> {
    let file = &parts[0];
    let has_tensor = |name: &str| parts.iter().any(|part| part.tensor(name).is_some());
    let name = file.string("general.architecture").map_err(ModelError::gguf(path))?.unwrap_or("(none declared)");
    let family =
        FAMILIES.iter().find(|family| family.gguf == Some(name)).copied().ok_or_else(|| ModelError::Architecture {
            path: path.into(),
            name: name.into(),
            supported: FAMILIES.iter().filter_map(|family| family.gguf).collect::<Vec<_>>().join(", "),
        })?;
    let keys = Keys { file, parts, path, prefix: name };

    if keys.optional("expert_count")?.unwrap_or(0) > 0 {
        return Err(ModelError::Unsupported { path: path.into(), what: format!("{name} with experts") });
    }
    let hidden_size = keys.required("embedding_length")?;
    let heads = keys.heads("attention.head_count")?.ok_or_else(|| keys.missing("attention.head_count"))?;
    let head_dim = match keys.optional("attention.key_length")? {
        Some(length) => length,
        None if heads == 0 || !hidden_size.is_multiple_of(heads) => {
            let problem = format!("{heads} heads do not divide the embedding length {hidden_size}");
            return Err(keys.error("attention.head_count", problem));
        }
        None => hidden_size / heads,
    };
    for (key, problem) in [
        ("attention.value_length", "differs from the key length, which is not supported"),
        ("rope.dimension_count", "rotates part of each head only, which is not supported"),
    ] {
        if keys.optional(key)?.is_some_and(|length| length != head_dim) {
            return Err(keys.error(key, problem));
        }
    }
    let vocab_size = vocab_size(&keys)?;
    let context = keys.required("context_length")?;
    let config = ModelConfig {
        architecture: family.architecture,
        vocab_size,
        hidden_size,
        intermediate_size: keys.required("feed_forward_length")?,
        layers: keys.required("block_count")?,
        heads,
        kv_heads: keys.heads("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        rms_norm_eps: keys.float("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6),
        rope: RopeConfig {
            theta: keys.float("rope.freq_base")?.unwrap_or(10_000.0),
            scaling: scaling(&keys, head_dim, context)?,
        },
        tie_word_embeddings: !has_tensor("output.weight"),
        qkv_bias: has_tensor("blk.0.attn_q.bias"),
        o_bias: has_tensor("blk.0.attn_output.bias"),
        mlp_bias: has_tensor("blk.0.ffn_gate.bias"),
        max_position_embeddings: context,
    };
    config.validate(path)?;
    Ok(config)
}

/// Rows of the embedding; where that is in a later part of a split file, the length of the token list.
fn vocab_size(keys: &Keys<'_>) -> Result<usize, ModelError> {
    if let Some(&[rows, _]) = keys.file.tensor("token_embd.weight").map(|info| info.shape.as_slice()) {
        return Ok(rows);
    }
    let tokens = keys.file.array("tokenizer.ggml.tokens").map_err(ModelError::gguf(keys.path))?;
    tokens
        .map(|tokens| tokens.len())
        .ok_or_else(|| ModelError::MissingTensor { name: "token_embd.weight".into(), path: keys.path.into() })
}

/// Of Llama 3.1: one factor a frequency, beside the weights.
const FREQUENCY_FACTORS: &str = "rope_freqs.weight";

/// Frequency factors, or what the metadata says.
fn scaling(keys: &Keys<'_>, head_dim: usize, context: usize) -> Result<RopeScaling, ModelError> {
    let declared = declared_scaling(keys, context)?;
    let Some(factors) = frequency_factors(keys, head_dim)? else { return Ok(declared) };
    if declared != RopeScaling::None {
        // llama.cpp applies both.
        let what = format!("`{FREQUENCY_FACTORS}` together with `{}`", keys.full("rope.scaling"));
        return Err(ModelError::Unsupported { path: keys.path.into(), what });
    }
    Ok(RopeScaling::PerFrequency { factors })
}

fn frequency_factors(keys: &Keys<'_>, head_dim: usize) -> Result<Option<Vec<f32>>, ModelError> {
    let name = FREQUENCY_FACTORS;
    let found = keys.parts.iter().find_map(|part| Some((part, part.tensor(name)?)));
    let Some((part, info)) = found else { return Ok(None) };
    let expected = vec![head_dim / 2];
    if info.shape != expected {
        return Err(ModelError::TensorShape { name: name.into(), expected, actual: info.shape.clone() });
    }
    let data = part.data(name).filter(|_| info.dtype() == Some(DType::F32));
    let data = data.ok_or_else(|| ModelError::TensorType {
        name: name.into(),
        found: ggml_type_name(info.ggml_type).into(),
        advice: "; it must be F32",
    })?;
    Ok(Some(floats(DType::F32, data)))
}

fn declared_scaling(keys: &Keys<'_>, context: usize) -> Result<RopeScaling, ModelError> {
    // As llama.cpp has it: the second is the key's old name, zero is no scaling, and a factor without a type is linear.
    let factor = match keys.float("rope.scaling.factor")? {
        Some(factor) => Some(factor),
        None => keys.float("rope.scale_linear")?,
    };
    let factor = factor.filter(|&factor| factor != 0.0).unwrap_or(1.0);
    match keys.string("rope.scaling.type")?.unwrap_or("linear") {
        "none" => Ok(RopeScaling::None),
        "linear" if factor == 1.0 => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor }),
        "yarn" => {
            // llama.cpp multiplies its own temperature by the factor the file gives.
            let temperature = if factor <= 1.0 { 1.0 } else { 0.1 * libm::logf(factor) + 1.0 };
            let given = match keys.float("rope.scaling.attn_factor")? {
                Some(given) => Some(given),
                None => keys.float("rope.scaling.yarn_attn_factor")?,
            };
            Ok(RopeScaling::Yarn {
                factor,
                beta_fast: keys.float("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: keys.float("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                attention_factor: given.map(|given| given * temperature),
                original_max_position: keys.optional("rope.scaling.original_context_length")?.unwrap_or(context),
                truncate: true,
            })
        }
        other => Err(ModelError::Unsupported { path: keys.path.into(), what: format!("rope scaling type `{other}`") }),
    }
}

/// Metadata keys below one architecture's name.
struct Keys<'a> {
    file: &'a Gguf,
    parts: &'a [Gguf],
    path: &'a Path,
    prefix: &'a str,
}

impl<'a> Keys<'a> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.prefix)
    }

    fn error(&self, key: &str, problem: impl Into<String>) -> ModelError {
        ModelError::gguf(self.path)(GgufError::Value { key: self.full(key), problem: problem.into() })
    }

    fn missing(&self, key: &str) -> ModelError {
        self.error(key, "is missing")
    }

    fn optional(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let value = self.file.unsigned(&self.full(key)).map_err(ModelError::gguf(self.path))?;
        value.map(|n| usize::try_from(n).map_err(|_| self.error(key, "is out of range"))).transpose()
    }

    fn required(&self, key: &str) -> Result<usize, ModelError> {
        self.optional(key)?.ok_or_else(|| self.missing(key))
    }

    fn float(&self, key: &str) -> Result<Option<f32>, ModelError> {
        let value = self.file.float(&self.full(key)).map_err(ModelError::gguf(self.path))?;
        Ok(value.map(|x| x as f32))
    }

    fn string(&self, key: &str) -> Result<Option<&'a str>, ModelError> {
        self.file.string(&self.full(key)).map_err(ModelError::gguf(self.path))
    }

    /// A head count: one number, or one a layer as long as they agree.
    fn heads(&self, key: &str) -> Result<Option<usize>, ModelError> {
        let Ok(Some(array)) = self.file.array(&self.full(key)) else { return self.optional(key) };
        let mut counts = array.integers().ok_or_else(|| self.error(key, "is not a list of integers"))?;
        let first = counts.next().ok_or_else(|| self.error(key, "is empty"))?;
        if counts.any(|count| count != first) {
            return Err(self.error(key, "differs from layer to layer, which is not supported"));
        }
        usize::try_from(first).map(Some).map_err(|_| self.error(key, "is negative"))
    }
}

#[cfg(test)]
mod tests;
