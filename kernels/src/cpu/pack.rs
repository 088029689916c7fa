//! Weights in the order the kernels read them.
//!
//! Output columns are taken in groups of sixteen, one a vector lane; a group holds its weights for all `k`, one after
//! the other, so that a product streams through memory once. Quantised weights come in blocks of 32 `k`:
//!
//! | format | a block of 16 columns | from |
//! | --- | --- | --- |
//! | `U4` | 4 × 64 bytes, 16 f16 scales, 16 f16 minimums | Q4_0, Q4_1, Q4_K |
//! | `I8` | 8 × 64 bytes, 16 f16 scales | Q8_0, Q5_0 |
//! | `I8Min` | the same, 16 f16 minimums | Q5_1, Q5_K |
//! | `I8Halves` | 8 × 64 bytes, 2 × 16 f16 scales: of the first and second sixteen `k` | Q6_K |
//!
//! 64 bytes are 16 columns × 4 consecutive `k`; in `U4` they are two such groups, the first in the low nibbles. A
//! weight is `scale × q + minimum`. K-quants' two-level scales are multiplied out and rounded to f16: one part in 2,000
//! of what a 4-bit weight is uncertain by anyway, and Q4_0's `-8 × scale` is exact. Float weights stay as they are,
//! `[k][16]`; bf16 in pairs of `k`, `[k / 2][16][2]`.

use half::f16;

use super::isa::LANES;
use super::quant::BLOCK;
use crate::blocks::decode;
use crate::{DType, Matrix};

/// How a part's weights are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    U4,
    I8,
    I8Min,
    I8Halves,
    Bf16,
    F16,
    F32,
}

impl Format {
    /// What weights of `dtype` become.
    pub(crate) fn of(dtype: DType) -> Self {
        match dtype {
            DType::Q4_0 | DType::Q4_1 | DType::Q4K => Self::U4,
            DType::Q8_0 | DType::Q5_0 => Self::I8,
            DType::Q5_1 | DType::Q5K => Self::I8Min,
            DType::Q6K => Self::I8Halves,
            DType::BF16 => Self::Bf16,
            DType::F16 => Self::F16,
            DType::F32 => Self::F32,
        }
    }

    /// Whether activations are quantised for it.
    pub(crate) fn is_quantized(self) -> bool {
        matches!(self, Self::U4 | Self::I8 | Self::I8Min | Self::I8Halves)
    }

    /// Bytes of the smallest unit of a group and how many `k` it covers.
    pub(crate) const fn unit(self) -> (usize, usize) {
        match self {
            Self::U4 => (256 + 64, BLOCK),
            Self::I8 => (512 + 32, BLOCK),
            Self::I8Min | Self::I8Halves => (512 + 64, BLOCK),
            Self::Bf16 => (4 * LANES, 2),
            Self::F16 => (2 * LANES, 1),
            Self::F32 => (4 * LANES, 1),
        }
    }

    /// Bytes of a group of sixteen columns.
    pub(crate) fn group_bytes(self, k: usize) -> usize {
        let (bytes, step) = self.unit();
        k.div_ceil(step) * bytes
    }
}

fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// Writes columns `16 × group ..` of `matrix` to `out`, which is zero and [`Format::group_bytes`] long. Columns beyond
/// the matrix stay zero.
pub(crate) fn pack_group(matrix: &Matrix<'_>, group: usize, out: &mut [u8]) {
    let format = Format::of(matrix.dtype());
    let columns = LANES.min(matrix.rows() - group * LANES);
    let (unit, step) = format.unit();
    for lane in 0..columns {
        let row = matrix.row(group * LANES + lane);
        if !format.is_quantized() {
            let element = unit / step / LANES;
            for (k, value) in row.chunks_exact(element).enumerate() {
                let at = k / step * unit + (lane * step + k % step) * element;
                out[at..at + element].copy_from_slice(value);
            }
            continue;
        }
        for (block, out) in out.chunks_exact_mut(unit).enumerate() {
            let decoded = decode(matrix.dtype(), row, block);
            let scales = if format == Format::U4 { 256 } else { 512 };
            for (i, &quant) in decoded.quants.iter().enumerate() {
                let (four, k) = (i / 4, i % 4);
                if format == Format::U4 {
                    out[four / 2 * 64 + lane * 4 + k] |= (quant as u8) << (four % 2 * 4);
                } else {
                    out[four * 64 + lane * 4 + k] = quant as u8;
                }
            }
            let mut put = |at: usize, value: f16| out[at..at + 2].copy_from_slice(&value.to_le_bytes());
            put(scales + 2 * lane, decoded.scales[0]);
            match format {
                Format::U4 | Format::I8Min => put(scales + 32 + 2 * lane, decoded.minimum),
                Format::I8Halves => put(scales + 32 + 2 * lane, decoded.scales[1]),
                _ => {}
            }
        }
    }
}

/// Reads column `lane` of a packed group back as f32: one row of the matrix, `out.len()` = `k`.
pub(crate) fn unpack_row(format: Format, group: &[u8], lane: usize, out: &mut [f32]) {
    let (unit, step) = format.unit();
    for (block, values) in group.chunks_exact(unit).zip(out.chunks_mut(step)) {
        let scales = if format == Format::U4 { 256 } else { 512 };
        let second = scales + 32 + 2 * lane;
        for (i, value) in values.iter_mut().enumerate() {
            let at = |stride: usize| (lane * step + i) * stride;
            *value = match format {
                Format::F32 => f32::from_le_bytes([0, 1, 2, 3].map(|byte| block[at(4) + byte])),
                Format::F16 => half(block, at(2)).to_f32(),
                Format::Bf16 => half::bf16::from_le_bytes([block[at(2)], block[at(2) + 1]]).to_f32(),
                Format::U4 => {
                    let (four, k) = (i / 4, i % 4);
                    let quant = block[four / 2 * 64 + lane * 4 + k] >> (four % 2 * 4) & 15;
                    half(block, scales + 2 * lane).to_f32() * f32::from(quant) + half(block, second).to_f32()
                }
                Format::I8 | Format::I8Min | Format::I8Halves => {
                    let quant = f32::from(block[i / 4 * 64 + lane * 4 + i % 4] as i8);
                    let own = if format == Format::I8Halves && i >= 16 { second } else { scales + 2 * lane };
                    let minimum = if format == Format::I8Min { half(block, second).to_f32() } else { 0.0 };
                    half(block, own).to_f32() * quant + minimum
                }
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
