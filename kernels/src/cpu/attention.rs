//! Causal attention over pages.
//!
//! Keys are taken in partitions of 256, counted from position 0 (the idea is FlashDecoding's). For each query head a
//! partition yields its largest score, the sum of exponentials and the weighted values; these are merged in order. One
//! partition is computed the same way, operation for operation, whether its query stands alone or in a tile, whether
//! one thread merges as it goes or several threads have computed the partitions in advance: so the bits do not depend
//! on batch, chunking or threads. A key that a query must not see is not computed with at all.
//!
//! This file plans the work and spreads it over threads; [`kernel`] computes, [`merge`] merges.

mod kernel;
mod merge;

use kernel::{PARTITION, ROWS_MAX, TileScratch, Unit};
use merge::{Partition, finish_rows, merge_rows};

use super::buffer::{Activations, Aligned, PerThread, Shared};
use super::isa::Dispatch;
use super::kv::KvCache;
use super::pool::Pool;
use crate::{AttentionShape, Batch};

/// f32 in the space for partitions computed in advance (64 MiB, taken from the system only as far as it is used).
/// Work that would need more is not split.
const PARTIALS_MAX: usize = 1 << 24;

/// Working space for attention.
pub(crate) struct Scratch {
    units: Vec<Unit>,
    /// Items that were split, to be merged: their first unit, and how many they are.
    split: Vec<(usize, usize)>,
    partials: Aligned<f32>,
    tiles: PerThread<TileScratch>,
}

impl Scratch {
    pub(crate) fn new(threads: usize) -> Self {
        Self {
            units: Vec::new(),
            split: Vec::new(),
            partials: Aligned::zeroed(if threads > 1 { PARTIALS_MAX } else { 0 }),
            tiles: PerThread::new(threads, TileScratch::new),
        }
    }

    /// Makes room for heads of `head_dim` elements and steps of `rows` tokens, so that no step has to.
    pub(crate) fn reserve(&mut self, kv_heads: usize, head_dim: usize, rows: usize) {
        self.tiles.iter_mut().for_each(|tile| tile.reserve(head_dim));
        self.units.reserve((rows * kv_heads).saturating_sub(self.units.len()));
        self.split.reserve((rows * kv_heads).saturating_sub(self.split.len()));
    }

    /// Cuts the batch into units of work. A unit is some queries of a sequence times the heads that share a key head;
    /// one that is long beside the whole is cut into partitions.
    fn plan(&mut self, shape: AttentionShape, batch: &Batch, threads: usize) {
        self.units.clear();
        self.split.clear();
        let group = shape.heads / shape.kv_heads;
        let heads = group.min(ROWS_MAX);
        let queries = (ROWS_MAX / heads).max(1) as u32;
        let each_tile = |visit: &mut dyn FnMut(Unit, usize)| {
            for (sequence, span) in batch.sequences.iter().enumerate() {
                for head in (0..shape.heads).step_by(group).flat_map(|first| (first..first + group).step_by(heads)) {
                    let heads = heads.min((head / group + 1) * group - head);
                    // Last queries first: they see most keys, and what is long should not start last.
                    for tile in (0..span.query_len.div_ceil(queries)).rev() {
                        let query = tile * queries;
                        let count = queries.min(span.query_len - query);
                        let visible = (span.context_len - span.query_len + query + count) as usize;
                        let partitions = visible.div_ceil(PARTITION);
                        let rows = count as usize * heads;
                        let unit = Unit {
                            sequence,
                            head,
                            heads,
                            query,
                            queries: count,
                            partitions: (0, partitions),
                            slot: None,
                        };
                        visit(unit, rows);
                    }
                }
            }
        };
        let mut total = 0;
        each_tile(&mut |unit, rows| total += unit.partitions.1 * rows);
        let mut used = 0;
        each_tile(&mut |unit, rows| {
            let partitions = unit.partitions.1;
            let slot = rows * Partition::stride(shape.head_dim);
            let is_long = partitions > 1 && threads > 1 && 2 * threads * partitions * rows > total;
            if !is_long || used + partitions * slot > self.partials.len() {
                self.units.push(unit);
                return;
            }
            self.split.push((self.units.len(), partitions));
            for partition in 0..partitions {
                self.units.push(Unit { partitions: (partition, partition + 1), slot: Some(used), ..unit });
                used += slot;
            }
        });
    }
}

/// One attention call: what all its units share.
#[derive(Clone, Copy)]
pub(crate) struct Attention<'a> {
    /// `[tokens, shape.qkv_width()]`
    pub(crate) qkv: &'a [f32],
    pub(crate) shape: AttentionShape,
    pub(crate) scale: f32,
    pub(crate) cache: &'a KvCache,
    pub(crate) layer: usize,
    pub(crate) batch: &'a Batch,
}

/// Computes attention for the whole batch into `out`, `[tokens, shape.q_width()]`.
pub(crate) fn attention(
    dispatch: Dispatch,
    pool: &mut Pool,
    scratch: &mut Scratch,
    call: Attention<'_>,
    out: &mut Activations,
) {
    let shape = call.shape;
    assert!(shape.heads.is_multiple_of(shape.kv_heads) && out.cols() == shape.q_width());
    assert!(call.cache.layout().head_dim == shape.head_dim && call.cache.layout().kv_heads == shape.kv_heads);
    out.set_rows(call.batch.tokens.len());
    scratch.reserve(shape.kv_heads, shape.head_dim, 0);
    scratch.plan(shape, call.batch, pool.threads());
    let Scratch { units, split, partials, tiles } = scratch;
    let (out, partials) = (Shared::new(out.values_mut()), Shared::new(partials));
    pool.run(units.len(), &|thread, chunk| {
        // SAFETY: the pool gives each running chunk a thread number of its own.
        let tile = unsafe { tiles.get(thread) };
        tile.run(dispatch, &call, &units[chunk], partials, out);
    });
    pool.run(split.len(), &|thread, chunk| {
        let (first, count) = split[chunk];
        // SAFETY: as above.
        let tile = unsafe { tiles.get(thread) };
        let rows = units[first].rows();
        for unit in &units[first..first + count] {
            let Some(slot) = unit.slot else { continue };
            let stride = Partition::stride(shape.head_dim);
            // SAFETY: the units have written their slots; only this chunk reads these.
            let partition = Partition::new(unsafe { partials.slice(slot, rows * stride) }, rows, shape.head_dim);
            merge_rows(dispatch, tile.state(rows, shape.head_dim), partition, unit.partitions.0 == 0);
        }
        finish_rows(dispatch, &call, &units[first], tile.state(rows, shape.head_dim), out);
    });
}

#[cfg(test)]
mod tests;
