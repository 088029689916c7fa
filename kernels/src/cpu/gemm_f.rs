//! Products of float weights (f32, f16, bf16, E4M3 with scales) with f32 activations.
//!
//! As in the quantised product, lanes are output columns and each output is summed over `k` in order in one
//! accumulator. A few rows read the packed weights directly, several column groups at a time so that enough sums are
//! under way to hide the latency of an addition. For more rows narrower weights are widened once into a panel in the
//! first-level cache. An E4M3 weight is `q × scale`, rounded to f32, wherever it is widened.
//!
//! As there, several groups take their turn before the next panel's `k`. A row's 256 `k` are 1 KiB and keep Zen 3 busy
//! for 256 cycles a group; of 128 rows they are 128 KiB, which stay in the second-level cache meanwhile. All `k` of
//! them stay in 512 KiB only if that is less than 1,000, and would otherwise come from the third level for each group;
//! what comes in their stead is 128 bytes of the sums, which wait in the output.

use std::ops::Range;

use super::buffer::{Aligned, Shared};
use super::isa::{Isa, Kernel, LANES};
use super::linear::Part;
use super::pack::{F8_BLOCK, F8_VALUES, Format};
use super::tile::{F16, tile, tile_f8, tile_pairs};

/// `k` in a panel of sixteen f32 columns: 16 KiB.
const PANEL_DEPTH: usize = 256;
/// Rows from which widening into a panel pays.
const PANEL_ROWS: usize = 5;
/// Most activations that stay in a second-level cache for the next group, all `k` of them: half of 512 KiB.
const CACHED_MAX: usize = 1 << 16;
/// Groups of columns that more activations meet before the `k` of the next panel have their turn.
const GROUPS_PER_PASS: usize = 16;

/// Space for one thread's panel.
pub(crate) fn panel() -> Aligned<f32> {
    Aligned::zeroed(PANEL_DEPTH * LANES)
}

/// Computes rows `rows` and column groups `groups` of one part of a weight.
pub(crate) struct FloatGemm<'a> {
    /// `[rows, depth]`.
    pub(crate) x: &'a [f32],
    pub(crate) depth: usize,
    pub(crate) part: &'a Part,
    pub(crate) groups: Range<usize>,
    pub(crate) rows: Range<usize>,
    /// Of the whole output row.
    pub(crate) bias: Option<&'a [f32]>,
    /// `[rows, out_cols]`; nobody else touches the named columns of the named rows.
    pub(crate) out: Shared<'a, f32>,
    pub(crate) out_cols: usize,
    pub(crate) panel: &'a mut Aligned<f32>,
}

/// Where a tile stands: first column group and row, and the `k` it covers.
struct Place {
    group: usize,
    row: usize,
    k: Range<usize>,
}

impl Kernel for FloatGemm<'_> {
    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        assert!(self.part.group_bytes == self.part.format.group_bytes(self.depth));
        assert!(self.groups.end * self.part.group_bytes <= self.part.data.len());
        assert!(self.rows.end * self.depth <= self.x.len());
        if self.rows.len() >= PANEL_ROWS { self.many_rows(isa) } else { self.few_rows(isa) }
    }
}

