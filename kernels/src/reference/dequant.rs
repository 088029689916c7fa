use float8::F8E4M3;
use half::{bf16, f16};

use crate::dtype::IQ4_VALUES;
use crate::{DType, Matrix};

/// All elements of a matrix in single precision, row-major.
pub fn dequantize(matrix: &Matrix<'_>) -> Vec<f32> {
    let mut out = Vec::with_capacity(matrix.rows() * matrix.cols());
    for row in 0..matrix.rows() {
        dequantize_row(matrix.dtype(), matrix.row(row), &mut out);
        // Without what fills up the last block.
        out.truncate((row + 1) * matrix.cols());
    }
    out
}

/// Appends the elements of whole blocks of `dtype` to `out`. Values of GGML's types are exactly what llama.cpp's
/// `dequantize_row_*` give: the same single precision operations in the same order.
pub fn dequantize_row(dtype: DType, bytes: &[u8], out: &mut Vec<f32>) {
    let blocks = bytes.chunks_exact(dtype.block_bytes());
    match dtype {
        DType::F32 => out.extend(blocks.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))),
        DType::F16 => out.extend(blocks.map(|b| half_at(b, 0))),
        DType::BF16 => out.extend(blocks.map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32())),
        DType::Q4_0 => blocks.for_each(|b| q4_0(b, out)),
        DType::Q4_1 => blocks.for_each(|b| q4_1(b, out)),
        DType::Q5_0 => blocks.for_each(|b| q5_0(b, out)),
        DType::Q5_1 => blocks.for_each(|b| q5_1(b, out)),
        DType::Q8_0 => blocks.for_each(|b| q8_0(b, out)),
        DType::Q3K => blocks.for_each(|b| q3_k(b, out)),
        DType::Q4K => blocks.for_each(|b| q4_k(b, out)),
        DType::Q5K => blocks.for_each(|b| q5_k(b, out)),
        DType::Q6K => blocks.for_each(|b| q6_k(b, out)),
        DType::IQ4NL => blocks.for_each(|b| iq4_nl(b, out)),
        DType::IQ4XS => blocks.for_each(|b| iq4_xs(b, out)),
        DType::F8 => blocks.for_each(|b| f8(b, out)),
    }
}

/// `[0..4]` scale, `[4..132]` E4M3 values: value `q · scale`.
fn f8(block: &[u8], out: &mut Vec<f32>) {
    let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]);
    out.extend(block[4..].iter().map(|&q| F8E4M3::from_bits(q).to_f32() * scale));
}

fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// The 32 values of 16 bytes: all low nibbles, then all high ones.
fn nibbles(bytes: &[u8]) -> impl Iterator<Item = u8> {
    bytes.iter().map(|byte| byte & 15).chain(bytes.iter().map(|byte| byte >> 4))
}

/// `[0..2]` scale, `[2..18]` nibbles: value `(q - 8) · scale`.
fn q4_0(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    out.extend(nibbles(&block[2..18]).map(|q| (q as f32 - 8.0) * scale));
}

/// `[0..2]` scale, `[2..4]` minimum, `[4..20]` nibbles: value `q · scale + minimum`.
fn q4_1(block: &[u8], out: &mut Vec<f32>) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    out.extend(nibbles(&block[4..20]).map(|q| q as f32 * scale + minimum));
}

/// 32 five-bit values: bit `i` of the little-endian word `high` is the fifth bit of value `i`.
fn five_bits(high: &[u8], low: &[u8]) -> impl Iterator<Item = u8> {
    let high = u32::from_le_bytes([high[0], high[1], high[2], high[3]]);
    nibbles(low).enumerate().map(move |(i, q)| q | ((high >> i & 1) as u8) << 4)
}

/// `[0..2]` scale, `[2..6]` fifth bits, `[6..22]` nibbles: value `(q - 16) · scale`.
fn q5_0(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    out.extend(five_bits(&block[2..6], &block[6..22]).map(|q| (q as f32 - 16.0) * scale));
}

/// `[0..2]` scale, `[2..4]` minimum, `[4..8]` fifth bits, `[8..24]` nibbles: value `q · scale + minimum`.
fn q5_1(block: &[u8], out: &mut Vec<f32>) {
    let (scale, minimum) = (half_at(block, 0), half_at(block, 2));
    out.extend(five_bits(&block[4..8], &block[8..24]).map(|q| q as f32 * scale + minimum));
}

