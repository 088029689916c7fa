use half::f16;

use super::super::quant::BLOCK;
use super::*;
use crate::DType;
use crate::cpu::isa::Level;
use crate::cpu::pack::weight_bytes;

const ALL: [DType; 15] = [
    DType::F32,
    DType::F16,
    DType::BF16,
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q3K,
    DType::Q4K,
    DType::Q5K,
    DType::Q6K,
    DType::IQ4NL,
    DType::IQ4XS,
    DType::F8,
];

struct Machine {
    dispatch: Dispatch,
    pool: Pool,
    scratch: Scratch,
}

impl Machine {
    fn new(level: Level, threads: usize) -> Option<Self> {
        Some(Self { dispatch: Dispatch::new(level)?, pool: Pool::new(threads), scratch: Scratch::new(threads) })
    }

    fn product(&mut self, x: &[f32], weight: &Linear, bias: &[f32]) -> Vec<f32> {
        let rows = x.len() / weight.cols();
        let mut input = Activations::new(rows, weight.cols());
        input.set_rows(rows);
        input.values_mut().copy_from_slice(x);
        let mut out = Activations::new(rows, weight.rows());
        weight.product(self.dispatch, &mut self.pool, &mut self.scratch, &input, Some(bias), &mut out);
        out.values().to_vec()
    }
}

