use super::{dequantize, sample::sample_row};
use crate::{
    AttentionShape, Backend, Batch, KernelError, KvLayout, KvPages, Matrix, QkNorm, RopeTable, SampleRow, Sampled,
    SequenceSpan,
};

/// The naive backend.
#[derive(Debug, Default)]
pub struct ReferenceBackend;

/// A weight `[out, in]` in single precision.
#[derive(Debug, Clone)]
pub struct ReferenceLinear {
    cols: usize,
    values: Vec<f32>,
}

impl ReferenceLinear {
    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..][..self.cols]
    }

    fn rows(&self) -> usize {
        self.values.len() / self.cols
    }
}

/// A working buffer `[rows, cols]`.
#[derive(Debug, Clone)]
pub struct ReferenceActivations {
    rows_max: usize,
    cols: usize,
    values: Vec<f32>,
}

impl ReferenceActivations {
    fn rows(&self) -> usize {
        self.values.len() / self.cols
    }

    fn row(&self, row: usize) -> &[f32] {
        &self.values[row * self.cols..][..self.cols]
    }

    fn row_mut(&mut self, row: usize) -> &mut [f32] {
        &mut self.values[row * self.cols..][..self.cols]
    }

    fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.rows_max, "{rows} rows in a buffer of {}", self.rows_max);
        self.values.clear();
        self.values.resize(rows * self.cols, f32::NAN);
    }
}

/// Keys and values `[layer, page, kv_head, token, head_dim]`, rounded to the cache's type.
#[derive(Debug)]
pub struct ReferenceKvCache {
    layout: KvLayout,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl ReferenceKvCache {
    /// Where a head's vector of one token of a sequence starts.
    fn slot(&self, layer: usize, batch: &Batch, sequence: &SequenceSpan, position: usize, head: usize) -> usize {
        let KvLayout { kv_heads, head_dim, block_size, blocks, .. } = self.layout;
        let page = batch.block_tables[sequence.table_start as usize + position / block_size] as usize;
        assert!(page < blocks, "page {page} of {blocks}");
        (((layer * blocks + page) * kv_heads + head) * block_size + position % block_size) * head_dim
    }
}

/// The sequence each token of a batch belongs to.
fn sequence_of(batch: &Batch, token: usize) -> &SequenceSpan {
    let holds = |s: &&SequenceSpan| (s.query_start..s.query_start + s.query_len).contains(&(token as u32));
    batch.sequences.iter().find(holds).expect("sequences tile the batch")
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| a as f64 * b as f64).sum()
}

fn normed(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let scale = 1.0 / (dot(x, x) / x.len() as f64 + eps as f64).sqrt();
    x.iter().zip(weight).map(|(&x, &w)| (x as f64 * scale * w as f64) as f32).collect()
}

fn rotated(x: &[f32], rope: &RopeTable, position: u32) -> Vec<f32> {
    let mut out = x.to_vec();
    let (cos, sin) = rope.at(position);
    for i in 0..rope.pairs() {
        let (a, b) = (x[i] as f64, x[i + rope.pairs()] as f64);
        let (cos, sin) = (cos[i] as f64, sin[i] as f64);
        out[i] = (a * cos - b * sin) as f32;
        out[i + rope.pairs()] = (b * cos + a * sin) as f32;
    }
    out
}

impl Backend for ReferenceBackend {
    type Linear = ReferenceLinear;
    type Vector = Vec<f32>;
    type Rope = RopeTable;
    type Activations = ReferenceActivations;
    type KvCache = ReferenceKvCache;

    fn linear_weight(&mut self, parts: &[Matrix<'_>]) -> Result<Self::Linear, KernelError> {
        let cols = parts[0].cols();
        let mut values = Vec::new();
        for part in parts {
            if part.cols() != cols {
                return Err(KernelError::StackedColumns { first: cols, other: part.cols() });
            }
            values.extend(dequantize(part));
        }
        Ok(ReferenceLinear { cols, values })
    }

    fn linear_bytes(&self, weight: &Self::Linear) -> usize {
        size_of_val(weight.values.as_slice())
    }

    fn vector(&mut self, values: &[f32]) -> Self::Vector {
        values.to_vec()
    }

    fn rope(&mut self, table: RopeTable) -> Self::Rope {
        table
    }

    fn activations(&mut self, rows_max: usize, cols: usize) -> Self::Activations {
        ReferenceActivations { rows_max, cols, values: Vec::new() }
    }

    fn kv_cache(&mut self, layout: KvLayout) -> Result<Self::KvCache, KernelError> {
        let elements = layout.total_bytes() / layout.dtype.bytes() / 2;
        Ok(ReferenceKvCache { layout, keys: vec![f32::NAN; elements], values: vec![f32::NAN; elements] })
    }

    fn kv_pages(&self, _: &Self::KvCache) -> Option<KvPages> {
        None
    }

    fn begin(&mut self, _: &Batch) {}

    fn check(&mut self) -> Result<(), KernelError> {
        Ok(())
    }

    fn embed(&mut self, table: &Self::Linear, batch: &Batch, out: &mut Self::Activations) {
        out.set_rows(batch.tokens.len());
        for (row, &token) in batch.tokens.iter().enumerate() {
            out.row_mut(row).copy_from_slice(table.row(token as usize));
        }
    }

    fn rms_norm(&mut self, x: &Self::Activations, weight: &Self::Vector, eps: f32, out: &mut Self::Activations) {
        out.set_rows(x.rows());
        for row in 0..x.rows() {
            out.row_mut(row).copy_from_slice(&normed(x.row(row), weight, eps));
        }
    }

    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Activations,
        delta: &Self::Activations,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Activations,
    ) {
        assert_eq!(residual.values.len(), delta.values.len(), "residual and delta have the same shape");
        for (residual, delta) in residual.values.iter_mut().zip(&delta.values) {
            *residual += delta;
        }
        self.rms_norm(residual, weight, eps, out);
    }

