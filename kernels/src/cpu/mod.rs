//! The fast CPU backend.
//!
//! Weights are repacked at load into what the inner loops want (`pack`), kernels are written once over sixteen-lane
//! vectors and compiled for each instruction set (`isa`), and a pool of threads shares each operation's chunks
//! (`pool`). Every output is summed in one accumulator in a fixed order, so a row's bits depend neither on the batch
//! nor on the threads nor on the processor.

mod arena;
mod attention;
mod buffer;
mod elementwise;
mod gemm_f;
mod gemm_q;
mod isa;
mod kv;
mod linear;
mod pack;
mod pool;
mod quant;
mod sample;
mod tile;

pub use buffer::Activations;
pub use isa::Level;
pub use kv::KvCache;
pub use linear::Linear;
pub use pack::weight_bytes;

use arena::Arena;
use attention::Attention;
use buffer::{PerThread, Shared};
use elementwise::{Norm, NormInput, RopeAndCache, SiluMul, TokenBands};
use isa::Dispatch;
use pool::Pool;
use sample::{SampleScratch, sample_row};

use crate::{
    AttentionShape, Backend, Batch, KernelError, KvLayout, KvPages, Matrix, QkNorm, RopeTable, SampleRow, Sampled,
};

/// Elements of a row-wise operation that one chunk takes: some microseconds of work.
const CHUNK_ELEMENTS: usize = 1 << 14;

/// How a [`CpuBackend`] uses the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuOptions {
    /// Threads that compute, the caller's included.
    pub threads: usize,
    /// Instruction set; `None` takes the best there is.
    pub level: Option<Level>,
}

impl Default for CpuOptions {
    /// As many threads as the process may use cores, and the best instructions.
    fn default() -> Self {
        Self { threads: std::thread::available_parallelism().map_or(1, usize::from), level: None }
    }
}

/// The CPU as a [`Backend`].
pub struct CpuBackend {
    dispatch: Dispatch,
    level: Level,
    pool: Pool,
    weights: Arena,
    linear: linear::Scratch,
    attention: attention::Scratch,
    samplers: PerThread<SampleScratch>,
    /// Widest rows the samplers have room for.
    vocab_max: usize,
    /// Most rows of any activations made.
    rows_max: usize,
    /// Whether KV caches are made of memory that other processes may map.
    share_kv_cache: bool,
}

impl CpuBackend {
    /// Starts the threads. A level this processor lacks is replaced by the best it has.
    pub fn new(options: CpuOptions) -> Self {
        let wanted = options.level.filter(|level| level.is_available());
        let level = wanted.unwrap_or_else(Level::detect);
        let dispatch = Dispatch::new(level).expect("the level was found available");
        let pool = Pool::new(options.threads.max(1));
        let threads = pool.threads();
        Self {
            dispatch,
            level,
            pool,
            weights: Arena::default(),
            linear: linear::Scratch::new(threads),
            attention: attention::Scratch::new(threads),
            samplers: PerThread::new(threads, || SampleScratch::new(0)),
            vocab_max: 0,
            rows_max: 0,
            share_kv_cache: false,
        }
    }

    /// From now on KV caches are made of memory that other processes of this host may map
    /// ([`crate::KvRegion::shared`]).
    pub fn share_kv_cache(&mut self) {
        self.share_kv_cache = true;
    }

    /// Threads that compute, the caller's included.
    pub fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Instruction set in use.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Calls `job(first, count)` for bands of `rows` rows of `cols` elements, on several threads if it is worth it.
    fn by_rows(&mut self, rows: usize, cols: usize, job: impl Fn(usize, usize) + Sync) {
        let band = (CHUNK_ELEMENTS / cols.max(1)).max(1);
        self.pool.run(rows.div_ceil(band), &|_, chunk| job(chunk * band, band.min(rows - chunk * band)));
    }
}

impl Backend for CpuBackend {
    type Linear = Linear;
    type Vector = Box<[f32]>;
    type Rope = RopeTable;
    type Activations = Activations;
    type KvCache = KvCache;