fn noise(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u32).map(|i| ((i + seed).wrapping_mul(2_654_435_761) >> 8) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// Any bits, but every f16 in the blocks' heads (or elements) finite and small.
fn bytes(dtype: DType, elements: usize) -> Vec<u8> {
    let len = elements / dtype.block_len() * dtype.block_bytes();
    let mut bytes: Vec<u8> = (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    match dtype {
        DType::F32 => bytes = noise(elements, 5).iter().flat_map(|v| v.to_le_bytes()).collect(),
        DType::F8 => bytes.chunks_exact_mut(dtype.block_bytes()).enumerate().for_each(|(i, block)| {
            block[..4].copy_from_slice(&(noise(1, i as u32)[0] / 448.0).to_le_bytes());
            // None that is NaN.
            block[4..].iter_mut().for_each(|quant| *quant ^= u8::from(*quant & 0x7f == 0x7f));
        }),
        DType::F16 | DType::BF16 => bytes.chunks_exact_mut(2).for_each(|v| v[1] = v[1] & 0x83 | 0x38),
        _ => {
            let heads = match dtype {
                DType::Q3K => [109, 109],
                DType::Q6K => [209, 209],
                _ => [1, 3],
            };
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                for at in heads {
                    block[at] = block[at] & 0x83 | 0x20;
                }
            }
        }
    }
    bytes
}

/// 37 output features: two whole groups of columns and a part of one.
fn weight(pool: &mut Pool, dtype: DType, cols: usize) -> Linear {
    weight_of(pool, dtype, 37, cols)
}

fn weight_of(pool: &mut Pool, dtype: DType, features: usize, cols: usize) -> Linear {
    let bytes = bytes(dtype, features * cols);
    let matrix = Matrix::new(dtype, features, cols, &bytes).expect("matrix");
    Linear::new(pool, &mut Arena::default(), &[matrix]).expect("weight")
}

#[test]
fn weights_take_the_bytes_that_are_said() {
    let mut pool = Pool::new(1);
    for dtype in ALL {
        for cols in if dtype.is_quantized() { [512, 256] } else { [512, 6] } {
            let weight = weight_of(&mut pool, dtype, 48, cols);
            assert_eq!(weight_bytes(dtype, &[48, cols]), weight.bytes(), "{dtype:?} of {cols} columns");
        }
    }
}

#[test]
fn one_row_gives_the_bits_it_gives_among_many() {
    // Wide enough that a panel does not hold all of `k`.
    let cols = 1024;
    let mut machine = Machine::new(Level::detect(), 2).expect("detected");
    for dtype in ALL {
        let weight = weight(&mut machine.pool, dtype, cols);
        let (x, bias) = (noise(135 * cols, 1), noise(37, 2));
        let all = machine.product(&x, &weight, &bias);
        assert!(all.iter().all(|v| v.is_finite()), "{dtype:?}");
        for rows in [1, 2, 3, 4, 5, 13, 64] {
            let first = 135 - rows;
            let some = machine.product(&x[first * cols..], &weight, &bias);
            assert!(some == all[first * 37..], "{dtype:?}: {rows} rows");
        }
    }
}

#[test]
fn a_row_among_many_gives_its_bits_where_one_thread_has_more_groups_than_wait_at_once() {
    // 21 whole groups of columns and a part of one, and several ranges of `k`.
    let (features, cols) = (341, 1792);
    let mut machine = Machine::new(Level::detect(), 1).expect("detected");
    for dtype in ALL {
        let weight = weight_of(&mut machine.pool, dtype, features, cols);
        let (x, bias) = (noise(39 * cols, 9), noise(features, 10));
        let all = machine.product(&x, &weight, &bias);
        assert!(all.iter().all(|v| v.is_finite()), "{dtype:?}");
        for first in [0, 20, 36] {
            let some = machine.product(&x[first * cols..(first + 3) * cols], &weight, &bias);
            assert!(some == all[first * features..(first + 3) * features], "{dtype:?}: rows from {first}");
        }
    }
}

#[test]
fn every_instruction_set_and_thread_count_gives_the_same_bits() {
    let cols = 256;
    let mut portable = Machine::new(Level::Portable, 1).expect("always there");
    for dtype in ALL {
        let weight = weight(&mut portable.pool, dtype, cols);
        let bias = noise(37, 4);
        // With a panel, without one in tiles of several heights, and one row alone.
        for rows in [40, 11, 1] {
            let x = noise(rows * cols, 3);
            let expected = portable.product(&x, &weight, &bias);
            for level in [Level::Avx2, Level::Avx512] {
                for threads in [1, 3] {
                    let Some(mut machine) = Machine::new(level, threads) else { continue };
                    let product = machine.product(&x, &weight, &bias);
                    assert!(product == expected, "{dtype:?}, {rows} rows, {level:?}, {threads} threads");
                }
            }
        }
    }
}

#[test]
fn a_product_is_that_of_the_unpacked_rows() {
    let cols = 512;
    let mut machine = Machine::new(Level::detect(), 1).expect("detected");
    for dtype in ALL {
        let weight = weight(&mut machine.pool, dtype, cols);
        let (x, bias) = (noise(6 * cols, 7), noise(37, 8));
        let product = machine.product(&x, &weight, &bias);
        let mut row = vec![0.0f32; cols];
        for column in 0..37 {
            weight.row(column, &mut row);
            for (i, x) in x.chunks_exact(cols).enumerate() {
                let terms = || row.iter().zip(x).map(|(w, x)| f64::from(w * x));
                let exact = terms().sum::<f64>() + f64::from(bias[column]);
                // Rounding an activation in ±1 to 8 bits is off by at most 1/254.
                let room: f64 = row.iter().map(|w| f64::from(w.abs()) / 254.0).sum::<f64>() * 0.5 + 1e-3;
                let off = (f64::from(product[i * 37 + column]) - exact).abs();
                assert!(off <= room, "{dtype:?}: {off} off, {room} allowed");
            }
        }
    }
}

#[test]
fn the_largest_quants_do_not_overflow() {
    // Largest weights against largest activations, where 16-bit sums come closest to their limits.
    let cols = 256;
    for level in [Level::Portable, Level::Avx2, Level::Avx512] {
        let Some(mut machine) = Machine::new(level, 1) else { continue };
        // Of each type, a block whose scale is 1: its quants' bytes, where they and the scale lie, and what they mean.
        for (dtype, quant, at, scale, largest) in [
            (DType::Q4_1, 0xff, 4..20, 0, 15.0),
            (DType::Q5_1, 0xff, 4..24, 0, 31.0),
            (DType::Q6K, 0xff, 0..192, 208, 31.0),
            (DType::Q6K, 0x00, 0..192, 208, -32.0),
            (DType::IQ4NL, 0x00, 2..18, 0, -127.0),
            (DType::IQ4NL, 0xff, 2..18, 0, 113.0),
            (DType::Q8_0, 0x80, 2..34, 0, -128.0),
            (DType::Q8_0, 0x7f, 2..34, 0, 127.0),
        ] {
            let mut block = vec![0u8; dtype.block_bytes()];
            block[at].fill(quant);
            if dtype == DType::Q6K {
                block[192..208].fill(1);
            }
            block[scale..scale + 2].copy_from_slice(&f16::ONE.to_le_bytes());
            let bytes = block.repeat(16 * cols / dtype.block_len());
            let matrix = Matrix::new(dtype, 16, cols, &bytes).expect("matrix");
            let weight = Linear::new(&mut machine.pool, &mut Arena::default(), &[matrix]);
            // With a peak like the rest, then one of the largest in a block's first half and one in its second.
            for (sign, peak) in [1.0, -1.0].into_iter().flat_map(|sign| [None, Some(0), Some(28)].map(|at| (sign, at)))
            {
                let mut x = vec![sign * 127.0f32; cols];
                for block in x.chunks_exact_mut(BLOCK) {
                    if let Some(at) = peak {
                        block[at..at + 4].fill(sign * 127.0 * 128.0);
                    }
                }
                let product = machine.product(&x, weight.as_ref().expect("weight"), &[0.0; 16]);
                let want = largest * x.iter().sum::<f32>();
                assert!(product.iter().all(|&v| v == want), "{level:?} {dtype:?} {peak:?} {product:?}, not {want}");
            }
        }
    }
}
