//! Taking weights apart into what the device's loads want (`kernels/cuda/weights.cuh` is the other half).

use half::f16;

use crate::blocks::{BLOCK, decode};
use crate::reference::dequantize;
use crate::{DType, Matrix};

/// How a matrix lies in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    F32,
    F16,
    BF16,
    /// Four bits a quant, scale and minimum for 32.
    Nibbles,
    /// Eight bits a quant, a scale for 32.
    Bytes,
    /// Eight bits a quant, scale and minimum for 16.
    FineBytes,
    /// E4M3, a scale for 128.
    F8,
}

/// Elements that share a scale in [`Form::F8`].
const F8_BLOCK: usize = DType::F8.block_len();
/// What scales of [`Form::F8`] are multiplied by (`QUARTER_UNIT` of the kernels).
const QUARTER_UNIT: f32 = 256.0;

impl Form {
    /// That of a matrix of so many columns. Kernels find an element's scale by counting elements, so rows of E4M3 have
    /// to be whole blocks; others, which few models have, become f16, to which products of many rows round them anyway.
    pub(super) const fn of(dtype: DType, cols: usize) -> Self {
        match dtype {
            DType::F8 if !cols.is_multiple_of(F8_BLOCK) => Self::F16,
            DType::F8 => Self::F8,
            DType::F32 => Self::F32,
            DType::F16 => Self::F16,
            DType::BF16 => Self::BF16,
            DType::Q4_0 | DType::Q4_1 | DType::Q4K => Self::Nibbles,
            DType::Q5_0 | DType::Q8_0 | DType::IQ4NL | DType::IQ4XS => Self::Bytes,
            DType::Q5_1 | DType::Q3K | DType::Q5K | DType::Q6K => Self::FineBytes,
        }
    }

    /// Its kernels.
    pub(super) const fn kernels(self) -> &'static Kernels {
        macro_rules! named {
            // `wide`: there are kernels that take eight features a warp.
            ($suffix:literal $(, $wide:ident)?) => {
                &Kernels {
                    embed: concat!("embed_", $suffix),
                    skinny: [
                        named!(@skinny "1", $suffix $(, $wide)?),
                        named!(@skinny "2", $suffix $(, $wide)?),
                        named!(@skinny "4", $suffix),
                        named!(@skinny "8", $suffix),
                        named!(@skinny "16", $suffix),
                    ],
                }
            };
            (@skinny $rows:literal, $suffix:literal) => {
                &[concat!("skinny_", $rows, "x2_", $suffix), concat!("skinny_", $rows, "x4_", $suffix)]
            };
            (@skinny $rows:literal, $suffix:literal, wide) => {
                &[
                    concat!("skinny_", $rows, "x2_", $suffix),
                    concat!("skinny_", $rows, "x4_", $suffix),
                    concat!("skinny_", $rows, "x8_", $suffix),
                ]
            };
        }
        match self {
            Self::F32 => named!("f32"),
            Self::F16 => named!("f16", wide),
            Self::BF16 => named!("bf16", wide),
            Self::Nibbles => named!("nibbles"),
            Self::Bytes => named!("bytes"),
            Self::FineBytes => named!("fine_bytes"),
            Self::F8 => named!("f8", wide),
        }
    }
}

/// Names of the kernels of `kernels/cuda/linear.cu` and `skinny.cu` for one form.
#[derive(Debug)]
pub(super) struct Kernels {
    pub(super) embed: &'static str,
    /// For 1, 2, 4, 8 and 16 rows, and of each for two, four and perhaps eight features a warp.
    pub(super) skinny: [&'static [&'static str]; 5],
}

