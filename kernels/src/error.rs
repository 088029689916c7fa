use crate::DType;
use crate::cuda::DriverError;

/// Why a backend refused something it was given. All but [`KernelError::Driver`] are found while
/// loading.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// The bytes handed over do not hold a matrix of the stated shape and type.
    #[error("a {dtype:?} matrix of {rows} x {cols} needs {expected} bytes, got {actual}")]
    MatrixSize {
        /// Element type of the matrix.
        dtype: DType,
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// Bytes such a matrix has.
        expected: usize,
        /// Bytes that were given.
        actual: usize,
    },
    /// Quantised types come in blocks; a row has to be a whole number of them.
    #[error("a {dtype:?} matrix needs rows that are a multiple of {block} long, got {cols}")]
    BlockSize {
        /// Element type of the matrix.
        dtype: DType,
        /// Elements in one block of that type.
        block: usize,
        /// Input features.
        cols: usize,
    },
    /// Matrices stacked into one weight must agree on their input features.
    #[error("matrices stacked along their rows have {first} and {other} columns")]
    StackedColumns {
        /// Columns of the first matrix.
        first: usize,
        /// Columns of the one that disagrees.
        other: usize,
    },
    /// The operating system did not give the memory for the KV cache.
    #[error("cannot reserve {bytes} bytes for the KV cache: {source}; lower --kv-cache-memory or --kv-blocks")]
    KvMemory {
        /// Bytes asked for.
        bytes: usize,
        /// What the system said.
        source: std::io::Error,
    },
    /// Heads of a width that the backend's attention cannot compute.
    #[error(
        "heads of {head_dim} elements: this device's kernels take multiples of 8 up to {max}; run with --device cpu"
    )]
    HeadDim {
        /// Elements of a head.
        head_dim: usize,
        /// Widest heads there may be.
        max: usize,
    },
    /// The device, or its driver.
    #[error(transparent)]
    Driver(#[from] DriverError),
}
