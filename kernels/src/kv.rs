use float8::F8E4M3;
use half::{bf16, f16};

use crate::RegionShape;

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvDType {
    /// Single precision: for f32 models and oracles.
    F32,
    /// Half precision: what quantised models use, as in llama.cpp.
    F16,
    /// bfloat16: for bf16 models.
    BF16,
    /// Eight bits, four of them the exponent and three the mantissa (E4M3 of Micikevicius et al. 2022): half the memory
    /// and half the bytes of a handoff, for answers that differ a little. What is larger than 448 becomes 448; there is
    /// no scale, as by default in vLLM.
    F8,
}

impl KvDType {
    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::F8 => 1,
        }
    }

    /// The nearest value this type holds: what reading back a stored `x` gives.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::BF16 => bf16::from_f32(x).to_f32(),
            Self::F8 => F8E4M3::from_f32(x).to_f32(),
        }
    }
}

/// Shape of the KV cache. Each layer is one range of one region, and in it `[page][kv_head]` each with its keys, then
/// its values: a page of one layer is contiguous, and the heads of a tensor-parallel rank are a contiguous slice of it.
///
/// How the `block_size × head_dim` keys (or values) of one page and head are ordered is the backend's choice, because
/// that is what its attention kernel is built around; it is part of what workers must agree on before they exchange
/// pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KvLayout {
    /// Layers of the model.
    pub layers: usize,
    /// Key/value heads of a layer.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
    /// Tokens a page holds.
    pub block_size: usize,
    /// Pages.
    pub blocks: usize,
    /// Element type.
    pub dtype: KvDType,
}

/// Sizes that would overflow saturate: nonsense is more memory than there is, never less than will be used.
impl KvLayout {
    /// Bytes of one page of one layer, keys and values.
    pub const fn block_bytes_per_layer(&self) -> usize {
        let elements = self.kv_heads.saturating_mul(self.head_dim).saturating_mul(self.block_size);
        elements.saturating_mul(2 * self.dtype.bytes())
    }

    /// Bytes of one page over all layers.
    pub const fn block_bytes(&self) -> usize {
        self.layers.saturating_mul(self.block_bytes_per_layer())
    }

    /// Bytes of the whole cache.
    pub const fn total_bytes(&self) -> usize {
        self.blocks.saturating_mul(self.block_bytes())
    }

    /// The pages as plain memory.
    pub const fn region_shape(&self) -> RegionShape {
        RegionShape { layers: self.layers, pages: self.blocks, page_bytes: self.block_bytes_per_layer() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_beyond_all_memory_do_not_wrap_around() {
        let layout = KvLayout { layers: 30, kv_heads: 3, head_dim: 64, block_size: 16, blocks: 7, dtype: KvDType::F16 };
        assert_eq!(layout.total_bytes(), 30 * 7 * 2 * 3 * 64 * 16 * 2);
        let absurd = KvLayout { blocks: usize::MAX / 1000, ..layout };
        assert_eq!(absurd.total_bytes(), usize::MAX);
        let absurd = KvLayout { block_size: usize::MAX / 2, ..layout };
        assert_eq!(absurd.block_bytes(), usize::MAX);
    }
}
