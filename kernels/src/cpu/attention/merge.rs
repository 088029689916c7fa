//! Merging the partitions of a row, in order, and dividing by the sum at the end (the online softmax of Milakov and
//! Gimelshein 2018).

use super::Attention;
use super::kernel::Unit;
use crate::cpu::buffer::Shared;
use crate::cpu::isa::{Dispatch, Isa, Kernel, LANES};

/// Result of some rows over one partition (or several, merged). `sum` is 0 for a row that sees none of its keys.
pub(crate) struct Partition<'a> {
    /// Largest score, `[rows]`.
    pub(super) max: &'a mut [f32],
    /// Sum of `exp(score - max)`, `[rows]`.
    pub(super) sum: &'a mut [f32],
    /// Sum of `exp(score - max) × value`, `[rows, padded head_dim]`.
    pub(super) values: &'a mut [f32],
}

impl<'a> Partition<'a> {
    /// f32 a row takes.
    pub(crate) fn stride(head_dim: usize) -> usize {
        head_dim.next_multiple_of(LANES) + 2
    }

    /// Lays the three parts out in `space`.
    pub(crate) fn new(space: &'a mut [f32], rows: usize, head_dim: usize) -> Self {
        let (max, rest) = space.split_at_mut(rows);
        let (sum, values) = rest.split_at_mut(rows);
        Self { max, sum, values: &mut values[..rows * head_dim.next_multiple_of(LANES)] }
    }
}

/// Merges the next partition into what the partitions before it gave.
pub(crate) fn merge_rows(dispatch: Dispatch, state: Partition<'_>, next: Partition<'_>, is_first: bool) {
    dispatch.run(Merge { state, next, is_first });
}

struct Merge<'a> {
    state: Partition<'a>,
    next: Partition<'a>,
    is_first: bool,
}

impl Kernel for Merge<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let Self { state, next, is_first } = self;
        if is_first {
            state.max.copy_from_slice(next.max);
            state.sum.copy_from_slice(next.sum);
            state.values.copy_from_slice(next.values);
            return;
        }
        let width = state.values.len() / state.max.len();
        let mut rows = state.values.chunks_exact_mut(width).zip(next.values.chunks_exact(width));
        for row in 0..state.max.len() {
            let Some((values, more)) = rows.next() else { return };
            if next.sum[row] == 0.0 {
                continue;
            }
            let greatest = if next.max[row] > state.max[row] { next.max[row] } else { state.max[row] };
            let old = isa.exp(isa.splat(state.max[row] - greatest));
            let new = isa.exp(isa.splat(next.max[row] - greatest));
            state.max[row] = greatest;
            let sum = isa.fma(isa.splat(state.sum[row]), old, isa.mul(isa.splat(next.sum[row]), new));
            state.sum[row] = isa.reduce_max(sum);
            for at in (0..width).step_by(LANES) {
                // SAFETY: rows are a multiple of sixteen long.
                unsafe {
                    let (to, more) = (values.as_mut_ptr().add(at), isa.load(more.as_ptr().add(at)));
                    isa.store(to, isa.fma(isa.load(to), old, isa.mul(more, new)));
                }
            }
        }
    }
}

/// Divides a unit's merged result by its sums and writes it to the attention output.
pub(crate) fn finish_rows(
    dispatch: Dispatch,
    call: &Attention<'_>,
    unit: &Unit,
    state: Partition<'_>,
    out: Shared<'_, f32>,
) {
    dispatch.run(Finish { call, unit, state, out });
}

struct Finish<'a> {
    call: &'a Attention<'a>,
    unit: &'a Unit,
    state: Partition<'a>,
    out: Shared<'a, f32>,
}

impl Kernel for Finish<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let head_dim = self.call.shape.head_dim;
        let first = self.call.batch.sequences[self.unit.sequence].query_start + self.unit.query;
        let padded = head_dim.next_multiple_of(LANES);
        for row in 0..self.unit.rows() {
            let token = first as usize + row / self.unit.heads;
            let start = token * self.call.shape.q_width() + (self.unit.head + row % self.unit.heads) * head_dim;
            // SAFETY: each row of the output belongs to one unit.
            let out = unsafe { self.out.slice(start, head_dim) };
            let values = &self.state.values[row * padded..][..padded];
            for at in (0..head_dim).step_by(LANES) {
                // SAFETY: padded rows are a multiple of sixteen long; the rest of `out` bounds the store.
                unsafe {
                    let value = isa.div(isa.load(values.as_ptr().add(at)), isa.splat(self.state.sum[row]));
                    isa.store_partial(out[at..].as_mut_ptr(), value, LANES.min(head_dim - at));
                }
            }
        }
    }
}
