//! The KV cache: pages of all layers.

use memmap2::{MmapOptions, MmapRaw};

use crate::{KernelError, KvLayout};

/// Keys and values of all layers. A page of one layer and head holds its keys as `[head_dim][token]`, because score
/// lanes are tokens, then its values as `[token][head_dim]`. Memory is taken from the system as pages are first written.
pub struct KvCache {
    memory: MmapRaw,
    layout: KvLayout,
}

impl KvCache {
    pub(crate) fn new(layout: KvLayout) -> Result<Self, KernelError> {
        let bytes = layout.total_bytes();
        let map = MmapOptions::new().len(bytes.max(1)).map_anon();
        let map = map.map_err(|source| KernelError::KvMemory { bytes, source })?;
        #[cfg(target_os = "linux")]
        if bytes >= 1 << 22 {
            // Fewer misses of the translation buffer; a system that cannot is no worse off.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Ok(Self { memory: MmapRaw::from(map), layout })
    }

    /// Shape of the cache.
    pub fn layout(&self) -> &KvLayout {
        &self.layout
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
            let keys = self.memory.as_mut_ptr().add(start);
            (keys, keys.add(half))
        }
    }
}
