//! The residual stream: operations that may be several in one.

use engine_kernels::{
    Attention, AttentionShape, Batch, DType, KvDType, KvLayout, Matrix, Projection, QkNorm, Residual, RmsNorm,
};

use crate::attention::DTYPES;
use crate::rope::table;
use crate::support::{FLOATS, QUANTIZED, Random, Subject, Weight, assert_same_bits};

/// A layer without its attention: `hidden` → `ffn` → `hidden`, and once more `hidden` → `out`.
struct Case {
    gate: Weight,
    up: Weight,
    /// Stacked, as those of gate and up are.
    down: [Weight; 2],
    next: Weight,
    norms: [Vec<f32>; 2],
    /// Of gate and up, of down.
    biases: Option<[Vec<f32>; 2]>,
}

const OUT: usize = 21;

impl Case {
    /// Types of gate and up, and of the parts of down.
    fn random([gate, up, last @ ..]: [DType; 4], hidden: usize, ffn: usize, random: &mut Random) -> Self {
        let biased = random.below(2) == 0;
        let [mut norms @ .., gate_up, down] = [hidden, hidden, 2 * ffn, hidden].map(|len| random.normals(len));
        // Beyond f16's range.
        norms[1].iter_mut().for_each(|weight| *weight *= 1e5);
        Self {
            gate: Weight::random(gate, ffn, hidden, random),
            up: Weight::random(up, ffn, hidden, random),
            down: [(last[0], hidden - 8), (last[1], 8)].map(|(dtype, rows)| Weight::random(dtype, rows, ffn, random)),
            next: Weight::random(up, OUT, hidden, random),
            norms,
            biases: biased.then_some([gate_up, down]),
        }
    }

    fn hidden(&self) -> usize {
        self.norms[0].len()
    }

