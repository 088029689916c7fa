//! `config.json` of Hugging Face directories.

use super::json::Fields;
use super::{ModelConfig, RopeConfig, RopeScaling};
use crate::ModelError;
use crate::family::{FAMILIES, Family};

/// `sliding_window` where nothing is said, in all families that have one; `null` is none.
const DEFAULT_WINDOW: usize = 4096;
/// The type of layers whose attention slides over a window.
const SLIDING: &str = "sliding_attention";

/// Reads a `config.json`.
pub(crate) fn parse(fields: &Fields<'_>) -> Result<ModelConfig, ModelError> {
    let family = family(fields)?;
    refuse_unsupported(fields)?;
    let hidden_size = fields.required_size("hidden_size")?;
    let heads = fields.required_size("num_attention_heads")?;
    let head_dim = match fields.size("head_dim")?.or(family.default_head_dim) {
        Some(head_dim) => head_dim,
        None if heads == 0 => return Err(fields.error("num_attention_heads", "is 0")),
        None if !hidden_size.is_multiple_of(heads) => {
            let problem = format!("is missing, and hidden_size {hidden_size} is not a multiple of {heads} heads");
            return Err(fields.error("head_dim", problem));
        }
        None => hidden_size / heads,
    };
    let max_position_embeddings = fields.required_size("max_position_embeddings")?;
    let rope = rope(fields, max_position_embeddings)?;
    let mut config = ModelConfig {
        architecture: family.architecture,
        vocab_size: fields.required_size("vocab_size")?,
        hidden_size,
        intermediate_size: fields.required_size("intermediate_size")?,
        layers: fields.required_size("num_hidden_layers")?,
        heads,
        kv_heads: fields.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim,
        rms_norm_eps: fields.float("rms_norm_eps")?.unwrap_or(1e-6),
        max_position_embeddings: max_position_embeddings.max(rope.scaling.extended_context()),
        rope,
        tie_word_embeddings: fields.boolean("tie_word_embeddings")?.unwrap_or(false),
        qkv_bias: false,
        o_bias: false,
        mlp_bias: false,
    };
    if has_windows(fields)? {
        end_at_window(fields, &mut config)?;
    }
    (family.from_hf)(fields, &mut config)?;
    config.validate(fields.path())?;
    Ok(config)
}

/// The family `architectures` names, or `model_type` where there is none.
fn family(fields: &Fields<'_>) -> Result<&'static Family, ModelError> {
    let class = match fields.get("architectures") {
        Some(list) => {
            let first = list.as_array().and_then(|list| list.first()).and_then(|name| name.as_str());
            Some(first.ok_or_else(|| fields.error("architectures", "is not a list of names"))?)
        }
        None => None,
    };
    let model_type = fields.string("model_type")?;
    let matches = |family: &Family| match (class, model_type) {
        (Some(class), _) => family.class == class,
        (None, model_type) => Some(family.model_type) == model_type,
    };
    FAMILIES.into_iter().find(|family| matches(family)).ok_or_else(|| ModelError::Architecture {
        path: fields.path().into(),
        name: class.or(model_type).unwrap_or("(none declared)").into(),
        supported: FAMILIES.map(|family| family.class).join(", "),
    })
}

/// Refuses, by name, what would change the arithmetic and is not done here.
fn refuse_unsupported(fields: &Fields<'_>) -> Result<(), ModelError> {
    let refuse = |what: String| Err(ModelError::Unsupported { path: fields.path().into(), what });
    if let Some(activation) = fields.string("hidden_act")?.filter(|name| *name != "silu") {
        return refuse(format!("hidden_act `{activation}`"));
    }
    if let Some(factor) = fields.float("partial_rotary_factor")?.filter(|&factor| factor != 1.0) {
        return refuse(format!("partial_rotary_factor {factor}"));
    }
    if let Some(other) = layer_types(fields).find(|kind| !["full_attention", SLIDING].contains(kind)) {
        return refuse(format!("layer type `{other}`"));
    }
    Ok(())
}

fn layer_types<'a>(fields: &Fields<'a>) -> impl Iterator<Item = &'a str> {
    let types = fields.get("layer_types").and_then(|types| types.as_array());
    types.into_iter().flatten().filter_map(|kind| kind.as_str())
}

/// Whether attention slides over windows in some layers, as Qwen's families say it. Which layers those are is left
/// alone: `max_window_layers` is read as the first of them and as their number, and no window slides in a context that
/// ends where it would begin to.
fn has_windows(fields: &Fields<'_>) -> Result<bool, ModelError> {
    Ok(fields.boolean("use_sliding_window")? == Some(true) || layer_types(fields).any(|kind| kind == SLIDING))
}

