use std::borrow::Cow;
use std::collections::HashSet;
use std::path::Path;

use super::{Tensor, WeightSource};
use crate::ModelError;
use crate::gguf::{Gguf, ggml_type_name};

/// Tensors of a GGUF file (or the parts of a split one) under their canonical names.
pub(crate) struct GgufWeights<'a> {
    /// The file, or the parts in order.
    pub(crate) parts: &'a [Gguf],
    /// For messages.
    pub(crate) path: &'a Path,
    /// Elements of a head if query and key rows are stored for interleaved rotation and have to be put back.
    pub(crate) interleaved_head_dim: Option<usize>,
}

impl WeightSource for GgufWeights<'_> {
    fn tensor(&self, name: &str, _: &[usize]) -> Result<Tensor<'_>, ModelError> {
        let missing = || ModelError::MissingTensor { name: file_name(name), path: self.path.into() };
        let stored = file_name(name);
        let (part, info) =
            self.parts.iter().find_map(|part| Some((part, part.tensor(&stored)?))).ok_or_else(missing)?;
        let (Some(dtype), Some(data)) = (info.dtype(), part.data(&stored)) else {
            return Err(ModelError::TensorType {
                found: format!("{} (GGML type {})", ggml_type_name(info.ggml_type), info.ggml_type),
                name: stored,
                advice: "; take another file of the model: those of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, \
                         Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL and IQ4_XS are read",
            });
        };
        let query_or_key = name.contains(".q_proj.") || name.contains(".k_proj.");
        let rows = info.shape.first().copied().unwrap_or(0);
        let file_bytes = data.len();
        let data = match self.interleaved_head_dim {
            Some(head_dim) if query_or_key && rows > 0 && rows.is_multiple_of(head_dim) => {
                Cow::Owned(half_split_rows(data, data.len() / rows, head_dim))
            }
            _ => Cow::Borrowed(data),
        };
        Ok(Tensor { dtype, shape: info.shape.clone(), data, file_bytes })
    }

    fn total_bytes(&self) -> u64 {
        self.parts.iter().flat_map(Gguf::tensors).map(|(_, info)| info.bytes() as u64).sum()
    }

    fn unused(&self, used: &HashSet<String>) -> Result<Vec<String>, ModelError> {
        let used: HashSet<_> = used.iter().map(|name| file_name(name)).collect();
        let names = self.parts.iter().flat_map(Gguf::tensors).map(|(name, _)| name);
        // Read with the configuration.
        let unused = names.filter(|&name| !used.contains(name) && name != "rope_freqs.weight");
        let unused: Vec<_> = unused.map(str::to_owned).collect();
        // No field announces a bias: where there is one, it is added.
        match unused.iter().filter(|name| name.starts_with("blk.") && name.ends_with(".bias")).min() {
            Some(name) => Err(ModelError::Unsupported { path: self.path.into(), what: format!("tensor `{name}`") }),
            None => Ok(unused),
        }
    }
}

/// What GGUF calls the tensor (`gguf-py/gguf/tensor_mapping.py` of llama.cpp).
fn file_name(canonical: &str) -> String {
    let rest = match canonical {
        "model.embed_tokens.weight" => return "token_embd.weight".into(),
        "model.norm.weight" => return "output_norm.weight".into(),
        "lm_head.weight" => return "output.weight".into(),
        _ => canonical.strip_prefix("model.layers."),
    };
    let parsed = rest.and_then(|rest| rest.split_once('.')).and_then(|(layer, rest)| {
        let (module, kind) = rest.rsplit_once('.')?;
        let module = match module {
            "input_layernorm" => "attn_norm",
            "self_attn.q_proj" => "attn_q",
            "self_attn.k_proj" => "attn_k",
            "self_attn.v_proj" => "attn_v",
            "self_attn.o_proj" => "attn_output",
            "self_attn.q_norm" => "attn_q_norm",
            "self_attn.k_norm" => "attn_k_norm",
            "post_attention_layernorm" => "ffn_norm",
            "mlp.gate_proj" => "ffn_gate",
            "mlp.up_proj" => "ffn_up",
            "mlp.down_proj" => "ffn_down",
            _ => return None,
        };
        Some(format!("blk.{layer}.{module}.{kind}"))
    });
    parsed.unwrap_or_else(|| canonical.into())
}

/// Undoes `LlamaModel.permute` of llama.cpp's `convert_hf_to_gguf.py`: it moves row `s·d/2 + j` of each head (`s` 0 or
/// 1) to row `2j + s`. Whole rows move, so quantised ones stay as they are.
fn half_split_rows(data: &[u8], row_bytes: usize, head_dim: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(data.len());
    for head in data.chunks_exact(row_bytes * head_dim) {
        for s in 0..2 {
            for j in 0..head_dim / 2 {
                let row = 2 * j + s;
                out.extend_from_slice(&head[row * row_bytes..(row + 1) * row_bytes]);
            }
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::GgufWriter;

    #[test]
    fn rows_come_back_in_the_order_they_had_before_conversion() {
        // Two heads of 6 rows, two bytes a row; the converter's permutation applied by hand.
        let original: Vec<u8> = (0..12).flat_map(|row| [row, 100 + row]).collect();
        let mut converted = vec![0; 24];
        for head in 0..2 {
            for s in 0..2 {
                for j in 0..3 {
                    let (from, to) = (head * 6 + s * 3 + j, head * 6 + 2 * j + s);
                    converted[2 * to..2 * to + 2].copy_from_slice(&original[2 * from..2 * from + 2]);
                }
            }
        }
        assert_ne!(converted, original);
        assert_eq!(half_split_rows(&converted, 2, 6), original);
    }

    #[test]
    fn canonical_names_are_found_under_the_files_names() {
        let bytes = GgufWriter::default()
            .tensor("blk.3.attn_q.weight", &[4, 32], 8, (0..136).collect())
            .tensor("blk.3.ffn_norm.weight", &[1], 0, vec![0; 4])
            .tensor("blk.3.attn_v.weight", &[256], 16, vec![0; 66])
            .tensor("surplus", &[1], 0, vec![0; 4])
            .build();
        let parts = [Gguf::from_bytes(bytes).unwrap()];
        let source = GgufWeights { parts: &parts, path: Path::new("m.gguf"), interleaved_head_dim: Some(4) };

        let q = source.tensor("model.layers.3.self_attn.q_proj.weight", &[]).unwrap();
        assert_eq!(q.shape, [4, 32]);
        assert_eq!([0, 34, 68, 102].map(|i| q.data[i]), [0, 68, 34, 102]);

        let error = source.tensor("model.layers.3.self_attn.v_proj.weight", &[]).err().unwrap().to_string();
        assert!(error.contains("`blk.3.attn_v.weight` has type IQ2_XXS (GGML type 16)"), "{error}");
        assert!(error.contains("take another file of the model"), "{error}");
        let error = source.tensor("lm_head.weight", &[]).err().unwrap().to_string();
        assert_eq!(error, "tensor `output.weight` is missing from m.gguf");

        let used = ["model.layers.3.self_attn.q_proj.weight", "model.layers.3.self_attn.v_proj.weight"]
            .map(String::from)
            .into_iter()
            .collect();
        let mut unused = source.unused(&used).unwrap();
        unused.sort();
        assert_eq!(unused, ["blk.3.ffn_norm.weight", "surplus"]);
    }
}
