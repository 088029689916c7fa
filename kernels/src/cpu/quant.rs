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
use super::pack::U6_OFFSET;

/// Elements that share a scale: as many as share one among the weights.
pub(crate) use crate::blocks::BLOCK;

/// Consecutive elements that are multiplied at once, and of which each block has one peak.
const GROUP: usize = 4;
/// What the high bytes of a peak count.
pub(crate) const PEAK_UNIT: i32 = 128;

/// Rows of a strip, unless there are fewer: as many as the tallest tiles take.
const STRIP_ROWS: usize = 8;

/// One block of one row: a cache line.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C, align(64))]
pub(crate) struct QuantizedBlock {
    /// The elements; of the peak, the low bytes.
    pub(crate) bytes: [i8; BLOCK],
    /// Value of one unit.
    pub(crate) scale: f32,
    /// `scale × Σ q`: what a weight's minimum is multiplied with.
    pub(crate) scaled_sum: f32,
    /// `-Σ q`, for instruction sets whose products want unsigned weights.
    pub(crate) less: i32,
    /// [`U6_OFFSET`] times that of the first and second sixteen.
    pub(crate) less_u6: [i32; 2],
    /// High bytes of the peak; like the others, none of a finite activation is -128.
    pub(crate) peak_high: [i8; GROUP],
    /// Which four the peak is: below 8.
    pub(crate) peak: u32,
}

impl super::buffer::Plain for QuantizedBlock {}

/// Where blocks lie: `[rows / strip][cols / BLOCK][strip]`, so that those a tile meets at a time are neighbours.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strips {
    /// Rows of a strip.
    pub(crate) rows: usize,
    /// Blocks of a row.
    pub(crate) blocks: usize,
}

impl Strips {
    fn new(rows: usize, cols: usize) -> Self {
        assert!(cols.is_multiple_of(BLOCK));
        Self { rows: rows.next_power_of_two().min(STRIP_ROWS), blocks: cols / BLOCK }
    }

    /// Blocks that there are in all with so many rows.
    fn len(self, rows: usize) -> usize {
        rows.next_multiple_of(self.rows) * self.blocks
    }

    /// The place of a row's block.
    pub(crate) fn place(self, row: usize, block: usize) -> usize {
        (row / self.rows * self.blocks + block) * self.rows + row % self.rows
    }
}

/// Quantised rows.
pub(crate) struct QuantizedRows {
    blocks: Aligned<QuantizedBlock>,
    strips: Strips,
}

/// Read access to quantised rows for kernels.
#[derive(Clone, Copy)]
pub(crate) struct QuantizedView<'a> {
    pub(crate) blocks: &'a [QuantizedBlock],
    pub(crate) strips: Strips,
}

impl QuantizedRows {
    pub(crate) fn new() -> Self {
        Self { blocks: Aligned::zeroed(0), strips: Strips::new(1, 0) }
    }

    /// Makes room for `[rows, cols]`, and whatever has fewer of either.
    pub(crate) fn reserve(&mut self, rows: usize, cols: usize) {
        self.blocks.grow(rows.next_multiple_of(STRIP_ROWS) * cols.div_ceil(BLOCK));
    }

    /// Takes on the shape `[rows, cols]`, `cols` a multiple of [`BLOCK`], and hands the blocks out to be filled.
    pub(crate) fn start(&mut self, rows: usize, cols: usize) -> (Shared<'_, QuantizedBlock>, Strips) {
        self.strips = Strips::new(rows, cols);
        self.blocks.grow(self.strips.len(rows));
        (Shared::new(&mut self.blocks), self.strips)
    }

    pub(crate) fn view(&self) -> QuantizedView<'_> {
        QuantizedView { blocks: &self.blocks, strips: self.strips }
    }
}

/// Quantises `values`, those of row `first` and of as many after it as there are.
///
/// # Safety
/// Nobody else touches the blocks of these rows.
pub(crate) unsafe fn quantize(
    dispatch: Dispatch,
    values: &[f32],
    first: usize,
    blocks: Shared<'_, QuantizedBlock>,
    strips: Strips,
) {
    assert!(values.len().is_multiple_of(strips.blocks * BLOCK));
    dispatch.run(Quantize { values, first, blocks, strips });
}

/// For each peak a block may have, 1 for its elements and 0 for the others.
static IS_PEAK: [[f32; BLOCK]; BLOCK / GROUP] = {
    let mut table = [[0.0; BLOCK]; BLOCK / GROUP];
    let mut i = 0;
    while i < BLOCK {
        table[i / GROUP][i] = 1.0;
        i += 1;
    }
    table
};

struct Quantize<'a> {
    values: &'a [f32],
    first: usize,
    blocks: Shared<'a, QuantizedBlock>,
    strips: Strips,
}

