//! A weight matrix and its product: packing at load, splitting over threads in a step.

use super::arena::{Arena, Piece};
use super::buffer::{Activations, Aligned, PerThread, Shared};
use super::gemm_f::{self, FloatGemm};
use super::gemm_q::{self, QuantizedGemm};
use super::isa::{Dispatch, LANES};
use super::pack::{Format, pack_group, unpack_row};
use super::pool::Pool;
use super::quant::{QuantizedRows, quantize};
use crate::{KernelError, Matrix};

/// Rows that pass by one panel: as many as leave their activations of a panel's `k` in a second-level cache.
pub(crate) const ROWS_PER_CHUNK: usize = 128;
/// Multiply-adds below which waking other threads costs more than it saves.
const SERIAL_WORK: usize = 1 << 15;
/// Chunks a thread gets on average: enough to even out a thread that is slowed down.
const CHUNKS_PER_THREAD: usize = 6;

/// Consecutive output features that came from one matrix.
pub(crate) struct Part {
    pub(crate) format: Format,
    /// Where its features start in an output row.
    pub(crate) row_start: usize,
    /// Output features.
    pub(crate) rows: usize,
    /// Bytes of sixteen of them.
    pub(crate) group_bytes: usize,
    /// The groups, one after the other.
    pub(crate) data: Piece,
}

impl Part {
    fn groups(&self) -> usize {
        self.rows.div_ceil(LANES)
    }
}

/// A weight matrix `[out, in]`, one part for each matrix it was stacked from.
pub struct Linear {
    parts: Vec<Part>,
    rows: usize,
    cols: usize,
}

/// One thread's working space.
struct Panels {
    quantized: gemm_q::Space,
    float: Aligned<f32>,
}

/// Working space for products.
pub(crate) struct Scratch {
    quantized: QuantizedRows,
    panels: PerThread<Panels>,
}

impl Scratch {
    pub(crate) fn new(threads: usize) -> Self {
        let panels = || Panels { quantized: gemm_q::Space::new(), float: gemm_f::panel() };
        Self { quantized: QuantizedRows::new(), panels: PerThread::new(threads, panels) }
    }

    /// Makes room for activations of the shape `[rows, cols]`.
    pub(crate) fn reserve(&mut self, rows: usize, cols: usize) {
        self.quantized.reserve(rows, cols);
    }
}

impl Linear {
    /// Repacks `parts`, stacked along their rows, into memory from `arena`.
    pub(crate) fn new(pool: &mut Pool, arena: &mut Arena, parts: &[Matrix<'_>]) -> Result<Self, KernelError> {
        let cols = parts.first().map_or(0, Matrix::cols);
        let mut packed = Vec::with_capacity(parts.len());
        let mut rows = 0;
        for matrix in parts {
            if matrix.cols() != cols {
                return Err(KernelError::StackedColumns { first: cols, other: matrix.cols() });
            }
            let format = Format::of(matrix.dtype());
            let group_bytes = format.group_bytes(cols);
            let groups = matrix.rows().div_ceil(LANES);
            let mut data = arena.take(groups * group_bytes);
            let shared = Shared::new(&mut data);
            pool.run(groups, &|_, group| {
                // SAFETY: each group is packed by one chunk.
                pack_group(matrix, group, unsafe { shared.slice(group * group_bytes, group_bytes) });
            });
            packed.push(Part { format, row_start: rows, rows: matrix.rows(), group_bytes, data });
            rows += matrix.rows();
        }
        Ok(Self { parts: packed, rows, cols })
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of memory the weights take.
    pub(crate) fn bytes(&self) -> usize {
        self.parts.iter().map(|part| part.data.len()).sum()
    }

    /// Row `row` as f32: an embedding.
    pub(crate) fn row(&self, row: usize, out: &mut [f32]) {
        assert!(row < self.rows && out.len() == self.cols, "row {row} of a table of {}", self.rows);
        let part = &self.parts[self.parts.partition_point(|part| part.row_start + part.rows <= row)];
        let row = row - part.row_start;
        let group = &part.data[row / LANES * part.group_bytes..][..part.group_bytes];
        unpack_row(part.format, group, row % LANES, out);
    }

    /// `out = x · weightᵀ + bias`.
    pub(crate) fn product(
        &self,
        dispatch: Dispatch,
        pool: &mut Pool,
        scratch: &mut Scratch,
        x: &Activations,
        bias: Option<&[f32]>,
        out: &mut Activations,
    ) {
        assert!(x.cols() == self.cols && out.cols() == self.rows && bias.is_none_or(|bias| bias.len() == self.rows));
        let rows = x.rows();
        out.set_rows(rows);
        if self.parts.iter().any(|part| part.format.is_quantized()) {
            quantize_rows(dispatch, pool, &mut scratch.quantized, x);
        }
        let groups: usize = self.parts.iter().map(Part::groups).sum();
        let bands = rows.div_ceil(ROWS_PER_CHUNK);
        let threads = pool.threads();
        let is_small = threads == 1 || rows * self.rows * self.cols < SERIAL_WORK;
        let pieces = if is_small { 1 } else { (threads * CHUNKS_PER_THREAD).div_ceil(bands.max(1)).min(groups).max(1) };
        let view = scratch.quantized.view();
        let panels = &scratch.panels;
        let out_cols = self.rows;
        let shared = Shared::new(out.values_mut());
        let job = |thread: usize, chunk: usize| {
            let (band, piece) = (chunk % bands, chunk / bands);
            let rows = band * ROWS_PER_CHUNK..((band + 1) * ROWS_PER_CHUNK).min(rows);
            let wanted = groups * piece / pieces..groups * (piece + 1) / pieces;
            // SAFETY: the pool gives each running chunk a thread number of its own.
            let panels = unsafe { panels.get(thread) };
            let mut start = 0;
            for part in &self.parts {
                let end = start + part.groups();
                let own = wanted.start.clamp(start, end) - start..wanted.end.clamp(start, end) - start;
                start = end;
                if own.is_empty() {
                    continue;
                }
                if part.format.is_quantized() {
                    dispatch.run(QuantizedGemm {
                        x: view,
                        part,
                        groups: own,
                        rows: rows.clone(),
                        bias,
                        out: shared,
                        out_cols,
                        space: &mut panels.quantized,
                    });
                } else {
                    dispatch.run(FloatGemm {
                        x: x.values(),
                        depth: self.cols,
                        part,
                        groups: own,
                        rows: rows.clone(),
                        bias,
                        out: shared,
                        out_cols,
                        panel: &mut panels.float,
                    });
                }
            }
        };
        if is_small {
            (0..bands).for_each(|chunk| job(0, chunk));
        } else {
            pool.run(bands * pieces, &job);
        }
    }
}

fn quantize_rows(dispatch: Dispatch, pool: &mut Pool, quantized: &mut QuantizedRows, x: &Activations) {
    let (rows, cols) = (x.rows(), x.cols());
    let (blocks, strips) = quantized.start(rows, cols);
    let rows_per_chunk = (SERIAL_WORK / cols.max(1)).max(1);
    pool.run(rows.div_ceil(rows_per_chunk), &|_, chunk| {
        let first = chunk * rows_per_chunk;
        let count = rows_per_chunk.min(rows - first);
        // SAFETY: chunks are different rows.
        unsafe { quantize(dispatch, &x.values()[first * cols..][..count * cols], first, blocks, strips) };
    });
}

#[cfg(test)]
mod tests;
