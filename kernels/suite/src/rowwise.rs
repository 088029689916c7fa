//! The operations that look at one row at a time.

use engine_kernels::reference::{ReferenceBackend, dequantize};

use crate::support::{FLOATS, QUANTIZED, Random, Subject, Weight, assert_near, assert_same_bits, weight_tolerance};

/// Shapes `[rows, cols]` that leave every kind of remainder.
const SHAPES: [(usize, usize); 9] =
    [(1, 1), (1, 7), (3, 16), (2, 33), (5, 64), (16, 255), (17, 256), (33, 576), (70, 100)];

pub(crate) fn embeddings_are_the_rows_of_every_type<B: Subject>() {
    let mut random = Random::new(11);
    for dtype in FLOATS.into_iter().chain(QUANTIZED) {
        let cols = if dtype.is_quantized() { 512 } else { 37 };
        let table = Weight::random(dtype, 50, cols, &mut random);
        let values = dequantize(&table.matrix());
        let mut backend = B::any();
        let table = backend.linear_weight(&[table.matrix()]).unwrap();
        let mut out = backend.activations(70, cols);
        for count in [1, 2, 17, 70] {
            let tokens: Vec<u32> = (0..count).map(|_| random.below(50) as u32).collect();
            backend.embedded(&table, &tokens, &mut out);
            let want: Vec<f32> = tokens.iter().flat_map(|&t| &values[t as usize * cols..][..cols]).copied().collect();
            let what = format!("{dtype:?}, {count} tokens");
            assert_near(&backend.read(&out), &want, |i| weight_tolerance::<B>(dtype, want[i]), &what);
        }
    }
}

pub(crate) fn rms_norms_match_the_reference<B: Subject>() {
    fn run<B: Subject>(backend: &mut B, x: &[f32], delta: &[f32], weight: &[f32], eps: f32) -> [Vec<f32>; 3] {
        let cols = weight.len();
        let weight = backend.vector(weight);
        let delta = backend.filled(delta, cols);
        let mut residual = backend.filled(x, cols);
        let mut out = backend.activations(x.len() / cols, cols);
        backend.rms_norm(&residual, &weight, eps, &mut out);
        let plain = backend.read(&out);
        backend.add_rms_norm(&mut residual, &delta, &weight, eps, &mut out);
        [plain, backend.read(&residual), backend.read(&out)]
    }
    let mut random = Random::new(12);
    for (rows, cols) in SHAPES {
        for scale in [1e-4, 1.0, 1e4] {
            let x: Vec<f32> = random.normals(rows * cols).iter().map(|x| x * scale).collect();
            let delta = random.normals(rows * cols);
            let weight = random.normals(cols);
            let eps = random.pick(&[1e-5, 1e-6]);
            let [plain, residual, added] = run(&mut B::any(), &x, &delta, &weight, eps);
            let want = run(&mut ReferenceBackend, &x, &delta, &weight, eps);
            let what = format!("[{rows}, {cols}] of {scale}");
            // A few roundings of a value that is at most sqrt(cols) times its weight.
            let near = |ours: &[f32], want: &[f32]| assert_near(ours, want, |i| 3e-6 * want[i].abs() + 1e-30, &what);
            near(&plain, &want[0]);
            assert_same_bits(&residual, &want[1], &what);
            near(&added, &want[2]);
        }
    }
    let [ones, ..] = run(&mut B::any(), &[3.0; 8], &[0.0; 8], &[1.0; 8], 0.0);
    assert_near(&ones, &[1.0; 8], |_| 1e-6, "a constant row has that constant as its root mean square");
}

