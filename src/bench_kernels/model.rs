//! Weights of a model, made up.

use anyhow::Result;
use engine_kernels::{Backend, DType, Matrix, RopeTable};

use super::Shape;
use super::clock::Cuda;

/// What is read again and again has to be more than this together, or it would come from a cache: several times the
/// largest there is.
const BEYOND_CACHES: usize = 256 << 20;
/// Copies of it at most.
pub(super) const COPIES_MAX: usize = 64;

/// How many of something of so many bytes are beyond caches.
pub(super) fn copies(bytes: usize, tiny: bool) -> usize {
    if tiny { 2 } else { BEYOND_CACHES.div_ceil(bytes).clamp(1, COPIES_MAX) }
}

/// Copies of a bf16 weight with values around 0, of which each layer has another.
pub(super) struct Weights {
    copies: Vec<<Cuda as Backend>::Linear>,
}

impl Weights {
    fn new(backend: &mut Cuda, rows: usize, cols: usize, tiny: bool) -> Result<Self> {
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
        let copies = (0..copies(bytes, tiny)).map(|_| backend.linear_weight(&[matrix]));
        Ok(Self { copies: copies.collect::<Result<_, _>>()? })
    }

    pub(super) fn of(&self, layer: usize) -> &<Cuda as Backend>::Linear {
        &self.copies[layer % self.copies.len()]
    }

    pub(super) fn bytes(&self, backend: &Cuda) -> usize {
        backend.linear_bytes(self.of(0))
    }
}

/// All weights.
pub(super) struct Model {
    pub(super) qkv: Weights,
    pub(super) output: Weights,
    pub(super) gate_up: Weights,
    pub(super) down: Weights,
    pub(super) head: Weights,
    pub(super) norm: <Cuda as Backend>::Vector,
    pub(super) head_norm: <Cuda as Backend>::Vector,
    pub(super) rope: <Cuda as Backend>::Rope,
}

impl Model {
    pub(super) fn new(backend: &mut Cuda, shape: &Shape, tiny: bool) -> Result<Self> {
        let Shape { hidden, ffn, vocabulary, heads, .. } = *shape;
        Ok(Self {
            qkv: Weights::new(backend, heads.qkv_width(), hidden, tiny)?,
            output: Weights::new(backend, hidden, heads.q_width(), tiny)?,
            gate_up: Weights::new(backend, 2 * ffn, hidden, tiny)?,
            down: Weights::new(backend, hidden, ffn, tiny)?,
            head: Weights::new(backend, vocabulary, hidden, tiny)?,
            norm: backend.vector(&vec![1.0; hidden]),
            head_norm: backend.vector(&vec![1.0; heads.head_dim]),
            rope: backend.rope(RopeTable::new(&vec![0.01; heads.head_dim / 2], 1.0, 65_536)),
        })
    }
}
