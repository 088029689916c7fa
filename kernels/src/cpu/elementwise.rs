//! Operations on rows: norms, the gated activation, rotation and storing keys and values.
//!
//! A row is summed in sixteen lanes, element `i` in lane `i % 16`, and the lanes in a fixed order: a result depends on
//! the row's length alone.

use std::ops::Range;

use super::buffer::Shared;
use super::isa::{Isa, Kernel, LANES};
use super::kv::KvCache;
use super::tile::Quarter;
use crate::{AttentionShape, Batch, KvDType, RopeTable};

/// Calls `$body` for each sixteen (in the end fewer) of `$len` elements, with the start and the count.
macro_rules! each_vector {
    ($len:expr, |$at:ident, $count:ident| $body:expr) => {{
        let len = $len;
        let mut $at = 0;
        while $at < len {
            let $count = LANES.min(len - $at);
            $body;
            $at += LANES;
        }
    }};
}

/// Reads `count` elements, all sixteen the fast way.
///
/// # Safety
/// `count` values are readable at `p`.
#[inline(always)]
unsafe fn load<I: Isa>(isa: I, p: *const f32, count: usize) -> I::F {
    // SAFETY: as the function says.
    unsafe { if count == LANES { isa.load(p) } else { isa.load_partial(p, count) } }
}

/// Writes `count` elements.
///
/// # Safety
/// `count` values are writable at `p`.
#[inline(always)]
unsafe fn store<I: Isa>(isa: I, p: *mut f32, x: I::F, count: usize) {
    // SAFETY: as the function says.
    unsafe { if count == LANES { isa.store(p, x) } else { isa.store_partial(p, x, count) } }
}

/// `out = x / sqrt(mean(x²) + eps) * weight`; `out` may be `x`.
///
/// # Safety
/// All three have `weight.len()` elements.
#[inline(always)]
unsafe fn norm<I: Isa>(isa: I, x: *const f32, weight: &[f32], eps: f32, out: *mut f32) {
    let mut squares = isa.zero();
    // SAFETY: as the function says.
    unsafe {
        each_vector!(weight.len(), |at, count| {
            let v = load(isa, x.add(at), count);
            squares = isa.fma(v, v, squares);
        });
        let inverse = isa.splat(1.0 / (isa.reduce_add(squares) / weight.len() as f32 + eps).sqrt());
        each_vector!(weight.len(), |at, count| {
            let v = isa.mul(load(isa, x.add(at), count), inverse);
            store(isa, out.add(at), isa.mul(v, load(isa, weight.as_ptr().add(at), count)), count);
        });
    }
}

/// What a norm is taken of, `[rows, weight.len()]`.
pub(crate) enum NormInput<'a> {
    /// The values themselves.
    Plain(&'a [f32]),
    /// The residual stream after the delta has been added to it, in place.
    Sum { residual: &'a mut [f32], delta: &'a [f32] },
}

/// RMS norm of whole rows.
pub(crate) struct Norm<'a> {
    pub(crate) input: NormInput<'a>,
    pub(crate) weight: &'a [f32],
    pub(crate) eps: f32,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for Norm<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let cols = self.weight.len();
        assert!(cols > 0 && self.out.len().is_multiple_of(cols));
        // SAFETY: all rows have `cols` elements, and there are as many rows in each.
        unsafe {
            let x = match self.input {
                NormInput::Plain(x) => x,
                NormInput::Sum { residual, delta } => {
                    assert!(delta.len() == residual.len());
                    each_vector!(delta.len(), |at, count| {
                        let to = residual.as_mut_ptr().add(at);
                        store(isa, to, isa.add(load(isa, to, count), load(isa, delta.as_ptr().add(at), count)), count);
                    });
                    residual
                }
            };
            assert!(x.len() == self.out.len());
            let x = x.as_ptr();
            for row in 0..self.out.len() / cols {
                norm(isa, x.add(row * cols), self.weight, self.eps, self.out.as_mut_ptr().add(row * cols));
            }
        }
    }
}

/// `out = silu(gate) × up`, rows of `[gate, up]`.
pub(crate) struct SiluMul<'a> {
    pub(crate) gate_up: &'a [f32],
    pub(crate) ffn: usize,
    pub(crate) out: &'a mut [f32],
}

impl Kernel for SiluMul<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        assert!(self.gate_up.len() == 2 * self.out.len() && self.out.len().is_multiple_of(self.ffn));
        for row in 0..self.out.len() / self.ffn {
            // SAFETY: the assertion gives each row its elements.
            unsafe {
                let gate = self.gate_up.as_ptr().add(row * 2 * self.ffn);
                let out = self.out.as_mut_ptr().add(row * self.ffn);
                each_vector!(self.ffn, |at, count| {
                    let g = load(isa, gate.add(at), count);
                    let u = load(isa, gate.add(self.ffn + at), count);
                    let silu = isa.div(g, isa.add(isa.splat(1.0), isa.exp(isa.sub(isa.zero(), g))));
                    store(isa, out.add(at), isa.mul(silu, u), count);
                });
            }
        }
    }
}

