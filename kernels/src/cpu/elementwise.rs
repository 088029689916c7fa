//! Operations on rows: norms, the gated activation, rotation and storing keys and values.
//!
//! A row is summed in sixteen lanes, element `i` in lane `i % 16`, and the lanes in a fixed order: a result depends on
//! the row's length alone.

use std::ops::Range;

use super::buffer::Shared;
use super::isa::{Isa, Kernel, LANES};
use super::kv::KvCache;
use super::tile::F8;
use crate::{AttentionShape, Batch, KvDType, RopeTable, SequenceSpan};

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

/// A batch's tokens in bands, of which no two write to the same cache line of a page: threads that do take the line
/// from each other at every store.
pub(crate) struct TokenBands<'a> {
    batch: &'a Batch,
    /// [`KvCache::tokens_a_line`].
    line: usize,
    /// Tokens of a band, before it is cut where it may be.
    tokens: usize,
}

impl<'a> TokenBands<'a> {
    /// Bands of about `tokens` tokens, and no shorter than what sequences have in a line on average, for most would
    /// come out empty.
    pub(crate) fn new(batch: &'a Batch, line: usize, tokens: usize) -> Self {
        let run = line.min(batch.tokens.len() / batch.sequences.len().max(1)).max(1);
        Self { batch, line, tokens: tokens.max(1).next_multiple_of(run) }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.batch.tokens.len().div_ceil(self.tokens)
    }

    /// The tokens of one, possibly none.
    pub(crate) fn tokens(&self, band: usize) -> Range<usize> {
        self.cut(band * self.tokens)..self.cut((band + 1) * self.tokens)
    }

    /// The first place from `token` on where a line begins: every `line` positions of a sequence and, as a page that is
    /// written has but one sequence, between two of them.
    fn cut(&self, token: usize) -> usize {
        let Batch { tokens, positions, sequences, .. } = self.batch;
        if token >= tokens.len() {
            return tokens.len();
        }
        let end = |span: &SequenceSpan| (span.query_start + span.query_len) as usize;
        let span = &sequences[sequences.partition_point(|span| end(span) <= token)];
        if span.query_start as usize == token {
            return token;
        }
        let position = positions[token] as usize;
        (token + position.next_multiple_of(self.line) - position).min(end(span))
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
            for (i, &bits) in values.map(F8::bits_of)[..count].iter().enumerate() {
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

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Sequences of `(position, tokens)`, each with pages of 16 tokens of its own.
    fn batch(spans: &[(u32, usize)]) -> Batch {
        let mut batch = Batch::default();
        for (i, &(position, tokens)) in spans.iter().enumerate() {
            let pages: Vec<u32> =
                (0..(position as usize + tokens).div_ceil(16) as u32).map(|page| page + 100 * i as u32).collect();
            batch.push(&vec![0; tokens], position, &pages, tokens);
        }
        batch
    }

    #[test]
    fn bands_hold_each_token_once_and_share_no_line_of_a_page() {
        for spans in [
            &[(0, 300)][..],
            &[(7, 90), (0, 1), (31, 1), (16, 40), (5, 3)],
            &[(9, 1), (10, 1), (11, 1), (12, 1), (13, 1), (14, 1), (15, 1)],
            &[(3, 10), (40, 7), (15, 2)],
        ] {
            let batch = batch(spans);
            for (line, wanted) in [(16, 1), (16, 4), (16, 17), (8, 4), (8, 100)] {
                let bands = TokenBands::new(&batch, line, wanted);
                let mut next = 0;
                let mut owners = HashMap::new();
                for band in 0..bands.count() {
                    let tokens = bands.tokens(band);
                    assert_eq!(tokens.start, next);
                    next = tokens.end;
                    for token in tokens {
                        let sequence = batch.sequences.iter().rposition(|span| span.query_start as usize <= token);
                        let place = (sequence, batch.positions[token] as usize / line);
                        assert_eq!(*owners.entry(place).or_insert(band), band, "{spans:?}, {line} a line, {place:?}");
                    }
                }
                assert_eq!(next, batch.tokens.len());
            }
        }
    }

    #[test]
    fn a_prompt_is_cut_by_lines_and_decoding_by_tokens() {
        let prompt = batch(&[(0, 64)]);
        let bands = TokenBands::new(&prompt, 16, 4);
        assert_eq!((bands.count(), bands.tokens(1)), (4, 16..32));
        let decoding = batch(&[(9, 1); 12]);
        let bands = TokenBands::new(&decoding, 16, 4);
        assert_eq!((bands.count(), bands.tokens(1)), (3, 4..8));
    }
}
