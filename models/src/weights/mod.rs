//! Tensors by the names Hugging Face's checkpoints give them, wherever they come from.

mod dummy;
mod fp8;
mod gguf;
mod loader;
mod safetensors;

pub(crate) use dummy::DummyWeights;
pub(crate) use gguf::GgufWeights;
pub use loader::LoadReport;
pub(crate) use loader::Loader;
pub(crate) use safetensors::{INDEX_FILE, SINGLE_FILE, SafetensorsFiles, shards};

use std::borrow::Cow;
use std::collections::HashSet;

use engine_kernels::{DType, KvDType};
use half::{bf16, f16};

use crate::ModelError;

/// A tensor as it stands in the file (borrowed), or rearranged or made up (owned).
pub(crate) struct Tensor<'a> {
    pub(crate) dtype: DType,
    /// Slowest dimension first: `[out, in]`.
    pub(crate) shape: Vec<usize>,
    pub(crate) data: Cow<'a, [u8]>,
    /// Bytes it takes in the files.
    pub(crate) file_bytes: usize,
}

/// Where a model's tensors come from.
pub(crate) trait WeightSource {
    /// The tensor of a canonical name. `shape` is what the caller will insist on; a source of made-up weights makes it.
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError>;

    /// Bytes of all tensors, for progress.
    fn total_bytes(&self) -> u64;

    /// Tensors in the files that `used` (canonical names) leaves over, as the files name them; an error if the model is
    /// another without one of them.
    fn unused(&self, used: &HashSet<String>) -> Result<Vec<String>, ModelError>;
}

/// Element type of the KV cache that suits weights with these bytes of each type: the type of most of them if it is f32
/// or bf16, else f16, as llama.cpp has it. Weights of eight-bit floats do not count: what was not quantised beside them
/// shows what the model was before.
pub(crate) fn kv_dtype(bytes_by_type: impl Iterator<Item = (DType, usize)>) -> KvDType {
    let mut f32_bytes = 0;
    let mut bf16_bytes = 0;
    let mut other_bytes = 0;
    for (dtype, bytes) in bytes_by_type {
        *match dtype {
            DType::F8 => continue,
            DType::F32 => &mut f32_bytes,
            DType::BF16 => &mut bf16_bytes,
            _ => &mut other_bytes,
        } += bytes;
    }
    if f32_bytes > bf16_bytes.max(other_bytes) {
        KvDType::F32
    } else if bf16_bytes > other_bytes {
        KvDType::BF16
    } else {
        KvDType::F16
    }
}

/// Little-endian floats of type F32, F16 or BF16, widened; empty for other types.
pub(crate) fn floats(dtype: DType, data: &[u8]) -> Vec<f32> {
    match dtype {
        DType::F32 => data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b)).collect(),
        DType::F16 => data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).to_f32()).collect(),
        DType::BF16 => data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).to_f32()).collect(),
        _ => Vec::new(),
    }
}