/// Has the context end at the size of a window that slides: a token sees that many, itself among them (transformers'
/// `sliding_window_overlay`; vLLM too), so the last one of a context of that length still sees all.
pub(crate) fn end_at_window(fields: &Fields<'_>, config: &mut ModelConfig) -> Result<(), ModelError> {
    let name = "sliding_window";
    let window = match fields.size(name)? {
        Some(0) => return Err(fields.error(name, "is 0")),
        Some(window) => window,
        None if fields.names().any(|field| field == name) => return Ok(()),
        None => DEFAULT_WINDOW,
    };
    if window < config.max_position_embeddings {
        let (path, positions) = (fields.path().display(), config.max_position_embeddings);
        tracing::warn!(%path, window, positions, "attention slides over a window; contexts end at its size here");
        config.max_position_embeddings = window;
    }
    Ok(())
}

/// Rotary parameters: `rope_parameters` (transformers 5), or `rope_theta` beside `rope_scaling` (before).
fn rope(fields: &Fields<'_>, max_positions: usize) -> Result<RopeConfig, ModelError> {
    let parameters = match fields.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => fields.object("rope_scaling")?,
    };
    let nested = parameters.map(|parameters| parameters.float("rope_theta")).transpose()?.flatten();
    let theta = match nested {
        Some(theta) => theta,
        None => fields.float("rope_theta")?.unwrap_or(10_000.0),
    };
    let scaling = match parameters {
        Some(parameters) => scaling(fields, &parameters, max_positions)?,
        None => RopeScaling::None,
    };
    Ok(RopeConfig { theta, scaling })
}

fn scaling(fields: &Fields<'_>, rope: &Fields<'_>, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let kind = match rope.string("rope_type")? {
        Some(kind) => kind,
        None => rope.string("type")?.unwrap_or("default"),
    };
    // Where the model itself states the length it was trained on, that counts; without any, its context length does.
    let original_max_position = || {
        let name = "original_max_position_embeddings";
        Ok::<_, ModelError>(fields.size(name)?.or(rope.size(name)?).unwrap_or(max_positions))
    };
    let scaling = match kind {
        "default" => RopeScaling::None,
        "linear" => RopeScaling::Linear { factor: rope.required_float("factor")? },
        // Stretches what is longer than `max_position_embeddings`, and no context here is.
        "dynamic" => rope.required_float("factor").map(|_| RopeScaling::None)?,
        "llama3" => RopeScaling::Llama3 {
            factor: rope.required_float("factor")?,
            low_freq_factor: rope.required_float("low_freq_factor")?,
            high_freq_factor: rope.required_float("high_freq_factor")?,
            original_max_position: original_max_position()?,
        },
        "yarn" => yarn(rope, original_max_position()?, max_positions)?,
        other => {
            let what = format!("rope type `{other}`");
            return Err(ModelError::Unsupported { path: fields.path().into(), what });
        }
    };
    let ignored = ignored_keys(rope, kind);
    if !ignored.is_empty() {
        tracing::warn!(path = %fields.path().display(), kind, ?ignored, "keys beside those of this rope type; ignored");
    }
    Ok(scaling)
}

/// Keys that a rope type has no use for. transformers ignores and names them too.
fn ignored_keys<'a>(rope: &Fields<'a>, kind: &str) -> Vec<&'a str> {
    let own: &[&str] = match kind {
        "linear" => &["factor"],
        "dynamic" => &["factor", "original_max_position_embeddings"],
        "llama3" => &["factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"],
        "yarn" => &[
            "factor",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "original_max_position_embeddings",
            "truncate",
        ],
        _ => &[],
    };
    let known = |name: &str| own.contains(&name) || ["rope_type", "type", "rope_theta"].contains(&name);
    rope.names().filter(|name| !known(name)).collect()
}

fn yarn(rope: &Fields<'_>, original_max_position: usize, max_positions: usize) -> Result<RopeScaling, ModelError> {
    let factor = rope.float("factor")?.unwrap_or(max_positions as f32 / original_max_position as f32);
    // DeepSeek's form: the quotient of two temperatures. A zero counts as absent, as in transformers.
    let temperature = |mscale: f32| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * libm::logf(factor) + 1.0 };
    let mscale = rope.float("mscale")?.filter(|&x| x != 0.0);
    let mscale_all_dim = rope.float("mscale_all_dim")?.filter(|&x| x != 0.0);
    let attention_factor = match rope.float("attention_factor")? {
        Some(given) => Some(given),
        None => mscale.zip(mscale_all_dim).map(|(own, all)| temperature(own) / temperature(all)),
    };
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: rope.float("beta_fast")?.filter(|&x| x != 0.0).unwrap_or(32.0),
        beta_slow: rope.float("beta_slow")?.filter(|&x| x != 0.0).unwrap_or(1.0),
        attention_factor,
        original_max_position,
        truncate: rope.boolean("truncate")?.unwrap_or(true),
    })
}

#[cfg(test)]
mod tests;