/// Bytes that a tensor takes on a device, which for some quantised ones is more than in their files.
pub fn weight_bytes(dtype: DType, shape: &[usize]) -> usize {
    let Some((&cols, others)) = shape.split_last() else { return 0 };
    let elements = others.iter().product::<usize>().saturating_mul(cols.next_multiple_of(8));
    let of_a_block = match Form::of(dtype, cols) {
        Form::F32 => 4 * BLOCK,
        Form::F16 | Form::BF16 => 2 * BLOCK,
        Form::Nibbles => BLOCK / 2 + 4,
        Form::Bytes => BLOCK + 2,
        Form::FineBytes => BLOCK + 2 * 4,
        // And a quarter of a scale.
        Form::F8 => BLOCK + 1,
    };
    elements.div_ceil(BLOCK).saturating_mul(of_a_block)
}

/// A matrix taken apart. Rows are as long as `cols` rounded up to a multiple of eight.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Unpacked {
    pub(super) values: Vec<u8>,
    /// Empty for floats.
    pub(super) scales: Vec<u8>,
}

impl Unpacked {
    /// Appends the rows of another matrix of the same form and width.
    pub(super) fn push(&mut self, matrix: &Matrix<'_>) {
        let form = Form::of(matrix.dtype(), matrix.cols());
        if matrix.dtype() == DType::F8 {
            return self.push_f8(matrix, form);
        }
        if let Form::F32 | Form::F16 | Form::BF16 = form {
            let element = matrix.dtype().block_bytes();
            let padding = (matrix.cols().next_multiple_of(8) - matrix.cols()) * element;
            for row in 0..matrix.rows() {
                self.values.extend_from_slice(matrix.row(row));
                self.values.resize(self.values.len() + padding, 0);
            }
            return;
        }
        for row in 0..matrix.rows() {
            for block in 0..matrix.cols() / BLOCK {
                let decoded = decode(matrix.dtype(), matrix.row(row), block);
                let quants = decoded.quants.map(|quant| quant as u8);
                let (scales, minimum) =
                    (decoded.scales.map(|scale| scale.to_le_bytes()), decoded.minimum.to_le_bytes());
                match form {
                    Form::Nibbles => {
                        self.values.extend(quants.as_chunks::<2>().0.iter().map(|[low, high]| low | high << 4));
                        self.scales.extend([scales[0], minimum].concat());
                    }
                    Form::Bytes => {
                        self.values.extend(quants);
                        self.scales.extend(scales[0]);
                    }
                    _ => {
                        self.values.extend(quants);
                        self.scales.extend([scales[0], minimum, scales[1], minimum].concat());
                    }
                }
            }
        }
    }

    fn push_f8(&mut self, matrix: &Matrix<'_>, form: Form) {
        if form == Form::F16 {
            let padding = (matrix.cols().next_multiple_of(8) - matrix.cols()) * size_of::<f16>();
            for row in dequantize(matrix).chunks_exact(matrix.cols()) {
                self.values.extend(row.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()));
                self.values.resize(self.values.len() + padding, 0);
            }
            return;
        }
        for block in matrix.data().chunks_exact(DType::F8.block_bytes()) {
            let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]) * QUARTER_UNIT;
            self.scales.extend(scale.to_le_bytes());
            self.values.extend_from_slice(&block[4..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_take_the_bytes_that_are_said() {
        use DType::{BF16, F8, F16, F32, IQ4NL, IQ4XS, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        let wide = [F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q3K, Q4K, Q5K, Q6K, IQ4NL, IQ4XS, F8];
        let wide = wide.map(|dtype| (dtype, 512));
        // Eight-bit floats of such a width become f16.
        for (dtype, cols) in wide.into_iter().chain([(F8, 200), (F8, 160)]) {
            let rows = 4;
            let file = vec![0; rows * dtype.row_bytes(cols)];
            let mut unpacked = Unpacked::default();
            unpacked.push(&Matrix::new(dtype, rows, cols, &file).unwrap());
            let taken = unpacked.values.len() + unpacked.scales.len();
            assert_eq!(weight_bytes(dtype, &[rows, cols]), taken, "{dtype:?} of {cols} columns");
        }
    }
}
