//! What one thread does for attention: scores, softmax and values of one partition.

use super::Attention;
use super::merge::{Partition, finish_rows, merge_rows};
use crate::KvDType;
use crate::cpu::buffer::{Aligned, Shared};
use crate::cpu::isa::{Dispatch, Isa, Kernel, LANES};
use crate::cpu::tile::{BF16, Element, F8, F16, tile};

/// Keys of one partition. Part of what determines the bits of a result.
pub(crate) const PARTITION: usize = 256;
/// Query rows (queries × heads of a group) computed together.
pub(crate) const ROWS_MAX: usize = 96;
/// Query rows from which converting keys and values to f32 once pays.
const PACK_ROWS: usize = 8;

/// Some queries of one sequence and the query heads that share one key head, over some partitions of the keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unit {
    pub(crate) sequence: usize,
    pub(crate) head: usize,
    pub(crate) heads: usize,
    /// First query, counted from the sequence's first in this batch.
    pub(crate) query: u32,
    pub(crate) queries: u32,
    pub(crate) partitions: (usize, usize),
    /// Where the result of the (one) partition goes in the shared space; `None`: all partitions, merged at once.
    pub(crate) slot: Option<usize>,
}

impl Unit {
    /// Query rows: row `i` is query `i / heads`, head `i % heads`.
    pub(crate) fn rows(&self) -> usize {
        self.queries as usize * self.heads
    }
}

/// One thread's working space.
pub(crate) struct TileScratch {
    /// Scaled queries, `[rows, head_dim]`.
    queries: Aligned<f32>,
    /// Scores, then weights, `[rows, PARTITION]`.
    scores: Aligned<f32>,
    /// Keys or values as f32: `[head_dim][16]` of sixteen keys, or `[head_dim / 16][PARTITION][16]`.
    panel: Aligned<f32>,
    partition: Aligned<f32>,
    state: Aligned<f32>,
}

impl TileScratch {
    pub(crate) fn new() -> Self {
        let empty = || Aligned::zeroed(0);
        let scores = Aligned::zeroed(ROWS_MAX * PARTITION);
        Self { queries: empty(), scores, panel: empty(), partition: empty(), state: empty() }
    }

    pub(crate) fn reserve(&mut self, head_dim: usize) {
        self.queries.grow(ROWS_MAX * head_dim);
        self.panel.grow(PARTITION * head_dim.next_multiple_of(LANES));
        self.partition.grow(ROWS_MAX * Partition::stride(head_dim));
        self.state.grow(ROWS_MAX * Partition::stride(head_dim));
    }

    /// Where a unit's partitions are merged.
    pub(crate) fn state(&mut self, rows: usize, head_dim: usize) -> Partition<'_> {
        Partition::new(&mut self.state, rows, head_dim)
    }

    /// Computes a unit: its partition into its slot, or its final result into `out`.
    pub(crate) fn run(
        &mut self,
        dispatch: Dispatch,
        call: &Attention<'_>,
        unit: &Unit,
        partials: Shared<'_, f32>,
        out: Shared<'_, f32>,
    ) {
        let (rows, head_dim) = (unit.rows(), call.shape.head_dim);
        self.gather_queries(call, unit);
        for number in unit.partitions.0..unit.partitions.1 {
            let space = match unit.slot {
                // SAFETY: slots of different units do not overlap.
                Some(slot) => unsafe { partials.slice(slot, rows * Partition::stride(head_dim)) },
                None => &mut self.partition[..],
            };
            let mut result = Partition::new(space, rows, head_dim);
            let (queries, scores, panel) = (&self.queries[..], &mut self.scores[..], &mut self.panel[..]);
            let one = OnePartition { call, unit, number, queries, scores, panel, result: &mut result };
            dispatch.run(one);
            if unit.slot.is_none() {
                merge_rows(dispatch, Partition::new(&mut self.state, rows, head_dim), result, number == 0);
            }
        }
        if unit.slot.is_none() {
            finish_rows(dispatch, call, unit, self.state(rows, head_dim), out);
        }
    }

    /// Copies the unit's queries together, times the scale.
    fn gather_queries(&mut self, call: &Attention<'_>, unit: &Unit) {
        let head_dim = call.shape.head_dim;
        let first = call.batch.sequences[unit.sequence].query_start + unit.query;
        for (row, to) in self.queries.chunks_exact_mut(head_dim).take(unit.rows()).enumerate() {
            let token = first as usize + row / unit.heads;
            let start = token * call.shape.qkv_width() + (unit.head + row % unit.heads) * head_dim;
            for (to, from) in to.iter_mut().zip(&call.qkv[start..start + head_dim]) {
                *to = from * call.scale;
            }
        }
    }
}

