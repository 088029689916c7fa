//! Whole decoding steps, and attention.

use anyhow::Result;
use engine_kernels::cuda::Driver;
use engine_kernels::{Attention, Backend, Batch, KvDType, KvLayout, Projection, QkNorm, Residual, RmsNorm};

use super::Shape;
use super::clock::{Clock, filled};
use super::model::{Model, copies};
use super::row::{MMA_PER_MS, WGMMA_PER_MS, Work};

/// Tokens of a page, as workers have them by default.
const BLOCK_SIZE: usize = 64;

pub(super) fn measure(clock: &mut Clock, shape: &Shape, model: &Model) -> Result<()> {
    let contexts = [(1, 512), (64, 512), (256, 512), (16, 512), (1, 8192), (1, 65_536)];
    for (sequences, context) in if clock.tiny { vec![(1, 200)] } else { contexts.to_vec() } {
        step(clock, shape, model, sequences, context)?;
    }
    let prompts = [(2048, 0), (16_384, 0), (512, 0), (512, 7680)];
    for (tokens, cached) in if clock.tiny { vec![(20, 9)] } else { prompts.to_vec() } {
        prompt(clock, shape, tokens, cached)?;
    }
    Ok(())
}

fn layout(shape: &Shape, layers: usize, blocks: usize) -> KvLayout {
    let Shape { heads, .. } = *shape;
    KvLayout {
        layers,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        block_size: BLOCK_SIZE,
        blocks,
        dtype: KvDType::BF16,
    }
}

/// Attention of a layer, for a chunk of a prompt behind `cached` tokens.
fn prompt(clock: &mut Clock, shape: &Shape, tokens: usize, cached: usize) -> Result<()> {
    let Shape { name, heads, .. } = *shape;
    let backend = &mut clock.backend;
    let blocks = (tokens + cached).div_ceil(BLOCK_SIZE);
    let mut batch = Batch::default();
    batch.push(&vec![1; tokens], cached as u32, &(0..blocks as u32).collect::<Vec<_>>(), 0);
    let cache = backend.kv_cache(layout(shape, 1, blocks))?;
    let qkv = filled(backend, tokens, heads.qkv_width());
    let mut mixed = backend.activations(tokens, heads.q_width());
    backend.begin(&batch);
    let scale = 1.0 / (heads.head_dim as f32).sqrt();
    // Each token sees those before it, and itself.
    let pairs = tokens * cached + tokens * (tokens + 1) / 2;
    let pages = 4 * (tokens + cached) * heads.kv_heads * heads.head_dim;
    let (bytes, operations) = (pages + 8 * tokens * heads.q_width(), 4 * pairs * heads.heads * heads.head_dim);
    // Where there are two ways, both.
    let both: &[bool] = if clock.backend.driver().has_wgmma() { &[true, false] } else { &[false] };
    for &wgmma in both {
        clock.backend.use_wgmma(wgmma);
        let time = clock.time(|backend, _| backend.attention(&qkv, heads, scale, &cache, 0, &batch, &mut mixed))?;
        let (per_ms, by) = if wgmma { (WGMMA_PER_MS, " by wgmma") } else { (MMA_PER_MS, "") };
        let what = format!("{name}: prompt of {tokens} behind {cached}: attention of a layer{by}");
        clock.print(&what, time, Work { bytes, operations, per_ms });
    }
    clock.backend.use_wgmma(true);
    Ok(())
}

/// One decoding step of `sequences` sequences with `context` tokens each.
fn decode(sequences: usize, context: usize) -> Batch {
    let pages = context.div_ceil(BLOCK_SIZE);
    let mut batch = Batch::default();
    for sequence in 0..sequences {
        let table: Vec<u32> = (sequence * pages..(sequence + 1) * pages).map(|page| page as u32).collect();
        batch.push(&[1], context as u32 - 1, &table, 0);
    }
    batch
}

/// A whole step, then its attention alone.
fn step(clock: &mut Clock, shape: &Shape, model: &Model, sequences: usize, context: usize) -> Result<()> {
    let Shape { name, hidden, ffn, layers, vocabulary, heads } = *shape;
    let pages = 4 * sequences * context * heads.kv_heads * heads.head_dim;
    let caches = copies(pages, clock.tiny);
    let batch = decode(sequences, context);
    let backend = &mut clock.backend;
    let mut cache = backend.kv_cache(layout(shape, caches, batch.block_tables.len()))?;
    let scale = 1.0 / (heads.head_dim as f32).sqrt();

    let mut residual = Residual::new(backend, sequences, hidden);
    let mut qkv = filled(backend, sequences, heads.qkv_width());
    let mut mixed = backend.activations(sequences, heads.q_width());
    let mut gate_up = backend.activations(sequences, 2 * ffn);
    let mut inner = backend.activations(sequences, ffn);
    let mut logits = backend.activations(sequences, vocabulary);
    let sized = format!("{name}: {sequences} × {context} tokens");
    // Operations of decoding are far from any floor, and not counted.
    let work = |bytes| Work { bytes, operations: 0, per_ms: MMA_PER_MS };

    let time = clock.time_with_host(|backend| {
        backend.step(&batch, &mut |backend| {
            backend.embed(model.head.of(0), &batch, residual.start());
            let rms_norm = || RmsNorm { weight: &model.norm, eps: 1e-6 };
            for layer in 0..layers {
                backend.norm_linear(&mut residual, rms_norm(), model.qkv.of(layer), None, &mut qkv);
                let weights = [&model.output, &model.gate_up, &model.down];
                let [output, first, second] = weights.map(|w| Projection { weight: w.of(layer), bias: None });
                let norm = Some(QkNorm { q: &model.head_norm, k: &model.head_norm, eps: 1e-6 });
                let attention = Attention { shape: heads, scale, norm, rope: &model.rope, output };
                let (pages, stored) = (layer % caches, &mut |_: &_| ());
                backend.add_attention(
                    &mut qkv,
                    attention,
                    &mut cache,
                    pages,
                    &batch,
                    &mut mixed,
                    &mut residual,
                    stored,
                );
                backend.add_mlp(&mut residual, rms_norm(), first, second, [&mut gate_up, &mut inner]);
            }
            backend.norm(&mut residual, rms_norm());
            backend.linear(residual.normed(), model.head.of(0), None, &mut logits);
        });
    })?;
    let weights = [&model.qkv, &model.output, &model.gate_up, &model.down].map(|weights| weights.bytes(&clock.backend));
    let bytes = layers * (weights.iter().sum::<usize>() + pages) + model.head.bytes(&clock.backend);
    clock.print(&format!("{sized}: a step"), time, work(bytes));

    clock.backend.begin(&batch);
    let time = clock.time(|backend, call| {
        backend.attention(&qkv, heads, scale, &cache, call % caches, &batch, &mut mixed);
    })?;
    clock.print(&format!("{sized}: attention of a layer"), time, work(pages));
    Ok(())
}
