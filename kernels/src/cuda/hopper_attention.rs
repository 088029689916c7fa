//! Attention of prompts by wgmma (`kernels/cuda/hopper_attention.cu`), for the caches it takes: its launch.

use super::driver::{Address, Arg, Boxes, Driver, Launch};
use super::stream::Stream;
use crate::{KvDType, KvLayout};

/// Rows of a tile, and tiles of keys or values that are in shared memory at a time.
const ROWS: usize = 128;
const SLOTS: usize = 5;
const THREADS: usize = 384;
/// A box: so many columns, and bytes of their rows.
const BOX_COLS: usize = 64;
const BOX_ROW: usize = 128;
/// What it may take until the first tile can begin.
const ALIGNMENT_BYTES: usize = 1024 - 16;

/// The kernel for one kind of caches.
pub(super) struct HopperAttention {
    kernel: &'static str,
    /// Keys of a tile.
    keys: usize,
}

impl HopperAttention {
    /// That for such a cache, if there is one: of those that there are kernels by mma for.
    pub(super) fn of(layout: &KvLayout) -> Option<Self> {
        let (kernels, keys) = match layout.head_dim {
            64 => (["hopper_attention_64_f16", "hopper_attention_64_bf16"], 128),
            96 => (["hopper_attention_96_f16", "hopper_attention_96_bf16"], 128),
            128 => (["hopper_attention_128_f16", "hopper_attention_128_bf16"], 128),
            256 => (["hopper_attention_256_f16", "hopper_attention_256_bf16"], 64),
            _ => return None,
        };
        let kernel = match layout.dtype {
            KvDType::F16 => kernels[0],
            KvDType::BF16 => kernels[1],
            KvDType::F32 | KvDType::F8 => return None,
        };
        // Eight rows of a box are where a swizzle begins anew.
        (layout.block_size.is_power_of_two() && layout.block_size >= 8).then_some(Self { kernel, keys })
    }

    /// Enqueues it, for a layer whose pages start there.
    pub(super) fn enqueue<D: Driver>(
        &self,
        stream: &Stream<D>,
        pages: Address,
        layout: &KvLayout,
        grid: [usize; 3],
        args: &[Arg],
    ) {
        let KvLayout { kv_heads, head_dim, block_size, blocks, .. } = *layout;
        // One matrix of all tokens' keys and values, a page's part of a tile a box.
        let boxes = Boxes {
            start: pages,
            rows: blocks * kv_heads * 2 * block_size,
            cols: head_dim,
            row_bytes: head_dim * size_of::<u16>(),
            box_rows: block_size.min(self.keys),
        };
        let Some(map) = stream.attempt(|driver| driver.tensor_map(&boxes)) else { return };
        let shared = (ROWS + SLOTS * self.keys) * head_dim.div_ceil(BOX_COLS) * BOX_ROW + ALIGNMENT_BYTES;
        stream.enqueue(&Launch { kernel: self.kernel, grid, block: THREADS, shared, maps: &[map], args });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn caches_of_sixteen_bits_in_pages_of_eights_go_by_wgmma() {
        let layout = |head_dim, block_size, dtype| {
            let layout = KvLayout { layers: 1, kv_heads: 1, head_dim, block_size, blocks: 1, dtype };
            HopperAttention::of(&layout).map(|hopper| hopper.kernel)
        };
        assert_eq!(layout(128, 64, KvDType::BF16), Some("hopper_attention_128_bf16"));
        assert_eq!(layout(64, 8, KvDType::F16), Some("hopper_attention_64_f16"));
        for (head_dim, block_size, dtype) in
            [(128, 64, KvDType::F8), (128, 64, KvDType::F32), (80, 64, KvDType::F16), (128, 4, KvDType::F16)]
        {
            assert_eq!(layout(head_dim, block_size, dtype), None, "{head_dim}, {block_size}, {dtype:?}");
        }
    }
}
