//! Products of quantised weights with quantised activations.
//!
//! Lanes are output columns, and each output is summed over `k` in one accumulator, block after block: the integer
//! product of a block, its peak included, is exact, then `acc = fma(product, d_w × d_a, acc)` and, with a minimum,
//! `acc = fma(m_w, d_a × Σq, acc)`. The order is the same for one row or many and on every instruction set, so the bits
//! are too.
//!
//! A few rows (decoding) read the packed weights directly and are bound by memory. More rows (prefill) are bound by
//! arithmetic if caches keep up: a row's block takes some 15 (4 bits) or 24 cycles (8 bits) a group, counted in Zen 3's
//! instructions, and needs at least its own 56 bytes of the second-level cache. (Were activations to stay and weights
//! to come, in tiles of four rows, it would be 160 or 136.) To need no more, a range of `k` is taken at a time:
//!
//! - Its weights of one group, 4-bit ones unpacked into a panel, stay in the first-level cache while all rows pass by.
//!   All `k` of 8-bit weights stay only if that is less than 1,300 or so; otherwise 136 bytes come along every time.
//! - Its activations, 168 KiB for 128 rows, stay in the second-level cache while several groups take their turn. All
//!   `k` of them stay in 512 KiB only if that is less than 2,300; otherwise the 56 bytes come from the third level for
//!   each group instead of once for sixteen.
//! - The sums of these groups, 128 KiB, wait for the next range beside them: 128 bytes a row for 24 blocks.

use std::ops::Range;

use super::buffer::{Aligned, Shared};
use super::isa::{Isa, Kernel, LANES};
use super::linear::{Part, ROWS_PER_CHUNK};
use super::pack::Format;
use super::quant::{BLOCK, BlockInfo, QuantizedView};

/// Blocks of 32 `k` in a range: a panel of 15 KiB, half of a common first-level data cache.
const PANEL_BLOCKS: usize = 24;
/// A panel's block: 512 weights as bytes, 16 scales and 16 minimums as f32.
const PANEL_STRIDE: usize = 512 + 2 * 4 * LANES;
/// Rows from which ranges and unpacking into a panel pay: measured on Zen 3, where at 16 rows unpacking each time is
/// 20 % faster.
const PANEL_ROWS: usize = 33;
/// Groups of columns that a range's activations meet before the next range's turn.
const GROUPS_PER_PASS: usize = 16;
/// How far ahead of a product its weights are asked for.
const PREFETCH_BYTES: usize = 2560;

/// One thread's working space.
pub(crate) struct Space {
    panel: Aligned<u8>,
    /// Sums of the ranges so far, `[GROUPS_PER_PASS][rows][16]`.
    sums: Aligned<f32>,
}

impl Space {
    pub(crate) fn new() -> Self {
        let panel = Aligned::zeroed(PANEL_BLOCKS * PANEL_STRIDE);
        Self { panel, sums: Aligned::zeroed(GROUPS_PER_PASS * ROWS_PER_CHUNK * LANES) }
    }
}

