//! Which kernel of `kernels/cuda/attention.cu`, and what it needs besides its operands.

use super::buffer::Buffer;
use super::driver::{Address, Driver};
use super::plan::SLOTS_MAX;
use super::stream::Stream;
use crate::{AttentionShape, KvDType};

/// Threads of a block.
pub(super) const THREADS: usize = 256;
/// Blocks a multiprocessor should get. Two are there at a time: with twice as many, those that are slower are made up
/// for.
const BLOCKS_A_PROCESSOR: usize = 4;

/// Items of work that fill a device with so many multiprocessors.
pub(super) fn items_wanted(processors: usize, kv_heads: usize) -> usize {
    (BLOCKS_A_PROCESSOR * processors).div_ceil(kv_heads.max(1))
}

/// The kernel, and how many query heads it computes at a time: all that share a key/value head, if they are not too
/// many.
pub(super) fn kernel(shape: AttentionShape, dtype: KvDType) -> (&'static str, usize) {
    macro_rules! of_type {
        ($heads_and_lanes:literal) => {
            match dtype {
                KvDType::F32 => concat!("attention_", $heads_and_lanes, "_f32"),
                KvDType::F16 => concat!("attention_", $heads_and_lanes, "_f16"),
                KvDType::BF16 => concat!("attention_", $heads_and_lanes, "_bf16"),
                KvDType::F8 => concat!("attention_", $heads_and_lanes, "_f8"),
            }
        };
    }
    // Lanes that lie across a head, eight elements each.
    let lanes = match shape.head_dim {
        0..=64 => 8,
        65..=128 => 16,
        _ => 32,
    };
    let most = if lanes == 32 { 4 } else { 8 };
    let heads = (shape.heads / shape.kv_heads).next_power_of_two().min(most);
    let kernel = match (heads, lanes) {
        (1, 8) => of_type!("1x8"),
        (2, 8) => of_type!("2x8"),
        (4, 8) => of_type!("4x8"),
        (_, 8) => of_type!("8x8"),
        (1, 16) => of_type!("1x16"),
        (2, 16) => of_type!("2x16"),
        (4, 16) => of_type!("4x16"),
        (_, 16) => of_type!("8x16"),
        (1, _) => of_type!("1x32"),
        (2, _) => of_type!("2x32"),
        (_, _) => of_type!("4x32"),
    };
    (kernel, heads)
}

/// Where partitions leave their results until they are merged.
pub(super) struct Partials<D: Driver> {
    results: Buffer<D>,
    /// Partitions of a row that have left theirs; zeros between steps.
    arrived: Buffer<D>,
    made_for: AttentionShape,
}

impl<D: Driver> Partials<D> {
    pub(super) fn new(stream: &Stream<D>, shape: AttentionShape) -> Self {
        let of_head = (shape.head_dim + 2) * size_of::<f32>();
        Self {
            results: Buffer::zeroed(stream, SLOTS_MAX * shape.heads * of_head),
            arrived: Buffer::zeroed(stream, SLOTS_MAX * shape.heads * size_of::<i32>()),
            made_for: shape,
        }
    }

    pub(super) fn are_for(&self, shape: AttentionShape) -> bool {
        self.made_for == shape
    }

    /// Of the results, and of the counts.
    pub(super) fn addresses(&self) -> [Address; 2] {
        [self.results.address(), self.arrived.address()]
    }
}
