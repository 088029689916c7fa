//! `quantization_config` of `config.json`: which quantised weights are read, and which are refused.
//!
//! Those of eight-bit floats are (E4M3, with scales), as three families of tools write them: `fp8` (transformers and
//! DeepSeek with a scale for each block of 128 by 128, AutoFP8 with one for each matrix), `compressed-tensors`
//! (llm-compressor, a scale for each matrix, row or block), and `modelopt` (NVIDIA's Model Optimizer, one for each
//! matrix or row). What such a file says of activations is left alone: they are not quantised here.

use serde_json::Value;

use super::json::Fields;
use crate::ModelError;

/// Weights of eight-bit floats. Which tensors are such, their types say, and how far a scale reaches, the scales'
/// shapes.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Fp8 {
    /// Rows and columns that share a scale where scales come in blocks.
    pub(crate) block: Option<[usize; 2]>,
    /// Modules that have other weights: for those who make weights up.
    pub(crate) except: Vec<String>,
}

/// What is supported, for messages.
const SUPPORTED: &str = "supported are quant_method `fp8`, `compressed-tensors` with weights of 8 bits, `float`, and \
    `modelopt` with quant_algo `FP8` or `FP8_PER_CHANNEL_PER_TOKEN`; else use bf16, f16 or f32 weights, or a GGUF file";
/// Columns of a block have to be a multiple of these ([`engine_kernels::DType::F8`]).
const BLOCK_COLUMNS: usize = engine_kernels::DType::F8.block_len();

impl Fp8 {
    /// What `config.json` says of its weights' quantisation, if anything. Errors name what is not supported.
    pub(crate) fn parse(fields: &Fields<'_>) -> Result<Option<Self>, ModelError> {
        let Some(quantization) = fields.object("quantization_config")? else { return Ok(None) };
        let this = match quantization.string("quant_method")? {
            Some("fp8") => Self::transformers(&quantization)?,
            Some("compressed-tensors") => Self::compressed_tensors(&quantization)?,
            Some("modelopt") => Self::modelopt(&quantization)?,
            other => return Err(refuse(fields, format!("quant_method `{}`", other.unwrap_or("(none)")))),
        };
        match this.block {
            Some([rows, columns]) if rows == 0 || columns == 0 || !columns.is_multiple_of(BLOCK_COLUMNS) => Err(
                refuse(fields, format!("blocks of {rows} by {columns}, not of a multiple of {BLOCK_COLUMNS} columns")),
            ),
            _ => Ok(Some(this)),
        }
    }

    fn transformers(quantization: &Fields<'_>) -> Result<Self, ModelError> {
        if let Some(other) = quantization.string("fmt")?.filter(|fmt| *fmt != "e4m3") {
            return Err(refuse(quantization, format!("fmt `{other}`")));
        }
        // transformers' name, and vLLM's.
        let except = ["modules_to_not_convert", "ignored_layers"];
        let except = except.into_iter().flat_map(|field| names(quantization.get(field))).collect();
        Ok(Self { block: block(quantization, "weight_block_size")?, except })
    }

    fn compressed_tensors(quantization: &Fields<'_>) -> Result<Self, ModelError> {
        let check_format = |fields: &Fields<'_>| match fields.string("format")? {
            // Both have quants and scales as they are; the other formats pack them.
            None | Some("float-quantized" | "naive-quantized") => Ok(()),
            Some(other) => Err(refuse(quantization, format!("format `{other}`"))),
        };
        check_format(quantization)?;
        if let Some(sparsity) = quantization.object("sparsity_config")?
            && let Some(format) = sparsity.string("format")?.filter(|format| *format != "dense")
        {
            return Err(refuse(quantization, format!("sparsity_config of format `{format}`")));
        }
        if quantization.object("transform_config")?.is_some_and(|transform| transform.get("config_groups").is_some()) {
            return Err(refuse(quantization, "transform_config".into()));
        }
        let Some(groups) = quantization.object("config_groups")? else {
            return Err(quantization.error("config_groups", "is missing"));
        };
        let mut blocks = Vec::new();
        for name in groups.names() {
            let group = groups.object(name)?.ok_or_else(|| groups.error(name, "is null"))?;
            check_format(&group)?;
            let weights = group.object("weights")?.ok_or_else(|| group.error("weights", "is missing"))?;
            let (bits, kind) = (weights.required_size("num_bits")?, weights.string("type")?.unwrap_or("int"));
            if bits != 8 || kind != "float" {
                return Err(refuse(quantization, format!("weights of {bits} bits, `{kind}`")));
            }
            if weights.boolean("symmetric")? == Some(false) {
                return Err(refuse(quantization, "weights that are not symmetric".into()));
            }
            blocks.push(match weights.string("strategy")? {
                None | Some("tensor" | "channel") => None,
                Some("block") => {
                    let block = block(&weights, "block_structure")?;
                    Some(block.ok_or_else(|| weights.error("block_structure", "is missing"))?)
                }
                Some(other) => return Err(refuse(quantization, format!("weights by strategy `{other}`"))),
            });
        }
        let Some(&first) = blocks.first() else { return Err(quantization.error("config_groups", "is empty")) };
        if blocks.iter().any(|block| *block != first) {
            return Err(refuse(quantization, "config_groups with blocks and without".into()));
        }
        Ok(Self { block: first, except: names(quantization.get("ignore")).collect() })
    }

    fn modelopt(quantization: &Fields<'_>) -> Result<Self, ModelError> {
        match quantization.string("quant_algo")? {
            Some("FP8" | "FP8_PER_CHANNEL_PER_TOKEN") => {
                Ok(Self { block: None, except: names(quantization.get("ignore")).collect() })
            }
            other => Err(refuse(quantization, format!("quant_algo `{}`", other.unwrap_or("(none)")))),
        }
    }

    /// Whether the projection `name` of a layer (`model.layers.0.mlp.up_proj.weight`) is quantised. Patterns (`re:`) in
    /// the list of exceptions are left alone.
    pub(crate) fn quantizes(&self, name: &str) -> bool {
        let Some(module) = name.strip_suffix(".weight").filter(|module| module.ends_with("_proj")) else {
            return false;
        };
        let is_in = |outer: &String| {
            module.strip_prefix(outer.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
        };
        !self.except.iter().any(is_in)
    }
}

fn refuse(fields: &Fields<'_>, what: String) -> ModelError {
    ModelError::Quantization { path: fields.path().into(), what, supported: SUPPORTED }
}

fn names(list: Option<&Value>) -> impl Iterator<Item = String> {
    list.and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str).map(str::to_owned)
}

/// A pair of sizes, if the field is there.
fn block(fields: &Fields<'_>, field: &str) -> Result<Option<[usize; 2]>, ModelError> {
    let Some(value) = fields.get(field) else { return Ok(None) };
    let sizes: Option<Vec<usize>> = value
        .as_array()
        .map(|list| list.iter().map(|size| size.as_u64().and_then(|size| usize::try_from(size).ok())).collect())
        .unwrap_or_default();
    match sizes.as_deref() {
        Some(&[rows, columns]) => Ok(Some([rows, columns])),
        _ => Err(fields.error(field, "is not a pair of sizes")),
    }
}

#[cfg(test)]
mod tests;