    fn linear_weight(&mut self, parts: &[Matrix<'_>]) -> Result<Linear, KernelError> {
        Linear::new(&mut self.pool, &mut self.weights, parts)
    }

    fn linear_bytes(&self, weight: &Linear) -> usize {
        weight.bytes()
    }

    fn vector(&mut self, values: &[f32]) -> Box<[f32]> {
        values.into()
    }

    fn rope(&mut self, table: RopeTable) -> RopeTable {
        table
    }

    fn activations(&mut self, rows_max: usize, cols: usize) -> Activations {
        self.linear.reserve(rows_max, cols);
        self.rows_max = self.rows_max.max(rows_max);
        Activations::new(rows_max, cols)
    }

    fn kv_cache(&mut self, layout: KvLayout) -> Result<KvCache, KernelError> {
        self.attention.reserve(layout.kv_heads, layout.head_dim, self.rows_max);
        KvCache::new(layout, self.share_kv_cache)
    }

    fn kv_pages(&self, cache: &KvCache) -> Option<KvPages> {
        Some(cache.region().clone().into())
    }

    fn begin(&mut self, _: &Batch) {}

    fn check(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn embed(&mut self, table: &Linear, batch: &Batch, out: &mut Activations) {
        let tokens = &batch.tokens[..];
        out.set_rows(tokens.len());
        let cols = out.cols();
        let out = Shared::new(out.values_mut());
        self.by_rows(tokens.len(), cols, |first, count| {
            for (row, &token) in (first..).zip(&tokens[first..first + count]) {
                // SAFETY: bands are different rows.
                table.row(token as usize, unsafe { out.slice(row * cols, cols) });
            }
        });
    }

    fn rms_norm(&mut self, x: &Activations, weight: &Box<[f32]>, eps: f32, out: &mut Activations) {
        assert!(x.cols() == weight.len() && out.cols() == weight.len());
        out.set_rows(x.rows());
        let (cols, dispatch) = (weight.len(), self.dispatch);
        let out = Shared::new(out.values_mut());
        self.by_rows(x.rows(), cols, |first, count| {
            let input = NormInput::Plain(&x.values()[first * cols..(first + count) * cols]);
            // SAFETY: bands are different rows.
            dispatch.run(Norm { input, weight, eps, out: unsafe { out.slice(first * cols, count * cols) } });
        });
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut Activations,
        delta: &Activations,
        weight: &Box<[f32]>,
        eps: f32,
        out: &mut Activations,
    ) {
        assert!(residual.cols() == weight.len() && delta.cols() == weight.len() && out.cols() == weight.len());
        let (rows, cols, dispatch) = (residual.rows(), weight.len(), self.dispatch);
        out.set_rows(rows);
        let (residual, out) = (Shared::new(residual.values_mut()), Shared::new(out.values_mut()));
        self.by_rows(rows, cols, |first, count| {
            let (start, len) = (first * cols, count * cols);
            // SAFETY: bands are different rows.
            let (residual, out) = unsafe { (residual.slice(start, len), out.slice(start, len)) };
            let input = NormInput::Sum { residual, delta: &delta.values()[start..start + len] };
            dispatch.run(Norm { input, weight, eps, out });
        });
    }

    fn linear(&mut self, x: &Activations, weight: &Linear, bias: Option<&Box<[f32]>>, out: &mut Activations) {
        let bias = bias.map(|bias| &**bias);
        weight.product(self.dispatch, &mut self.pool, &mut self.linear, x, bias, out);
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut Activations,
        shape: AttentionShape,
        norm: Option<QkNorm<'_, Box<[f32]>>>,
        rope: &RopeTable,
        cache: &mut KvCache,
        layer: usize,
        batch: &Batch,
    ) {
        assert!(qkv.cols() == shape.qkv_width() && qkv.rows() == batch.tokens.len());
        let dispatch = self.dispatch;
        let bands = TokenBands::new(batch, cache.tokens_a_line(), CHUNK_ELEMENTS / qkv.cols());
        let norm = norm.map(|norm| (&norm.q[..], &norm.k[..], norm.eps));
        let qkv = Shared::new(qkv.values_mut());
        let cache = &*cache;
        self.pool.run(bands.count(), &|_, band| {
            let tokens = bands.tokens(band);
            dispatch.run(RopeAndCache { qkv, shape, norm, rope, cache, layer, batch, tokens });
        });
    }

    fn attention(
        &mut self,
        qkv: &Activations,
        shape: AttentionShape,
        scale: f32,
        cache: &KvCache,
        layer: usize,
        batch: &Batch,
        out: &mut Activations,
    ) {
        assert!(qkv.cols() == shape.qkv_width() && qkv.rows() == batch.tokens.len());
        let call = Attention { qkv: qkv.values(), shape, scale, cache, layer, batch };
        attention::attention(self.dispatch, &mut self.pool, &mut self.attention, call, out);
    }

    fn silu_mul(&mut self, gate_up: &Activations, out: &mut Activations) {
        out.set_rows(gate_up.rows());
        let (rows, ffn, dispatch) = (out.rows(), out.cols(), self.dispatch);
        let out = Shared::new(out.values_mut());
        self.by_rows(rows, ffn, |first, count| {
            let gate_up = &gate_up.values()[first * 2 * ffn..(first + count) * 2 * ffn];
            // SAFETY: bands are different rows.
            dispatch.run(SiluMul { gate_up, ffn, out: unsafe { out.slice(first * ffn, count * ffn) } });
        });
    }

    fn select_rows(&mut self, x: &Activations, rows: &[u32], out: &mut Activations) {
        let cols = x.cols();
        assert!(out.cols() == cols);
        out.set_rows(rows.len());
        for (&row, out) in rows.iter().zip(out.values_mut().chunks_exact_mut(cols)) {
            out.copy_from_slice(&x.values()[row as usize * cols..][..cols]);
        }
    }

    fn sample<'a>(
        &mut self,
        logits: &mut Activations,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
    ) {
        assert!(out.len() == logits.rows());
        let vocab = logits.cols();
        if vocab > self.vocab_max {
            self.vocab_max = vocab;
            self.samplers = PerThread::new(self.pool.threads(), || SampleScratch::new(vocab));
        }
        let samplers = &self.samplers;
        let (rows, logits, out) = (out.len(), Shared::new(logits.values_mut()), Shared::new(out));
        self.pool.run(rows, &|thread, index| {
            // SAFETY: the pool gives each running chunk a thread number of its own; chunks are different rows.
            let (logits, out, scratch) =
                unsafe { (logits.slice(index * vocab, vocab), out.slice(index, 1), samplers.get(thread)) };
            out[0] = sample_row(logits, &row(index), scratch);
        });
    }

    fn read(&self, x: &Activations) -> Vec<f32> {
        x.values().to_vec()
    }

    fn write(&mut self, values: &[f32], out: &mut Activations) {
        assert!(values.len().is_multiple_of(out.cols()));
        out.set_rows(values.len() / out.cols());
        out.values_mut().copy_from_slice(values);
    }
}