impl Kernel for Quantize<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let half = isa.splat(0.5);
        for (i, values) in self.values.as_chunks::<BLOCK>().0.iter().enumerate() {
            let place = self.strips.place(self.first + i / self.strips.blocks, i % self.strips.blocks);
            // SAFETY: `quantize`'s caller vouches for these rows' blocks.
            let block = unsafe { &mut self.blocks.slice(place, 1)[0] };
            // SAFETY: a block is twice sixteen values.
            let (first, second) = unsafe { (isa.load(values.as_ptr()), isa.load(values[LANES..].as_ptr())) };
            let first_sizes = isa.max_of_fours(isa.abs(first));
            let second_sizes = isa.max_of_fours(isa.abs(second));
            let greatest = isa.reduce_max(isa.max(first_sizes, second_sizes));

            // The first four with it. Only NaNs need the limit.
            let top = isa.splat(greatest);
            let tops = isa.mask_not_lt(first_sizes, top) | isa.mask_not_lt(second_sizes, top) << LANES;
            let peak = (tops.trailing_zeros() as usize).min(BLOCK - 1) / GROUP;
            let is_peak = IS_PEAK[peak].as_ptr();
            // SAFETY: there are as many as values in a block.
            let (first_is_peak, second_is_peak) = unsafe { (isa.load(is_peak), isa.load(is_peak.add(LANES))) };

            let first_rest = isa.zero_if_lt(first_sizes, half, first_is_peak);
            let second_rest = isa.zero_if_lt(second_sizes, half, second_is_peak);
            let rest = isa.reduce_max(isa.max(first_rest, second_rest));
            let (fine, coarse) = (rest / 127.0, greatest / (127 * PEAK_UNIT) as f32);
            let scale = if fine > coarse { fine } else { coarse };
            // Below this the inverse would overflow; such a block counts as zeros.
            let inverse = if scale > 1e-36 { 1.0 / scale } else { 0.0 };
            let unit = isa.splat(inverse);
            let mut highs = [0i8; BLOCK];
            // SAFETY: there is room for a block's 32 bytes at both places.
            let sums = unsafe {
                let (bytes, highs) = (block.bytes.as_mut_ptr(), highs.as_mut_ptr());
                [
                    split(isa, isa.mul(first, unit), first_is_peak, bytes, highs),
                    split(isa, isa.mul(second, unit), second_is_peak, bytes.add(LANES), highs.add(LANES)),
                ]
            };
            let peak_high = std::array::from_fn(|i| highs[peak * GROUP + i]);
            // Sums of integers so small are exact.
            let sum = sums[0] + sums[1];
            // Whatever the integers of a NaN or of an infinity are, what they make is NaN.
            let scale = if sum.is_nan() { f32::NAN } else { scale };
            let less_u6 = sums.map(|sum| (-U6_OFFSET as f32 * sum) as i32);
            let (scaled_sum, less) = (scale * sum, -sum as i32);
            *block =
                QuantizedBlock { bytes: block.bytes, scale, scaled_sum, less, less_u6, peak_high, peak: peak as u32 };
        }
    }
}

/// Writes sixteen of a block's integers, rounded: what is below [`PEAK_UNIT`] to `low`, and where the peak is, how many
/// of these there are to `high`. Returns their sum.
///
/// # Safety
/// There is room for sixteen bytes at both places.
#[inline(always)]
unsafe fn split<I: Isa>(isa: I, q: I::F, is_peak: I::F, low: *mut i8, high: *mut i8) -> f32 {
    let q = isa.round(q);
    let units = isa.round(isa.mul(isa.zero_if_lt(q, is_peak, isa.splat(0.5)), isa.splat(1.0 / PEAK_UNIT as f32)));
    // SAFETY: as the function says.
    unsafe {
        isa.store_i8(low, isa.fma(units, isa.splat(-PEAK_UNIT as f32), q));
        isa.store_i8(high, units);
    }
    isa.reduce_add(q)
}

#[cfg(test)]
mod tests {
    use super::super::isa::Level;
    use super::*;

    /// What `values` came to: each block's integers and scale.
    fn quantized(values: &[f32]) -> Vec<(Vec<i32>, QuantizedBlock)> {
        let mut rows = QuantizedRows::new();
        let (blocks, strips) = rows.start(1, values.len());
        // SAFETY: they are this function's alone.
        unsafe { quantize(Dispatch::new(Level::detect()).expect("detected"), values, 0, blocks, strips) };
        let block = |block: &QuantizedBlock| {
            let mut integers: Vec<i32> = block.bytes.iter().map(|&byte| byte.into()).collect();
            for (i, &high) in block.peak_high.iter().enumerate() {
                integers[block.peak as usize * GROUP + i] += PEAK_UNIT * i32::from(high);
            }
            (integers, *block)
        };
        rows.view().blocks.iter().map(block).collect()
    }

    #[test]
    fn rows_lie_in_strips_and_none_on_another() {
        for rows in 1..20 {
            let strips = Strips::new(rows, 96);
            let mut places: Vec<usize> =
                (0..rows).flat_map(|row| (0..3).map(move |block| strips.place(row, block))).collect();
            assert!(places.iter().all(|&place| place < strips.len(rows)));
            places.sort_unstable();
            places.dedup();
            assert_eq!(places.len(), rows * 3);
        }
        assert_eq!(Strips::new(9, 96).place(8, 1) - Strips::new(9, 96).place(0, 0), 3 * 8 + 8);
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
            assert_eq!(info.less_u6, [-32 * sum(0), -32 * sum(1)]);
            assert_eq!(info.less, -sum(0) - sum(1));
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
    fn a_nan_or_an_infinity_spoils_its_block_and_makes_no_peak_that_is_not_there() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            for at in [0, 13, 31] {
                let mut values = [1.0; 32];
                values[at] = value;
                for values in [values, [value; 32]] {
                    let block = quantized(&values)[0].1;
                    assert!(block.peak < 8 && block.scale.is_nan());
                }
            }
        }
    }
}