/// `[0..2]` scale, `[2..34]` signed bytes: value `q · scale`.
fn q8_0(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    out.extend(block[2..34].iter().map(|&q| q as i8 as f32 * scale));
}

/// `[0..32]` third bits (bit `r` of byte `i`: value `i` of run `r`), `[32..96]` low two bits, `[96..108]` scales of 16
/// sub-blocks of 16, `[108..110]` scale of scales: value `d · (scale - 32) · (q - 4)`. Of the eight runs of 32 values,
/// four share 32 bytes of low bits. Scales have six bits: the low four are the low nibbles of bytes 0..8, then the high
/// ones; the high two of scale `i` are in byte `8 + i % 4`, the lowest for the first four.
fn q3_k(block: &[u8], out: &mut Vec<f32>) {
    let d = half_at(block, 108);
    let scales = &block[96..108];
    for run in 0..8 {
        for i in 0..32 {
            let sub_block = 2 * run + i / 16;
            let nibble = if sub_block < 8 { scales[sub_block] & 15 } else { scales[sub_block - 8] >> 4 };
            let scale = nibble | (scales[8 + sub_block % 4] >> (2 * (sub_block / 4)) & 3) << 4;
            let q = block[32 + 32 * (run / 4) + i] >> (2 * (run % 4)) & 3 | (block[i] >> run & 1) << 2;
            out.push(d * (scale as f32 - 32.0) * (q as f32 - 4.0));
        }
    }
}

/// Scale and minimum (6 bits each) of sub-block `i` of eight, out of the 12 bytes that hold them in Q4_K and Q5_K:
/// the first four of each lie in the low six bits of bytes 0..4 and 4..8; the others have their low nibbles in bytes
/// 8..12 and their high two bits on top of the first four.
fn scale_and_minimum(packed: &[u8], i: usize) -> (f32, f32) {
    let (scale, minimum) = if i < 4 {
        (packed[i] & 63, packed[i + 4] & 63)
    } else {
        (packed[i + 4] & 15 | packed[i - 4] >> 6 << 4, packed[i + 4] >> 4 | packed[i] >> 6 << 4)
    };
    (scale as f32, minimum as f32)
}

/// `[0..2]` scale of scales, `[2..4]` scale of minimums, `[4..16]` scales and minimums of 8 sub-blocks of 32,
/// `[16..144]` nibbles, 32 bytes for each two sub-blocks: value `q · (d · scale) - dmin · minimum`.
fn q4_k(block: &[u8], out: &mut Vec<f32>) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    for (pair, bytes) in block[16..144].chunks_exact(32).enumerate() {
        for (i, q) in nibbles(bytes).enumerate() {
            let (scale, minimum) = scale_and_minimum(&block[4..16], 2 * pair + i / 32);
            out.push(d * scale * q as f32 - dmin * minimum);
        }
    }
}

/// As Q4_K, with `[16..48]` fifth bits (bit `s` of byte `i`: value `i` of sub-block `s`) and `[48..176]` nibbles.
fn q5_k(block: &[u8], out: &mut Vec<f32>) {
    let (d, dmin) = (half_at(block, 0), half_at(block, 2));
    let high = &block[16..48];
    for (pair, bytes) in block[48..176].chunks_exact(32).enumerate() {
        for (i, low) in nibbles(bytes).enumerate() {
            let sub_block = 2 * pair + i / 32;
            let q = low | (high[i % 32] >> sub_block & 1) << 4;
            let (scale, minimum) = scale_and_minimum(&block[4..16], sub_block);
            out.push(d * scale * q as f32 - dmin * minimum);
        }
    }
}

