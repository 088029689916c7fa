//! The operations of a step, enqueued.

use super::attention::{self, Partials};
use super::buffer::{Activations, Buffer, KvCache, Linear, Rope, Staged, Vector, bytes_of};
use super::driver::{Address, Arg, Driver};
use super::gemm::Products;
use super::graphs::Graphs;
use super::plan::Plan;
use super::rounded::Rounding;
use super::sample::Sampler;
use super::skinny::{self, Skinny, Then};
use super::stream::Stream;
use crate::{
    Attention, AttentionShape, Backend, Batch, DeviceRegion, DrawsAhead, KernelError, KvLayout, KvPages, Matrix,
    Projection, QkNorm, Residual, RmsNorm, RopeTable, SampleRow, Sampled, WarmUp,
};

/// Threads of a block of the row-wise kernels (`kernels/cuda/rowwise.cu`).
pub(super) const ROWWISE_THREADS: usize = 256;
/// Threads of a block of the other kernels.
pub(super) const THREADS: usize = 128;
/// What allocations that other processes open are a multiple of.
const IPC_BLOCK_BYTES: usize = 2 << 20;
/// Widest heads (`HEAD_DIM_MAX` in `kernels/cuda/pages.cuh`); their width is a multiple of eight.
const HEAD_DIM_MAX: usize = 256;

/// A CUDA device as a [`Backend`].
///
/// Everything is enqueued on one stream. What a step needs to know is sent once, in [`Backend::step`]; the host waits
/// for the device only where it reads sampled tokens, and where a step's logits come in more than two tiles, as those
/// of scored prompts do: a tile's description goes where that of the last but one was.
pub struct CudaBackend<D: Driver> {
    /// First, and so dropped first: recordings hold kernels of the module that the driver unloads when it is dropped.
    pub(super) graphs: Graphs<D>,
    pub(super) stream: Stream<D>,
    pub(super) plan: Plan,
    pub(super) step: Staged<D>,
    selected: Staged<D>,
    pub(super) sampler: Sampler<D>,
    pub(super) products: Products<D>,
    /// Whether prompts' attention goes by wgmma where it can; `products` knows it of itself.
    pub(super) wgmma: bool,
    /// Made when heads are known.
    pub(super) partials: Option<Partials<D>>,
}

impl<D: Driver> CudaBackend<D> {
    /// Works with `driver`'s device.
    pub fn new(driver: D) -> Self {
        let wgmma = driver.has_wgmma();
        Self {
            graphs: Graphs::new(),
            stream: Stream::new(driver),
            plan: Plan::default(),
            step: Staged::new(),
            selected: Staged::new(),
            sampler: Sampler::new(),
            products: Products::new(wgmma),
            wgmma,
            partials: None,
        }
    }

    /// Records so many steps at most, none if 0; otherwise 128.
    pub fn with_graphs_max(mut self, most: usize) -> Self {
        self.graphs.limit(most);
        self
    }

    /// Whether products of more than a few rows, and the attention of prompts, go by wgmma from now on, where the
    /// device has it: for whoever measures what that is worth.
    pub fn use_wgmma(&mut self, wanted: bool) {
        self.graphs.clear();
        self.wgmma = wanted && self.driver().has_wgmma();
        self.products.use_wgmma(self.wgmma);
    }

    /// The driver.
    pub fn driver(&self) -> &D {
        self.stream.driver()
    }

    /// Steps that were recorded so far.
    pub fn graphs(&self) -> usize {
        self.graphs.count()
    }

    /// Where a part of the step's plan starts on the device.
    pub(super) fn planned(&self, word: usize) -> Arg {
        self.step.address().offset(word * size_of::<i32>()).into()
    }

    pub(super) fn check_plan(&self, rows: usize, batch: &Batch) {
        assert!([rows, self.plan.tokens()] == [batch.tokens.len(); 2], "the step was begun with this batch");
    }
}

pub(super) fn address_of<D: Driver>(vector: Option<&Vector<D>>) -> Arg {
    vector.map_or(Address::NULL, |vector| vector.buffer.address()).into()
}

impl<D: Driver> Backend for CudaBackend<D> {
    type Linear = Linear<D>;
    type Vector = Vector<D>;
    type Rope = Rope<D>;
    type Activations = Activations<D>;
    type KvCache = KvCache<D>;