/// One partition of one unit.
struct OnePartition<'a, 'b> {
    call: &'a Attention<'a>,
    unit: &'a Unit,
    number: usize,
    queries: &'a [f32],
    scores: &'a mut [f32],
    panel: &'a mut [f32],
    result: &'a mut Partition<'b>,
}

impl Kernel for OnePartition<'_, '_> {
    #[inline(always)]
    fn run<I: Isa>(mut self, isa: I) {
        match self.call.cache.layout().dtype {
            KvDType::F32 => self.compute::<I, f32>(isa),
            KvDType::F16 => self.compute::<I, F16>(isa),
            KvDType::BF16 => self.compute::<I, BF16>(isa),
            KvDType::F8 => self.compute::<I, F8>(isa),
        }
    }
}

/// Rows `$from..$to` in tiles as tall as the registers allow; `$step` is called with the first row and a constant
/// count.
macro_rules! in_tiles {
    ($isa:ident, $from:expr, $to:expr, |$row:ident, $count:ident| $step:expr) => {{
        let (mut $row, end) = ($from, $to);
        while $row < end {
            macro_rules! tile_of {
                ($n:literal) => {{
                    const $count: usize = $n;
                    $step;
                    $row += $n;
                }};
            }
            match end - $row {
                12.. if $isa::ROWS_MAX >= 12 => tile_of!(12),
                6.. if $isa::ROWS_MAX >= 6 => tile_of!(6),
                4.. if $isa::ROWS_MAX >= 6 => tile_of!(4),
                3 if $isa::ROWS_MAX >= 6 => tile_of!(3),
                2 if $isa::ROWS_MAX >= 6 => tile_of!(2),
                _ => tile_of!(1),
            }
        }
    }};
}

impl OnePartition<'_, '_> {
    /// Keys of this partition that row `row` sees. Never falls from one row to the next.
    #[inline(always)]
    fn visible(&self, row: usize) -> usize {
        let span = &self.call.batch.sequences[self.unit.sequence];
        let position = span.context_len - span.query_len + self.unit.query + (row / self.unit.heads) as u32;
        (position as usize + 1).saturating_sub(self.number * PARTITION).min(PARTITION)
    }

    /// Where key `key` of this partition lives: its page's keys and values, and its place in the page.
    #[inline(always)]
    fn locate<E>(&self, key: usize) -> (*const E, *const E, usize) {
        let size = self.call.cache.layout().block_size;
        let token = self.number * PARTITION + key;
        let table = self.call.batch.sequences[self.unit.sequence].table_start as usize;
        let page = self.call.batch.block_tables[table + token / size] as usize;
        let kv_head = self.unit.head / (self.call.shape.heads / self.call.shape.kv_heads);
        let (keys, values) = self.call.cache.page(self.call.layer, page, kv_head);
        (keys.cast_const().cast(), values.cast_const().cast(), token % size)
    }

    #[inline(always)]
    fn compute<I: Isa, E: Element>(&mut self, isa: I) {
        let rows = self.unit.rows();
        assert!(rows <= ROWS_MAX && rows * self.call.shape.head_dim <= self.queries.len());
        assert!(self.panel.len() >= PARTITION * self.call.shape.head_dim.next_multiple_of(LANES));
        assert!(self.scores.len() >= ROWS_MAX * PARTITION);
        self.scores::<I, E>(isa);
        for row in 0..rows {
            self.softmax(isa, row);
        }
        self.values::<I, E>(isa);
    }

