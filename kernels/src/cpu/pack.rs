//! Weights in the order the kernels read them.
//!
//! Output columns are taken in groups of sixteen, one a vector lane; a group holds its weights for all `k`, one after
//! the other, so that a product streams through memory once. Quantised weights come in blocks of 32 `k`:
//!
//! | format | a block of 16 columns | bits a weight | from |
//! | --- | --- | --- | --- |
//! | `U4` | 4 × 64 bytes, 16 f16 scales, 16 f16 minimums | 5 | Q4_0, Q4_1, Q4_K |
//! | `U5` | 4 × 64 bytes, 64 bytes of fifth bits, 16 f16 scales, 16 f16 minimums | 6 | Q5_0, Q5_1, Q5_K |
//! | `U6` | 4 × 64 bytes, 2 × 64 of upper bits, 2 × 16 f16 scales: of the first and second sixteen `k` | 7 | Q6_K, Q3_K |
//! | `Iq4` | 4 × 64 bytes, 16 f16 scales | 4.5 | IQ4_NL, IQ4_XS |
//! | `I8` | 8 × 64 bytes, 16 f16 scales | 8.5 | Q8_0 |
//!
//! 64 bytes are 16 columns × 4 consecutive `k`; where a weight has but four bits in them, they are two such groups, the
//! first in the low nibbles. Bit `f` of a fifth bits' byte belongs to the group `f`; upper bits are pairs, four groups
//! to 64 bytes. A weight is `scale × q + minimum`: `q` is what is stored, in `U6` less 32, and in `Iq4` what IQ4's table
//! has for it. Two-level scales, those of K-quants and IQ4_XS, are multiplied out and rounded to f16: one part in 2,000
//! of what a 4-bit weight is uncertain by anyway. The minimums of Q4_0, `-8 × scale`, and Q5_0, `-16 × scale`, are exact
//! (the latter if a scale is below 4,094). Float weights stay as they are, `[k][16]`; bf16 in pairs of `k`,
//! `[k / 2][16][2]`; E4M3 in blocks of 128 `k`, 16 f32 scales and then `[k][16]`.

use float8::F8E4M3;
use half::f16;

use super::isa::{F8_UNIT, LANES};
use super::quant::BLOCK;
use crate::blocks::decode;
use crate::dtype::IQ4_VALUES;
use crate::{DType, Matrix};

/// How a part's weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    U4,
    U5,
    U6,
    Iq4,
    I8,
    Bf16,
    F16,
    F32,
    /// Scales are [`F8_UNIT`] times the file's.
    F8,
}

/// Where the bits beyond the fourth begin in a block of [`Format::U5`] and [`Format::U6`].
pub(crate) const UPPER_BITS: usize = 256;
/// What is taken off a weight of [`Format::U6`].
pub(crate) const U6_OFFSET: i32 = 32;

/// `k` that share a scale in [`Format::F8`].
pub(crate) const F8_BLOCK: usize = DType::F8.block_len();
/// Where its values begin in a unit.
pub(crate) const F8_VALUES: usize = 4 * LANES;