pub(crate) fn silu_mul_matches_the_reference<B: Subject>() {
    fn run<B: Subject>(backend: &mut B, gate_up: &[f32], cols: usize) -> Vec<f32> {
        let gate_up = backend.filled(gate_up, 2 * cols);
        let mut out = backend.activations(70, cols);
        backend.silu_mul(&gate_up, &mut out);
        backend.read(&out)
    }
    let mut random = Random::new(13);
    for (rows, cols) in SHAPES {
        let gate_up: Vec<f32> = random.normals(rows * 2 * cols).iter().map(|x| x * 6.0).collect();
        let want = run(&mut ReferenceBackend, &gate_up, cols);
        let ours = run(&mut B::any(), &gate_up, cols);
        // A polynomial exp, a division and a product: a few units in the last place.
        assert_near(&ours, &want, |i| 1e-6 * want[i].abs() + 1e-30, &format!("[{rows}, {cols}]"));
    }
    // Where exp overflows or vanishes: x·sigmoid(x) is 0 far below and x far above.
    let gate_up = [0.0, 100.0, -100.0, -1e4, 1e4, -3e38, 1.0, 2.0, 3.0, 4.0, 5.0, 0.0];
    let want = [0.0, 200.0, 0.0, 0.0, 5e4, 0.0];
    assert_near(&run(&mut B::any(), &gate_up, 6), &want, |i| 1e-6 * want[i].abs() + 1e-30, "extremes");
}

pub(crate) fn selecting_and_copying_rows_is_exact<B: Subject>() {
    let mut random = Random::new(14);
    let mut backend = B::any();
    for (rows, cols) in SHAPES {
        let values = random.normals(rows * cols);
        let x = backend.filled(&values, cols);
        assert_same_bits(&backend.read(&x), &values, "written and read");
        let rows = rows as u32;
        let some: Vec<u32> = (0..rows).filter(|_| random.below(2) == 0).collect();
        // Those in order are another path on devices.
        for selected in [some, (0..rows).collect(), (0..rows.div_ceil(2)).collect(), (0..rows).rev().collect()] {
            let mut out = backend.activations(rows as usize, cols);
            backend.select_rows(&x, &selected, &mut out);
            let want: Vec<f32> = selected.iter().flat_map(|&r| &values[r as usize * cols..][..cols]).copied().collect();
            assert_same_bits(&backend.read(&out), &want, "selected");
        }
    }
}

/// All row-wise results of a batch: norm, sum, norm of the sum, silu.
fn everything<B: Subject>(backend: &mut B, x: &[f32], delta: &[f32], weight: &[f32]) -> [Vec<f32>; 4] {
    let cols = weight.len();
    let weight = backend.vector(weight);
    let delta = backend.filled(delta, cols);
    let mut residual = backend.filled(x, cols);
    let mut out = backend.activations(x.len() / cols, cols);
    backend.rms_norm(&residual, &weight, 1e-5, &mut out);
    let norm = backend.read(&out);
    backend.add_rms_norm(&mut residual, &delta, &weight, 1e-5, &mut out);
    let added = backend.read(&out);
    let mut half = backend.activations(x.len() / cols, cols / 2);
    backend.silu_mul(&residual, &mut half);
    [norm, backend.read(&residual), added, backend.read(&half)]
}

pub(crate) fn rows_do_not_see_each_other<B: Subject>() {
    let mut random = Random::new(15);
    let (rows, cols) = (70, 94);
    let (x, delta, weight) = (random.normals(rows * cols), random.normals(rows * cols), random.normals(cols));
    let mut backend = B::any();
    let all = everything(&mut backend, &x, &delta, &weight);
    for row in 0..rows {
        let span = row * cols..(row + 1) * cols;
        let alone = everything(&mut backend, &x[span.clone()], &delta[span], &weight);
        for (all, alone) in all.iter().zip(&alone) {
            let width = alone.len();
            assert_same_bits(alone, &all[row * width..(row + 1) * width], &format!("row {row}"));
        }
    }
}

pub(crate) fn the_number_of_threads_changes_no_bit<B: Subject>() {
    let mut random = Random::new(16);
    for (rows, cols) in [(1, 576), (3, 64), (70, 94)] {
        let (x, delta, weight) = (random.normals(rows * cols), random.normals(rows * cols), random.normals(cols));
        let one = everything(&mut B::with_threads(1), &x, &delta, &weight);
        for threads in [2, 3] {
            let more = everything(&mut B::with_threads(threads), &x, &delta, &weight);
            for (one, more) in one.iter().zip(&more) {
                assert_same_bits(more, one, &format!("[{rows}, {cols}], {threads} threads"));
            }
        }
    }
}
