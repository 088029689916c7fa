//! Products with weights of every type.

use engine_kernels::reference::{ReferenceBackend, dequantize};
use engine_kernels::{DType, KernelError, Matrix};

use crate::support::{FLOATS, QUANTIZED, Random, Subject, Weight, assert_near, assert_same_bits, narrowed};

fn product<B: Subject>(backend: &mut B, parts: &[Matrix<'_>], x: &[f32], bias: Option<&[f32]>) -> Vec<f32> {
    let weight = backend.linear_weight(parts).unwrap();
    let bias = bias.map(|bias| backend.vector(bias));
    let x = backend.filled(x, parts[0].cols());
    let rows = backend.read(&x).len() / parts[0].cols();
    let mut out = backend.activations(rows, parts.iter().map(Matrix::rows).sum());
    backend.linear(&x, &weight, bias.as_ref(), &mut out);
    backend.read(&out)
}

const BLOCK: usize = 32;

fn largest(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |max, x| max.max(x.abs()))
}

/// The unit in which a backend that rounds activations counts a block of them: of the eight fours, the one with the
/// largest magnitude (the first of equals) may take 127 × 128 units, and the largest of the other seven takes 127.
fn unit(block: &[f32]) -> f32 {
    let fours: Vec<f32> = block.chunks(4).map(largest).collect();
    let peak = (0..fours.len()).rev().max_by(|&a, &b| fours[a].total_cmp(&fours[b])).unwrap();
    let rest = fours.iter().enumerate().filter(|(i, _)| *i != peak).fold(0.0f32, |max, (_, x)| max.max(*x));
    (rest / 127.0).max(fours[peak] / (127.0 * 128.0))
}

/// Activations as a backend that rounds them sees them: whole units.
fn rounded(x: &[f32]) -> Vec<f32> {
    let block = |block: &[f32]| {
        let unit = unit(block);
        let inverse = if unit > 0.0 { 1.0 / unit } else { 0.0 };
        block.iter().map(|x| (x * inverse).round_ties_even() * unit).collect::<Vec<_>>()
    };
    x.chunks(BLOCK).flat_map(block).collect()
}

