//! Products of quantised weights with quantised activations.
//!
//! Lanes are output columns, and each output is summed over `k` in one accumulator, block after block: the integer
//! product of a block, its peak included, is exact, then `acc = fma(product, d_w × d_a, acc)` and, with a minimum,
//! `acc = fma(m_w, d_a × Σq, acc)`. The order is the same for one row or many and on every instruction set, so the bits
//! are too.
//!
//! A few rows (decoding) read the packed weights directly and are bound by memory. More rows (prefill) are bound by
//! arithmetic if caches keep up: a row's block takes some 12 (4 bits) to 24 cycles (8 bits) a group, counted in Zen 3's
//! instructions, and needs at least its own 56 bytes of the second-level cache. (Were activations to stay and weights
//! to come, in tiles of four rows, it would be 160 or 136.) To need no more, a range of `k` is taken at a time:
//!
//! - Its weights of one group, unpacked into a panel as registers want them, stay in the first-level cache while all
//!   rows pass by.
//! - Its activations, 168 KiB for 128 rows, stay in the second-level cache while several groups take their turn. All
//!   `k` of them stay in 512 KiB only if that is less than 2,300; otherwise the 56 bytes come from the third level for
//!   each group instead of once for sixteen.
//! - The sums of these groups, 128 KiB, wait for the next range beside them: 128 bytes a row for 24 blocks.

use std::ops::Range;
use std::sync::atomic::{Ordering, compiler_fence};

use super::buffer::{Aligned, Shared};
use super::isa::{Isa, Kernel, LANES};
use super::linear::{Part, ROWS_PER_CHUNK};
use super::pack::{Format, U6_OFFSET, UPPER_BITS};
use super::quant::{BLOCK, BlockInfo, QuantizedView};

/// Blocks of 32 `k` in a range: a panel of 15 KiB, half of a common first-level data cache.
const PANEL_BLOCKS: usize = 24;
/// A panel's block: 512 weights as bytes, 16 scales and 16 minimums or second scales as f32.
const PANEL_STRIDE: usize = 512 + 2 * 4 * LANES;
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
    /// Whether blocks have a minimum.
    const MIN: bool = matches!(Self::FORMAT, Format::U4 | Format::U5);
    /// Parts with scales of their own: blocks, or their halves.
    const PARTS: usize = if matches!(Self::FORMAT, Format::U6) { 2 } else { 1 };
    /// Whether several weights share a byte, so that they have to be unpacked.
    const PACKED: bool = !matches!(Self::FORMAT, Format::I8);

    /// Rows from which ranges and unpacking into a panel pay. With fewer, unpacking each time is up to 30 % faster, but
    /// not where registers are few (AVX2) and bits lie in two places (measured on Zen 3 and Sapphire Rapids).
    fn panel_rows<I: Isa>() -> usize {
        if I::ROWS_MAX < 8 && matches!(Self::FORMAT, Format::U5 | Format::U6) { 12 } else { 33 }
    }
}

macro_rules! layouts {
    ($($name:ident)*) => {$(
        struct $name;
        impl Layout for $name {
            const FORMAT: Format = Format::$name;
        }
    )*};
}

layouts! { U4 U5 U6 Iq4 I8 }

impl Kernel for QuantizedGemm<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        match self.part.format {
            Format::U4 => self.product::<I, U4>(isa),
            Format::U5 => self.product::<I, U5>(isa),
            Format::U6 => self.product::<I, U6>(isa),
            Format::Iq4 => self.product::<I, Iq4>(isa),
            Format::I8 => self.product::<I, I8>(isa),
            Format::Bf16 | Format::F16 | Format::F32 | Format::F8 => unreachable!("float parts have their own kernel"),
        }
    }
}

/// Weights of sixteen columns and eight consecutive `k`, the `pair`-th such eight of the block at `w`.
///
/// # Safety
/// A block of the layout, or of a panel, is readable at `w`, and `pair` is below 4.
#[inline(always)]
unsafe fn weights<I: Isa, L: Layout, const PANEL: bool>(isa: I, w: *const u8, pair: usize) -> (I::W, I::W) {
    // SAFETY: as the function says.
    unsafe {
        if PANEL || !L::PACKED {
            return (unpacked::<I, L, PANEL>(isa, w, 2 * pair), unpacked::<I, L, PANEL>(isa, w, 2 * pair + 1));
        }
        let (low, high) = isa.load_u4(w.add(pair * 64));
        let (first, second) = (2 * pair as u32, 2 * pair as u32 + 1);
        (beyond_nibbles::<I, L>(isa, w, low, first), beyond_nibbles::<I, L>(isa, w, high, second))
    }
}