    fn linear(
        &mut self,
        x: &Self::Activations,
        weight: &Self::Linear,
        bias: Option<&Self::Vector>,
        out: &mut Self::Activations,
    ) {
        assert_eq!(x.cols, weight.cols, "input features of the weight");
        assert_eq!(out.cols, weight.rows(), "output features of the weight");
        out.set_rows(x.rows());
        for row in 0..x.rows() {
            for (i, out) in out.row_mut(row).iter_mut().enumerate() {
                let bias = bias.map_or(0.0, |bias| bias[i] as f64);
                *out = (dot(x.row(row), weight.row(i)) + bias) as f32;
            }
        }
    }

    fn rope_and_cache(
        &mut self,
        qkv: &mut Self::Activations,
        shape: AttentionShape,
        norm: Option<QkNorm<'_, Self::Vector>>,
        rope: &Self::Rope,
        cache: &mut Self::KvCache,
        layer: usize,
        batch: &Batch,
    ) {
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        let dtype = cache.layout.dtype;
        for token in 0..batch.tokens.len() {
            let position = batch.positions[token];
            let row = qkv.row_mut(token);
            for (head, x) in row[..(heads + kv_heads) * head_dim].chunks_exact_mut(head_dim).enumerate() {
                if let Some(norm) = &norm {
                    let weight = if head < heads { norm.q } else { norm.k };
                    x.copy_from_slice(&normed(x, weight, norm.eps));
                }
                x.copy_from_slice(&rotated(x, rope, position));
            }
            for head in 0..kv_heads {
                let slot = cache.slot(layer, batch, sequence_of(batch, token), position as usize, head);
                for i in 0..head_dim {
                    cache.keys[slot + i] = dtype.round(row[(heads + head) * head_dim + i]);
                    cache.values[slot + i] = dtype.round(row[(heads + kv_heads + head) * head_dim + i]);
                }
            }
            // The contract leaves keys and values unspecified afterwards: nobody may rely on them.
            row[heads * head_dim..].fill(f32::NAN);
        }
    }

    fn attention(
        &mut self,
        qkv: &Self::Activations,
        shape: AttentionShape,
        scale: f32,
        cache: &Self::KvCache,
        layer: usize,
        batch: &Batch,
        out: &mut Self::Activations,
    ) {
        let AttentionShape { heads, kv_heads, head_dim } = shape;
        out.set_rows(batch.tokens.len());
        for token in 0..batch.tokens.len() {
            let sequence = sequence_of(batch, token);
            let keys = batch.positions[token] as usize + 1;
            assert!(keys <= sequence.context_len as usize, "a position lies within its context");
            for head in 0..heads {
                let q = &qkv.row(token)[head * head_dim..][..head_dim];
                let slot = |key| cache.slot(layer, batch, sequence, key, head / (heads / kv_heads));
                let scores: Vec<f64> =
                    (0..keys).map(|key| dot(q, &cache.keys[slot(key)..][..head_dim]) * scale as f64).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|score| (score - max).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let mut mixed = vec![0.0; head_dim];
                for (key, weight) in weights.iter().enumerate() {
                    let value = &cache.values[slot(key)..][..head_dim];
                    mixed.iter_mut().zip(value).for_each(|(mixed, &value)| *mixed += weight * value as f64);
                }
                let out = &mut out.row_mut(token)[head * head_dim..][..head_dim];
                out.iter_mut().zip(mixed).for_each(|(out, mixed)| *out = (mixed / sum) as f32);
            }
        }
    }

    fn silu_mul(&mut self, gate_up: &Self::Activations, out: &mut Self::Activations) {
        out.set_rows(gate_up.rows());
        for row in 0..gate_up.rows() {
            let (gate, up) = gate_up.row(row).split_at(out.cols);
            for (out, (&gate, &up)) in out.row_mut(row).iter_mut().zip(gate.iter().zip(up)) {
                *out = (gate as f64 / (1.0 + (-gate as f64).exp()) * up as f64) as f32;
            }
        }
    }

    fn select_rows(&mut self, x: &Self::Activations, rows: &[u32], out: &mut Self::Activations) {
        out.set_rows(rows.len());
        for (to, &from) in rows.iter().enumerate() {
            out.row_mut(to).copy_from_slice(x.row(from as usize));
        }
    }

    fn sample<'a>(
        &mut self,
        logits: &mut Self::Activations,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
    ) {
        assert_eq!(out.len(), logits.rows(), "one outcome a row");
        for (i, out) in out.iter_mut().enumerate() {
            *out = sample_row(logits.row(i), &row(i));
        }
    }

    fn read(&self, x: &Self::Activations) -> Vec<f32> {
        x.values.clone()
    }

    fn write(&mut self, values: &[f32], out: &mut Self::Activations) {
        assert!(values.len().is_multiple_of(out.cols), "whole rows");
        out.set_rows(values.len() / out.cols);
        out.values.copy_from_slice(values);
    }
}
