//! Taking weights apart into what the device's loads want (`kernels/cuda/weights.cuh` is the other half).

use std::num::NonZero;
use std::thread;

use half::f16;

use crate::blocks::{BLOCK, Decoded, decode};
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
/// What scales of [`Form::F8`] are multiplied by (`F8_UNIT` of the kernels).
const F8_UNIT: f32 = 256.0;

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

    /// Bytes of the quants of 32 weights, and of the scales and minimums beside them, where they are integers.
    const fn block_bytes(self) -> Option<[usize; 2]> {
        match self {
            Self::Nibbles => Some([BLOCK / 2, 4]),
            Self::Bytes => Some([BLOCK, 2]),
            Self::FineBytes => Some([BLOCK, 2 * 4]),
            Self::F32 | Self::F16 | Self::BF16 | Self::F8 => None,
        }
    }

    /// Writes such a block to where it is to be.
    fn write(self, block: &Decoded, values: &mut [u8], scales: &mut [u8]) {
        let quants = block.quants.map(|quant| quant as u8);
        let ([first, second], minimum) = (block.scales.map(f16::to_le_bytes), block.minimum.to_le_bytes());
        if self == Self::Nibbles {
            let pairs = quants.as_chunks::<2>().0;
            values.iter_mut().zip(pairs).for_each(|(value, [low, high])| *value = low | high << 4);
        } else {
            values.copy_from_slice(&quants);
        }
        match self {
            Self::Nibbles => scales.copy_from_slice([first, minimum].as_flattened()),
            Self::Bytes => scales.copy_from_slice(&first),
            _ => scales.copy_from_slice([first, minimum, second, minimum].as_flattened()),
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
    let form = Form::of(dtype, cols);
    let of_a_block = match (form, form.block_bytes()) {
        (_, Some([values, scales])) => values + scales,
        (Form::F32, _) => 4 * BLOCK,
        // And a quarter of a scale.
        (Form::F8, _) => BLOCK + 1,
        _ => 2 * BLOCK,
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
        let Some([values_bytes, scales_bytes]) = form.block_bytes() else {
            let element = matrix.dtype().block_bytes();
            let padding = (matrix.cols().next_multiple_of(8) - matrix.cols()) * element;
            for row in 0..matrix.rows() {
                self.values.extend_from_slice(matrix.row(row));
                self.values.resize(self.values.len() + padding, 0);
            }
            return;
        };
        // There may be thousands of millions of them: all cores take part.
        let blocks = matrix.cols() / BLOCK;
        let threads = thread::available_parallelism().map_or(1, NonZero::get);
        let rows = matrix.rows().div_ceil(threads).max(1);
        let values = grown(&mut self.values, matrix.rows() * blocks * values_bytes);
        let scales = grown(&mut self.scales, matrix.rows() * blocks * scales_bytes);
        let values = values.chunks_mut((rows * blocks * values_bytes).max(1));
        let scales = scales.chunks_mut((rows * blocks * scales_bytes).max(1));
        thread::scope(|scope| {
            for (part, (values, scales)) in values.zip(scales).enumerate() {
                scope.spawn(move || {
                    let places = values.chunks_exact_mut(values_bytes).zip(scales.chunks_exact_mut(scales_bytes));
                    for (at, (values, scales)) in places.enumerate() {
                        let (row, block) = (part * rows + at / blocks, at % blocks);
                        form.write(&decode(matrix.dtype(), matrix.row(row), block), values, scales);
                    }
                });
            }
        });
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
            let scale = f32::from_le_bytes([block[0], block[1], block[2], block[3]]) * F8_UNIT;
            self.scales.extend(scale.to_le_bytes());
            self.values.extend_from_slice(&block[4..]);
        }
    }
}

/// Lengthens a buffer, and returns what is new of it.
fn grown(bytes: &mut Vec<u8>, by: usize) -> &mut [u8] {
    let from = bytes.len();
    bytes.resize(from + by, 0);
    &mut bytes[from..]
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

    #[test]
    fn rows_are_in_order_however_many_threads_have_them() {
        use DType::{IQ4NL, IQ4XS, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
        let rows = 4 * thread::available_parallelism().map_or(1, NonZero::get) + 1;
        for dtype in [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q3K, Q4K, Q5K, Q6K, IQ4NL, IQ4XS] {
            let row_bytes = dtype.row_bytes(512);
            let file: Vec<u8> = (0..rows * row_bytes).map(|at| (at * 31 % 251) as u8).collect();
            let (mut together, mut by_rows) = (Unpacked::default(), Unpacked::default());
            together.push(&Matrix::new(dtype, rows, 512, &file).unwrap());
            for row in file.chunks_exact(row_bytes) {
                by_rows.push(&Matrix::new(dtype, 1, 512, row).unwrap());
            }
            assert!(together == by_rows, "{dtype:?}");
        }
    }
}
