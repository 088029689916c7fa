//! A step as the decoder computes it (`models/src/model.rs`), with made-up weights: whole, and as the kernels that
//! each of its layers launches. Operations are called here and kernels noted, none of which is named: what runs is what
//! is measured.

use anyhow::Result;
use engine_kernels::{
    Attention, Backend, Batch, KvDType, KvLayout, Projection, QkNorm, Residual, RmsNorm,
    cuda::{Activations, CudaBackend, Driver, KvCache, Noted, Vector},
};

use super::{
    Shape,
    model::{COPIES_MAX, Model, copies},
    work::Size,
};

/// Tokens of a page, as workers have them by default.
const BLOCK_SIZE: usize = 64;

/// A step, and what it works in.
pub(super) struct Step<'a, D: Driver> {
    pub(super) batch: Batch,
    layers: Layers<'a, D>,
    pub(super) size: Size,
}

struct Layers<'a, D: Driver> {
    shape: Shape,
    model: &'a Model<D>,
    cache: KvCache<D>,
    /// Layers of the cache, which a model's take in turn.
    caches: usize,
    residual: Residual<Activations<D>>,
    qkv: Activations<D>,
    mixed: Activations<D>,
    gate_up: Activations<D>,
    inner: Activations<D>,
    selected: Activations<D>,
    logits: Activations<D>,
}

/// What a step launches: kernels of several layers, each with other weights and pages, and of as many ends of a step.
pub(super) struct Kernels {
    pub(super) layers: Vec<Vec<Noted>>,
    /// The last norm, and logits.
    pub(super) ends: Vec<Vec<Noted>>,
}

/// Some token; another for most rows.
fn token(shape: Shape, row: usize) -> u32 {
    (row * 7919 % shape.vocabulary) as u32
}

impl<'a, D: Driver> Step<'a, D> {
    /// One that decodes a token of each of `sequences` sequences, with `context` tokens each by then in a cache of this
    /// type.
    pub(super) fn decode(
        backend: &mut CudaBackend<D>,
        shape: Shape,
        model: &'a Model<D>,
        [sequences, context]: [usize; 2],
        cache: KvDType,
    ) -> Result<Self> {
        let pages = context.div_ceil(BLOCK_SIZE);
        let mut batch = Batch::default();
        for sequence in 0..sequences {
            let table: Vec<u32> = (sequence * pages..(sequence + 1) * pages).map(|page| page as u32).collect();
            batch.push(&[token(shape, sequence)], context as u32 - 1, &table, 0);
        }
        let size = Size { shape, rows: sequences, tokens: sequences * context, pairs: sequences * context, cache };
        Self::new(backend, model, batch, size)
    }

    /// One that computes a chunk of a prompt behind `cached` tokens.
    pub(super) fn prompt(
        backend: &mut CudaBackend<D>,
        shape: Shape,
        model: &'a Model<D>,
        [rows, cached]: [usize; 2],
    ) -> Result<Self> {
        let table: Vec<u32> = (0..(rows + cached).div_ceil(BLOCK_SIZE) as u32).collect();
        let mut batch = Batch::default();
        let tokens: Vec<u32> = (0..rows).map(|row| token(shape, row)).collect();
        batch.push(&tokens, cached as u32, &table, rows);
        // Each token sees those before it, and itself.
        let pairs = rows * cached + rows * (rows + 1) / 2;
        let cache = KvDType::BF16;
        Self::new(backend, model, batch, Size { shape, rows, tokens: rows + cached, pairs, cache })
    }

    fn new(backend: &mut CudaBackend<D>, model: &'a Model<D>, batch: Batch, size: Size) -> Result<Self> {
        let Size { shape, rows, .. } = size;
        let Shape { hidden, ffn, vocabulary, heads, .. } = shape;
        let caches = copies(size.pages_bytes(), shape.is_small);
        let cache = backend.kv_cache(KvLayout {
            layers: caches,
            kv_heads: heads.kv_heads,
            head_dim: heads.head_dim,
            block_size: BLOCK_SIZE,
            blocks: batch.block_tables.len(),
            dtype: size.cache,
        })?;
        let asked_for = batch.logit_rows.len().max(1);
        let layers = Layers {
            shape,
            model,
            cache,
            caches,
            residual: Residual::new(backend, rows, hidden),
            qkv: backend.activations(rows, heads.qkv_width()),
            mixed: backend.activations(rows, heads.q_width()),
            gate_up: backend.activations(rows, 2 * ffn),
            inner: backend.activations(rows, ffn),
            selected: backend.activations(asked_for, hidden),
            logits: backend.activations(asked_for, vocabulary),
        };
        Ok(Self { batch, layers, size })
    }