impl Format {
    /// What weights of `dtype` become.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::Q4_0 | DType::Q4_1 | DType::Q4K => Self::U4,
            DType::Q5_0 | DType::Q5_1 | DType::Q5K => Self::U5,
            DType::Q6K | DType::Q3K => Self::U6,
            DType::IQ4NL | DType::IQ4XS => Self::Iq4,
            DType::Q8_0 => Self::I8,
            DType::BF16 => Self::Bf16,
            DType::F16 => Self::F16,
            DType::F32 => Self::F32,
            DType::F8 => Self::F8,
        }
    }

    /// Whether activations are quantised for it.
    pub(crate) fn is_quantized(self) -> bool {
        matches!(self, Self::U4 | Self::U5 | Self::U6 | Self::Iq4 | Self::I8)
    }

    /// Bytes of the smallest unit of a group and how many `k` it covers.
    pub(crate) const fn unit(self) -> (usize, usize) {
        match self {
            Self::U4 => (256 + 64, BLOCK),
            Self::U5 => (256 + 64 + 64, BLOCK),
            Self::U6 => (256 + 2 * 64 + 64, BLOCK),
            Self::Iq4 => (256 + 32, BLOCK),
            Self::I8 => (512 + 32, BLOCK),
            Self::Bf16 => (4 * LANES, 2),
            Self::F16 => (2 * LANES, 1),
            Self::F32 => (4 * LANES, 1),
            Self::F8 => (F8_VALUES + F8_BLOCK * LANES, F8_BLOCK),
        }
    }

    /// Where the scales of a block of a quantised format begin.
    pub(crate) const fn scales_at(self) -> usize {
        match self {
            Self::U4 | Self::Iq4 => 256,
            Self::U5 => UPPER_BITS + 64,
            Self::U6 => UPPER_BITS + 2 * 64,
            Self::I8 => 512,
            Self::Bf16 | Self::F16 | Self::F32 | Self::F8 => panic!("no quantised format"),
        }
    }

    /// Bytes of a group of sixteen columns.
    pub(crate) fn group_bytes(self, k: usize) -> usize {
        let (bytes, step) = self.unit();
        k.div_ceil(step) * bytes
    }
}

/// Bytes that a tensor takes in this backend, which for some quantised ones is more than in their files.
pub fn weight_bytes(dtype: DType, shape: &[usize]) -> usize {
    let Some((&cols, others)) = shape.split_last() else { return 0 };
    let (bytes, step) = Format::of(dtype).unit();
    let of_a_row = cols.div_ceil(step).saturating_mul(bytes / LANES);
    others.iter().product::<usize>().saturating_mul(of_a_row)
}

fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn single(bytes: &[u8], at: usize) -> f32 {
    f32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]))
}

/// Writes columns `16 × group ..` of `matrix` to `out`, which is zero and [`Format::group_bytes`] long. Columns beyond
/// the matrix stay zero.
pub(crate) fn pack_group(matrix: &Matrix<'_>, group: usize, out: &mut [u8]) {
    let format = Format::of(matrix.dtype());
    let columns = LANES.min(matrix.rows() - group * LANES);
    let (unit, step) = format.unit();
    for lane in 0..columns {
        let row = matrix.row(group * LANES + lane);
        if format == Format::F8 {
            for (block, out) in row.chunks_exact(DType::F8.block_bytes()).zip(out.chunks_exact_mut(unit)) {
                let scale = single(block, 0) * F8_UNIT;
                out[4 * lane..][..4].copy_from_slice(&scale.to_le_bytes());
                for (&quant, out) in block[4..].iter().zip(out[F8_VALUES..].chunks_exact_mut(LANES)) {
                    out[lane] = quant;
                }
            }
            continue;
        }
        if !format.is_quantized() {
            let element = unit / step / LANES;
            for (k, value) in row.chunks_exact(element).enumerate() {
                let at = k / step * unit + (lane * step + k % step) * element;
                out[at..at + element].copy_from_slice(value);
            }
            continue;
        }
        for (block, out) in out.chunks_exact_mut(unit).enumerate() {
            pack_block(matrix.dtype(), row, block, lane, out);
        }
    }
}