    #[inline(always)]
    fn scores<I: Isa, E: Element>(&mut self, isa: I) {
        let (rows, head_dim) = (self.unit.rows(), self.call.shape.head_dim);
        let size = self.call.cache.layout().block_size;
        let limit = self.visible(rows - 1);
        let mut row_start = 0;
        for first in (0..limit).step_by(LANES) {
            while self.visible(row_start) <= first {
                row_start += 1;
            }
            let is_direct = size.is_multiple_of(LANES);
            let (keys, _, offset) = self.locate::<E>(first);
            // SAFETY: sixteen keys side by side lie within a page if its size is a multiple of sixteen; a panel holds
            // sixteen keys; queries and scores have ROWS_MAX rows (`compute` checked).
            unsafe {
                if is_direct && rows - row_start < PACK_ROWS {
                    self.score_tiles(isa, first, row_start, keys.add(offset), size);
                    continue;
                }
                let panel = self.panel.as_mut_ptr();
                if is_direct {
                    for d in 0..head_dim {
                        isa.store(panel.add(d * LANES), E::load(isa, keys.add(d * size + offset)));
                    }
                } else {
                    for lane in 0..LANES.min(limit - first) {
                        let (keys, _, offset) = self.locate::<E>(first + lane);
                        for d in 0..head_dim {
                            *panel.add(d * LANES + lane) = E::get(keys.add(d * size + offset));
                        }
                    }
                }
                self.score_tiles(isa, first, row_start, panel.cast_const(), LANES);
            }
        }
    }

    /// Scores of keys `first..first + 16`, which stand at `keys` as `[head_dim]` rows `stride` apart.
    #[inline(always)]
    unsafe fn score_tiles<I: Isa, E: Element>(
        &mut self,
        isa: I,
        first: usize,
        row_start: usize,
        keys: *const E,
        stride: usize,
    ) {
        let head_dim = self.call.shape.head_dim;
        in_tiles!(I, row_start, self.unit.rows(), |row, COUNT| {
            let mut acc = [[isa.zero(); 1]; COUNT];
            // SAFETY: the caller vouches for keys, queries and scores.
            unsafe {
                let queries = self.queries.as_ptr().add(row * head_dim);
                tile(isa, queries, head_dim, keys, stride, 0, head_dim, &mut acc);
                for (r, acc) in acc.iter().enumerate() {
                    isa.store(self.scores.as_mut_ptr().add((row + r) * PARTITION + first), acc[0]);
                }
            }
        });
    }

    /// Turns the scores of a row into weights. Beyond what the row sees they become zero.
    #[inline(always)]
    fn softmax<I: Isa>(&mut self, isa: I, row: usize) {
        let visible = self.visible(row);
        let padded = visible.next_multiple_of(LANES);
        let scores = &mut self.scores[row * PARTITION..][..padded];
        scores[visible..].fill(f32::NEG_INFINITY);
        let p = scores.as_mut_ptr();
        let mut max = isa.splat(f32::NEG_INFINITY);
        let mut sum = isa.zero();
        // SAFETY: `padded` scores, a multiple of sixteen.
        unsafe {
            for at in (0..padded).step_by(LANES) {
                max = isa.max(max, isa.load(p.add(at)));
            }
            let greatest = isa.reduce_max(max);
            for at in (0..padded).step_by(LANES) {
                let weight = isa.exp(isa.sub(isa.load(p.add(at)), isa.splat(greatest)));
                isa.store(p.add(at), weight);
                sum = isa.add(sum, weight);
            }
            self.result.max[row] = greatest;
        }
        self.result.sum[row] = isa.reduce_add(sum);
    }