    /// What a stream that starts with `x` gives: the gated values, the next product, and a norm after all that again.
    fn run<B: Subject>(&self, x: &[f32], fused: bool) -> [Vec<f32>; 3] {
        let mut backend = B::any();
        let mut weight = |parts: &[Matrix<'_>]| backend.linear_weight(parts).unwrap();
        let gate_up = weight(&[self.gate.matrix(), self.up.matrix()]);
        let (down, next) = (weight(&self.down.each_ref().map(Weight::matrix)), weight(&[self.next.matrix()]));
        let [first, second] = [0, 1].map(|i| backend.vector(&self.norms[i]));
        let biases = self.biases.as_ref().map(|biases| [0, 1].map(|i| backend.vector(&biases[i])));
        let [of_gate_up, of_down] = [0, 1].map(|i| biases.as_ref().map(|biases| &biases[i]));

        let (rows, hidden, ffn) = (x.len() / self.hidden(), self.hidden(), self.gate.matrix().rows());
        let mut both = backend.activations(rows, 2 * ffn);
        let mut inner = backend.activations(rows, ffn);
        let mut out = backend.activations(rows, OUT);
        if fused {
            let mut residual = Residual::new(&mut backend, rows, hidden);
            backend.write(x, residual.start());
            let norm = |weight| RmsNorm { weight, eps: 1e-5 };
            backend.norm_linear_silu_mul(&mut residual, norm(&first), &gate_up, of_gate_up, &mut both, &mut inner);
            let gated = backend.read(&inner);
            backend.add_linear(&inner, &down, of_down, &mut residual);
            backend.norm_linear(&mut residual, norm(&second), &next, None, &mut out);
            let gate_up = Projection { weight: &gate_up, bias: of_gate_up };
            let down = Projection { weight: &down, bias: of_down };
            backend.add_mlp(&mut residual, norm(&second), gate_up, down, [&mut both, &mut inner]);
            backend.norm(&mut residual, norm(&first));
            return [gated, backend.read(&out), backend.read(residual.normed())];
        }
        let mut residual = backend.filled(x, hidden);
        let [mut normed, mut delta] = [(); 2].map(|()| backend.activations(rows, hidden));
        backend.rms_norm(&residual, &first, 1e-5, &mut normed);
        backend.linear(&normed, &gate_up, of_gate_up, &mut both);
        backend.silu_mul(&both, &mut inner);
        let gated = backend.read(&inner);
        backend.linear(&inner, &down, of_down, &mut delta);
        backend.add_rms_norm(&mut residual, &delta, &second, 1e-5, &mut normed);
        backend.linear(&normed, &next, None, &mut out);
        backend.linear(&normed, &gate_up, of_gate_up, &mut both);
        backend.silu_mul(&both, &mut inner);
        backend.linear(&inner, &down, of_down, &mut delta);
        backend.add_rms_norm(&mut residual, &delta, &first, 1e-5, &mut normed);
        [gated, backend.read(&out), backend.read(&normed)]
    }
}

/// Around every number of rows at which a backend is likely to do something else.
const ROWS: [usize; 9] = [1, 2, 3, 4, 5, 8, 9, 16, 17];

pub(crate) fn fused_operations_give_the_bits_of_those_they_stand_for<B: Subject>() {
    let mut random = Random::new(91);
    let all: Vec<DType> = FLOATS.into_iter().chain(QUANTIZED).collect();
    for (i, &dtype) in all.iter().enumerate() {
        // Gate and up of one type, and now and then of two.
        let other = if i % 4 == 3 { all[i - 2] } else { dtype };
        let is_quantized = dtype.is_quantized() || other.is_quantized();
        // The last beyond what a block of the gated activation takes.
        let (hidden, ffn) = if is_quantized { (256, 256) } else { ([40, 264, 300][i], [17, 33, 523][i]) };
        // Once of two types that activations are rounded for in two ways.
        let last = if dtype == DType::Q4_1 { DType::BF16 } else { other };
        let case = Case::random([dtype, other, dtype, last], hidden, ffn, &mut random);
        for rows in [ROWS[i % 9], ROWS[(i + 5) % 9], 17 + i] {
            let mut x = random.normals(rows * hidden);
            x[..hidden].fill(0.0);
            let (fused, apart) = (case.run::<B>(&x, true), case.run::<B>(&x, false));
            for (what, (fused, apart)) in ["gated", "next", "normed"].iter().zip(fused.iter().zip(&apart)) {
                assert_same_bits(fused, apart, &format!("{what}, {dtype:?} and {other:?}, {rows} rows"));
            }
        }
    }
}

pub(crate) fn a_row_of_a_fused_operation_does_not_see_the_others<B: Subject>() {
    let mut random = Random::new(92);
    for dtype in [DType::BF16, DType::Q4_0, DType::F8] {
        let case = Case::random([dtype; 4], 256, 64, &mut random);
        let x = random.normals(16 * 256);
        let all = case.run::<B>(&x, true);
        for rows in [1, 2, 4, 7] {
            let start = random.below(16 - rows + 1);
            let some = case.run::<B>(&x[start * 256..(start + rows) * 256], true);
            for (some, all) in some.iter().zip(&all) {
                let width = all.len() / 16;
                let what = format!("{dtype:?}, {rows} rows from {start}");
                assert_same_bits(some, &all[start * width..(start + rows) * width], &what);
            }
        }
    }
}

/// A layer's attention, and what its sequences hold when it begins.
struct Attended {
    shape: AttentionShape,
    block_size: usize,
    dtype: KvDType,
    /// Elements of a head that are rotated.
    rotary: usize,
    norms: Option<[Vec<f32>; 2]>,
    output: Weight,
    bias: Vec<f32>,
    weight: Vec<f32>,
    /// How large queries, keys and values of new tokens are,
    size: f32,
    /// and those of each sequence's tokens before them.
    cached: Vec<Vec<f32>>,
    pages: Vec<Vec<u32>>,
}

impl Attended {
    const BLOCKS: usize = 400;

