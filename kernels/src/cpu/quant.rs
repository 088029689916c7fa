//! Activations as small integers.
//!
//! A row is cut into blocks of 32, as the weights are, and an activation of a block is `scale × q`. The block's *peak*,
//! the four consecutive elements with the largest magnitude among them, has `q` of 15 bits, `128 × high + low`. All
//! others have 8 bits, and it is they who determine the scale: the largest of them becomes ±127. So an outlier does not
//! take the precision of its neighbours away, which is most of what 8-bit activations cost a model
//! (tests/reference/README.md has the figures), for the price of one more product of four.
//!
//! That the few largest activations spoil the precision of the rest and are better multiplied apart is an observation
//! of LLM.int8() (Dettmers et al., 2022); blocks of bytes with their scales and sums are llama.cpp's Q8_1.

use super::buffer::{Aligned, Shared};
use super::isa::{Dispatch, Isa, Kernel, LANES};

/// Elements that share a scale: as many as share one among the weights.
pub(crate) use crate::blocks::BLOCK;

/// Consecutive elements that are multiplied at once, and of which each block has one peak.
const GROUP: usize = 4;
/// What the high bytes of a peak count.
pub(crate) const PEAK_UNIT: i32 = 128;

/// What belongs to one block of one row, beside its bytes (at the peak, the low ones).
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct BlockInfo {
    /// Value of one unit.
    pub(crate) scale: f32,
    /// `scale × Σ q`: what a weight's minimum is multiplied with.
    pub(crate) scaled_sum: f32,
    /// `Σ q` of the first and second sixteen, for instruction sets whose products want unsigned weights.
    pub(crate) sums: [i32; 2],
    /// High bytes of the peak, none of them -128.
    pub(crate) peak_high: [i8; GROUP],
    /// Which four the peak is: below 8.
    pub(crate) peak: u32,
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
        let places: [f32; LANES] = std::array::from_fn(|i| i as f32);
        // SAFETY: there are as many as lanes.
        let places = unsafe { isa.load(places.as_ptr()) };
        let second_places = isa.add(places, isa.splat(LANES as f32));
        for (block, info) in self.infos.iter_mut().enumerate() {
            // SAFETY: `quantize` checked that each block has its 32 values and bytes.
            let (values, bytes) =
                unsafe { (self.values.as_ptr().add(block * BLOCK), self.bytes.as_mut_ptr().add(block * BLOCK)) };
            // SAFETY: as above.
            let (first, second) = unsafe { (isa.load(values), isa.load(values.add(LANES))) };
            let (first_size, second_size) = (isa.abs(first), isa.abs(second));
            let greatest = isa.reduce_max(isa.max(first_size, second_size));

            // How far from the block's end the first element of that magnitude is. Only NaNs need the clamp.
            let (top, end) = (isa.splat(greatest), isa.splat(BLOCK as f32));
            let from_end = isa.max(
                isa.zero_if_lt(isa.sub(end, places), first_size, top),
                isa.zero_if_lt(isa.sub(end, second_places), second_size, top),
            );
            let peak = (BLOCK - (isa.reduce_max(from_end) as usize).clamp(1, BLOCK)) / GROUP;

            let (middle, reach) = (isa.splat((peak * GROUP) as f32 + 1.5), isa.splat(2.0));
            let first = isa.zero_if_lt(first, isa.abs(isa.sub(places, middle)), reach);
            let second = isa.zero_if_lt(second, isa.abs(isa.sub(second_places, middle)), reach);
            let rest = isa.reduce_max(isa.max(isa.abs(first), isa.abs(second)));
            let (fine, coarse) = (rest / 127.0, greatest / (127 * PEAK_UNIT) as f32);
            let scale = if fine > coarse { fine } else { coarse };
            // Below this the inverse would overflow; such a block counts as zeros.
            let inverse = if scale > 1e-36 { 1.0 / scale } else { 0.0 };
            let unit = isa.splat(inverse);
            // SAFETY: as above, and the peak is one of eight fours.
            let (mut sums, peak_values, peak_bytes) = unsafe {
                let sums =
                    [isa.store_i8(bytes, isa.mul(first, unit)), isa.store_i8(bytes.add(LANES), isa.mul(second, unit))];
                let at = peak * GROUP;
                (sums, values.add(at).cast::<[f32; GROUP]>().read(), &mut *bytes.add(at).cast::<[i8; GROUP]>())
            };
            let mut peak_high = [0; GROUP];
            for ((value, high_byte), low_byte) in peak_values.iter().zip(&mut peak_high).zip(peak_bytes) {
                let q = (value * inverse).round_ties_even() as i32;
                let high = (q + PEAK_UNIT / 2).div_euclid(PEAK_UNIT);
                (*high_byte, *low_byte) = (high as i8, (q - PEAK_UNIT * high) as i8);
                sums[peak * GROUP / LANES] += q;
            }
            let scaled_sum = scale * (sums[0].wrapping_add(sums[1])) as f32;
            *info = BlockInfo { scale, scaled_sum, sums, peak_high, peak: peak as u32 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::isa::Level;
    use super::*;

    /// What `values` came to: each block's integers and scale.
    fn quantized(values: &[f32]) -> Vec<(Vec<i32>, BlockInfo)> {
        let mut bytes = vec![0i8; values.len()];
        let mut infos = vec![BlockInfo::default(); values.len() / BLOCK];
        quantize(Dispatch::new(Level::detect()).expect("detected"), values, &mut bytes, &mut infos);
        let block = |(bytes, info): (&[i8], BlockInfo)| {
            let mut integers: Vec<i32> = bytes.iter().map(|&byte| byte.into()).collect();
            for (i, &high) in info.peak_high.iter().enumerate() {
                integers[info.peak as usize * GROUP + i] += PEAK_UNIT * i32::from(high);
            }
            (integers, info)
        };
        bytes.chunks(BLOCK).zip(infos).map(block).collect()
    }

    #[test]
    fn a_block_comes_back_within_half_a_unit_of_what_its_peak_leaves() {
        let mut values: Vec<f32> = (0..128).map(|i| if i < 96 { (i as f32 * 0.7).sin() * 3.0 } else { 0.0 }).collect();
        values[17] = -200.0; // an outlier,
        values[18] = 150.0; // its neighbour,
        values[71] = 1e6; // and one too large for 15 bits of the others' unit.
        for (values, (integers, info)) in values.chunks(BLOCK).zip(quantized(&values)) {
            for (value, integer) in values.iter().zip(&integers) {
                assert!((*integer as f32 * info.scale - value).abs() <= info.scale * 0.501);
            }
            let sum = |half: usize| integers[half * 16..][..16].iter().sum::<i32>();
            assert_eq!(info.sums, [sum(0), sum(1)]);
            assert_eq!(info.scaled_sum, info.scale * (sum(0) + sum(1)) as f32);
        }
        let blocks = quantized(&values);
        let scales: Vec<f32> = blocks.iter().map(|(_, info)| info.scale).collect();
        assert!(scales[0] <= 3.0 / 127.0 && scales[1] <= 3.0 / 127.0);
        assert_eq!(scales[2..], [1e6 / (127.0 * 128.0), 0.0]);
        assert_eq!((blocks[0].1.peak, blocks[2].1.peak), (4, 1));
    }

    #[test]
    fn among_equals_the_first_four_are_the_peak() {
        let (integers, info) = quantized(&[-2.0; 32]).remove(0);
        assert_eq!((info.peak, integers), (0, vec![-127; 32]));
    }

    #[test]
    fn tiny_activations_do_not_overflow_the_inverse_scale() {
        let (integers, info) = quantized(&[1e-40; 32]).remove(0);
        assert!(integers.iter().all(|q| (-127..=127).contains(q)) && info.scaled_sum.is_finite());
    }

    #[test]
    fn no_activation_makes_a_peak_that_is_not_there() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 13, 31] {
                let mut values = [1.0; 32];
                values[at] = value;
                assert!(quantized(&values)[0].1.peak < 8);
                assert!(quantized(&[value; 32])[0].1.peak < 8);
            }
        }
    }
}