/// `[0..128]` low nibbles, `[128..192]` high two bits, `[192..208]` signed scales of 16 sub-blocks of 16, `[208..210]`
/// scale of scales: value `d · scale · (q - 32)`. Each half of 128 values has four runs of 32: nibbles of run `r` are
/// the low (r < 2) or high ones of bytes `32 · (r % 2) ..`, its high bits are bits `2r, 2r + 1` of the half's 32 bytes.
fn q6_k(block: &[u8], out: &mut Vec<f32>) {
    let d = half_at(block, 208);
    for half in 0..2 {
        let (low, high) = (&block[64 * half..][..64], &block[128 + 32 * half..][..32]);
        for run in 0..4 {
            for i in 0..32 {
                let nibble = low[32 * (run % 2) + i] >> (4 * (run / 2)) & 15;
                let q = nibble | (high[i] >> (2 * run) & 3) << 4;
                let scale = block[192 + 8 * half + 2 * run + i / 16] as i8;
                out.push(d * scale as f32 * (q as f32 - 32.0));
            }
        }
    }
}

/// `[0..2]` scale, `[2..18]` nibbles: value `scale · VALUES[q]`.
fn iq4_nl(block: &[u8], out: &mut Vec<f32>) {
    let scale = half_at(block, 0);
    out.extend(nibbles(&block[2..18]).map(|q| scale * IQ4_VALUES[q as usize] as f32));
}