/// Computes rows `rows` and column groups `groups` of one part of a weight.
pub(crate) struct QuantizedGemm<'a> {
    pub(crate) x: QuantizedView<'a>,
    pub(crate) part: &'a Part,
    pub(crate) groups: Range<usize>,
    pub(crate) rows: Range<usize>,
    /// Of the whole output row.
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, out_cols]`; nobody else touches the named columns of the named rows.
    pub(crate) out: Shared<'a, f32>,
    pub(crate) out_cols: usize,
    pub(crate) space: &'a mut Space,
}

/// What tells the formats apart, known when a kernel is compiled.
trait Layout {
    const FORMAT: Format;
    const MIN: bool;
    const HALVES: bool;
    const U4: bool;
}

macro_rules! layouts {
    ($($name:ident: $min:literal, $halves:literal, $u4:literal;)*) => {$(
        struct $name;
        impl Layout for $name {
            const FORMAT: Format = Format::$name;
            const MIN: bool = $min;
            const HALVES: bool = $halves;
            const U4: bool = $u4;
        }
    )*};
}

layouts! {
    U4: true, false, true;
    I8: false, false, false;
    I8Min: true, false, false;
    I8Halves: false, true, false;
}

impl Kernel for QuantizedGemm<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        match self.part.format {
            Format::U4 => self.product::<I, U4>(isa),
            Format::I8 => self.product::<I, I8>(isa),
            Format::I8Min => self.product::<I, I8Min>(isa),
            Format::I8Halves => self.product::<I, I8Halves>(isa),
            Format::Bf16 | Format::F16 | Format::F32 | Format::F8 => unreachable!("float parts have their own kernel"),
        }
    }
}

/// What a tile reads: `blocks` blocks of weights at `w`, and the rows of activations they meet.
#[derive(Clone, Copy)]
struct Operands {
    w: *const u8,
    blocks: usize,
    bytes: *const i8,
    bytes_stride: usize,
    infos: *const BlockInfo,
    infos_stride: usize,
}

/// Where a tile stands.
#[derive(Clone, Copy)]
struct Place {
    group: usize,
    row: usize,
    /// The sums of the rows' earlier ranges of `k`, unless this is the first, and room for them, unless it is the last.
    sums: *mut f32,
    is_first: bool,
    is_last: bool,
}

impl QuantizedGemm<'_> {
    #[inline(always)]
    fn product<I: Isa, L: Layout>(self, isa: I) {
        let blocks = self.x.cols / BLOCK;
        let group_bytes = self.part.group_bytes;
        assert!(group_bytes == L::FORMAT.group_bytes(self.x.cols));
        assert!(self.groups.end * group_bytes <= self.part.data.len());
        assert!(self.rows.end * self.x.cols <= self.x.bytes.len() && self.rows.end * blocks <= self.x.infos.len());
        assert!(self.rows.len() <= ROWS_PER_CHUNK);
        let (panel, sums) = (self.space.panel.as_mut_ptr(), self.space.sums.as_mut_ptr());
        let in_ranges = self.rows.len() >= PANEL_ROWS;
        let step = if in_ranges { PANEL_BLOCKS } else { blocks };
        let mut pass = self.groups.start;
        while pass < self.groups.end {
            let groups = pass..self.groups.end.min(pass + GROUPS_PER_PASS);
            let mut first = 0;
            while first < blocks {
                let count = step.min(blocks - first);
                for group in groups.clone() {
                    // SAFETY: the assertions above bound group, rows and blocks; a panel has room for PANEL_BLOCKS,
                    // and the sums for the groups of a pass and the rows of a chunk.
                    unsafe {
                        let weights = self.part.data[group * group_bytes..].as_ptr();
                        let packed = weights.add(first * L::FORMAT.unit().0);
                        let w = if L::U4 && in_ranges {
                            unpack_panel(isa, packed, count, panel);
                            panel.cast_const()
                        } else {
                            packed
                        };
                        let mut row = self.rows.start;
                        while row < self.rows.end {
                            let operands = Operands {
                                w,
                                blocks: count,
                                bytes: self.x.bytes.as_ptr().add(row * self.x.cols + first * BLOCK),
                                bytes_stride: self.x.cols,
                                infos: self.x.infos.as_ptr().add(row * blocks + first),
                                infos_stride: blocks,
                            };
                            let waiting = (group - pass) * self.rows.len() + row - self.rows.start;
                            let place = Place {
                                group,
                                row,
                                sums: sums.add(waiting * LANES),
                                is_first: first == 0,
                                is_last: first + count == blocks,
                            };
                            row += if L::U4 && in_ranges {
                                self.some_rows::<I, L, true>(isa, operands, place)
                            } else {
                                self.some_rows::<I, L, false>(isa, operands, place)
                            };
                        }
                    }
                }
                first += count;
            }
            pass = groups.end;
        }
    }

    /// The next rows, as many as a tile takes; returns how many.
    #[inline(always)]
    unsafe fn some_rows<I: Isa, L: Layout, const PANEL: bool>(
        &self,
        isa: I,
        operands: Operands,
        place: Place,
    ) -> usize {
        // SAFETY: the caller vouches for the operands and sums of all rows that are left.
        unsafe {
            match self.rows.end - place.row {
                8.. if I::ROWS_MAX >= 8 => self.tile::<I, L, 8, PANEL>(isa, operands, place),
                4.. if I::ROWS_MAX >= 4 => self.tile::<I, L, 4, PANEL>(isa, operands, place),
                3 if I::ROWS_MAX >= 4 => self.tile::<I, L, 3, PANEL>(isa, operands, place),
                2 if I::ROWS_MAX >= 4 => self.tile::<I, L, 2, PANEL>(isa, operands, place),
                _ => self.tile::<I, L, 1, PANEL>(isa, operands, place),
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<I: Isa, L: Layout, const R: usize, const PANEL: bool>(
        &self,
        isa: I,
        operands: Operands,
        place: Place,
    ) -> usize {
        let mut acc = [isa.zero(); R];
        if !place.is_first {
            for (r, acc) in acc.iter_mut().enumerate() {
                // SAFETY: the caller vouches for sixteen sums of each row.
                *acc = unsafe { isa.load(place.sums.add(r * LANES)) };
            }
        }
        // SAFETY: the caller vouches for the operands.
        unsafe { accumulate::<I, L, R, PANEL>(isa, operands, &mut acc) };
        if !place.is_last {
            for (r, &acc) in acc.iter().enumerate() {
                // SAFETY: as above.
                unsafe { isa.store(place.sums.add(r * LANES), acc) };
            }
            return R;
        }
        let column = place.group * LANES;
        let lanes = LANES.min(self.part.rows - column);
        let column = self.part.row_start + column;
        for (r, &acc) in acc.iter().enumerate() {
            // SAFETY: these columns of these rows are this chunk's alone; a bias is as long as an output row.
            unsafe {
                let out = self.out.slice((place.row + r) * self.out_cols + column, lanes).as_mut_ptr();
                let value = match self.bias {
                    Some(bias) => isa.add(acc, isa.load_partial(bias[column..][..lanes].as_ptr(), lanes)),
                    None => acc,
                };
                if lanes == LANES { isa.store(out, value) } else { isa.store_partial(out, value, lanes) }
            }
        }
        R
    }
}

/// Adds the products of `operands.blocks` blocks to the accumulators of `R` rows.
#[inline(always)]
unsafe fn accumulate<I: Isa, L: Layout, const R: usize, const PANEL: bool>(
    isa: I,
    operands: Operands,
    acc: &mut [I::F; R],
) {
    let stride = if PANEL { PANEL_STRIDE } else { L::FORMAT.unit().0 };
    let scales_at = if L::U4 && !PANEL { 256 } else { 512 };
    for block in 0..operands.blocks {
        // SAFETY: the caller vouches for `blocks` blocks of weights and of each of `R` rows.
        unsafe {
            let w = operands.w.add(block * stride);
            if !PANEL {
                for line in 0..stride.div_ceil(64) {
                    isa.prefetch(w.wrapping_add(PREFETCH_BYTES + 64 * line));
                }
            }
            let (scale, second) = if PANEL {
                (isa.load(w.add(512).cast()), isa.load(w.add(512 + 4 * LANES).cast()))
            } else {
                let second = if L::MIN || L::HALVES { isa.load_f16(w.add(scales_at + 32).cast()) } else { isa.zero() };
                (isa.load_f16(w.add(scales_at).cast()), second)
            };
            let bytes = operands.bytes.add(block * BLOCK);
            let infos = operands.infos.add(block);
            let mut sums = [isa.int_zero(); R];
            for pair in 0..4 {
                let (low, high) = if PANEL {
                    (isa.load_u8(w.add(pair * 128)), isa.load_u8(w.add(pair * 128 + 64)))
                } else if L::U4 {
                    isa.load_u4(w.add(pair * 64))
                } else {
                    (isa.load_i8(w.add(pair * 128)), isa.load_i8(w.add(pair * 128 + 64)))
                };
                for (r, sum) in sums.iter_mut().enumerate() {
                    let a = bytes.add(r * operands.bytes_stride + pair * 8);
                    *sum = if L::U4 {
                        isa.dot_u4(isa.dot_u4(*sum, low, a), high, a.add(4))
                    } else {
                        isa.dot_i8(isa.dot_i8(*sum, low, a), high, a.add(4))
                    };
                }
                if L::HALVES && pair == 1 {
                    for r in 0..R {
                        let info = &*infos.add(r * operands.infos_stride);
                        let product = isa.finish_i8(add_peak(isa, sums[r], w, info, Some(0)), info.sums[0]);
                        acc[r] = isa.fma(product, isa.mul(scale, isa.splat(info.scale)), acc[r]);
                        sums[r] = isa.int_zero();
                    }
                }
            }
            for r in 0..R {
                let info = &*infos.add(r * operands.infos_stride);
                let product = if L::U4 {
                    let peak = info.peak as usize;
                    let weights = if PANEL {
                        isa.load_u8(w.add(peak * 64))
                    } else {
                        isa.load_u4_half(w.add(peak / 2 * 64), info.peak % 2 * 4)
                    };
                    isa.finish_u4(sums[r], weights, info.peak_high.as_ptr())
                } else if L::HALVES {
                    isa.finish_i8(add_peak(isa, sums[r], w, info, Some(1)), info.sums[1])
                } else {
                    isa.finish_i8(add_peak(isa, sums[r], w, info, None), info.sums[0].wrapping_add(info.sums[1]))
                };
                let scale = if L::HALVES { second } else { scale };
                acc[r] = isa.fma(product, isa.mul(scale, isa.splat(info.scale)), acc[r]);
                if L::MIN {
                    acc[r] = isa.fma(second, isa.splat(info.scaled_sum), acc[r]);
                }
            }
        }
    }
}

/// Adds what the high bytes of a block's peak make with its 8-bit weights at `w`; with a `half`, only if the peak lies
/// there.
///
/// # Safety
/// 512 weights are readable at `w`.
#[inline(always)]
unsafe fn add_peak<I: Isa>(isa: I, sum: I::I, w: *const u8, info: &BlockInfo, half: Option<u32>) -> I::I {
    let elsewhere = half.is_some_and(|half| info.peak / 4 != half);
    let high = if elsewhere { [0; 4] } else { info.peak_high };
    // SAFETY: a peak is one of the block's eight fours.
    unsafe { isa.peak_i8(sum, isa.load_i8(w.add(info.peak as usize * 64)), high.as_ptr()) }
}

/// Unpacks `count` 4-bit blocks.
#[inline(always)]
unsafe fn unpack_panel<I: Isa>(isa: I, packed: *const u8, count: usize, panel: *mut u8) {
    let stride = Format::U4.unit().0;
    for block in 0..count {
        // SAFETY: the caller vouches for `count` blocks at both places.
        unsafe {
            let (from, to) = (packed.add(block * stride), panel.add(block * PANEL_STRIDE));
            for pair in 0..4 {
                let (low, high) = isa.load_u4(from.add(pair * 64));
                isa.store_u8(to.add(pair * 128), low);
                isa.store_u8(to.add(pair * 128 + 64), high);
            }
            isa.store(to.add(512).cast(), isa.load_f16(from.add(256).cast()));
            isa.store(to.add(512 + 4 * LANES).cast(), isa.load_f16(from.add(256 + 32).cast()));
        }
    }
}
