use engine_kernels::DType;

/// Why a file is not a GGUF file this engine can read.
#[derive(Debug, thiserror::Error)]
pub enum GgufError {
    /// The file could not be opened or mapped.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The file does not begin with `GGUF`.
    #[error("not a GGUF file: it does not begin with \"GGUF\"")]
    NotGguf,
    /// A file for machines of the other byte order.
    #[error("a big-endian GGUF file; convert it with gguf_convert_endian.py of llama.cpp")]
    BigEndian,
    /// A version of the format this engine does not read.
    #[error("GGUF version {version}; versions 2 and 3 are read, convert the file with a current llama.cpp")]
    Version {
        /// The version the file states.
        version: u32,
    },
    /// The file ends too early.
    #[error("the file is truncated: {what} at byte {position} needs {needed} bytes and {left} are left")]
    Truncated {
        /// What was being read.
        what: String,
        /// Where.
        position: usize,
        /// Bytes it needs.
        needed: u64,
        /// Bytes there are.
        left: usize,
    },
    /// Metadata and tensor table are absurdly large.
    #[error("metadata and tensor table are longer than {limit} bytes")]
    HeaderTooLong {
        /// Most bytes that are read.
        limit: usize,
    },
    /// A count beyond any sensible file's.
    #[error("{count} {what}, and at most {limit} are accepted")]
    TooMany {
        /// What was counted.
        what: &'static str,
        /// How many the file states.
        count: u64,
        /// The limit.
        limit: u64,
    },
    /// Two metadata keys or tensors of one name.
    #[error("`{name}` occurs twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// Text that is not UTF-8.
    #[error("{what} is not UTF-8")]
    Text {
        /// What it belongs to.
        what: String,
    },
    /// A metadata value type the format does not have.
    #[error("metadata key `{key}` has value type {kind}, which GGUF does not have")]
    ValueType {
        /// The key.
        key: String,
        /// The type number.
        kind: u32,
    },
    /// Arrays nested too deep.
    #[error("metadata key `{key}` nests arrays more than {limit} deep")]
    Nesting {
        /// The key.
        key: String,
        /// Deepest nesting accepted.
        limit: u32,
    },
    /// A metadata value that is missing or not what it should be.
    #[error("metadata key `{key}`: {problem}")]
    Value {
        /// The key.
        key: String,
        /// What is wrong with its value.
        problem: String,
    },
    /// A tensor whose size does not fit in an address.
    #[error("tensor `{name}` has more elements than can be addressed")]
    TensorTooLarge {
        /// The tensor.
        name: String,
    },
    /// A tensor that does not begin on the alignment the file states.
    #[error("tensor `{name}` begins at offset {offset}, not a multiple of {alignment}")]
    TensorAlignment {
        /// The tensor.
        name: String,
        /// Its offset from the start of the data.
        offset: u64,
        /// The file's alignment.
        alignment: usize,
    },
    /// A quantised tensor whose rows are not whole blocks.
    #[error("tensor `{name}` has rows of {cols} elements, which is not a whole number of {dtype:?} blocks")]
    TensorBlocks {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: DType,
        /// Elements of a row.
        cols: usize,
    },
    /// A tensor that reaches beyond the end of the file.
    #[error("tensor `{name}` reaches beyond the file's {file_len} bytes: the file is truncated, download it again")]
    TensorOutside {
        /// The tensor.
        name: String,
        /// Length of the file.
        file_len: usize,
    },
}
