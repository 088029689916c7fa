//! A layer of a model, in any backend, for tests of steps as a whole.
#![allow(dead_code, reason = "each test uses some of it")]

use engine_cuda_emulated::{Emulated, EmulatedBackend};
use engine_kernels::{AttentionShape, Backend, Batch, DType, KvDType, KvLayout, Matrix, QkNorm, Rehearsed, RopeTable};

pub(crate) const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 16 };
pub(crate) const HIDDEN: usize = 64;
pub(crate) const VOCABULARY: usize = 50;
pub(crate) const BLOCK_SIZE: usize = 16;
pub(crate) const BLOCKS: usize = 64;
pub(crate) const ROWS_MAX: usize = 24;

/// A layer of a model, in any backend.
pub(crate) struct Layer<B: Backend> {
    pub(crate) backend: B,
    table: B::Linear,
    norm: B::Vector,
    qkv: B::Linear,
    q_norm: B::Vector,
    output: B::Linear,
    rope: B::Rope,
    pub(crate) cache: B::KvCache,
    hidden: B::Activations,
    projected: B::Activations,
    mixed: B::Activations,
    out: B::Activations,
}

pub(crate) fn numbers(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) % 2003) as f32 / 1000.0 - 1.0).collect()
}

impl<B: Backend> Layer<B> {
    pub(crate) fn new(mut backend: B) -> Self {
        let mut weight = |rows: usize, cols: usize, seed: u32| {
            let bytes: Vec<u8> = numbers(rows * cols, seed).iter().flat_map(|x| x.to_le_bytes()).collect();
            backend.linear_weight(&[Matrix::new(DType::F32, rows, cols, &bytes).unwrap()]).unwrap()
        };
        let (table, qkv) = (weight(VOCABULARY, HIDDEN, 1), weight(SHAPE.qkv_width(), HIDDEN, 2));
        let output = weight(HIDDEN, SHAPE.q_width(), 3);
        let layout = KvLayout {
            layers: 1,
            kv_heads: SHAPE.kv_heads,
            head_dim: SHAPE.head_dim,
            block_size: BLOCK_SIZE,
            blocks: BLOCKS,
            dtype: KvDType::BF16,
        };
        let mut layer = Self {
            table,
            qkv,
            output,
            norm: backend.vector(&numbers(HIDDEN, 4)),
            q_norm: backend.vector(&numbers(SHAPE.head_dim, 5)),
            rope: backend.rope(RopeTable::new(&numbers(SHAPE.head_dim / 2, 6), 1.0, 512)),
            cache: backend.kv_cache(layout).unwrap(),
            hidden: backend.activations(ROWS_MAX, HIDDEN),
            projected: backend.activations(ROWS_MAX, SHAPE.qkv_width()),
            mixed: backend.activations(ROWS_MAX, SHAPE.q_width()),
            out: backend.activations(ROWS_MAX, HIDDEN),
            backend,
        };
        // Something in every page.
        for page in 0..BLOCKS as u32 {
            let mut batch = Batch::default();
            batch.push(&[page % 7; BLOCK_SIZE], 0, &[page], 0);
            layer.step(&batch);
        }
        layer
    }

    /// A step; what comes out of it, the rows of `batch` alone.
    pub(crate) fn step(&mut self, batch: &Batch) -> Vec<f32> {
        self.with_step(batch, |backend, operations| backend.step(batch, operations));
        self.result(batch)
    }

    /// A rehearsal.
    pub(crate) fn rehearse(&mut self, batch: &Batch) -> Rehearsed {
        self.with_step(batch, |backend, operations| backend.rehearse(batch, operations))
    }

    fn with_step<R>(&mut self, batch: &Batch, step: impl FnOnce(&mut B, &mut dyn FnMut(&mut B)) -> R) -> R {
        let Self { backend, table, norm, qkv, q_norm, output, rope, cache, hidden, projected, mixed, out } = self;
        step(backend, &mut |backend| {
            backend.embed(table, batch, hidden);
            // As wide as the hidden states here, and used for both.
            backend.rms_norm(hidden, norm, 1e-5, mixed);
            backend.linear(mixed, qkv, None, projected);
            let norm = QkNorm { q: &*q_norm, k: &*q_norm, eps: 1e-6 };
            backend.rope_and_cache(projected, SHAPE, Some(norm), rope, cache, 0, batch);
            backend.attention(projected, SHAPE, 0.25, cache, 0, batch, mixed);
            backend.linear(mixed, output, None, out);
        })
    }

    fn result(&mut self, batch: &Batch) -> Vec<f32> {
        let Self { backend, hidden, out, .. } = self;
        let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
        backend.select_rows(out, &rows, hidden);
        backend.read(hidden)
    }
}

/// One decoding step of sequences with these contexts, each in pages of its own.
pub(crate) fn decode(contexts: &[u32], turn: u32) -> Batch {
    let mut batch = Batch::default();
    for (i, &context) in (0..).zip(contexts) {
        let pages: Vec<u32> = (0..context.div_ceil(BLOCK_SIZE as u32)).map(|page| (i * 3 + page) % 64).collect();
        batch.push(&[(i * 7 + turn) % VOCABULARY as u32], context - 1, &pages, 0);
    }
    batch
}

pub(crate) fn prompt(tokens: u32) -> Batch {
    let mut batch = Batch::default();
    let ids: Vec<u32> = (0..tokens).map(|i| i % VOCABULARY as u32).collect();
    batch.push(&ids, 0, &[0, 1], ids.len());
    batch
}

pub(crate) fn device() -> Layer<EmulatedBackend> {
    Layer::new(EmulatedBackend::new(Emulated::default()))
}

#[track_caller]
pub(crate) fn assert_near(ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= 0.02 * (1.0 + b.abs()), "element {i} is {a}, should be {b}");
    }
}