/// For each output: what a sum of products in single precision may be off. A sum of `k` terms is off by less than
/// `k · 2^-24` of the sum of magnitudes, and by the root of that as a rule: 2e-5 is the latter with much to spare at
/// the widths here. The magnitude of a quantised weight is that of its row: scale and minimum may be large and cancel.
fn rounding(parts: &[Matrix<'_>], x: &[f32]) -> Vec<f32> {
    let cols = parts[0].cols();
    let weights: Vec<f32> = parts.iter().flat_map(dequantize).collect();
    let mut out = Vec::new();
    for x in x.chunks_exact(cols) {
        let sum: f32 = x.iter().map(|x| x.abs()).sum();
        out.extend(weights.chunks_exact(cols).map(|row| 2e-5 * largest(row) * sum + 1e-6));
    }
    out
}

/// How far rounded activations can move each output: each by half a unit.
fn rounding_bound(parts: &[Matrix<'_>], x: &[f32]) -> Vec<f32> {
    let cols = parts[0].cols();
    let weights: Vec<f32> = parts.iter().flat_map(dequantize).collect();
    let mut out = Vec::new();
    for x in x.chunks_exact(cols) {
        let halves: Vec<f32> = x.chunks(BLOCK).map(|block| unit(block) / 2.0).collect();
        out.extend(
            weights.chunks_exact(cols).map(|row| {
                row.iter().enumerate().map(|(k, w)| w.abs() * halves[k / BLOCK]).sum::<f32>() * 1.001 + 1e-6
            }),
        );
    }
    out
}

/// How far narrower activations, and quantised weights, can move each output.
fn narrowing_bound(parts: &[Matrix<'_>], x: &[f32], narrow: DType) -> Vec<f32> {
    let cols = parts[0].cols();
    // Half a unit in the last place of 8 bits, or of 11, of both factors.
    let unit = if narrow == DType::BF16 { 1.0 / 256.0 } else { 2.01 / 2048.0 };
    let weights: Vec<f32> = parts.iter().flat_map(dequantize).collect();
    let bound = |x: &[f32], row: &[f32]| row.iter().zip(x).map(|(w, x)| (w * x).abs()).sum::<f32>() * unit + 1e-6;
    x.chunks_exact(cols).flat_map(|x| weights.chunks_exact(cols).map(|row| bound(x, row)).collect::<Vec<_>>()).collect()
}

/// The weights as the backend has them, read back through its embedding. What it may make of a file's weights is a
/// question for the embedding's test; here it is taken as given, so that products can be held to little.
fn as_kept<B: Subject>(backend: &mut B, parts: &[Matrix<'_>]) -> Vec<f32> {
    let weight = backend.linear_weight(parts).unwrap();
    let rows = parts.iter().map(Matrix::rows).sum::<usize>();
    let mut out = backend.activations(rows, parts[0].cols());
    backend.embedded(&weight, &(0..rows as u32).collect::<Vec<_>>(), &mut out);
    backend.read(&out)
}

fn has_integers(dtype: DType) -> bool {
    dtype.is_quantized() && dtype != DType::F8
}

fn check<B: Subject>(parts: &[Matrix<'_>], x: &[f32], bias: Option<&[f32]>, what: &str) {
    let mut backend = B::any();
    let ours = product(&mut backend, parts, x, bias);
    let (dtype, cols) = (parts[0].dtype(), parts[0].cols());
    let rounds = B::ROUNDS_ACTIVATIONS && parts.iter().all(|part| has_integers(part.dtype()));
    let narrow = B::narrows_to(dtype, x.len() / cols);
    let seen = match narrow {
        Some(narrow) => narrowed(x, cols, narrow, false),
        None if rounds => rounded(x),
        None => x.to_vec(),
    };
    let tight = rounding(parts, x);
    let weights = as_kept(&mut backend, parts);
    let kept = Weight::of(DType::F32, cols, &weights);
    let multiplied = narrow.map_or(weights.clone(), |narrow| narrowed(&weights, cols, narrow, true));
    let want = product(&mut ReferenceBackend, &[Weight::of(DType::F32, cols, &multiplied).matrix()], &seen, bias);
    assert_near(&ours, &want, |i| tight[i], what);
    if let Some(narrow) = narrow {
        let loose = narrowing_bound(parts, x, narrow);
        let exact = product(&mut ReferenceBackend, &[kept.matrix()], x, bias);
        assert_near(&ours, &exact, |i| tight[i] + loose[i], &format!("{what}, nothing narrowed"));
    }
    if rounds {
        let loose = rounding_bound(parts, x);
        let exact = product(&mut ReferenceBackend, &[kept.matrix()], x, bias);
        assert_near(&ours, &exact, |i| tight[i] + loose[i], &format!("{what}, activations unrounded"));
    }
}

/// Row counts around every tile height a kernel is likely to have.
const ROWS: [usize; 14] = [1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 33, 64, 70];

pub(crate) fn float_weights_match_the_reference<B: Subject>() {
    let mut random = Random::new(1);
    for dtype in FLOATS {
        for (i, rows) in ROWS.into_iter().enumerate() {
            // Widths and heights that are no multiple of anything, and some that are.
            let cols = [1, 7, 33, 64, 129, 255, 256, 577][i % 8];
            let out = [1, 3, 15, 16, 17, 31, 48, 65, 100][i % 9];
            let weight = Weight::random(dtype, out, cols, &mut random);
            let x = random.normals(rows * cols);
            let bias = random.normals(out);
            let bias = (i % 2 == 0).then_some(bias.as_slice());
            check::<B>(&[weight.matrix()], &x, bias, &format!("{dtype:?} [{out}, {cols}] x {rows}"));
        }
    }
}

pub(crate) fn quantized_weights_match_the_reference<B: Subject>() {
    let mut random = Random::new(2);
    for dtype in QUANTIZED {
        for (i, rows) in ROWS.into_iter().enumerate() {
            let cols = dtype.block_len() * [1, 2, 3, 5, 18][i % 5].min(1280 / dtype.block_len());
            let out = [1, 3, 15, 16, 17, 31, 48, 65, 100][i % 9];
            let weight = Weight::random(dtype, out, cols, &mut random);
            let x = random.normals(rows * cols);
            let bias = random.normals(out);
            let bias = (i % 2 == 0).then_some(bias.as_slice());
            check::<B>(&[weight.matrix()], &x, bias, &format!("{dtype:?} [{out}, {cols}] x {rows}"));
        }
    }
}

pub(crate) fn eight_bit_floats_of_any_width_match_the_reference<B: Subject>() {
    let mut random = Random::new(12);
    for (i, cols) in [1, 7, 40, 72, 127, 129, 200, 576, 1000].into_iter().enumerate() {
        let weight = Weight::random(DType::F8, [5, 16, 37][i % 3], cols, &mut random);
        let what = format!("[{}, {cols}]", weight.matrix().rows());
        let want = dequantize(&weight.matrix());
        // Where rows have to be whole blocks, others may be kept as f16.
        let tolerance = |i: usize| want[i].abs() / 2048.0 + 6e-8;
        assert_near(&as_kept(&mut B::any(), &[weight.matrix()]), &want, tolerance, &what);
        for rows in [1, 2, 4, 6, 16, 19] {
            let x = random.normals(rows * cols);
            let bias = random.normals(weight.matrix().rows());
            check::<B>(&[weight.matrix()], &x, Some(&bias), &format!("{what} x {rows}"));
        }
    }
}

pub(crate) fn eight_bit_floats_with_small_and_large_scales_match_the_reference<B: Subject>() {
    // As small and as large as models have them: also what is multiplied as f16 is near enough.
    let mut random = Random::new(13);
    for scale in [1e-6f32, 1e-4, 1e-2, 1.0] {
        let (out, cols) = (24, 384);
        let mut bytes = Vec::new();
        for _ in 0..out * cols / 128 {
            bytes.extend((scale * (0.5 + random.unit())).to_le_bytes());
            bytes.extend((0..128).map(|_| random.below(127) as u8 | (random.below(2) as u8) << 7));
        }
        let weight = Matrix::new(DType::F8, out, cols, &bytes).unwrap();
        let largest = largest(&dequantize(&weight));
        for rows in [1, 3, 16, 20] {
            let x = random.normals(rows * cols);
            let ours = product(&mut B::any(), &[weight], &x, None);
            let want = product(&mut ReferenceBackend, &[weight], &x, None);
            // A hundredth of what weights of eight bits are uncertain by.
            let sums: Vec<f32> = x.chunks(cols).map(|x| x.iter().map(|x| x.abs()).sum()).collect();
            let what = format!("scales around {scale:e}, {rows} rows");
            assert_near(&ours, &want, |i| largest * sums[i / out] / 1600.0, &what);
        }
    }
}

pub(crate) fn stacked_parts_of_mixed_types_stand_one_after_the_other<B: Subject>() {
    let mut random = Random::new(3);
    let all: Vec<DType> = FLOATS.into_iter().chain(QUANTIZED).collect();
    for rows in [1, 6, 19] {
        for i in 0..all.len() {
            // Heights that put the seams inside tiles.
            let parts: Vec<Weight> = [(0, 24), (3, 7), (7, 33)]
                .map(|(step, height)| Weight::random(all[(i + step) % all.len()], height, 512, &mut random))
                .into();
            let x = random.normals(rows * 512);
            let bias = random.normals(64);
            let matrices: Vec<Matrix<'_>> = parts.iter().map(Weight::matrix).collect();
            let stacked = product(&mut B::any(), &matrices, &x, Some(&bias));
            let mut start = 0;
            for matrix in matrices {
                let bias = &bias[start..start + matrix.rows()];
                let alone = product(&mut B::any(), &[matrix], &x, Some(bias));
                for row in 0..rows {
                    let part = &stacked[row * 64 + start..][..matrix.rows()];
                    let what = format!("row {row}, {:?} at {start}", matrix.dtype());
                    assert_same_bits(part, &alone[row * matrix.rows()..][..matrix.rows()], &what);
                }
                start += matrix.rows();
            }
        }
    }
}

pub(crate) fn every_row_count_gives_the_same_bits<B: Subject>() {
    let mut random = Random::new(4);
    for dtype in FLOATS.into_iter().chain(QUANTIZED) {
        let (out, cols) = (37, 256);
        let mut backend = B::any();
        let weight = Weight::random(dtype, out, cols, &mut random);
        let weight = backend.linear_weight(&[weight.matrix()]).unwrap();
        let x = random.normals(70 * cols);
        let mut results = backend.activations(70, out);
        // Computed all at once, and a few at a time.
        let mut computed = |rows: usize| {
            let chunks = x.chunks(rows * cols).map(|x| {
                let x = backend.filled(x, cols);
                backend.linear(&x, &weight, None, &mut results);
                backend.read(&results)
            });
            chunks.collect::<Vec<_>>().concat()
        };
        let (all, few) = (computed(70), computed(B::FEW_ROWS.max(1)));
        for rows in 1..70 {
            let all = if rows <= B::FEW_ROWS { &few } else { &all };
            // From another start each time, so that a row meets every place in a tile.
            let start = random.below(70 - rows + 1);
            let some = backend.filled(&x[start * cols..(start + rows) * cols], cols);
            backend.linear(&some, &weight, None, &mut results);
            let what = format!("{dtype:?}, {rows} rows from {start}");
            assert_same_bits(&backend.read(&results), &all[start * out..(start + rows) * out], &what);
        }
    }
}

pub(crate) fn wide_products_match_the_reference<B: Subject>() {
    // Input features of every number of whole and begun rounds of whatever loop goes over them, with the bits of a row
    // alone and among others.
    let mut random = Random::new(9);
    for (i, cols) in [1024usize, 1032, 2048, 3080, 4352].into_iter().enumerate() {
        for dtype in [DType::BF16, DType::F32, DType::Q4_0, DType::Q8_0, DType::Q6K, DType::F8] {
            let cols = if dtype.is_quantized() { cols.next_multiple_of(dtype.block_len()) } else { cols };
            let rows = [1, 2, 4, 8, 16][i];
            let weight = Weight::random(dtype, [9, 70][i % 2], cols, &mut random);
            let x = random.normals(rows * cols);
            let what = format!("{dtype:?} with {cols} columns x {rows}");
            check::<B>(&[weight.matrix()], &x, None, &what);
            let all = product(&mut B::any(), &[weight.matrix()], &x, None);
            let last = product(&mut B::any(), &[weight.matrix()], &x[(rows - 1) * cols..], None);
            assert_same_bits(&last, &all[all.len() - last.len()..], &what);
        }
    }
}

pub(crate) fn products_that_fill_a_device_match_the_reference<B: Subject>() {
    // As many output features as make devices of 20 to 340 multiprocessors take each kernel there is, for each form
    // that weights have there.
    let mut random = Random::new(11);
    for dtype in [DType::F32, DType::F16, DType::BF16, DType::Q4_0, DType::Q8_0, DType::Q6K, DType::F8] {
        for (i, rows) in [1, 2, 3, 5, 9].into_iter().enumerate() {
            // The widest kernels are for a row or two.
            let outs = [512, 1024, 2048, 4096, 8192];
            for &out in if rows <= 2 { &outs[..] } else { &outs[..4] } {
                let cols = (32 + 8 * i).next_multiple_of(dtype.block_len());
                let weight = Weight::random(dtype, out, cols, &mut random);
                let x = random.normals(rows * cols);
                check::<B>(&[weight.matrix()], &x, None, &format!("{dtype:?} [{out}, {cols}] x {rows}"));
            }
        }
    }
}

pub(crate) fn infinities_stay_in_their_rows<B: Subject>() {
    let mut random = Random::new(10);
    for dtype in FLOATS {
        for (rows, bad) in [(2, 0), (5, 3), (16, 15), (20, 4)] {
            let (cols, out) = (72, 20);
            let weight = Weight::random(dtype, out, cols, &mut random);
            let mut x = random.normals(rows * cols);
            x[bad * cols..(bad + 1) * cols].fill(1e30);
            let clean = product(&mut B::any(), &[weight.matrix()], &x, None);
            x[bad * cols..(bad + 1) * cols].fill(f32::INFINITY);
            let ours = product(&mut B::any(), &[weight.matrix()], &x, None);
            for row in (0..rows).filter(|&row| row != bad) {
                let span = row * out..(row + 1) * out;
                assert_same_bits(&ours[span.clone()], &clean[span], &format!("{dtype:?}, row {row} of {rows}"));
            }
        }
    }
}

pub(crate) fn a_row_may_have_its_largest_element_anywhere<B: Subject>() {
    let mut random = Random::new(11);
    let (rows, cols) = (20, 72);
    for dtype in FLOATS {
        // The last input feature is passed on, and no other.
        let mut values = vec![0.0; cols];
        values[cols - 1] = 1.0;
        let weight = Weight::of(dtype, cols, &values);
        let mut x = random.normals(rows * cols);
        // Beyond f16's range, and a number of each type once it is brought into it.
        let largest = (1 << 20) as f32;
        x.chunks_exact_mut(cols).for_each(|row| row[cols - 1] = largest);
        let out = product(&mut B::any(), &[weight.matrix()], &x, None);
        assert_near(&out, &vec![largest; rows], |_| 0.0, &format!("{dtype:?}"));
    }
}

pub(crate) fn the_number_of_threads_changes_no_bit<B: Subject>() {
    let mut random = Random::new(5);
    for dtype in FLOATS.into_iter().chain(QUANTIZED) {
        let weight = Weight::random(dtype, 333, 512, &mut random);
        for rows in [1, 5, 40] {
            let x = random.normals(rows * 512);
            let one = product(&mut B::with_threads(1), &[weight.matrix()], &x, None);
            for threads in [2, 3] {
                let more = product(&mut B::with_threads(threads), &[weight.matrix()], &x, None);
                assert_same_bits(&more, &one, &format!("{dtype:?}, {rows} rows, {threads} threads"));
            }
        }
    }
}

pub(crate) fn the_identity_gives_its_input_back<B: Subject>() {
    let mut random = Random::new(6);
    for dtype in FLOATS {
        for cols in [1, 5, 16, 40] {
            let identity: Vec<f32> = (0..cols * cols).map(|i| (i % (cols + 1) == 0) as u8 as f32).collect();
            for rows in [9, 21] {
                let x = random.normals(rows * cols);
                let out = product(&mut B::any(), &[Weight::of(dtype, cols, &identity).matrix()], &x, None);
                let narrow = B::narrows_to(dtype, rows);
                let x = narrow.map_or(x.clone(), |narrow| narrowed(&x, cols, narrow, false));
                assert_near(&out, &x, |_| 0.0, &format!("{dtype:?} identity of {cols}, {rows} rows"));
            }
        }
    }
}

pub(crate) fn parts_of_different_widths_are_refused<B: Subject>() {
    let mut random = Random::new(7);
    let (a, b) = (Weight::random(DType::F32, 2, 32, &mut random), Weight::random(DType::F32, 2, 64, &mut random));
    let refused = B::any().linear_weight(&[a.matrix(), b.matrix()]);
    assert!(matches!(refused, Err(KernelError::StackedColumns { first: 32, other: 64 })));
}

pub(crate) fn rows_of_zeros_give_the_bias<B: Subject>() {
    let mut random = Random::new(8);
    for dtype in FLOATS.into_iter().chain(QUANTIZED) {
        let weight = Weight::random(dtype, 20, 256, &mut random);
        let bias = random.normals(20);
        // And of what is too little to be brought near the upper end of f16.
        let sizes = if dtype.is_quantized() { &[0.0][..] } else { &[0.0, 7e-35] };
        for (rows, &size) in [2, 20].into_iter().flat_map(|rows| sizes.iter().map(move |size| (rows, size))) {
            let out = product(&mut B::any(), &[weight.matrix()], &vec![size; rows * 256], Some(&bias));
            assert_near(&out, &bias.repeat(rows), |_| 0.0, &format!("{dtype:?}, {rows} rows of {size:e}"));
        }
    }
}