/// Writes one column's block of a quantised format.
fn pack_block(dtype: DType, row: &[u8], block: usize, lane: usize, out: &mut [u8]) {
    let format = Format::of(dtype);
    let mut decoded = decode(dtype, row, block);
    if dtype == DType::Q5_0 {
        decoded.quants = decoded.quants.map(|quant| quant + 16);
        decoded.minimum = f16::from_f32(-16.0 * decoded.scales[0].to_f32());
    }
    for (i, &quant) in decoded.quants.iter().enumerate() {
        let (four, place) = (i / 4, lane * 4 + i % 4);
        let stored = match format {
            Format::U6 => (i32::from(quant) + U6_OFFSET) as u8,
            Format::Iq4 => IQ4_VALUES.partition_point(|&value| value < quant) as u8,
            _ => quant as u8,
        };
        if format == Format::I8 {
            out[four * 64 + place] = stored;
            continue;
        }
        out[four / 2 * 64 + place] |= (stored & 15) << (four % 2 * 4);
        match format {
            Format::U5 => out[UPPER_BITS + place] |= (stored >> 4) << four,
            Format::U6 => out[UPPER_BITS + four / 4 * 64 + place] |= (stored >> 4) << (four % 4 * 2),
            _ => {}
        }
    }
    let at = format.scales_at() + 2 * lane;
    let mut put = |at: usize, value: f16| out[at..at + 2].copy_from_slice(&value.to_le_bytes());
    put(at, decoded.scales[0]);
    match format {
        Format::U4 | Format::U5 => put(at + 32, decoded.minimum),
        Format::U6 => put(at + 32, decoded.scales[1]),
        _ => {}
    }
}

/// Weight `i` of column `lane` of a block of a quantised format.
fn unpack(format: Format, block: &[u8], lane: usize, i: usize) -> f32 {
    let (four, place) = (i / 4, lane * 4 + i % 4);
    let nibble = || block[four / 2 * 64 + place] >> (four % 2 * 4) & 15;
    let at = format.scales_at() + 2 * lane;
    let (first, second) = (|| half(block, at).to_f32(), || half(block, at + 32).to_f32());
    match format {
        Format::U4 => first() * f32::from(nibble()) + second(),
        Format::U5 => {
            let fifth = block[UPPER_BITS + place] >> four & 1;
            first() * f32::from(nibble() | fifth << 4) + second()
        }
        Format::U6 => {
            let upper = block[UPPER_BITS + four / 4 * 64 + place] >> (four % 4 * 2) & 3;
            let quant = f32::from(nibble() | upper << 4) - U6_OFFSET as f32;
            quant * if i < BLOCK / 2 { first() } else { second() }
        }
        Format::Iq4 => first() * f32::from(IQ4_VALUES[usize::from(nibble())]),
        Format::I8 => first() * f32::from(block[four * 64 + place] as i8),
        Format::Bf16 | Format::F16 | Format::F32 | Format::F8 => unreachable!("no quantised format"),
    }
}