impl FloatGemm<'_> {
    #[inline(always)]
    fn few_rows<I: Isa>(&self, isa: I) {
        let mut group = self.groups.start;
        while group < self.groups.end {
            let place = Place { group, row: self.rows.start, k: 0..self.depth };
            let is_wide = self.groups.end - group >= 4;
            match (self.rows.len(), is_wide) {
                (0, _) => return,
                (1, true) => self.direct::<I, 1, 4>(isa, &place),
                (1, false) => self.direct::<I, 1, 1>(isa, &place),
                (2, true) => {
                    self.direct::<I, 2, 2>(isa, &place);
                    self.direct::<I, 2, 2>(isa, &Place { group: group + 2, ..place });
                }
                (2, false) => self.direct::<I, 2, 1>(isa, &place),
                (3, _) => self.direct::<I, 3, 1>(isa, &place),
                _ => self.direct::<I, 4, 1>(isa, &place),
            }
            group += if is_wide && self.rows.len() <= 2 { 4 } else { 1 };
        }
    }

    /// `R` rows by `C` column groups straight from the packed weights.
    #[inline(always)]
    fn direct<I: Isa, const R: usize, const C: usize>(&self, isa: I, place: &Place) {
        let mut acc = [[isa.zero(); C]; R];
        let stride = self.part.group_bytes;
        let weights = self.part.data[place.group * stride..].as_ptr();
        // SAFETY: `run` checked the groups and rows; a group holds `depth` rows of sixteen columns.
        unsafe {
            let x = self.x.as_ptr().add(place.row * self.depth);
            match self.part.format {
                Format::Bf16 => tile_pairs(isa, x, self.depth, weights.cast(), stride / 2, self.depth, &mut acc),
                Format::F16 => {
                    let weights = weights.cast::<F16>();
                    tile(isa, x, self.depth, weights, LANES, stride / 2, self.depth, &mut acc);
                }
                Format::F8 => tile_f8(isa, x, self.depth, weights, stride, self.depth, &mut acc),
                _ => tile(isa, x, self.depth, weights.cast::<f32>(), LANES, stride / 4, self.depth, &mut acc),
            }
        }
        self.finish(isa, place, &acc);
    }

    #[inline(always)]
    fn many_rows<I: Isa>(&mut self, isa: I) {
        let taken = if self.rows.len() * self.depth > CACHED_MAX { GROUPS_PER_PASS } else { 1 };
        let mut pass = self.groups.start;
        while pass < self.groups.end {
            let groups = pass..self.groups.end.min(pass + taken);
            let mut first = 0;
            while first < self.depth {
                let k = first..(first + PANEL_DEPTH).min(self.depth);
                for group in groups.clone() {
                    let panel = self.panel_of(isa, group, &k);
                    let mut row = self.rows.start;
                    while row < self.rows.end {
                        let place = Place { group, row, k: k.clone() };
                        row += match self.rows.end - row {
                            12.. if I::ROWS_MAX >= 12 => self.paneled::<I, 12>(isa, panel, &place),
                            6.. if I::ROWS_MAX >= 6 => self.paneled::<I, 6>(isa, panel, &place),
                            4.. if I::ROWS_MAX >= 6 => self.paneled::<I, 4>(isa, panel, &place),
                            2.. if I::ROWS_MAX >= 6 => self.paneled::<I, 2>(isa, panel, &place),
                            _ => self.paneled::<I, 1>(isa, panel, &place),
                        };
                    }
                }
                first = k.end;
            }
            pass = groups.end;
        }
    }

    /// Weights of `k`, sixteen columns, as f32.
    #[inline(always)]
    fn panel_of<I: Isa>(&mut self, isa: I, group: usize, k: &Range<usize>) -> *const f32 {
        let weights = self.part.data[group * self.part.group_bytes..].as_ptr();
        let panel = self.panel.as_mut_ptr();
        // SAFETY: `run` checked the group; a panel has room for PANEL_DEPTH rows and belongs to this thread alone.
        // Panels start at an even `k`, so a last odd one has its (zero) partner both in the weights and in the panel.
        unsafe {
            match self.part.format {
                Format::Bf16 => {
                    for pair in 0..k.len().div_ceil(2) {
                        let (first, second) = isa.load_bf16_pairs(weights.cast::<u16>().add((k.start / 2 + pair) * 32));
                        isa.store(panel.add(pair * 32), first);
                        isa.store(panel.add(pair * 32 + LANES), second);
                    }
                }
                Format::F16 => {
                    for i in 0..k.len() {
                        let values = isa.load_f16(weights.cast::<u16>().add((k.start + i) * LANES));
                        isa.store(panel.add(i * LANES), values);
                    }
                }
                Format::F8 => {
                    let unit = Format::F8.unit().0;
                    for (i, k) in k.clone().enumerate() {
                        let block = weights.add(k / F8_BLOCK * unit);
                        let quants = isa.load_f8_small(block.add(F8_VALUES + k % F8_BLOCK * LANES));
                        isa.store(panel.add(i * LANES), isa.mul(quants, isa.load(block.cast())));
                    }
                }
                _ => return weights.cast::<f32>().add(k.start * LANES),
            }
        }
        panel
    }

    #[inline(always)]
    fn paneled<I: Isa, const R: usize>(&self, isa: I, panel: *const f32, place: &Place) -> usize {
        let mut acc = [[isa.zero(); 1]; R];
        if place.k.start > 0 {
            for (r, acc) in acc.iter_mut().enumerate() {
                let out = self.place(place.group, place.row + r);
                // SAFETY: as many values as `out` has.
                acc[0] = unsafe { isa.load_partial(out.as_ptr(), out.len()) };
            }
        }
        // SAFETY: `run` checked the rows; the panel holds the `k` of `place`.
        unsafe {
            let x = self.x.as_ptr().add(place.row * self.depth + place.k.start);
            tile(isa, x, self.depth, panel, LANES, 0, place.k.len(), &mut acc);
        }
        self.finish(isa, place, &acc);
        R
    }

    /// The columns of `group` in output row `row`.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "`out` hands out disjoint parts")]
    fn place(&self, group: usize, row: usize) -> &mut [f32] {
        let column = group * LANES;
        let lanes = LANES.min(self.part.rows - column);
        // SAFETY: these columns of these rows are this chunk's alone, and each is looked at by one tile at a time.
        unsafe { self.out.slice(row * self.out_cols + self.part.row_start + column, lanes) }
    }

    #[inline(always)]
    fn finish<I: Isa, const R: usize, const C: usize>(&self, isa: I, place: &Place, acc: &[[I::F; C]; R]) {
        for (r, acc) in acc.iter().enumerate() {
            for (c, &acc) in acc.iter().enumerate() {
                let out = self.place(place.group + c, place.row + r);
                let column = self.part.row_start + (place.group + c) * LANES;
                // SAFETY: as many values as `out` has; a bias is as long as an output row.
                unsafe {
                    let value = match self.bias {
                        Some(bias) if place.k.end == self.depth => {
                            isa.add(acc, isa.load_partial(bias[column..][..out.len()].as_ptr(), out.len()))
                        }
                        _ => acc,
                    };
                    isa.store_partial(out.as_mut_ptr(), value, out.len());
                }
            }
        }
    }
}