/// The weights of four `k` alone: of those from `4 × four` on.
///
/// # Safety
/// As for [`weights`], and `four` is below 8.
#[inline(always)]
unsafe fn weights_of_four<I: Isa, L: Layout, const PANEL: bool>(isa: I, w: *const u8, four: u32) -> I::W {
    // SAFETY: as the function says.
    unsafe {
        if PANEL || !L::PACKED {
            return unpacked::<I, L, PANEL>(isa, w, four as usize);
        }
        let nibbles = isa.load_u4_half(w.add(four as usize / 2 * 64), four % 2 * 4);
        beyond_nibbles::<I, L>(isa, w, nibbles, four)
    }
}

/// The weights of four `k` where each has a byte.
#[inline(always)]
unsafe fn unpacked<I: Isa, L: Layout, const PANEL: bool>(isa: I, w: *const u8, four: usize) -> I::W {
    // SAFETY: the callers vouch for 512 weights.
    unsafe {
        match L::FORMAT {
            Format::Iq4 | Format::I8 if PANEL => isa.load_signed(w.add(four * 64)),
            Format::I8 => isa.load_i8(w.add(four * 64)),
            _ => isa.load_u8(w.add(four * 64)),
        }
    }
}

/// The weights of a block, a byte each.
#[repr(align(64))]
struct Unpacked([u8; 512]);

/// Writes those of [`weights`] to where [`unpacked`] finds them.
#[inline(always)]
unsafe fn store_weights<I: Isa, L: Layout>(isa: I, to: *mut u8, pair: usize, weights: (I::W, I::W)) {
    // SAFETY: the callers vouch for room for 512 weights.
    unsafe {
        let (first, second) = (to.add(pair * 128), to.add(pair * 128 + 64));
        if matches!(L::FORMAT, Format::Iq4 | Format::I8) {
            isa.store_signed(first, weights.0);
            isa.store_signed(second, weights.1);
        } else {
            isa.store_u8(first, weights.0);
            isa.store_u8(second, weights.1);
        }
    }
}

/// What weights are whose lowest bits, or numbers in IQ4's table, are `nibbles`.
#[inline(always)]
unsafe fn beyond_nibbles<I: Isa, L: Layout>(isa: I, w: *const u8, nibbles: I::W, four: u32) -> I::W {
    // SAFETY: the callers vouch for a block.
    unsafe {
        match L::FORMAT {
            Format::U5 => isa.raise(nibbles, isa.load_u8(w.add(UPPER_BITS)), four, 1),
            Format::U6 => isa.raise(nibbles, isa.load_u8(w.add(UPPER_BITS + four as usize / 4 * 64)), four % 4 * 2, 3),
            Format::Iq4 => isa.look_up(nibbles),
            _ => nibbles,
        }
    }
}

/// The f32 sums of a tile's rows. Those of more rows than leave registers for a block's integers wait in memory between
/// blocks: where compilers may choose, they let every weight go through memory instead, once a row.
struct Sums<I: Isa, const R: usize> {
    registers: [I::F; R],
    /// `[R][16]`.
    memory: *mut f32,
}

impl<I: Isa, const R: usize> Sums<I, R> {
    const WAIT: bool = R > I::SUMS_MAX;

    #[inline(always)]
    unsafe fn get(&self, isa: I, r: usize) -> I::F {
        // SAFETY: whoever made this vouches for `R` rows' sums.
        if Self::WAIT { unsafe { isa.load(self.memory.add(r * LANES)) } } else { self.registers[r] }
    }