    fn linear_weight(&mut self, parts: &[Matrix<'_>]) -> Result<Linear<D>, KernelError> {
        Linear::new(&self.stream, parts)
    }

    fn linear_bytes(&self, weight: &Linear<D>) -> usize {
        weight.bytes
    }

    fn vector(&mut self, values: &[f32]) -> Vector<D> {
        let mut padded = values.to_vec();
        padded.resize(values.len().next_multiple_of(8), 0.0);
        Vector { buffer: Buffer::holding(&self.stream, bytes_of(&padded)), len: values.len() }
    }

    fn rope(&mut self, table: RopeTable) -> Rope<D> {
        let (cos, sin) = table.tables();
        Rope {
            cos: Buffer::holding(&self.stream, bytes_of(cos)),
            sin: Buffer::holding(&self.stream, bytes_of(sin)),
            pairs: table.pairs(),
            positions: table.positions(),
        }
    }

    fn activations(&mut self, rows_max: usize, cols: usize) -> Activations<D> {
        // Whoever makes buffers will not do the same steps as before.
        self.graphs.clear();
        Activations::new(&self.stream, rows_max, cols)
    }

    fn kv_cache(&mut self, layout: KvLayout) -> Result<KvCache<D>, KernelError> {
        if !layout.head_dim.is_multiple_of(8) || layout.head_dim > HEAD_DIM_MAX {
            return Err(KernelError::HeadDim { head_dim: layout.head_dim, max: HEAD_DIM_MAX });
        }
        // Recorded steps read another cache's pages.
        self.graphs.clear();
        // Opening memory of another process opens the block that the driver has it in, which is so large: there is
        // nothing else in it.
        let bytes = DeviceRegion::bytes(layout.region_shape());
        let bytes = bytes.checked_next_multiple_of(IPC_BLOCK_BYTES).unwrap_or(usize::MAX);
        let buffer = Buffer::zeroed(&self.stream, bytes);
        self.stream.check()?;
        self.plan.aim_at(attention::items_wanted(self.driver().processors(), layout.kv_heads));
        self.plan.read_from(&layout);
        Ok(KvCache { buffer, layout })
    }

    fn kv_pages(&self, cache: &KvCache<D>) -> Option<KvPages> {
        let memory = cache.buffer.memory()?;
        Some(KvPages::Device(DeviceRegion::new(memory, self.driver().mover(), cache.layout.region_shape())))
    }

    fn is_recording(&self) -> bool {
        self.graphs.is_recording()
    }

    fn begin(&mut self, batch: &Batch) {
        self.plan.set(batch);
        let words = bytes_of(self.plan.words());
        if self.step.reserve(&self.stream, words.len()) {
            // Recorded kernels read where the plan was.
            self.graphs.clear();
        }
        self.step.upload(&self.stream, &[words]);
    }

    fn step(&mut self, batch: &Batch, operations: &mut dyn FnMut(&mut Self)) {
        self.begin(batch);
        // Without logits a step has fewer operations than one that decodes, and may have its shape.
        if batch.logit_rows.is_empty() { operations(self) } else { self.run(operations) }
    }

    fn warm_up_sizes(&self, sequences: usize) -> Vec<usize> {
        self.bucket_sizes(sequences)
    }

    fn warm_up(&mut self, batch: &Batch, operations: &mut dyn FnMut(&mut Self)) -> WarmUp {
        self.prepare(batch, operations)
    }

    fn check(&mut self) -> Result<(), KernelError> {
        self.stream.check().map_err(KernelError::from)
    }

    fn embed(&mut self, table: &Linear<D>, batch: &Batch, out: &mut Activations<D>) {
        assert_eq!(out.cols, table.cols, "columns of the table");
        out.set_rows(batch.tokens.len());
        self.check_plan(out.rows, batch);
        let tokens = self.planned(self.plan.shape().tokens().start);
        let drawn = self.sampler.outcomes().into();
        for part in &table.parts {
            let args = [
                part.values.address().into(),
                part.scales.address().into(),
                tokens,
                drawn,
                out.address().into(),
                table.cols.into(),
                part.rows.into(),
                part.first.into(),
            ];
            let kernel = part.form.kernels().embed;
            self.stream.launch(kernel, [out.computed_rows(), 1, 1], THREADS, &args);
        }
    }

    fn rms_norm(&mut self, x: &Activations<D>, weight: &Vector<D>, eps: f32, out: &mut Activations<D>) {
        assert!(x.cols == weight.len && out.cols == weight.len, "columns of a norm");
        out.set_rows(x.rows);
        let args =
            [x.address().into(), weight.buffer.address().into(), out.address().into(), x.cols.into(), eps.into()];
        self.stream.launch("rms_norm", [out.computed_rows(), 1, 1], ROWWISE_THREADS, &args);
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut Activations<D>,
        delta: &Activations<D>,
        weight: &Vector<D>,
        eps: f32,
        out: &mut Activations<D>,
    ) {
        assert!([residual.cols, delta.cols, out.cols] == [weight.len; 3], "columns of a norm");
        out.set_rows(residual.rows);
        let args = [
            residual.address().into(),
            delta.address().into(),
            weight.buffer.address().into(),
            out.address().into(),
            residual.cols.into(),
            eps.into(),
        ];
        self.stream.launch("add_rms_norm", [out.computed_rows(), 1, 1], ROWWISE_THREADS, &args);
    }

    fn linear(&mut self, x: &Activations<D>, weight: &Linear<D>, bias: Option<&Vector<D>>, out: &mut Activations<D>) {
        assert!(x.cols == weight.cols && out.cols == weight.rows, "features of the weight");
        out.set_rows(x.rows);
        let rows = out.computed_rows();
        if rows <= skinny::ROWS_MAX {
            return Skinny { x, norm: None, weight, bias, then: Then::Store }.enqueue(&self.stream, out);
        }
        self.make_room_for(rows, weight);
        for alike in weight.parts.chunk_by(|a, b| Rounding::of(a.form) == Rounding::of(b.form)) {
            if let Some(rounding) = Rounding::of(alike[0].form) {
                let rounded = self.products.next(rounding, rows, x.cols);
                rounded.round(&self.stream, x);
                alike.iter().for_each(|part| self.products.multiply(&self.stream, &rounded, part, bias, out));
                continue;
            }
            for part in alike {
                let args = [
                    part.values.address().into(),
                    part.scales.address().into(),
                    x.address().into(),
                    address_of(bias),
                    out.address().into(),
                    rows.into(),
                    weight.cols.into(),
                    part.rows.into(),
                    out.cols.into(),
                    part.first.into(),
                ];
                let grid = [part.rows.div_ceil(64), rows.div_ceil(32), 1];
                self.stream.launch("tiled_f32", grid, THREADS, &args);
            }
        }
    }

    fn add_linear(
        &mut self,
        x: &Activations<D>,
        weight: &Linear<D>,
        bias: Option<&Vector<D>>,
        residual: &mut Residual<Activations<D>>,
    ) {
        self.enqueue_add_linear(x, weight, bias, residual);
    }

    fn norm_linear(
        &mut self,
        residual: &mut Residual<Activations<D>>,
        norm: RmsNorm<'_, Vector<D>>,
        weight: &Linear<D>,
        bias: Option<&Vector<D>>,
        out: &mut Activations<D>,
    ) {
        self.enqueue_norm_linear(residual, norm, weight, bias, out);
    }

    fn norm_linear_silu_mul(
        &mut self,
        residual: &mut Residual<Activations<D>>,
        norm: RmsNorm<'_, Vector<D>>,
        weight: &Linear<D>,
        bias: Option<&Vector<D>>,
        gate_up: &mut Activations<D>,
        out: &mut Activations<D>,
    ) {
        self.enqueue_norm_linear_silu_mul(residual, norm, weight, bias, gate_up, out);
    }

    fn add_mlp(
        &mut self,
        residual: &mut Residual<Activations<D>>,
        norm: RmsNorm<'_, Vector<D>>,
        gate_up: Projection<'_, Linear<D>, Vector<D>>,
        down: Projection<'_, Linear<D>, Vector<D>>,
        buffers: [&mut Activations<D>; 2],
    ) {
        self.enqueue_add_mlp(residual, norm, gate_up, down, buffers);
    }

    fn add_attention(
        &mut self,
        qkv: &mut Activations<D>,
        attention: Attention<'_, Linear<D>, Vector<D>, Rope<D>>,
        cache: &mut KvCache<D>,
        layer: usize,
        batch: &Batch,
        mixed: &mut Activations<D>,
        residual: &mut Residual<Activations<D>>,
        stored: &mut dyn FnMut(&Self),
    ) {
        self.enqueue_add_attention(qkv, attention, cache, layer, batch, mixed, residual, stored);
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut Activations<D>,
        shape: AttentionShape,
        norm: Option<QkNorm<'_, Vector<D>>>,
        rope: &Rope<D>,
        cache: &mut KvCache<D>,
        layer: usize,
        batch: &Batch,
    ) {
        self.enqueue_rope_and_cache(qkv, shape, norm, rope, cache, layer, batch);
    }

    fn attention(
        &mut self,
        qkv: &Activations<D>,
        shape: AttentionShape,
        scale: f32,
        cache: &KvCache<D>,
        layer: usize,
        batch: &Batch,
        out: &mut Activations<D>,
    ) {
        assert_eq!(out.cols, shape.q_width(), "columns of attention's output");
        out.set_rows(batch.tokens.len());
        self.enqueue_attention(qkv, shape, scale, None, cache, layer, batch, [out.address(), Address::NULL]);
    }

    fn silu_mul(&mut self, gate_up: &Activations<D>, out: &mut Activations<D>) {
        assert_eq!(gate_up.cols, 2 * out.cols, "gate, then up");
        out.set_rows(gate_up.rows);
        let args = [gate_up.address().into(), out.address().into(), out.cols.into()];
        let grid = [out.computed_rows(), out.cols.div_ceil(ROWWISE_THREADS), 1];
        self.stream.launch("silu_mul", grid, ROWWISE_THREADS, &args);
    }

    fn select_rows(&mut self, x: &Activations<D>, rows: &[u32], out: &mut Activations<D>) {
        assert_eq!(x.cols, out.cols, "columns of selected rows");
        out.set_rows(rows.len());
        // Those of steps that only decode are all rows, in order: nothing is sent, and the device waits for no copy.
        let mut selected = Address::NULL;
        if !rows.iter().copied().eq(0..rows.len() as u32) {
            let bytes = bytes_of(rows);
            self.selected.reserve(&self.stream, bytes.len());
            self.selected.upload(&self.stream, &[bytes]);
            selected = self.selected.address();
        }
        let args = [x.address().into(), selected.into(), out.address().into(), x.cols.into()];
        self.stream.launch("select_rows", [rows.len(), 1, 1], ROWWISE_THREADS, &args);
    }

    fn sample<'a>(
        &mut self,
        logits: &mut Activations<D>,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
    ) {
        assert!(out.len() == logits.rows, "one outcome a row");
        self.sampler.assert_idle();
        self.make_room(out.len());
        self.draw(logits, 0, row);
        self.fetch(out.len());
        self.collect(out);
    }