    #[inline(always)]
    fn values<I: Isa, E: Element>(&mut self, isa: I) {
        let (rows, head_dim) = (self.unit.rows(), self.call.shape.head_dim);
        let limit = self.visible(rows - 1);
        if rows < PACK_ROWS && head_dim.is_multiple_of(LANES) {
            // As many vectors at a time as the registers hold sums for.
            let mut chunk = 0;
            while chunk < head_dim / LANES {
                chunk += match (head_dim / LANES - chunk).min(I::ROWS_MAX / rows) {
                    4.. => self.weigh_direct::<I, E, 4>(isa, chunk),
                    2.. => self.weigh_direct::<I, E, 2>(isa, chunk),
                    _ => self.weigh_direct::<I, E, 1>(isa, chunk),
                };
            }
            return;
        }
        let size = self.call.cache.layout().block_size;
        let panel = self.panel.as_mut_ptr();
        let mut key = 0;
        while key < limit {
            let (_, values, offset) = self.locate::<E>(key);
            let in_page = (size - offset).min(limit - key);
            for (from, key) in (offset..).zip(key..key + in_page) {
                for chunk in 0..head_dim.div_ceil(LANES) {
                    let count = LANES.min(head_dim - chunk * LANES);
                    // SAFETY: a page holds `head_dim` values of each token; the panel holds PARTITION keys (`compute`
                    // checked).
                    unsafe {
                        let from = values.add(from * head_dim + chunk * LANES);
                        let to = panel.add((chunk * PARTITION + key) * LANES);
                        if count == LANES {
                            isa.store(to, E::load(isa, from));
                        } else {
                            for lane in 0..LANES {
                                *to.add(lane) = if lane < count { E::get(from.add(lane)) } else { 0.0 };
                            }
                        }
                    }
                }
            }
            key += in_page;
        }
        for chunk in 0..head_dim.div_ceil(LANES) {
            in_tiles!(I, 0, rows, |row, COUNT| {
                let mut acc = [[isa.zero(); 1]; COUNT];
                let common = self.visible(row);
                // SAFETY: as above; weights are PARTITION apart.
                unsafe {
                    let values = panel.cast_const().add(chunk * PARTITION * LANES);
                    let weights = self.scores.as_ptr().add(row * PARTITION);
                    tile(isa, weights, PARTITION, values, LANES, 0, common, &mut acc);
                    for (r, acc) in acc.iter_mut().enumerate() {
                        // What later rows of the tile see beyond the first.
                        let more = self.visible(row + r) - common;
                        let weights = weights.add(r * PARTITION + common);
                        let mut one = [*acc];
                        tile(isa, weights, PARTITION, values.add(common * LANES), LANES, 0, more, &mut one);
                        self.put(isa, row + r, chunk, one[0][0]);
                    }
                }
            });
        }
    }

    /// `C` vectors of the values of all rows, straight from the pages; returns `C`.
    #[inline(always)]
    fn weigh_direct<I: Isa, E: Element, const C: usize>(&mut self, isa: I, chunk: usize) -> usize {
        in_tiles!(I, 0, self.unit.rows(), |row, COUNT| {
            let mut acc = [[isa.zero(); C]; COUNT];
            let common = self.visible(row);
            // SAFETY: rows are below ROWS_MAX; `weigh_pages` stays within the pages.
            unsafe {
                let weights = self.scores.as_ptr().add(row * PARTITION);
                self.weigh_pages::<I, E, COUNT, C>(isa, weights, chunk, 0..common, &mut acc);
                for (r, acc) in acc.into_iter().enumerate() {
                    let mut one = [acc];
                    let rest = common..self.visible(row + r);
                    self.weigh_pages::<I, E, 1, C>(isa, weights.add(r * PARTITION), chunk, rest, &mut one);
                    for (c, &value) in one[0].iter().enumerate() {
                        self.put(isa, row + r, chunk + c, value);
                    }
                }
            }
        });
        C
    }

    /// Adds the weighted values of `keys`, page by page.
    #[inline(always)]
    unsafe fn weigh_pages<I: Isa, E: Element, const R: usize, const C: usize>(
        &self,
        isa: I,
        weights: *const f32,
        chunk: usize,
        keys: std::ops::Range<usize>,
        acc: &mut [[I::F; C]; R],
    ) {
        let (head_dim, size) = (self.call.shape.head_dim, self.call.cache.layout().block_size);
        let mut key = keys.start;
        while key < keys.end {
            let (_, values, offset) = self.locate::<E>(key);
            let count = (size - offset).min(keys.end - key);
            // SAFETY: `count` keys are left in the page; the caller vouches for the weights.
            unsafe {
                let values = values.add(offset * head_dim + chunk * LANES);
                tile(isa, weights.add(key), PARTITION, values, head_dim, LANES, count, acc);
            }
            key += count;
        }
    }

    #[inline(always)]
    fn put<I: Isa>(&mut self, isa: I, row: usize, chunk: usize, value: I::F) {
        let at = row * self.call.shape.head_dim.next_multiple_of(LANES) + chunk * LANES;
        // SAFETY: sixteen values are there, or this panics.
        unsafe { isa.store(self.result.values[at..at + LANES].as_mut_ptr(), value) };
    }
}
