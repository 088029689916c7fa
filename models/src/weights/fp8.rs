//! Weights of eight-bit floats with their scales, put together.

use engine_kernels::DType;

use crate::config::quantization::Fp8;

/// The largest E4M3: a scale times it has to be a number. (Kernels multiply scales by 256.)
const LARGEST: f32 = 448.0;

/// The scales of a matrix `[rows, cols]`.
pub(crate) struct Scales {
    values: Vec<f32>,
    /// Rows that share scales.
    rows: usize,
    /// Columns that do.
    cols: usize,
    /// Scales of a row.
    per_row: usize,
}

impl Scales {
    /// Scales that a file has in the shape `stored`. What is wrong with them, else.
    pub(crate) fn new(fp8: &Fp8, matrix: [usize; 2], stored: &[usize], values: Vec<f32>) -> Result<Self, String> {
        let [rows, cols] = matrix;
        let (this, fits) = match fp8.block {
            Some([block_rows, block_cols]) => {
                let shape = [rows.div_ceil(block_rows), cols.div_ceil(block_cols)];
                (Self { values, rows: block_rows, cols: block_cols, per_row: shape[1] }, stored == shape)
            }
            None if stored.iter().all(|&extent| extent == 1) => (Self { values, rows, cols, per_row: 1 }, true),
            None => (Self { values, rows: 1, cols, per_row: 1 }, stored == [rows] || stored == [rows, 1]),
        };
        if !fits {
            let expected = match fp8.block {
                Some([block_rows, block_cols]) => {
                    format!("blocks of {block_rows} by {block_cols}, {:?}", [rows.div_ceil(block_rows), this.per_row])
                }
                None => format!("one for all, or one for each row, {:?}", [rows, 1]),
            };
            return Err(format!(
                "has shape {stored:?}; its matrix is {matrix:?}, and the configuration wants {expected}"
            ));
        }
        match this.values.iter().find(|scale| !(*scale * LARGEST).is_finite()) {
            Some(scale) => Err(format!("has a scale of {scale}: the file is damaged, download it again")),
            None => Ok(this),
        }
    }

    fn of(&self, row: usize, col: usize) -> f32 {
        self.values[row / self.rows * self.per_row + col / self.cols]
    }
}

/// The matrix as [`DType::F8`], or nothing if one of its elements is not a number: no tool writes such, and kernels do
/// not look for them.
pub(crate) fn blocks(quants: &[u8], cols: usize, scales: &Scales) -> Option<Vec<u8>> {
    let block = DType::F8.block_len();
    let mut out = Vec::with_capacity(quants.len() / cols * DType::F8.row_bytes(cols));
    for (row, quants) in quants.chunks_exact(cols).enumerate() {
        for (i, quants) in quants.chunks(block).enumerate() {
            // All of them, which is faster than to stop at the first.
            if quants.iter().fold(false, |found, quant| found | (quant & 0x7f == 0x7f)) {
                return None;
            }
            out.extend(scales.of(row, i * block).to_le_bytes());
            out.extend_from_slice(quants);
            out.resize(out.len() + block - quants.len(), 0);
        }
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use engine_kernels::Matrix;
    use engine_kernels::reference::dequantize;

    use super::*;

    fn fp8(block: Option<[usize; 2]>) -> Fp8 {
        Fp8 { block, except: Vec::new() }
    }

    /// A matrix of ones, scaled.
    fn scaled(block: Option<[usize; 2]>, matrix: [usize; 2], stored: &[usize]) -> Vec<f32> {
        let count = stored.iter().product::<usize>();
        let values = (1..=count).map(|scale| scale as f32).collect();
        let scales = Scales::new(&fp8(block), matrix, stored, values).unwrap();
        let [rows, cols] = matrix;
        let bytes = blocks(&vec![0x38; rows * cols], cols, &scales).unwrap();
        dequantize(&Matrix::new(DType::F8, rows, cols, &bytes).unwrap())
    }

    #[test]
    fn a_scale_reaches_as_far_as_its_shape_says() {
        for stored in [&[][..], &[1], &[1, 1]] {
            assert_eq!(scaled(None, [3, 200], stored), [1.0; 600]);
        }
        for stored in [&[3][..], &[3, 1]] {
            assert_eq!(scaled(None, [3, 200], stored), [[1.0; 200], [2.0; 200], [3.0; 200]].concat());
        }
        // The last row and the last 44 columns are in blocks that are not full.
        let want = |row: usize, col: usize| (row / 2 * 2 + col / 256 + 1) as f32;
        let all: Vec<f32> = (0..3 * 300).map(|i| want(i / 300, i % 300)).collect();
        assert_eq!(scaled(Some([2, 256]), [3, 300], &[2, 2]), all);
    }

    #[test]
    fn scales_of_other_shapes_or_that_are_no_numbers_are_said_to_be_so() {
        let problem = |block, stored: &[usize], scale: f32| {
            let values = vec![scale; stored.iter().product()];
            Scales::new(&fp8(block), [256, 384], stored, values).err().unwrap()
        };
        let said = problem(Some([128, 128]), &[3, 2], 1.0);
        assert!(said.contains("has shape [3, 2]") && said.contains("blocks of 128 by 128, [2, 3]"), "{said}");
        assert!(problem(Some([128, 128]), &[1], 1.0).contains("[2, 3]"));
        assert!(problem(None, &[2, 3], 1.0).contains("one for each row, [256, 1]"));
        assert!(problem(None, &[384], 1.0).contains("[256, 1]"));
        for scale in [f32::NAN, f32::INFINITY, f32::MAX, 1e36] {
            assert!(problem(None, &[], scale).contains("damaged"));
        }
    }

    #[test]
    fn no_element_may_be_nan() {
        let scales = Scales::new(&fp8(None), [2, 130], &[], vec![1.0]).unwrap();
        for (at, nan) in [(0, 0x7f), (129, 0xff), (259, 0x7f)] {
            let mut quants = vec![0x7e; 260];
            assert!(blocks(&quants, 130, &scales).is_some());
            quants[at] = nan;
            assert!(blocks(&quants, 130, &scales).is_none());
        }
    }
}