    fn random(case: (usize, usize, usize, usize, KvDType, usize, DType), lens: &[usize], random: &mut Random) -> Self {
        let (heads, kv_heads, head_dim, block_size, dtype, rotary, output) = case;
        let shape = AttentionShape { heads, kv_heads, head_dim };
        let hidden = 24;
        let mut pages = random.shuffled(Self::BLOCKS).into_iter();
        // And a few tokens more.
        let mut table = |&len: &usize| pages.by_ref().take((len + 12).div_ceil(block_size)).collect();
        Self {
            shape,
            block_size,
            dtype,
            rotary,
            norms: (rotary < head_dim).then(|| [(); 2].map(|()| random.normals(head_dim))),
            output: Weight::random(output, hidden, shape.q_width(), random),
            bias: random.normals(hidden),
            weight: random.normals(hidden),
            size: 1.0,
            pages: lens.iter().map(&mut table).collect(),
            cached: lens.iter().map(|len| random.normals(len * shape.qkv_width())).collect(),
        }
    }

    /// The norms of the residual stream behind each of some steps, of which each is so many tokens of each sequence.
    fn run<B: Subject>(&self, steps: &[Vec<usize>], fused: bool) -> Vec<Vec<f32>> {
        let Self { shape, block_size, dtype, .. } = *self;
        let mut backend = B::any();
        let AttentionShape { kv_heads, head_dim, .. } = shape;
        let mut cache = backend
            .kv_cache(KvLayout { layers: 2, kv_heads, head_dim, block_size, blocks: Self::BLOCKS, dtype })
            .unwrap();
        let rope = backend.rope(table(self.rotary / 2, 512));
        let output = backend.linear_weight(&[self.output.matrix()]).unwrap();
        let [bias, weight] = [&self.bias, &self.weight].map(|values| backend.vector(values));
        let norms = self.norms.as_ref().map(|[q, k]| [backend.vector(q), backend.vector(k)]);
        let norm = || norms.as_ref().map(|[q, k]| QkNorm { q, k, eps: 1e-6 });
        let hidden = self.weight.len();
        let mut lens: Vec<usize> = self.cached.iter().map(|cached| cached.len() / shape.qkv_width()).collect();
        for ((cached, pages), &len) in self.cached.iter().zip(&self.pages).zip(&lens).filter(|(_, len)| **len > 0) {
            let mut batch = Batch::default();
            batch.push(&vec![0; len], 0, pages, len);
            let mut qkv = backend.filled(cached, shape.qkv_width());
            backend.begin(&batch);
            backend.rope_and_cache(&mut qkv, shape, norm(), &rope, &mut cache, 1, &batch);
        }
        let mut random = Random::new(94);
        let mut step = |tokens: &Vec<usize>| {
            let mut batch = Batch::default();
            for ((&tokens, len), pages) in tokens.iter().zip(&mut lens).zip(&self.pages) {
                if tokens > 0 {
                    batch.push(&vec![0; tokens], *len as u32, pages, 0);
                }
                *len += tokens;
            }
            let rows = batch.tokens.len();
            let x = random.normals(rows * hidden);
            let qkv = random.normals(rows * shape.qkv_width()).into_iter().map(|x| x * self.size);
            let mut qkv = backend.filled(&qkv.collect::<Vec<_>>(), shape.qkv_width());
            let mut mixed = backend.activations(rows, shape.q_width());
            backend.begin(&batch);
            let scale = 0.1;
            if fused {
                let mut residual = Residual::new(&mut backend, rows, hidden);
                backend.write(&x, residual.start());
                let output = Projection { weight: &output, bias: Some(&bias) };
                let attention = Attention { shape, scale, norm: norm(), rope: &rope, output };
                let mut stored = 0;
                let count = &mut |_: &B| stored += 1;
                backend.add_attention(&mut qkv, attention, &mut cache, 1, &batch, &mut mixed, &mut residual, count);
                assert_eq!(stored, 1, "what is done when keys and values are stored is done once");
                backend.norm(&mut residual, RmsNorm { weight: &weight, eps: 1e-5 });
                return backend.read(residual.normed());
            }
            let mut residual = backend.filled(&x, hidden);
            let [mut delta, mut normed] = [(); 2].map(|()| backend.activations(rows, hidden));
            backend.rope_and_cache(&mut qkv, shape, norm(), &rope, &mut cache, 1, &batch);
            backend.attention(&qkv, shape, scale, &cache, 1, &batch, &mut mixed);
            backend.linear(&mixed, &output, Some(&bias), &mut delta);
            backend.add_rms_norm(&mut residual, &delta, &weight, 1e-5, &mut normed);
            backend.read(&normed)
        };
        steps.iter().map(&mut step).collect()
    }
}

pub(crate) fn attention_that_is_added_gives_the_bits_of_its_parts<B: Subject>() {
    // Heads, key/value heads, width, tokens of a page, type of the cache, rotated elements, type of the weights.
    let cases = [
        (4, 2, 64, 16, KvDType::BF16, 64, DType::BF16),
        (9, 1, 24, 16, KvDType::F32, 8, DType::F32),
        (16, 1, 64, 8, KvDType::F16, 48, DType::Q4_0),
        (6, 3, 128, 48, KvDType::F8, 128, DType::F8),
        (5, 1, 256, 16, KvDType::BF16, 64, DType::F16),
        // Neither normed nor as wide as lanes are: only barriers keep heads apart that a warp turns one after another.
        (16, 2, 80, 24, KvDType::F16, 80, DType::BF16),
        (8, 4, 128, 64, KvDType::BF16, 120, DType::BF16),
    ];
    let mut random = Random::new(93);
    // Where a page, a warp's keys or a partition end, and before and behind.
    let lens = [0, 15, 16, 17, 127, 128, 255, 7, 63, 64, 126, 1, 2, 3, 4, 5, 300, 31, 95, 79];
    for case in cases {
        let attended = Attended::random(case, &lens, &mut random);
        // What pads narrower heads is zero also where wider ones left what is no number.
        let (heads, kv_heads, width, block_size, dtype, _, output) = case;
        let wide = width.next_power_of_two().max(64);
        let infinite = (heads, kv_heads, wide, block_size, dtype, wide, output);
        Attended { size: f32::INFINITY, ..Attended::random(infinite, &[3], &mut random) }.run::<B>(&[vec![1]], true);
        let of = |sequences: usize| vec![1; sequences];
        // Each row reads what the steps before have stored. The last but one has prompts too.
        let steps = [of(20), of(3), of(20), [of(14), vec![7, 1, 2]].concat(), of(20)];
        let (fused, apart) = (attended.run::<B>(&steps, true), attended.run::<B>(&steps, false));
        for (i, (fused, apart)) in fused.iter().zip(&apart).enumerate() {
            assert_same_bits(fused, apart, &format!("{case:?}, step {i}"));
        }
    }
}

pub(crate) fn decoding_with_every_group_head_and_type_rotates_where_it_attends<B: Subject>() {
    let mut random = Random::new(94);
    for heads in [1, 2, 4, 8] {
        for width in [64, 128, 256] {
            for dtype in DTYPES {
                let case = (heads, 1, width, 16, dtype, width, DType::BF16);
                let attended = Attended::random(case, &[33, 2], &mut random);
                let steps = [vec![1, 1], vec![1, 1]];
                let (fused, apart) = (attended.run::<B>(&steps, true), attended.run::<B>(&steps, false));
                for (fused, apart) in fused.iter().zip(&apart) {
                    assert_same_bits(fused, apart, &format!("{case:?}"));
                }
            }
        }
    }
}