    fn ahead(&mut self) -> Option<&mut dyn DrawsAhead<Activations<D>>> {
        Some(self)
    }

    fn read(&self, x: &Activations<D>) -> Vec<f32> {
        let mut padded = vec![0u8; x.rows * x.stride() * size_of::<f32>()];
        self.stream.attempt(|driver| driver.read(x.address(), &mut padded));
        let value = |bytes: &[u8; 4]| f32::from_ne_bytes(*bytes);
        let rows = padded.as_chunks::<4>().0.chunks_exact(x.stride().max(1));
        rows.flat_map(|row| row[..x.cols].iter().map(value)).collect()
    }

    fn write(&mut self, values: &[f32], out: &mut Activations<D>) {
        assert!(values.len().is_multiple_of(out.cols), "whole rows");
        out.set_rows(values.len() / out.cols);
        let mut padded = vec![0.0; out.rows * out.stride()];
        for (to, from) in padded.chunks_exact_mut(out.stride()).zip(values.chunks_exact(out.cols)) {
            to[..out.cols].copy_from_slice(from);
        }
        self.stream.attempt(|driver| driver.write(bytes_of(&padded), out.address()));
    }
}

impl<D: Driver> DrawsAhead<Activations<D>> for CudaBackend<D> {
    fn make_room(&mut self, rows: usize) {
        if self.sampler.reserve(&self.stream, rows) {
            // Recorded kernels read tokens where the outcomes were.
            self.graphs.clear();
        }
    }

    fn make_room_for_penalties(&mut self) {
        self.sampler.make_lists(&self.stream);
    }

    fn draw<'a>(&mut self, logits: &mut Activations<D>, first: usize, row: &(dyn Fn(usize) -> SampleRow<'a> + Sync)) {
        self.sampler.draw(&self.stream, logits, first, row);
    }

    fn fetch(&mut self, rows: usize) {
        self.sampler.fetch(&self.stream, rows);
    }

    fn collect(&mut self, out: &mut [Sampled]) {
        self.sampler.collect(&self.stream, out);
    }
}
