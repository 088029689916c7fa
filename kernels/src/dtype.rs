use crate::KernelError;

/// Element type of a weight as it stands in a model file. The quantised ones are GGML's block formats
/// (ggml-common.h of llama.cpp describes them; the bit layouts are repeated where they are decoded), and
/// [`DType::F8`], which is made when a file is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE single precision.
    F32,
    /// IEEE half precision.
    F16,
    /// bfloat16: the upper half of an f32.
    BF16,
    /// 32 weights: f16 scale, 4-bit values offset by 8.
    Q4_0,
    /// 32 weights: f16 scale and minimum, 4-bit values.
    Q4_1,
    /// 32 weights: f16 scale, 5-bit values offset by 16.
    Q5_0,
    /// 32 weights: f16 scale and minimum, 5-bit values.
    Q5_1,
    /// 32 weights: f16 scale, 8-bit signed values.
    Q8_0,
    /// 256 weights: f16 super-scale, 16 sub-blocks with signed 6-bit scales, 3-bit values offset by 4.
    Q3K,
    /// 256 weights: f16 super-scale and super-minimum, 8 sub-blocks with 6-bit scales and minimums, 4-bit values.
    Q4K,
    /// As [`DType::Q4K`] with 5-bit values.
    Q5K,
    /// 256 weights: f16 super-scale, 16 sub-blocks with signed 8-bit scales, 6-bit values offset by 32.
    Q6K,
    /// 32 weights: f16 scale, and for each four bits that say which of sixteen uneven values it has.
    IQ4NL,
    /// 256 weights: f16 super-scale, 8 sub-blocks with signed 6-bit scales, values as in [`DType::IQ4NL`].
    IQ4XS,
    /// 128 weights: f32 scale, E4M3 values (Micikevicius et al. 2022), none of them NaN. A row's last block may be
    /// filled up with zeros, so rows are of any length. Files have the values apart from the scales, which are one for
    /// a matrix, for a row, or for a block, mostly of 128 by 128: in this form they are all alike.
    F8,
}

/// The values that four bits stand for in [`DType::IQ4NL`] and [`DType::IQ4XS`]: closer to each other near zero, where
/// most weights are.
pub(crate) const IQ4_VALUES: [i8; 16] = [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

impl DType {
    /// Elements in one block; 1 for the float types.
    pub const fn block_len(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 | Self::IQ4NL => 32,
            Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K | Self::IQ4XS => 256,
            Self::F8 => 128,
        }
    }

    /// Bytes of one block.
    pub const fn block_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
            Self::IQ4NL => 18,
            Self::IQ4XS => 136,
            Self::F8 => 4 + 128,
        }
    }

    /// Bytes of a row of so many elements.
    pub const fn row_bytes(self, cols: usize) -> usize {
        cols.div_ceil(self.block_len()) * self.block_bytes()
    }

    /// Whether values are stored in quantised blocks.
    pub const fn is_quantized(self) -> bool {
        self.block_len() > 1
    }
}

/// A weight matrix `[rows, cols]` = `[output features, input features]`, row-major, borrowed from a (mapped) file.
/// The bytes carry no alignment promise.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    dtype: DType,
    rows: usize,
    cols: usize,
    data: &'a [u8],
}

impl<'a> Matrix<'a> {
    /// Checks that `data` holds exactly `[rows, cols]` elements of `dtype`, rows of whole blocks.
    pub fn new(dtype: DType, rows: usize, cols: usize, data: &'a [u8]) -> Result<Self, KernelError> {
        let block = dtype.block_len();
        if dtype != DType::F8 && !cols.is_multiple_of(block) {
            return Err(KernelError::BlockSize { dtype, block, cols });
        }
        let expected = dtype.row_bytes(cols).saturating_mul(rows);
        if data.len() != expected {
            return Err(KernelError::MatrixSize { dtype, rows, cols, expected, actual: data.len() });
        }
        Ok(Self { dtype, rows, cols, data })
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Output features.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// All bytes, row after row.
    pub fn data(&self) -> &'a [u8] {
        self.data
    }

    /// The bytes of one row.
    pub fn row(&self, row: usize) -> &'a [u8] {
        let bytes = self.dtype.row_bytes(self.cols);
        &self.data[row * bytes..(row + 1) * bytes]
    }
}
