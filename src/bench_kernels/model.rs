//! Weights of a model, made up.

use anyhow::Result;
use engine_kernels::{
    Backend, DType, Matrix, RopeTable,
    cuda::{CudaBackend, Driver, Linear, Rope, Vector},
};

use super::Shape;

/// What is read again and again has to be more than this together, or it would come from a cache: several times the
/// largest there is.
const BEYOND_CACHES: usize = 256 << 20;
/// Copies of it at most.
pub(super) const COPIES_MAX: usize = 64;

/// How many of something of so many bytes are beyond caches.
pub(super) fn copies(bytes: usize, is_small: bool) -> usize {
    if is_small { 2 } else { BEYOND_CACHES.div_ceil(bytes).clamp(1, COPIES_MAX) }
}

/// Copies of a bf16 weight with values around 0, of which each layer has another.
pub(super) struct Weights<D: Driver> {
    copies: Vec<Linear<D>>,
}

impl<D: Driver> Weights<D> {
    fn new(backend: &mut CudaBackend<D>, rows: usize, cols: usize, is_small: bool) -> Result<Self> {
        // 1,999 values, again and again: no line of a matrix is like the next.
        let value = |i: usize| {
            let [_, _, low, high] = ((i * 1_000_003 % 1999) as f32 / 1e5 - 0.01).to_le_bytes();
            // bf16, cut off.
            [low, high]
        };
        let pattern: Vec<u8> = (0..1999).flat_map(value).collect();
        let bytes = 2 * rows * cols;
        let mut all = pattern.repeat(bytes.div_ceil(pattern.len()));
        all.truncate(bytes);
        let matrix = Matrix::new(DType::BF16, rows, cols, &all)?;
        let copies = (0..copies(bytes, is_small)).map(|_| backend.linear_weight(&[matrix]));
        Ok(Self { copies: copies.collect::<Result<_, _>>()? })
    }

    pub(super) fn of(&self, layer: usize) -> &Linear<D> {
        &self.copies[layer % self.copies.len()]
    }
}

/// All weights.
pub(super) struct Model<D: Driver> {
    pub(super) qkv: Weights<D>,
    pub(super) output: Weights<D>,
    pub(super) gate_up: Weights<D>,
    pub(super) down: Weights<D>,
    pub(super) head: Weights<D>,
    pub(super) norm: Vector<D>,
    pub(super) head_norm: Vector<D>,
    pub(super) rope: Rope<D>,
}

impl<D: Driver> Model<D> {
    pub(super) fn new(backend: &mut CudaBackend<D>, shape: &Shape) -> Result<Self> {
        let Shape { hidden, ffn, vocabulary, heads, is_small, .. } = *shape;
        Ok(Self {
            qkv: Weights::new(backend, heads.qkv_width(), hidden, is_small)?,
            output: Weights::new(backend, hidden, heads.q_width(), is_small)?,
            gate_up: Weights::new(backend, 2 * ffn, hidden, is_small)?,
            down: Weights::new(backend, hidden, ffn, is_small)?,
            head: Weights::new(backend, vocabulary, hidden, is_small)?,
            norm: backend.vector(&vec![1.0; hidden]),
            head_norm: backend.vector(&vec![1.0; heads.head_dim]),
            rope: backend.rope(RopeTable::new(&vec![0.01; heads.head_dim / 2], 1.0, 65_536)),
        })
    }
}
