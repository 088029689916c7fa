/// Rotary position embedding (Su et al. 2021, RoFormer) as a table of angles, in the half-split convention of Hugging
/// Face's Llama: element `i` of a head is rotated together with element `i + rotary_dim/2`. Weights stored for
/// interleaved rotation (GGUF's Llama) are permuted when they are loaded.
#[derive(Debug, Clone)]
pub struct RopeTable {
    pairs: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// `inv_freq` has one angular frequency a pair (radians a position); `scale` multiplies cos and sin (YaRN's
    /// attention factor, 1 otherwise). Angles are computed in f32 as transformers does; sine and cosine are the crate
    /// `libm`'s, compiled in, so that the table has the same bits on every machine.
    pub fn new(inv_freq: &[f32], scale: f32, max_positions: usize) -> Self {
        let mut cos = Vec::with_capacity(max_positions * inv_freq.len());
        let mut sin = Vec::with_capacity(max_positions * inv_freq.len());
        for position in 0..max_positions {
            for &frequency in inv_freq {
                let angle = position as f32 * frequency;
                cos.push(libm::cosf(angle) * scale);
                sin.push(libm::sinf(angle) * scale);
            }
        }
        Self { pairs: inv_freq.len(), cos, sin }
    }

    /// Rotated pairs of a head: half the rotary dimension.
    pub fn pairs(&self) -> usize {
        self.pairs
    }

    /// Positions the table covers.
    pub fn positions(&self) -> usize {
        self.cos.len() / self.pairs
    }

    /// All cosines and all sines, `[positions, pairs]` each.
    pub fn tables(&self) -> (&[f32], &[f32]) {
        (&self.cos, &self.sin)
    }

    /// Cosines and sines of one position, `[pairs]` each.
    pub fn at(&self, position: u32) -> (&[f32], &[f32]) {
        let start = position as usize * self.pairs;
        (&self.cos[start..start + self.pairs], &self.sin[start..start + self.pairs])
    }
}
