//! The operations of a step, enqueued.

use std::collections::HashMap;

use super::attention::{self, Partials};
use super::buffer::{Activations, Buffer, KvCache, Linear, Part, Rope, Staged, Vector, bytes_of};
use super::driver::{Address, Arg, Driver};
use super::plan::{Plan, Shape};
use super::product::Products;
use super::sample::Sampler;
use super::skinny::{self, Skinny, Then};
use super::stream::Stream;
use super::weight::{Form, Unpacked};
use crate::{
    AttentionShape, Backend, Batch, DeviceRegion, KernelError, KvDType, KvLayout, KvPages, Matrix, QkNorm, Residual,
    RmsNorm, RopeTable, SampleRow, Sampled,
};

/// Threads of a block of the row-wise kernels (`kernels/cuda/rowwise.cu`).
const ROWWISE_THREADS: usize = 256;
/// Threads of a block of the other kernels.
const THREADS: usize = 128;
/// Threads of a block of `kernels/cuda/prefill_attention.cu`.
const PREFILL_THREADS: usize = 256;
/// What allocations that other processes open are a multiple of.
const IPC_BLOCK_BYTES: usize = 2 << 20;
/// Widest heads (`HEAD_DIM_MAX` in `kernels/cuda/pages.cuh`); their width is a multiple of eight.
const HEAD_DIM_MAX: usize = 256;

/// A CUDA device as a [`Backend`].
///
/// Everything is enqueued on one stream. What a step needs to know is sent once, in [`Backend::step`]; the host waits
/// for the device only where it reads sampled tokens.
pub struct CudaBackend<D: Driver> {
    stream: Stream<D>,
    plan: Plan,
    step: Staged<D>,
    selected: Staged<D>,
    sampler: Sampler<D>,
    products: Products<D>,
    /// Made when heads are known.
    partials: Option<Partials<D>>,
    graphs: HashMap<Shape, Recorded<D>>,
    /// Whether operations are being recorded.
    recording: bool,
}

/// What is known of steps of one shape.
enum Recorded<D: Driver> {
    /// It came once: whatever had to be allocated for it is there.
    Seen,
    Graph(D::Graph),
}

impl<D: Driver> CudaBackend<D> {
    /// Works with `driver`'s device.
    pub fn new(driver: D) -> Self {
        Self {
            stream: Stream::new(driver),
            plan: Plan::default(),
            step: Staged::new(),
            selected: Staged::new(),
            sampler: Sampler::new(),
            products: Products::new(),
            partials: None,
            graphs: HashMap::new(),
            recording: false,
        }
    }

    /// The driver.
    pub fn driver(&self) -> &D {
        self.stream.driver()
    }

    /// Steps that were recorded so far.
    pub fn graphs(&self) -> usize {
        self.graphs.values().filter(|recorded| matches!(recorded, Recorded::Graph(_))).count()
    }

    /// Where a part of the step's plan starts on the device.
    fn planned(&self, word: usize) -> Arg {
        self.step.address().offset(word * size_of::<i32>()).into()
    }

    /// Records `operations`, unless something failed before or fails now.
    fn record(&mut self, operations: &mut dyn FnMut(&mut Self)) -> Option<D::Graph> {
        self.stream.attempt(|driver| driver.begin_capture())?;
        self.recording = true;
        operations(self);
        self.recording = false;
        self.stream.attempt(|driver| driver.end_capture())
    }