/// Reads column `lane` of a packed group back as f32: one row of the matrix, `out.len()` = `k`.
pub(crate) fn unpack_row(format: Format, group: &[u8], lane: usize, out: &mut [f32]) {
    let (unit, step) = format.unit();
    for (block, values) in group.chunks_exact(unit).zip(out.chunks_mut(step)) {
        for (i, value) in values.iter_mut().enumerate() {
            let at = |stride: usize| (lane * step + i) * stride;
            *value = match format {
                Format::F32 => single(block, at(4)),
                Format::F8 => {
                    let quant = F8E4M3::from_bits(block[F8_VALUES + i * LANES + lane]).to_f32();
                    quant / F8_UNIT * single(block, 4 * lane)
                }
                Format::F16 => half(block, at(2)).to_f32(),
                Format::Bf16 => half::bf16::from_le_bytes([block[at(2)], block[at(2) + 1]]).to_f32(),
                Format::U4 | Format::U5 | Format::U6 | Format::Iq4 | Format::I8 => unpack(format, block, lane, i),
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use candle_core::quantized::{GgmlDType, QTensor};
    use candle_core::{Device, Tensor};

    use super::*;

    #[test]
    fn packed_rows_read_back_as_candle_dequantises_them() {
        let (rows, cols) = (21, 512);
        let values: Vec<f32> =
            (0..rows * cols).map(|i| ((i * i % 977) as f32 - 480.0) * 1e-3 + i as f32 * 1e-5).collect();
        let tensor = Tensor::from_vec(values, (rows, cols), &Device::Cpu).expect("tensor");
        for (dtype, ggml, tolerance) in [
            (DType::F32, GgmlDType::F32, 0.0),
            (DType::F16, GgmlDType::F16, 0.0),
            (DType::BF16, GgmlDType::BF16, 0.0),
            (DType::Q4_0, GgmlDType::Q4_0, 0.0),
            (DType::Q4_1, GgmlDType::Q4_1, 0.0),
            (DType::Q5_0, GgmlDType::Q5_0, 0.0),
            (DType::Q5_1, GgmlDType::Q5_1, 0.0),
            (DType::Q8_0, GgmlDType::Q8_0, 0.0),
            // The f16 rounding of multiplied-out scales.
            (DType::Q3K, GgmlDType::Q3K, 1e-3),
            (DType::Q4K, GgmlDType::Q4K, 1e-3),
            (DType::Q5K, GgmlDType::Q5K, 1e-3),
            (DType::Q6K, GgmlDType::Q6K, 1e-3),
        ] {
            let quantized = QTensor::quantize(&tensor, ggml).expect("quantise");
            let data = quantized.data().expect("bytes");
            let exact: Vec<Vec<f32>> = quantized.dequantize(&Device::Cpu).expect("f32").to_vec2().expect("rows");
            let matrix = Matrix::new(dtype, rows, cols, &data).expect("matrix");
            let format = Format::of(dtype);
            let mut packed = vec![0u8; 2 * format.group_bytes(cols)];
            for (group, out) in packed.chunks_exact_mut(format.group_bytes(cols)).enumerate() {
                pack_group(&matrix, group, out);
            }
            let mut read = vec![0.0f32; cols];
            for (row, exact) in exact.iter().enumerate() {
                unpack_row(format, &packed[row / 16 * format.group_bytes(cols)..], row % 16, &mut read);
                for (a, b) in read.iter().zip(exact) {
                    assert!((a - b).abs() <= tolerance, "{dtype:?} row {row}: {a} and {b}");
                }
            }
        }
    }

    #[test]
    fn packed_eight_bit_rows_of_any_width_read_back_as_the_reference_has_them() {
        for cols in [1, 127, 128, 200, 384] {
            let rows = 19;
            let len = rows * DType::F8.row_bytes(cols);
            let mut bytes: Vec<u8> = (0..len).map(|i| (i * 37 % 127) as u8 | ((i % 3) << 7) as u8).collect();
            for (i, block) in bytes.chunks_exact_mut(DType::F8.block_bytes()).enumerate() {
                block[..4].copy_from_slice(&(1e-4 * (i + 1) as f32).to_le_bytes());
            }
            let matrix = Matrix::new(DType::F8, rows, cols, &bytes).expect("matrix");
            let group_bytes = Format::F8.group_bytes(cols);
            let mut packed = vec![0u8; 2 * group_bytes];
            for (group, out) in packed.chunks_exact_mut(group_bytes).enumerate() {
                pack_group(&matrix, group, out);
            }
            let want = crate::reference::dequantize(&matrix);
            let mut read = vec![0.0f32; cols];
            for (row, want) in want.chunks_exact(cols).enumerate() {
                unpack_row(Format::F8, &packed[row / 16 * group_bytes..], row % 16, &mut read);
                assert_eq!(read, want, "row {row} of {cols}");
            }
        }
    }

    #[test]
    fn odd_widths_of_float_types_are_kept_whole() {
        let values: Vec<f32> = (0..3 * 7).map(|i| i as f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
        let matrix = Matrix::new(DType::BF16, 3, 7, &bytes).expect("matrix");
        let mut packed = vec![0u8; Format::Bf16.group_bytes(7)];
        pack_group(&matrix, 0, &mut packed);
        let mut read = vec![0.0f32; 7];
        unpack_row(Format::Bf16, &packed, 2, &mut read);
        assert_eq!(read, values[14..]);
    }
}