    #[inline(always)]
    unsafe fn set(&mut self, isa: I, r: usize, sum: I::F) {
        if Self::WAIT {
            // SAFETY: as above.
            unsafe { isa.store(self.memory.add(r * LANES), sum) }
        } else {
            self.registers[r] = sum;
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
        let in_ranges = self.rows.len() >= L::panel_rows::<I>();
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
                        let w = if in_ranges {
                            unpack_panel::<I, L>(isa, packed, count, panel);
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
                            row += if in_ranges {
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
        let mut sums = Sums { registers: [isa.zero(); R], memory: place.sums };
        // SAFETY: the caller vouches for the operands and for sixteen sums of each row.
        unsafe {
            for r in 0..R {
                let earlier = if place.is_first { isa.zero() } else { isa.load(place.sums.add(r * LANES)) };
                sums.set(isa, r, earlier);
            }
            accumulate::<I, L, R, PANEL>(isa, operands, &mut sums);
            if !place.is_last {
                for r in 0..R {
                    isa.store(place.sums.add(r * LANES), sums.get(isa, r));
                }
                return R;
            }
        }
        let column = place.group * LANES;
        let lanes = LANES.min(self.part.rows - column);
        let column = self.part.row_start + column;
        for r in 0..R {
            // SAFETY: these columns of these rows are this chunk's alone; a bias is as long as an output row.
            unsafe {
                let sum = sums.get(isa, r);
                let out = self.out.slice((place.row + r) * self.out_cols + column, lanes).as_mut_ptr();
                let value = match self.bias {
                    Some(bias) => isa.add(sum, isa.load_partial(bias[column..][..lanes].as_ptr(), lanes)),
                    None => sum,
                };
                if lanes == LANES { isa.store(out, value) } else { isa.store_partial(out, value, lanes) }
            }
        }
        R
    }
}

/// A block of weights, and of the rows of activations it meets.
struct Block<I: Isa> {
    w: *const u8,
    bytes: *const i8,
    infos: *const BlockInfo,
    /// As [`scales`] gives them.
    scales: (I::F, I::F),
    /// Whose strides are meant.
    operands: Operands,
}

/// Adds the products of `operands.blocks` blocks to the sums of `R` rows.
#[inline(always)]
unsafe fn accumulate<I: Isa, L: Layout, const R: usize, const PANEL: bool>(
    isa: I,
    operands: Operands,
    sums: &mut Sums<I, R>,
) {
    let stride = if PANEL { PANEL_STRIDE } else { L::FORMAT.unit().0 };
    let mut unpacked = Unpacked([0; 512]);
    for block in 0..operands.blocks {
        if Sums::<I, R>::WAIT {
            // Or sums would be promoted to registers.
            compiler_fence(Ordering::SeqCst);
        }
        // SAFETY: the caller vouches for `blocks` blocks of weights and of each of `R` rows.
        unsafe {
            let w = operands.w.add(block * stride);
            if !PANEL {
                for line in 0..stride.div_ceil(64) {
                    isa.prefetch(w.wrapping_add(PREFETCH_BYTES + 64 * line));
                }
            }
            let scales = if PANEL {
                (isa.load(w.add(512).cast()), isa.load(w.add(512 + 4 * LANES).cast()))
            } else {
                scales::<I, L>(isa, w)
            };
            let (bytes, infos) = (operands.bytes.add(block * BLOCK), operands.infos.add(block));
            let block = Block { w, bytes, infos, scales, operands };
            accumulate_part::<I, L, R, PANEL, 0>(isa, &block, &mut unpacked, sums);
            if L::PARTS == 2 {
                accumulate_part::<I, L, R, PANEL, 1>(isa, &block, &mut unpacked, sums);
            }
        }
    }
}

/// Adds the products of a block, or of its `PART`-th half.
///
/// # Safety
/// `PART` is below `L::PARTS`, the block and those of `R` rows are readable, and `sums` are of as many.
#[inline(always)]
unsafe fn accumulate_part<I: Isa, L: Layout, const R: usize, const PANEL: bool, const PART: usize>(
    isa: I,
    block: &Block<I>,
    unpacked: &mut Unpacked,
    sums: &mut Sums<I, R>,
) {
    // A row's peak is anywhere in a block: where unpacking is much, each row takes its peak's weights from here.
    let keeps = !PANEL && R > 1 && matches!(L::FORMAT, Format::U5 | Format::U6 | Format::Iq4);
    // SAFETY: as the function says.
    unsafe {
        let mut products = [isa.int_zero(); R];
        for pair in PART * 4 / L::PARTS..(PART + 1) * 4 / L::PARTS {
            let (low, high) = weights::<I, L, PANEL>(isa, block.w, pair);
            if keeps {
                store_weights::<I, L>(isa, unpacked.0.as_mut_ptr(), pair, (low, high));
            }
            for (r, product) in products.iter_mut().enumerate() {
                let a = block.bytes.add(r * block.operands.bytes_stride + pair * 8);
                *product = match L::FORMAT {
                    Format::U4 => isa.dot_u4(isa.dot_u4(*product, low, a), high, a.add(4)),
                    Format::U5 | Format::U6 => isa.dot_u6(*product, (low, high), a),
                    _ => isa.dot_i8(isa.dot_i8(*product, low, a), high, a.add(4)),
                };
            }
        }
        let (first, second) = block.scales;
        let scale = if PART == 0 { first } else { second };
        for (r, product) in products.into_iter().enumerate() {
            let info = &*block.infos.add(r * block.operands.infos_stride);
            let product = if keeps {
                finish::<I, L, true, PART>(isa, product, unpacked.0.as_ptr(), info)
            } else {
                finish::<I, L, PANEL, PART>(isa, product, block.w, info)
            };
            let mut sum = isa.fma(product, isa.mul(scale, isa.splat(info.scale)), sums.get(isa, r));
            if L::MIN {
                sum = isa.fma(second, isa.splat(info.scaled_sum), sum);
            }
            sums.set(isa, r, sum);
        }
    }
}

/// The scales of the block at `w`, and its minimums or second scales.
///
/// # Safety
/// A block of the layout is readable at `w`.
#[inline(always)]
unsafe fn scales<I: Isa, L: Layout>(isa: I, w: *const u8) -> (I::F, I::F) {
    // SAFETY: as the function says.
    unsafe {
        let scales = w.add(L::FORMAT.scales_at());
        let second = if L::MIN || L::PARTS == 2 { isa.load_f16(scales.add(2 * LANES).cast()) } else { isa.zero() };
        (isa.load_f16(scales.cast()), second)
    }
}

/// The products of a block, or of its `PART`-th half, from those of the bytes and what the high bytes of the peak make
/// with the block's weights at `w`, if it lies there.
///
/// # Safety
/// As for [`weights`].
#[inline(always)]
unsafe fn finish<I: Isa, L: Layout, const PANEL: bool, const PART: usize>(
    isa: I,
    product: I::I,
    w: *const u8,
    info: &BlockInfo,
) -> I::F {
    // Where a peak lies cannot be foretold: a mask, no branch.
    let lies_here = L::PARTS == 1 || info.peak as usize / 4 == PART;
    let mask = u32::from(lies_here).wrapping_neg();
    let high = (u32::from_ne_bytes(info.peak_high.map(|byte| byte as u8)) & mask).to_ne_bytes();
    // SAFETY: a peak is one of the block's eight fours.
    unsafe {
        let w = weights_of_four::<I, L, PANEL>(isa, w, info.peak);
        let high = high.as_ptr().cast();
        let both = info.sums[0].wrapping_add(info.sums[1]);
        match L::FORMAT {
            Format::U4 => isa.finish_u4(product, w, high),
            Format::U5 => isa.finish_u6(isa.peak_u6(product, w, high), 0, 0),
            Format::U6 => isa.finish_u6(isa.peak_u6(product, w, high), U6_OFFSET, info.sums[PART]),
            _ => isa.finish_i8(isa.peak_i8(product, w, high), both),
        }
    }
}

/// Unpacks `count` blocks.
#[inline(always)]
unsafe fn unpack_panel<I: Isa, L: Layout>(isa: I, packed: *const u8, count: usize, panel: *mut u8) {
    for block in 0..count {
        // SAFETY: the caller vouches for `count` blocks at both places.
        unsafe {
            let (from, to) = (packed.add(block * L::FORMAT.unit().0), panel.add(block * PANEL_STRIDE));
            for pair in 0..4 {
                store_weights::<I, L>(isa, to, pair, weights::<I, L, false>(isa, from, pair));
            }
            let (scale, second) = scales::<I, L>(isa, from);
            isa.store(to.add(512).cast(), scale);
            isa.store(to.add(512 + 4 * LANES).cast(), second);
        }
    }
}