    /// Enqueues all of it, but for logits that nobody asks for.
    #[cfg(feature = "cuda")]
    pub(super) fn enqueue(&mut self, backend: &mut CudaBackend<D>) {
        let Self { batch, layers, .. } = self;
        backend.step(batch, &mut |backend| {
            layers.start(backend, batch);
            let ends_early = batch.logit_rows.is_empty();
            let whole = layers.shape.layers - usize::from(ends_early);
            (0..whole).for_each(|layer| layers.layer(backend, batch, layer));
            if ends_early { layers.keys_and_values(backend, batch, whole) } else { layers.norm(backend) }
        });
        if !batch.logit_rows.is_empty() {
            layers.logits(backend, &batch.logit_rows, 0);
        }
    }

    /// Computes as many layers as there are copies of pages, so that there is something in them: with nothing but zeros
    /// tensor cores take less power, and are faster for it.
    #[cfg(feature = "cuda")]
    pub(super) fn fill(&mut self, backend: &mut CudaBackend<D>) {
        let Self { batch, layers, .. } = self;
        backend.begin(batch);
        layers.start(backend, batch);
        (0..layers.caches).for_each(|layer| layers.layer(backend, batch, layer));
    }

    /// The kernels of as many layers as there are copies of weights, and, if it decodes, of as many ends.
    pub(super) fn kernels(&mut self, backend: &mut CudaBackend<D>) -> Kernels {
        let Self { batch, layers, .. } = self;
        backend.begin(batch);
        let mut note = || {
            // The first layer is not like the others: its first norm adds nothing up.
            backend.note(&mut |backend| {
                layers.start(backend, batch);
                layers.layer(backend, batch, 0);
            });
            let of_layer = |layer| backend.note(&mut |backend| layers.layer(backend, batch, layer));
            let noted: Vec<_> = (1..=COPIES_MAX).map(of_layer).collect();
            // Behind a layer, which leaves the end something to add up.
            let mut of_end = |copy| {
                let mut with_layer = backend.note(&mut |backend| {
                    layers.layer(backend, batch, 1);
                    layers.norm(backend);
                    layers.logits(backend, &batch.logit_rows, copy);
                });
                with_layer.split_off(noted[0].len())
            };
            let ends = if batch.logit_rows.is_empty() { 0 } else { COPIES_MAX };
            let ends = (0..ends).map(&mut of_end).collect();
            Kernels { layers: noted, ends }
        };
        // Noted once in vain: where there was no room, other things lie elsewhere afterwards.
        note();
        note()
    }
}

impl<D: Driver> Layers<'_, D> {
    fn rms_norm<'a>(model: &'a Model<D>) -> RmsNorm<'a, Vector<D>> {
        RmsNorm { weight: &model.norm, eps: 1e-6 }
    }

    fn start(&mut self, backend: &mut CudaBackend<D>, batch: &Batch) {
        backend.embed(self.model.head.of(0), batch, self.residual.start());
    }

    fn layer(&mut self, backend: &mut CudaBackend<D>, batch: &Batch, index: usize) {
        let Self { shape, model, cache, residual, qkv, mixed, .. } = self;
        backend.norm_linear(residual, Self::rms_norm(model), model.qkv.of(index), None, qkv);
        let weights = [&model.output, &model.gate_up, &model.down];
        let [output, gate_up, down] = weights.map(|weights| Projection { weight: weights.of(index), bias: None });
        let norm = Some(QkNorm { q: &model.head_norm, k: &model.head_norm, eps: 1e-6 });
        let scale = 1.0 / (shape.heads.head_dim as f32).sqrt();
        let attention = Attention { shape: shape.heads, scale, norm, rope: &model.rope, output };
        let pages = index % self.caches;
        backend.add_attention(qkv, attention, cache, pages, batch, mixed, residual, &mut |_| ());
        backend.add_mlp(residual, Self::rms_norm(model), gate_up, down, [&mut self.gate_up, &mut self.inner]);
    }

    /// All that is wanted of the last layer where no logits are.
    #[cfg(feature = "cuda")]
    fn keys_and_values(&mut self, backend: &mut CudaBackend<D>, batch: &Batch, index: usize) {
        let Self { shape, model, cache, residual, qkv, .. } = self;
        backend.norm_linear(residual, Self::rms_norm(model), model.qkv.of(index), None, qkv);
        let norm = Some(QkNorm { q: &model.head_norm, k: &model.head_norm, eps: 1e-6 });
        backend.rope_and_cache(qkv, shape.heads, norm, &model.rope, cache, index % self.caches, batch);
    }

    fn norm(&mut self, backend: &mut CudaBackend<D>) {
        backend.norm(&mut self.residual, Self::rms_norm(self.model));
    }

    fn logits(&mut self, backend: &mut CudaBackend<D>, rows: &[u32], copy: usize) {
        backend.select_rows(self.residual.normed(), rows, &mut self.selected);
        backend.linear(&self.selected, self.model.head.of(copy), None, &mut self.logits);
    }
}
