//! The KV cache: pages of all layers.

use crate::{KernelError, KvLayout, KvRegion};

/// Bytes of a cache line.
const LINE: usize = 64;

/// Keys and values of all layers. A page of one layer and head holds its keys as `[head_dim][token]`, because score
/// lanes are tokens, then its values as `[token][head_dim]`. Memory is taken from the system as pages are first
/// written.
pub struct KvCache {
    region: KvRegion,
    layout: KvLayout,
}

impl KvCache {
    /// Reserves the pages, in memory that other processes may map if `shared`.
    pub(crate) fn new(layout: KvLayout, shared: bool) -> Result<Self, KernelError> {
        let shape = layout.region_shape();
        #[cfg(target_os = "linux")]
        let region = if shared { KvRegion::shared(shape) } else { KvRegion::private(shape) };
        #[cfg(not(target_os = "linux"))]
        let region = {
            let _ = shared;
            KvRegion::private(shape)
        };
        let region = region.map_err(|source| KernelError::KvMemory { bytes: layout.total_bytes(), source })?;
        Ok(Self { region, layout })
    }

    /// Shape of the cache.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// How many tokens of a page, counted from its first, have their keys on the same cache lines, where no others have
    /// any. In pages of 16 tokens in f16 it is all of them: a line holds two elements of each.
    pub(crate) fn tokens_a_line(&self) -> usize {
        let KvLayout { block_size, dtype, .. } = self.layout;
        if (block_size * dtype.bytes()).is_multiple_of(LINE) { LINE / dtype.bytes() } else { block_size }
    }

    /// The memory of the pages, for whoever moves them.
    pub fn region(&self) -> &KvRegion {
        &self.region
    }

    /// Where the keys and the values of one page of one head start. Both are `block_size × head_dim` elements; who
    /// writes to them sees to it that nobody else uses the same elements.
    #[inline(always)]
    pub(crate) fn page(&self, layer: usize, page: usize, head: usize) -> (*mut u8, *mut u8) {
        let KvLayout { layers, kv_heads, head_dim, block_size, blocks, dtype } = self.layout;
        assert!(layer < layers && page < blocks && head < kv_heads);
        let half = head_dim * block_size * dtype.bytes();
        let start = ((layer * blocks + page) * kv_heads + head) * 2 * half;
        // SAFETY: within the mapping by the assertion.
        unsafe {
            let keys = self.region.base().add(start);
            (keys, keys.add(half))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::KvDType;

    #[test]
    fn tokens_share_lines_within_a_page_at_most() {
        for (block_size, dtype, tokens) in [
            (16, KvDType::F16, 16),
            (32, KvDType::BF16, 32),
            (64, KvDType::F16, 32),
            (48, KvDType::F16, 48),
            (16, KvDType::F32, 16),
            (64, KvDType::F32, 16),
            (16, KvDType::F8, 16),
            (128, KvDType::F8, 64),
        ] {
            let layout = KvLayout { layers: 1, kv_heads: 1, head_dim: 64, block_size, blocks: 1, dtype };
            assert_eq!(KvCache::new(layout, false).unwrap().tokens_a_line(), tokens, "{layout:?}");
        }
    }
}