/// `[0..2]` scale of scales, `[2..4]` high two bits of the scales of 8 sub-blocks of 32, the lowest those of the first,
/// `[4..8]` their low nibbles, `[8..136]` nibbles, 16 bytes for each sub-block: value `d · (scale - 32) · VALUES[q]`.
fn iq4_xs(block: &[u8], out: &mut Vec<f32>) {
    let d = half_at(block, 0);
    for (sub_block, bytes) in block[8..136].chunks_exact(16).enumerate() {
        let high = block[2 + sub_block / 4] >> (2 * (sub_block % 4)) & 3;
        let scale = block[4 + sub_block / 2] >> (4 * (sub_block % 2)) & 15 | high << 4;
        out.extend(nibbles(bytes).map(|q| d * (scale as f32 - 32.0) * IQ4_VALUES[q as usize] as f32));
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use candle_core::quantized::{GgmlDType, QStorage, QTensor};
    use candle_core::{Device, Tensor};

    use super::*;

    const QUANTIZED: [(DType, GgmlDType, &[usize]); 9] = [
        // With where the half precision scales lie.
        (DType::Q4_0, GgmlDType::Q4_0, &[0]),
        (DType::Q4_1, GgmlDType::Q4_1, &[0, 2]),
        (DType::Q5_0, GgmlDType::Q5_0, &[0]),
        (DType::Q5_1, GgmlDType::Q5_1, &[0, 2]),
        (DType::Q8_0, GgmlDType::Q8_0, &[0]),
        (DType::Q3K, GgmlDType::Q3K, &[108]),
        (DType::Q4K, GgmlDType::Q4K, &[0, 2]),
        (DType::Q5K, GgmlDType::Q5K, &[0, 2]),
        (DType::Q6K, GgmlDType::Q6K, &[208]),
    ];

    fn random_bytes(len: usize, seed: u64) -> Vec<u8> {
        (0..len as u64).map(|i| (crate::sampling::uniform(seed, i) * 256.0) as u8).collect()
    }

    #[test]
    fn every_quantized_type_decodes_as_candle_decodes_it() {
        let (rows, cols) = (5, 768);
        for (dtype, ggml, scales) in QUANTIZED {
            assert_eq!(dtype.block_len(), ggml.block_size());
            assert_eq!(dtype.block_bytes(), ggml.type_size());
            let len = rows * cols / dtype.block_len() * dtype.block_bytes();
            let mut bytes = random_bytes(len, 11);
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                for &at in scales {
                    let scale = f16::from_f32(block[at] as f32 / 128.0 - 1.0);
                    block[at..at + 2].copy_from_slice(&scale.to_le_bytes());
                }
            }
            let ours = dequantize(&Matrix::new(dtype, rows, cols, &bytes).unwrap());
            let storage = QStorage::from_data(Cow::Borrowed(&bytes), &Device::Cpu, ggml).unwrap();
            let theirs = QTensor::new(storage, (rows, cols)).unwrap().dequantize(&Device::Cpu).unwrap();
            let theirs = theirs.flatten_all().unwrap().to_vec1::<f32>().unwrap();
            assert_eq!(ours, theirs, "{dtype:?}");
        }
    }

    #[test]
    fn quantizing_smooth_values_and_decoding_them_gives_them_back_roughly() {
        let values: Vec<f32> = (0..512).map(|i| (i as f32 * 0.05).sin()).collect();
        let tensor = Tensor::from_slice(&values, (1, 512), &Device::Cpu).unwrap();
        for (dtype, ggml, _) in QUANTIZED {
            let quantized = QTensor::quantize(&tensor, ggml).unwrap();
            let bytes = quantized.data().unwrap();
            let decoded = dequantize(&Matrix::new(dtype, 1, 512, &bytes).unwrap());
            // Three bits are half as many steps as four.
            let tolerance = if dtype == DType::Q3K { 0.3 } else { 0.15 };
            for (value, decoded) in values.iter().zip(&decoded) {
                assert!((value - decoded).abs() < tolerance, "{dtype:?}: {value} became {decoded}");
            }
        }
    }

    #[test]
    fn four_bits_of_iq4_are_looked_up_and_multiplied_by_their_block_s_scale() {
        // candle does not read these types: values and places are those of ggml-common.h and ggml-quants.c.
        let values = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113].map(|v: i16| v as f32);
        // Each value once, upwards, and in the high nibbles once more, downwards.
        let nibbles = std::array::from_fn::<u8, 16, _>(|i| (i | (15 - i) << 4) as u8);
        let both_ways = |scale: f32| values.iter().chain(values.iter().rev()).map(move |value| scale * value);

        let half = |x: f32| f16::from_f32(x).to_le_bytes();
        let blocks = [&half(0.5)[..], &nibbles, &half(-3.0), &nibbles].concat();
        let want: Vec<f32> = both_ways(0.5).chain(both_ways(-3.0)).collect();
        assert_eq!(dequantize(&Matrix::new(DType::IQ4NL, 2, 32, &blocks).unwrap()), want);

        let scales = [0.0, 63.0, 32.0, 33.0, 17.0, 46.0, 5.0, 60.0];
        // Their high two bits are 0, 3, 2, 2, 1, 2, 0, 3, and the low four 0, 15, 0, 1, 1, 14, 5, 12.
        let block =
            [&half(0.25)[..], &0xc9ac_u16.to_le_bytes(), &[0xf0, 0x10, 0xe1, 0xc5], &nibbles.repeat(8)].concat();
        let want: Vec<f32> = scales.into_iter().flat_map(|scale| both_ways(0.25 * (scale - 32.0))).collect();
        assert_eq!(dequantize(&Matrix::new(DType::IQ4XS, 1, 256, &block).unwrap()), want);
    }

    #[test]
    fn eight_bit_floats_are_multiplied_by_their_block_s_scale_and_rows_end_where_they_end() {
        // 1, -2 and the largest and smallest there are.
        let quants = [0x38u8, 0xc0, 0x7e, 0x01];
        let block = |scale: f32, len: usize| {
            let mut bytes = scale.to_le_bytes().to_vec();
            bytes.extend((0..128).map(|i| if i < len { quants[i % 4] } else { 0 }));
            bytes
        };
        let values = |scale: f32, len: usize| {
            (0..len).map(|i| [1.0, -2.0, 448.0, 1.0 / 512.0][i % 4] * scale).collect::<Vec<_>>()
        };
        let rows = [block(0.5, 128), block(-3.0, 2), block(1.0 / 3.0, 128), block(1e-30, 2)];
        let want = [values(0.5, 128), values(-3.0, 2), values(1.0 / 3.0, 128), values(1e-30, 2)];
        assert_eq!(dequantize(&Matrix::new(DType::F8, 2, 130, &rows.concat()).unwrap()), want.concat());
        assert!(Matrix::new(DType::F8, 2, 128, &rows.concat()).is_err());
    }

    #[test]
    fn float_types_decode_exactly() {
        let values = [0.0f32, -1.5, 3.25, 65504.0];
        let single: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let half: Vec<u8> = values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect();
        let brain: Vec<u8> = values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect();
        assert_eq!(dequantize(&Matrix::new(DType::F32, 2, 2, &single).unwrap()), values);
        assert_eq!(dequantize(&Matrix::new(DType::F16, 2, 2, &half).unwrap()), values);
        assert_eq!(dequantize(&Matrix::new(DType::BF16, 2, 2, &brain).unwrap())[..3], values[..3]);
    }
}
