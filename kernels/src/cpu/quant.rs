//! Activations as 8-bit integers.
//!
//! A row is cut into blocks of 32, as the weights are. Each block is scaled so that its largest magnitude becomes 127,
//! and rounded (llama.cpp's Q8_1). Beside the bytes stand the scale, the scale times the sum of the bytes (what a
//! weight's minimum is multiplied with), and the sums of both halves (for instruction sets whose products want unsigned weights).

use super::buffer::{Aligned, Shared};
use super::isa::{Dispatch, Isa, Kernel, LANES};

/// Elements that share a scale.
pub(crate) const BLOCK: usize = 32;

/// What belongs to one block of one row.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct BlockInfo {
    /// Value of one unit.
    pub(crate) scale: f32,
    /// `scale × Σ bytes`.
    pub(crate) scaled_sum: f32,
    /// Sums of the first and second sixteen bytes.
    pub(crate) sums: [i32; 2],
}

impl super::buffer::Plain for BlockInfo {}

/// Quantised rows.
pub(crate) struct QuantizedRows {
    bytes: Aligned<i8>,
    infos: Aligned<BlockInfo>,
    cols: usize,
}

/// Read access to quantised rows for kernels.
#[derive(Clone, Copy)]
pub(crate) struct QuantizedView<'a> {
    /// `[rows, cols]`.
    pub(crate) bytes: &'a [i8],
    /// `[rows, cols / BLOCK]`.
    pub(crate) infos: &'a [BlockInfo],
    /// Columns.
    pub(crate) cols: usize,
}

impl QuantizedRows {
    pub(crate) fn new() -> Self {
        Self { bytes: Aligned::zeroed(0), infos: Aligned::zeroed(0), cols: 0 }
    }

    /// Makes room for `values` elements in all.
    pub(crate) fn reserve(&mut self, values: usize) {
        self.bytes.grow(values);
        self.infos.grow(values.div_ceil(BLOCK));
    }

    /// Takes on the shape `[rows, cols]`, `cols` a multiple of [`BLOCK`], and hands out both parts to be filled.
    pub(crate) fn start(&mut self, rows: usize, cols: usize) -> (Shared<'_, i8>, Shared<'_, BlockInfo>) {
        self.cols = cols;
        self.reserve(rows * cols);
        (Shared::new(&mut self.bytes), Shared::new(&mut self.infos))
    }

    pub(crate) fn view(&self) -> QuantizedView<'_> {
        QuantizedView { bytes: &self.bytes, infos: &self.infos, cols: self.cols }
    }
}

/// Quantises `values`, whole blocks of any number of rows.
pub(crate) fn quantize(dispatch: Dispatch, values: &[f32], bytes: &mut [i8], infos: &mut [BlockInfo]) {
    assert!(values.len().is_multiple_of(BLOCK) && bytes.len() == values.len() && infos.len() * BLOCK == values.len());
    dispatch.run(Quantize { values, bytes, infos });
}

struct Quantize<'a> {
    values: &'a [f32],
    bytes: &'a mut [i8],
    infos: &'a mut [BlockInfo],
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        for (block, info) in self.infos.iter_mut().enumerate() {
            // SAFETY: `quantize` checked that each block has its 32 values and bytes.
            unsafe {
                let values = self.values.as_ptr().add(block * BLOCK);
                let bytes = self.bytes.as_mut_ptr().add(block * BLOCK);
                let (first, second) = (isa.load(values), isa.load(values.add(LANES)));
                let greatest = isa.reduce_max(isa.max(isa.abs(first), isa.abs(second)));
                // Below this the inverse would overflow; such a block counts as zeros.
                let inverse = if greatest > 1e-36 { 127.0 / greatest } else { 0.0 };
                let inverse = isa.splat(inverse);
                let sums = [
                    isa.store_i8(bytes, isa.mul(first, inverse)),
                    isa.store_i8(bytes.add(LANES), isa.mul(second, inverse)),
                ];
                let scale = greatest / 127.0;
                *info = BlockInfo { scale, scaled_sum: scale * (sums[0].wrapping_add(sums[1])) as f32, sums };
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Level;
    use super::*;

    #[test]
    fn a_block_comes_back_within_half_a_unit() {
        let values: Vec<f32> = (0..96).map(|i| if i < 64 { (i as f32 * 0.7).sin() * 3.0 } else { 0.0 }).collect();
        let mut bytes = vec![0i8; 96];
        let mut infos = vec![BlockInfo::default(); 3];
        quantize(Dispatch::new(Level::detect()).expect("detected"), &values, &mut bytes, &mut infos);
        for (i, value) in values.iter().enumerate() {
            let info = infos[i / BLOCK];
            assert!((f32::from(bytes[i]) * info.scale - value).abs() <= info.scale * 0.5001);
        }
        for (block, info) in infos.iter().enumerate() {
            let sum = |half: usize| bytes[block * 32 + half * 16..][..16].iter().map(|&b| i32::from(b)).sum::<i32>();
            assert_eq!(info.sums, [sum(0), sum(1)]);
            assert_eq!(info.scaled_sum, info.scale * (sum(0) + sum(1)) as f32);
        }
        assert_eq!(infos[2].scale, 0.0);
    }

    #[test]
    fn tiny_activations_do_not_overflow_the_inverse_scale() {
        let mut bytes = vec![0i8; 32];
        let mut infos = vec![BlockInfo::default(); 1];
        quantize(Dispatch::new(Level::detect()).expect("detected"), &[1e-40; 32], &mut bytes, &mut infos);
        assert!(bytes.iter().all(|&b| (-127..=127).contains(&b)) && infos[0].scaled_sum.is_finite());
    }
}
