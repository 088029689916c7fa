//! Products of quantised weights with quantised activations.
//!
//! Lanes are output columns, and each output is summed over `k` in one accumulator, block after block: the integer
//! product of a block, its peak included, is exact, then `acc = fma(product, d_w × d_a, acc)` and, with a minimum,
//! `acc = fma(m_w, d_a × Σq, acc)`. The order is the same for one row or many and on every instruction set, so the bits
//! are too.
//!
//! A few rows (decoding) read the packed weights directly and are bound by memory. More rows (prefill) are bound by
//! arithmetic if caches keep up: a row's block takes some 12 (4 bits) to 24 cycles (8 bits) a group, counted in Zen 3's
//! instructions, and needs at least its own 64 bytes of the second-level cache. (Were activations to stay and weights
//! to come, in tiles of four rows, it would be 160 or 136.) To need no more, a range of `k` is taken at a time:
//!
//! - Its weights of one group, unpacked into a panel as registers want them, stay in the first-level cache while all
//!   rows pass by. Meanwhile those that the panel holds next are asked for: 20 bytes a row, where waiting for them took
//!   a tenth of the time.
//! - Its activations, 192 KiB for 128 rows, stay in the second-level cache while several groups take their turn. All
//!   `k` of them stay in 512 KiB only if that is less than 2,048; otherwise the 64 bytes come from the third level for
//!   each group instead of once for sixteen.
//! - The sums of these groups, 128 KiB, wait for the next range beside them: 128 bytes a row for 24 blocks.
//!
//! With AVX-512 a row's block is 13 to 15 vector instructions a group, of which two go in a cycle, but most read memory
//! too, and more often than twice a cycle it cannot be read. So two groups are taken together, in ranges half as long:
//! an activation is read once for both. On a Xeon with AMX that, and letting sums begin with what peaks add (see
//! [`Isa::PEAK_FIRST`]), took a thread from 128 to 155 G multiply-adds a second with weights of 4 bits, from 115 to 160
//! with weights of 8, and from 80 to 120 with weights of 6.

mod layout;
mod tile;

use std::ops::Range;

use self::layout::{I8, Iq4, Layout, PANEL_STRIDE, U4, U5, U6, unpack_panel};
use self::tile::{Operands, Sums, accumulate};
use super::buffer::{Aligned, Shared};
use super::isa::{Isa, Kernel, LANES};
use super::linear::{Part, ROWS_PER_CHUNK};
use super::pack::Format;
use super::quant::{BLOCK, QuantizedView};

/// Blocks that panels have room for in all: 15 KiB, half of a common first-level data cache.
const PANEL_BLOCKS: usize = 24;
/// Groups of columns that a range's activations meet before the next range's turn.
const GROUPS_PER_PASS: usize = 16;
/// How far ahead of a product its weights are asked for.
const PREFETCH_BYTES: usize = 2560;

/// Blocks of 32 `k` in a range: the panels of all groups that are taken together hold as many.
const fn range_blocks<I: Isa>() -> usize {
    PANEL_BLOCKS / I::GROUPS_MAX
}

/// Bytes from one group's panel to the next one's.
const fn panel_bytes<I: Isa>() -> usize {
    range_blocks::<I>() * PANEL_STRIDE
}

/// One thread's working space.
pub(crate) struct Space {
    panels: Aligned<u8>,
    /// Sums of the ranges so far, `[GROUPS_PER_PASS][rows][16]`.
    sums: Aligned<f32>,
}