/// Norms and rotates queries and keys of some tokens, and stores keys and values.
pub(crate) struct RopeAndCache<'a> {
    pub(crate) qkv: Shared<'a, f32>,
    pub(crate) shape: AttentionShape,
    /// Weights of the query and key norms, and eps.
    pub(crate) norm: Option<(&'a [f32], &'a [f32], f32)>,
    pub(crate) rope: &'a RopeTable,
    pub(crate) cache: &'a KvCache,
    pub(crate) layer: usize,
    pub(crate) batch: &'a Batch,
    /// These are this chunk's alone.
    pub(crate) tokens: Range<usize>,
}

impl Kernel for RopeAndCache<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape;
        let width = self.shape.qkv_width();
        assert!(2 * self.rope.pairs() <= head_dim && head_dim == self.cache.layout().head_dim);
        assert!(kv_heads == self.cache.layout().kv_heads);
        assert!(self.norm.is_none_or(|(q, k, _)| q.len() == head_dim && k.len() == head_dim));
        let sequences = &self.batch.sequences;
        let first = self.tokens.start as u32;
        let mut sequence = sequences.partition_point(|s| s.query_start + s.query_len <= first);
        for token in self.tokens.clone() {
            while sequences[sequence].query_start + sequences[sequence].query_len <= token as u32 {
                sequence += 1;
            }
            let position = self.batch.positions[token];
            let (cos, sin) = self.rope.at(position);
            // SAFETY: this chunk's rows are its own.
            let row = unsafe { self.qkv.slice(token * width, width) };
            for head in 0..heads + kv_heads {
                let x = &mut row[head * head_dim..][..head_dim];
                if let Some((q, k, eps)) = self.norm {
                    // SAFETY: `x` and the weights are one head long.
                    unsafe { norm(isa, x.as_ptr(), if head < heads { q } else { k }, eps, x.as_mut_ptr()) };
                }
                rotate(isa, x, cos, sin);
            }
            let size = self.cache.layout().block_size;
            let table = sequences[sequence].table_start as usize;
            let page = self.batch.block_tables[table + position as usize / size] as usize;
            let offset = position as usize % size;
            for head in 0..kv_heads {
                let (keys, values) = self.cache.page(self.layer, page, head);
                let key = &row[(heads + head) * head_dim..][..head_dim];
                let value = &row[(heads + kv_heads + head) * head_dim..][..head_dim];
                let dtype = self.cache.layout().dtype;
                // SAFETY: a page has `block_size` columns of keys and rows of values, and this token's are written by
                // this chunk alone.
                unsafe {
                    scatter(isa, key, dtype, keys, offset, size);
                    scatter(isa, value, dtype, values, offset * head_dim, 1);
                }
            }
        }
    }
}

/// Rotates element `i` together with element `i + pairs`.
#[inline(always)]
fn rotate<I: Isa>(isa: I, x: &mut [f32], cos: &[f32], sin: &[f32]) {
    let pairs = cos.len();
    assert!(2 * pairs <= x.len() && sin.len() == pairs);
    // SAFETY: the assertion covers both halves.
    unsafe {
        let (low, high) = (x.as_mut_ptr(), x.as_mut_ptr().add(pairs));
        each_vector!(pairs, |at, count| {
            let (a, b) = (load(isa, low.add(at), count), load(isa, high.add(at), count));
            let (c, s) = (load(isa, cos.as_ptr().add(at), count), load(isa, sin.as_ptr().add(at), count));
            store(isa, low.add(at), isa.sub(isa.mul(a, c), isa.mul(b, s)), count);
            store(isa, high.add(at), isa.add(isa.mul(b, c), isa.mul(a, s)), count);
        });
    }
}

/// Rounds `x` to `dtype` and writes element `i` to element `start + i × stride` of `to`.
///
/// # Safety
/// Those elements are writable.
#[inline(always)]
unsafe fn scatter<I: Isa>(isa: I, x: &[f32], dtype: KvDType, to: *mut u8, start: usize, stride: usize) {
    if dtype == KvDType::F32 {
        for (i, &value) in x.iter().enumerate() {
            // SAFETY: the caller vouches for it.
            unsafe { to.cast::<f32>().add(start + i * stride).write(value) };
        }
        return;
    }
    if dtype == KvDType::F8 {
        each_vector!(x.len(), |at, count| {
            let mut values = [0.0; LANES];
            values[..count].copy_from_slice(&x[at..at + count]);
            for (i, &bits) in values.map(Quarter::bits_of)[..count].iter().enumerate() {
                // SAFETY: the caller vouches for it.
                unsafe { to.add(start + (at + i) * stride).write(bits) };
            }
        });
        return;
    }
    let mut halves = [0u16; LANES];
    each_vector!(x.len(), |at, count| {
        if dtype == KvDType::F16 {
            // SAFETY: `count` elements of `x`, sixteen of `halves`.
            unsafe { isa.store_f16(halves.as_mut_ptr(), load(isa, x.as_ptr().add(at), count)) };
        } else {
            for (half, &value) in halves.iter_mut().zip(&x[at..at + count]) {
                *half = half::bf16::from_f32(value).to_bits();
            }
        }
        for (i, &half) in halves[..count].iter().enumerate() {
            // SAFETY: the caller vouches for it.
            unsafe { to.cast::<u16>().add(start + (at + i) * stride).write(half) };
        }
    });
}
