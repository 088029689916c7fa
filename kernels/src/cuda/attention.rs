//! What reads and writes pages (`kernels/cuda/{rope,attention,prefill_attention}.cu`): which kernels, what they need
//! besides their operands, and their launches.

use super::backend::{CudaBackend, THREADS, address_of};
use super::buffer::{Activations, Buffer, KvCache, Rope, Vector};
use super::driver::{Address, Arg, Driver};
use super::hopper_attention::HopperAttention;
use super::plan::Plan;
use super::stream::Stream;
use crate::{AttentionShape, Batch, KvDType, KvLayout, QkNorm};

/// Threads of a block of either attention.
const ATTENTION_THREADS: usize = 256;
/// Blocks a multiprocessor should get. Two are there at a time, or one of those that take many registers: with at least
/// twice as many, those that are slower are made up for.
const BLOCKS_A_PROCESSOR: usize = 4;

/// Items of work that fill a device with so many multiprocessors.
pub(super) fn items_wanted(processors: usize, kv_heads: usize) -> usize {
    (BLOCKS_A_PROCESSOR * processors).div_ceil(kv_heads.max(1))
}

/// The kernel, and how many query heads it computes at a time: all that share a key/value head, if they are not too
/// many.
fn kernel(shape: AttentionShape, dtype: KvDType) -> (&'static str, usize) {
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
    made_for: (AttentionShape, usize),
}

impl<D: Driver> Partials<D> {
    pub(super) fn new(stream: &Stream<D>, shape: AttentionShape, slots: usize) -> Self {
        let of_head = (shape.head_dim + 2) * size_of::<f32>();
        Self {
            results: Buffer::zeroed(stream, slots * shape.heads * of_head),
            arrived: Buffer::zeroed(stream, slots * shape.heads * size_of::<i32>()),
            made_for: (shape, slots),
        }
    }

    pub(super) fn are_for(&self, shape: AttentionShape, slots: usize) -> bool {
        self.made_for == (shape, slots)
    }

    /// Of the results, and of the counts.
    pub(super) fn addresses(&self) -> [Address; 2] {
        [self.results.address(), self.arrived.address()]
    }
}