    /// The sum and its norm, if products take that by themselves; otherwise it is taken now.
    fn normed<'a>(
        &mut self,
        residual: &'a mut Residual<Activations<D>>,
        norm: RmsNorm<'a, Vector<D>>,
    ) -> Option<(&'a Activations<D>, RmsNorm<'a, Vector<D>>)> {
        if residual.is_owed || residual.sum.computed_rows() > skinny::NORMED_ROWS_MAX {
            self.norm(residual, norm);
            return None;
        }
        assert_eq!(residual.sum.cols, norm.weight.len, "columns of a norm");
        Some((&residual.sum, norm))
    }

    fn check_plan(&self, rows: usize, batch: &Batch) {
        assert!([rows, self.plan.tokens()] == [batch.tokens.len(); 2], "the step was begun with this batch");
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

fn address_of<D: Driver>(vector: Option<&Vector<D>>) -> Arg {
    vector.map_or(Address::NULL, |vector| vector.buffer.address()).into()
}

impl<D: Driver> Backend for CudaBackend<D> {
    type Linear = Linear<D>;
    type Vector = Vector<D>;
    type Rope = Rope<D>;
    type Activations = Activations<D>;
    type KvCache = KvCache<D>;

    fn linear_weight(&mut self, parts: &[Matrix<'_>]) -> Result<Linear<D>, KernelError> {
        let cols = parts[0].cols();
        let mut linear = Linear { parts: Vec::new(), rows: 0, cols, bytes: 0 };
        for alike in parts.chunk_by(|a, b| Form::of(a.dtype()) == Form::of(b.dtype())) {
            let mut unpacked = Unpacked::default();
            for part in alike {
                if part.cols() != cols {
                    return Err(KernelError::StackedColumns { first: cols, other: part.cols() });
                }
                unpacked.push(part);
            }
            let rows = alike.iter().map(Matrix::rows).sum();
            linear.bytes += unpacked.values.len() + unpacked.scales.len();
            linear.parts.push(Part {
                form: Form::of(alike[0].dtype()),
                values: Buffer::holding(&self.stream, &unpacked.values),
                scales: Buffer::holding(&self.stream, &unpacked.scales),
                first: linear.rows,
                rows,
            });
            linear.rows += rows;
        }
        self.stream.check()?;
        Ok(linear)
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
        Ok(KvCache { buffer, layout })
    }

    fn kv_pages(&self, cache: &KvCache<D>) -> Option<KvPages> {
        let memory = cache.buffer.memory()?;
        Some(KvPages::Device(DeviceRegion::new(memory, self.driver().mover(), cache.layout.region_shape())))
    }

    fn is_recording(&self) -> bool {
        self.recording
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
        let shape = self.plan.shape();
        if !self.plan.is_recordable() {
            return operations(self);
        }
        match self.graphs.remove(&shape) {
            None => {
                operations(self);
                self.graphs.insert(shape, Recorded::Seen);
            }
            Some(recorded) => {
                let graph = match recorded {
                    Recorded::Seen => self.record(operations),
                    Recorded::Graph(graph) => Some(graph),
                };
                let Some(graph) = graph else { return };
                self.stream.attempt(|driver| driver.replay(&graph));
                self.graphs.insert(shape, Recorded::Graph(graph));
            }
        }
    }

    fn check(&mut self) -> Result<(), KernelError> {
        self.stream.check().map_err(KernelError::from)
    }

    fn embed(&mut self, table: &Linear<D>, batch: &Batch, out: &mut Activations<D>) {
        assert_eq!(out.cols, table.cols, "columns of the table");
        out.set_rows(batch.tokens.len());
        self.check_plan(out.rows, batch);
        let tokens = self.planned(self.plan.shape().tokens().start);
        for part in &table.parts {
            let args = [
                part.values.address().into(),
                part.scales.address().into(),
                tokens,
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
        if self.products.reserve(&self.stream, x, weight) {
            assert!(!self.recording, "a step is recorded when it comes for the second time");
            self.graphs.clear();
        }
        for part in &weight.parts {
            if Products::<D>::takes(part.form) {
                self.products.enqueue(&self.stream, x, part, address_of(bias), out);
                continue;
            }
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

    fn add_linear(
        &mut self,
        x: &Activations<D>,
        weight: &Linear<D>,
        bias: Option<&Vector<D>>,
        residual: &mut Residual<Activations<D>>,
    ) {
        if x.computed_rows() > skinny::ROWS_MAX || residual.is_owed {
            return self.linear(x, weight, bias, residual.delta());
        }
        let sum = &residual.sum;
        assert!(x.cols == weight.cols && sum.cols == weight.rows && sum.rows == x.rows, "features of the weight");
        Skinny { x, norm: None, weight, bias, then: Then::Add }.enqueue(&self.stream, sum);
    }

    fn norm_linear(
        &mut self,
        residual: &mut Residual<Activations<D>>,
        norm: RmsNorm<'_, Vector<D>>,
        weight: &Linear<D>,
        bias: Option<&Vector<D>>,
        out: &mut Activations<D>,
    ) {
        let Some((x, norm)) = self.normed(residual, norm) else {
            return self.linear(&residual.normed, weight, bias, out);
        };
        assert!(x.cols == weight.cols && out.cols == weight.rows, "features of the weight");
        out.set_rows(x.rows);
        Skinny { x, norm: Some(norm), weight, bias, then: Then::Store }.enqueue(&self.stream, out);
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
        if weight.parts.len() > 1 || residual.sum.computed_rows() > skinny::ROWS_MAX {
            self.norm_linear(residual, norm, weight, bias, gate_up);
            return self.silu_mul(gate_up, out);
        }
        let (x, norm) = match self.normed(residual, norm) {
            Some((x, norm)) => (x, Some(norm)),
            None => (&residual.normed, None),
        };
        assert!(x.cols == weight.cols && 2 * out.cols == weight.rows, "features of the weight");
        out.set_rows(x.rows);
        Skinny { x, norm, weight, bias, then: Then::Gate }.enqueue(&self.stream, out);
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
        assert_eq!(qkv.cols, shape.qkv_width(), "columns of queries, keys and values");
        self.check_plan(qkv.rows, batch);
        assert!((self.plan.position_max() as usize) < rope.positions, "positions within the rotation table");
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        let planned = self.plan.shape();
        let args = [
            qkv.address().into(),
            self.planned(planned.positions()),
            self.planned(planned.table_starts()),
            self.planned(planned.block_tables()),
            rope.cos.address().into(),
            rope.sin.address().into(),
            address_of(norm.as_ref().map(|norm| norm.q)),
            address_of(norm.as_ref().map(|norm| norm.k)),
            norm.map_or(0.0, |norm| norm.eps).into(),
            cache.layer(layer).into(),
            heads.into(),
            kv_heads.into(),
            head_dim.into(),
            cache.layout.block_size.into(),
            rope.pairs.into(),
        ];
        let kernels = ["rope_and_cache_f32", "rope_and_cache_f16", "rope_and_cache_bf16", "rope_and_cache_f8"];
        let grid = [qkv.computed_rows(), (heads + 2 * kv_heads).div_ceil(4), 1];
        self.stream.launch(of_type(kernels, cache.layout.dtype), grid, THREADS, &args);
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
        assert!(qkv.cols == shape.qkv_width() && out.cols == shape.q_width(), "columns of queries, keys and values");
        out.set_rows(batch.tokens.len());
        self.check_plan(qkv.rows, batch);
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        if self.partials.as_ref().is_none_or(|partials| !partials.are_for(shape)) {
            assert!(!self.recording, "a step is recorded when it comes for the second time");
            self.graphs.clear();
            self.partials = Some(Partials::new(&self.stream, shape));
        }
        let [partials, arrived] = self.partials.as_ref().map_or([Address::NULL; 2], Partials::addresses);
        let planned = self.plan.shape();
        let args = [
            qkv.address().into(),
            self.planned(planned.positions()),
            self.planned(planned.table_starts()),
            self.planned(planned.block_tables()),
            self.planned(planned.items()),
            cache.layer(layer).into(),
            heads.into(),
            kv_heads.into(),
            head_dim.into(),
            cache.layout.block_size.into(),
            scale.into(),
            partials.into(),
            arrived.into(),
            out.address().into(),
        ];
        let (kernel, at_a_time) = attention::kernel(shape, cache.layout.dtype);
        let tiled = prefill_kernel(&cache.layout);
        let items = if tiled.is_some() { planned.decode_items } else { planned.items };
        let grid = [items, kv_heads * (heads / kv_heads).div_ceil(at_a_time), 1];
        self.stream.launch(kernel, grid, attention::THREADS, &args);
        if let Some(kernel) = tiled {
            let args = [
                qkv.address().into(),
                self.planned(planned.positions()),
                self.planned(planned.table_starts()),
                self.planned(planned.block_tables()),
                self.planned(planned.tiles()),
                cache.layer(layer).into(),
                heads.into(),
                kv_heads.into(),
                cache.layout.block_size.into(),
                scale.into(),
                out.address().into(),
            ];
            self.stream.launch(kernel, [planned.tiles * heads, 1, 1], PREFILL_THREADS, &args);
        }
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
        let bytes = bytes_of(rows);
        self.selected.reserve(&self.stream, bytes.len());
        self.selected.upload(&self.stream, &[bytes]);
        let args = [x.address().into(), self.selected.address().into(), out.address().into(), x.cols.into()];
        self.stream.launch("select_rows", [rows.len(), 1, 1], ROWWISE_THREADS, &args);
    }

    fn sample<'a>(
        &mut self,
        logits: &mut Activations<D>,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
    ) {
        self.sampler.sample(&self.stream, logits, row, out);
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
