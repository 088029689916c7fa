//! The residual stream: operations that may be several in one.

use engine_kernels::{DType, Matrix, Residual, RmsNorm};

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
        let [norms @ .., gate_up, down] = [hidden, hidden, 2 * ffn, hidden].map(|len| random.normals(len));
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

    /// What a stream that starts with `x` gives: the gated values, the next product, and the last norm.
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
            backend.add_linear(&inner, &down, of_down, &mut residual);
            backend.norm_linear(&mut residual, norm(&second), &next, None, &mut out);
            let next = backend.read(&out);
            backend.add_linear(&inner, &down, of_down, &mut residual);
            backend.norm(&mut residual, norm(&first));
            return [backend.read(&inner), next, backend.read(residual.normed())];
        }
        let mut residual = backend.filled(x, hidden);
        let [mut normed, mut delta] = [(); 2].map(|()| backend.activations(rows, hidden));
        backend.rms_norm(&residual, &first, 1e-5, &mut normed);
        backend.linear(&normed, &gate_up, of_gate_up, &mut both);
        backend.silu_mul(&both, &mut inner);
        backend.linear(&inner, &down, of_down, &mut delta);
        backend.add_rms_norm(&mut residual, &delta, &second, 1e-5, &mut normed);
        backend.linear(&normed, &next, None, &mut out);
        backend.add_rms_norm(&mut residual, &delta, &first, 1e-5, &mut normed);
        [backend.read(&inner), backend.read(&out), backend.read(&normed)]
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
        for rows in [ROWS[i % 9], ROWS[(i + 5) % 9]] {
            let x = random.normals(rows * hidden);
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