/// The kernel for a cache's type, of those for f32, f16, bf16 and f8.
fn of_type([f32, f16, bf16, f8]: [&'static str; 4], dtype: KvDType) -> &'static str {
    match dtype {
        KvDType::F32 => f32,
        KvDType::F16 => f16,
        KvDType::BF16 => bf16,
        KvDType::F8 => f8,
    }
}

/// The kernel that computes prompts in tiles on tensor cores, if there is one for such a cache. Otherwise their rows
/// are computed as those that decode.
fn prefill_kernel(layout: &KvLayout) -> Option<&'static str> {
    let kernels = match layout.head_dim {
        64 => ["prefill_attention_64_f16", "prefill_attention_64_bf16", "prefill_attention_64_f8"],
        96 => ["prefill_attention_96_f16", "prefill_attention_96_bf16", "prefill_attention_96_f8"],
        128 => ["prefill_attention_128_f16", "prefill_attention_128_bf16", "prefill_attention_128_f8"],
        256 => ["prefill_attention_256_f16", "prefill_attention_256_bf16", "prefill_attention_256_f8"],
        _ => return None,
    };
    match layout.dtype {
        _ if !layout.block_size.is_power_of_two() => None,
        KvDType::F32 => None,
        KvDType::F16 => Some(kernels[0]),
        KvDType::BF16 => Some(kernels[1]),
        KvDType::F8 => Some(kernels[2]),
    }
}

/// What `attention` is told of queries, keys and values that are where they belong.
const NO_ROTATION: [Arg; 6] = {
    let none = Arg::Pointer(Address::NULL);
    [none, none, Arg::Int(0), none, none, Arg::Float(0.0)]
};

/// Whether all rows of the step are computed as those that decode.
pub(super) fn decodes_all(plan: &Plan, layout: &KvLayout) -> bool {
    plan.shape().tiles == 0 || prefill_kernel(layout).is_none()
}

impl<D: Driver> CudaBackend<D> {
    #[allow(clippy::too_many_arguments, reason = "as Backend::rope_and_cache has them")]
    pub(super) fn enqueue_rope_and_cache(
        &self,
        qkv: &Activations<D>,
        shape: AttentionShape,
        norm: Option<QkNorm<'_, Vector<D>>>,
        rope: &Rope<D>,
        cache: &KvCache<D>,
        layer: usize,
        batch: &Batch,
    ) {
        assert_eq!(qkv.cols, shape.qkv_width(), "columns of queries, keys and values");
        self.check_plan(qkv.rows, batch);
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        let planned = self.plan.shape();
        let [cos, sin, pairs, q_norm, k_norm, eps] = self.rotation(norm, rope);
        let args = [
            qkv.address().into(),
            self.planned(planned.positions()),
            self.planned(planned.table_starts()),
            self.planned(planned.block_tables()),
            cos,
            sin,
            pairs,
            q_norm,
            k_norm,
            eps,
            cache.layer(layer).into(),
            heads.into(),
            kv_heads.into(),
            head_dim.into(),
            cache.layout.block_size.into(),
        ];
        let kernels = ["rope_and_cache_f32", "rope_and_cache_f16", "rope_and_cache_bf16", "rope_and_cache_f8"];
        let grid = [qkv.computed_rows(), (heads + 2 * kv_heads).div_ceil(4), 1];
        self.stream.launch(of_type(kernels, cache.layout.dtype), grid, THREADS, &args);
    }

    /// What kernels are told of it: `Rotation` of `kernels/cuda/rotation.cuh`.
    pub(super) fn rotation(&self, norm: Option<QkNorm<'_, Vector<D>>>, rope: &Rope<D>) -> [Arg; 6] {
        assert!((self.plan.position_max() as usize) < rope.positions, "positions within the rotation table");
        [
            rope.cos.address().into(),
            rope.sin.address().into(),
            rope.pairs.into(),
            address_of(norm.as_ref().map(|norm| norm.q)),
            address_of(norm.as_ref().map(|norm| norm.k)),
            norm.map_or(0.0, |norm| norm.eps).into(),
        ]
    }

    /// With a rotation, of a step that only decodes, of what `rope_and_cache` has not seen, in its stead. To f32, or
    /// rounded to bf16, of which the other is no address; rounded only if [`decodes_all`] says that it may be.
    #[allow(clippy::too_many_arguments, reason = "as Backend::attention has them")]
    pub(super) fn enqueue_attention(
        &mut self,
        qkv: &Activations<D>,
        shape: AttentionShape,
        scale: f32,
        rotation: Option<[Arg; 6]>,
        cache: &KvCache<D>,
        layer: usize,
        batch: &Batch,
        [out, rounded]: [Address; 2],
    ) {
        assert_eq!(qkv.cols, shape.qkv_width(), "columns of queries, keys and values");
        self.check_plan(qkv.rows, batch);
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        let shared_by = heads / kv_heads;
        assert!(
            rounded == Address::NULL || decodes_all(&self.plan, &cache.layout),
            "prompts' attention is not rounded"
        );
        assert!(rotation.is_none() || self.plan.decodes(), "where there are prompts, keys are stored before attention");
        let slots = self.plan.slots();
        if self.partials.as_ref().is_none_or(|partials| !partials.are_for(shape, slots)) {
            self.graphs.clear();
            self.partials = Some(Partials::new(&self.stream, shape, slots));
        }
        let [partials, arrived] = self.partials.as_ref().map_or([Address::NULL; 2], Partials::addresses);
        let planned = self.plan.shape();
        let [cos, sin, pairs, q_norm, k_norm, eps] = rotation.unwrap_or(NO_ROTATION);
        let args = [
            qkv.address().into(),
            self.planned(planned.positions()),
            self.planned(planned.table_starts()),
            self.planned(planned.block_tables()),
            self.planned(planned.items()),
            cos,
            sin,
            pairs,
            q_norm,
            k_norm,
            eps,
            cache.layer(layer).into(),
            heads.into(),
            kv_heads.into(),
            shared_by.into(),
            head_dim.into(),
            cache.layout.block_size.into(),
            scale.into(),
            partials.into(),
            arrived.into(),
            out.into(),
            rounded.into(),
        ];
        let (kernel, at_a_time) = kernel(shape, cache.layout.dtype);
        let tiled = prefill_kernel(&cache.layout);
        let items = if tiled.is_some() { planned.decode_items } else { planned.items };
        let grid = [items, shared_by.div_ceil(at_a_time), kv_heads];
        self.stream.launch(kernel, grid, ATTENTION_THREADS, &args);
        let Some(kernel) = tiled.filter(|_| planned.tiles > 0) else { return };
        let grid = [planned.tiles * heads, 1, 1];
        let pages = cache.layer(layer);
        let plan = [planned.positions(), planned.table_starts(), planned.block_tables(), planned.tiles()];
        let [positions, table_starts, block_tables, tiles] = plan.map(|word| self.planned(word));
        let [qkv, block_size, out] = [qkv.address().into(), cache.layout.block_size.into(), out.into()];
        let [heads, kv_heads, scale] = [heads.into(), kv_heads.into(), scale.into()];
        if let Some(hopper) = HopperAttention::of(&cache.layout).filter(|_| self.wgmma) {
            let args = [qkv, positions, table_starts, block_tables, tiles, heads, kv_heads, block_size, scale, out];
            return hopper.enqueue(&self.stream, pages, &cache.layout, grid, &args);
        }
        let pages = pages.into();
        let args = [qkv, positions, table_starts, block_tables, tiles, pages, heads, kv_heads, block_size, scale, out];
        self.stream.launch(kernel, grid, ATTENTION_THREADS, &args);
    }
}
