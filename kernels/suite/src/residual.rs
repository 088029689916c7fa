//! The residual stream: operations that may be several in one.

use engine_kernels::{
    AttentionShape, Batch, DType, KvDType, KvLayout, Matrix, Projection, Residual, RmsNorm, RopeTable,
};

use crate::support::{FLOATS, QUANTIZED, Random, Subject, Weight, assert_same_bits};

/// A layer without its attention: `hidden` → `ffn` → `hidden`, and once more `hidden` → `out`.
struct Case {
    gate: Weight,
    up: Weight,
    down: Weight,
    next: Weight,
    norms: [Vec<f32>; 2],
    /// Of gate and up, of down.
    biases: Option<[Vec<f32>; 2]>,
}

const OUT: usize = 21;

impl Case {
    fn random(gate: DType, up: DType, hidden: usize, ffn: usize, random: &mut Random) -> Self {
        let biased = random.below(2) == 0;
        let [mut norms @ .., gate_up, down] = [hidden, hidden, 2 * ffn, hidden].map(|len| random.normals(len));
        // Beyond f16's range.
        norms[1].iter_mut().for_each(|weight| *weight *= 1e5);
        Self {
            gate: Weight::random(gate, ffn, hidden, random),
            up: Weight::random(up, ffn, hidden, random),
            down: Weight::random(gate, hidden, ffn, random),
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
        let (down, next) = (weight(&[self.down.matrix()]), weight(&[self.next.matrix()]));
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
        let (hidden, ffn) = if is_quantized { (256, 256) } else { ([40, 264, 300][i], [17, 33, 8][i]) };
        let case = Case::random(dtype, other, hidden, ffn, &mut random);
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
        let case = Case::random(dtype, dtype, 256, 64, &mut random);
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

pub(crate) fn attention_that_is_added_gives_the_bits_of_its_parts<B: Subject>() {
    const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 64 };
    const HIDDEN: usize = 40;
    let mut random = Random::new(93);
    // Contexts of rows that decode, and lengths of prompts behind them.
    let steps: [(Vec<u32>, &[usize]); 4] = [
        ((0..18).map(|i| 1 + i * 61 % 400).collect(), &[]),
        ((0..10).map(|i| 200 - i * 17).collect(), &[9, 3]),
        (Vec::new(), &[20]),
        (vec![7, 300, 130], &[]),
    ];
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q4_0, DType::F8] {
        let output = Weight::random(dtype, HIDDEN, SHAPE.q_width(), &mut random);
        let [bias, weight] = [HIDDEN; 2].map(|len| random.normals(len));
        for (contexts, prompts) in &steps {
            let mut batch = Batch::default();
            let mut pages = 0..;
            let mut table = |tokens: usize| pages.by_ref().take(tokens.div_ceil(16)).collect::<Vec<u32>>();
            contexts.iter().for_each(|&context| batch.push(&[0], context - 1, &table(context as usize), 0));
            prompts.iter().for_each(|&tokens| batch.push(&vec![0; tokens], 0, &table(tokens), 0));
            let rows = batch.tokens.len();
            let (x, qkv) = (random.normals(rows * HIDDEN), random.normals(rows * SHAPE.qkv_width()));
            let run = |fused: bool| {
                let mut backend = B::any();
                let AttentionShape { kv_heads, head_dim, .. } = SHAPE;
                let layout =
                    KvLayout { layers: 1, kv_heads, head_dim, block_size: 16, blocks: 400, dtype: KvDType::BF16 };
                let mut cache = backend.kv_cache(layout).unwrap();
                let rope = backend.rope(RopeTable::new(&[0.5; 32], 1.0, 512));
                let output = backend.linear_weight(&[output.matrix()]).unwrap();
                let [bias, weight] = [&bias, &weight].map(|values| backend.vector(values));
                let mut qkv = backend.filled(&qkv, SHAPE.qkv_width());
                let mut mixed = backend.activations(rows, SHAPE.q_width());
                backend.begin(&batch);
                backend.rope_and_cache(&mut qkv, SHAPE, None, &rope, &mut cache, 0, &batch);
                if fused {
                    let mut residual = Residual::new(&mut backend, rows, HIDDEN);
                    backend.write(&x, residual.start());
                    let output = Projection { weight: &output, bias: Some(&bias) };
                    backend.add_attention(&qkv, SHAPE, 0.1, &cache, 0, &batch, output, &mut mixed, &mut residual);
                    backend.norm(&mut residual, RmsNorm { weight: &weight, eps: 1e-5 });
                    return backend.read(residual.normed());
                }
                let mut residual = backend.filled(&x, HIDDEN);
                let [mut delta, mut normed] = [(); 2].map(|()| backend.activations(rows, HIDDEN));
                backend.attention(&qkv, SHAPE, 0.1, &cache, 0, &batch, &mut mixed);
                backend.linear(&mixed, &output, Some(&bias), &mut delta);
                backend.add_rms_norm(&mut residual, &delta, &weight, 1e-5, &mut normed);
                backend.read(&normed)
            };
            assert_same_bits(&run(true), &run(false), &format!("{dtype:?}, {contexts:?} and {prompts:?}"));
        }
    }
}