impl Space {
    pub(crate) fn new() -> Self {
        let panels = Aligned::zeroed(PANEL_BLOCKS * PANEL_STRIDE);
        Self { panels, sums: Aligned::zeroed(GROUPS_PER_PASS * ROWS_PER_CHUNK * LANES) }
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

/// A range of `k` that some groups of columns meet.
struct Span {
    groups: Range<usize>,
    blocks: Range<usize>,
}

/// Where a tile stands.
#[derive(Clone, Copy)]
struct Place {
    group: usize,
    row: usize,
    /// The sums of the rows' earlier ranges of `k`, unless this is the first, and room for them, unless it is the last;
    /// and how far those of the next group are.
    sums: *mut f32,
    sums_stride: usize,
    is_first: bool,
    is_last: bool,
}

impl QuantizedGemm<'_> {
    #[inline(always)]
    fn product<I: Isa, L: Layout>(mut self, isa: I) {
        let (blocks, strips) = (self.x.strips.blocks, self.x.strips);
        assert!(self.part.group_bytes == L::FORMAT.group_bytes(blocks * BLOCK));
        assert!(self.groups.end * self.part.group_bytes <= self.part.data.len());
        assert!(self.rows.is_empty() || strips.place(self.rows.end - 1, blocks - 1) < self.x.blocks.len());
        assert!(self.rows.start.is_multiple_of(strips.rows));
        assert!(self.rows.len() <= ROWS_PER_CHUNK);
        let in_panels = self.rows.len() >= L::panel_rows::<I>();
        let step = if in_panels { range_blocks::<I>() } else { blocks };
        for pass in self.groups.clone().step_by(GROUPS_PER_PASS) {
            let groups = pass..self.groups.end.min(pass + GROUPS_PER_PASS);
            for first in (0..blocks).step_by(step) {
                let span = Span { groups: groups.clone(), blocks: first..blocks.min(first + step) };
                let mut group = pass;
                while group < groups.end {
                    // SAFETY: the assertions above bound groups, rows and blocks; panels have room for a range of
                    // GROUPS_MAX, and the sums for the groups of a pass and the rows of a chunk.
                    group += unsafe {
                        if !in_panels {
                            self.all_rows::<I, L, 1, false>(isa, &span, group)
                        } else if I::GROUPS_MAX == 2 && group + 1 < groups.end {
                            self.all_rows::<I, L, 2, true>(isa, &span, group)
                        } else {
                            self.all_rows::<I, L, 1, true>(isa, &span, group)
                        }
                    };
                }
            }
        }
    }

    /// All rows with the `G` groups from `group` on; returns `G`.
    #[inline(always)]
    unsafe fn all_rows<I: Isa, L: Layout, const G: usize, const PANEL: bool>(
        &mut self,
        isa: I,
        span: &Span,
        group: usize,
    ) -> usize {
        let (strips, count) = (self.x.strips, span.blocks.len());
        // SAFETY: the caller vouches for all of it.
        unsafe {
            let mut w = self.packed::<L>(group, span.blocks.start);
            if PANEL {
                let panels = self.space.panels.as_mut_ptr();
                for g in 0..G {
                    let packed = self.packed::<L>(group + g, span.blocks.start);
                    unpack_panel::<I, L>(isa, packed, count, panels.add(g * panel_bytes::<I>()));
                }
                w = panels;
            }
            let mut row = self.rows.start;
            while row < self.rows.end {
                let operands = Operands {
                    w,
                    blocks: count,
                    rows: self.x.blocks.as_ptr().add(strips.place(row, span.blocks.start)),
                    rows_stride: strips.rows,
                };
                let waiting = (group - span.groups.start) * self.rows.len() + row - self.rows.start;
                let place = Place {
                    group,
                    row,
                    sums: self.space.sums.as_mut_ptr().add(waiting * LANES),
                    sums_stride: self.rows.len() * LANES,
                    is_first: span.blocks.start == 0,
                    is_last: span.blocks.end == strips.blocks,
                };
                let done = self.some_rows::<I, L, G, PANEL>(isa, operands, place);
                if PANEL {
                    self.ask_for_next::<I, L, G>(isa, span, group, row..row + done);
                }
                row += done;
            }
        }
        G
    }

    /// The packed weights of a group from a block on.
    #[inline(always)]
    fn packed<L: Layout>(&self, group: usize, block: usize) -> *const u8 {
        self.part.data.as_ptr().wrapping_add(group * self.part.group_bytes + block * L::FORMAT.unit().0)
    }

    /// Asks for what the panels of these groups hold next: these rows' share of it.
    #[inline(always)]
    fn ask_for_next<I: Isa, L: Layout, const G: usize>(&self, isa: I, span: &Span, group: usize, rows: Range<usize>) {
        let lines = (span.blocks.len() * L::FORMAT.unit().0).div_ceil(64);
        let share = |row: usize| (row - self.rows.start) * lines / self.rows.len();
        for g in 0..G {
            let next = match group + G + g {
                next if next < span.groups.end => self.packed::<L>(next, span.blocks.start),
                _ if span.blocks.end < self.x.strips.blocks => self.packed::<L>(span.groups.start + g, span.blocks.end),
                next => self.packed::<L>(next, 0),
            };
            for line in share(rows.start)..share(rows.end) {
                isa.prefetch(next.wrapping_add(64 * line));
            }
        }
    }

    /// The next rows, as many as a tile takes; returns how many.
    #[inline(always)]
    unsafe fn some_rows<I: Isa, L: Layout, const G: usize, const PANEL: bool>(
        &self,
        isa: I,
        operands: Operands,
        place: Place,
    ) -> usize {
        // SAFETY: the caller vouches for the operands and sums of all rows that are left.
        unsafe {
            match self.rows.end - place.row {
                8.. if I::ROWS_MAX >= 8 && G == 1 => self.tile::<I, L, G, 8, PANEL>(isa, operands, place),
                4.. if I::ROWS_MAX >= 4 => self.tile::<I, L, G, 4, PANEL>(isa, operands, place),
                3 if I::ROWS_MAX >= 4 => self.tile::<I, L, G, 3, PANEL>(isa, operands, place),
                2 if I::ROWS_MAX >= 4 => self.tile::<I, L, G, 2, PANEL>(isa, operands, place),
                _ => self.tile::<I, L, G, 1, PANEL>(isa, operands, place),
            }
        }
    }

    #[inline(always)]
    unsafe fn tile<I: Isa, L: Layout, const G: usize, const R: usize, const PANEL: bool>(
        &self,
        isa: I,
        operands: Operands,
        place: Place,
    ) -> usize {
        let registers = [[isa.zero(); R]; G];
        let mut sums: Sums<I, G, R> = Sums { registers, memory: place.sums, stride: place.sums_stride };
        // SAFETY: the caller vouches for the operands and for sixteen sums of each row with each group.
        unsafe {
            for g in 0..G {
                for r in 0..R {
                    let earlier = if place.is_first { isa.zero() } else { isa.load(sums.place(g, r)) };
                    sums.set(isa, g, r, earlier);
                }
            }
            accumulate::<I, L, G, R, PANEL>(isa, operands, &mut sums);
            if !place.is_last {
                for g in 0..G {
                    for r in 0..R {
                        isa.store(sums.place(g, r), sums.get(isa, g, r));
                    }
                }
                return R;
            }
        }
        for g in 0..G {
            let column = (place.group + g) * LANES;
            let lanes = LANES.min(self.part.rows - column);
            let column = self.part.row_start + column;
            for r in 0..R {
                // SAFETY: these columns of these rows are this chunk's alone; a bias is as long as an output row.
                unsafe {
                    let sum = sums.get(isa, g, r);
                    let out = self.out.slice((place.row + r) * self.out_cols + column, lanes).as_mut_ptr();
                    let value = match self.bias {
                        Some(bias) => isa.add(sum, isa.load_partial(bias[column..][..lanes].as_ptr(), lanes)),
                        None => sum,
                    };
                    if lanes == LANES { isa.store(out, value) } else { isa.store_partial(out, value, lanes) }
                }
            }
        }
        R
    }
}
