//! GGUF, the file format of llama.cpp: metadata, a tensor table, and the tensors' bytes, in one file.
//!
//! The file is mapped and never trusted: every length is compared with the bytes that are left before anything is done
//! with it, and values stay in the file until somebody asks for them, so opening allocates for the names of keys and
//! tensors alone. The format is specified in `docs/gguf.md` of the ggml repository; versions 2 and 3 are read.

mod error;
mod reader;
mod value;

#[cfg(test)]
pub(crate) mod testing;

pub use error::GgufError;
pub use value::{Array, Value};

use std::collections::HashMap;
use std::fmt;
use std::ops::{Deref, Range};
use std::path::Path;

use engine_kernels::{DType, MappedFile};
use reader::Reader;
use value::Stored;

/// Metadata and tensor table together may take this many bytes of the file (the largest known tokenizers take 20 MB).
const MAX_HEADER_BYTES: usize = 256 << 20;
/// Metadata keys a file may have; real ones have about 30.
const MAX_KEYS: u64 = 1 << 16;
/// Tensors a file may have; Llama 3.1 405B has 1,138.
const MAX_TENSORS: u64 = 1 << 18;
/// Longest name of a key or tensor, in bytes.
const MAX_NAME_BYTES: u64 = 1 << 12;
/// Dimensions a tensor may have (GGML_MAX_DIMS).
const MAX_DIMENSIONS: u32 = 4;

/// An opened GGUF file.
pub struct Gguf {
    bytes: Bytes,
    metadata: HashMap<String, Stored>,
    tensors: HashMap<String, TensorInfo>,
}

/// Where a tensor is and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Dimensions, slowest first (`[out, in]`): the reverse of the order in the file.
    pub shape: Vec<usize>,
    /// GGML's number of the element type.
    pub ggml_type: u32,
    /// Bytes in the file; `None` for an element type this engine does not read.
    range: Option<Range<usize>>,
}

impl TensorInfo {
    /// Element type, if this engine reads it.
    pub fn dtype(&self) -> Option<DType> {
        dtype_of(self.ggml_type)
    }

    /// Bytes in the file; 0 if the type is unknown.
    pub fn bytes(&self) -> usize {
        self.range.as_ref().map_or(0, ExactSizeIterator::len)
    }
}

impl Gguf {
    /// Maps and checks the file at `path`. The error does not name the path: the caller knows it.
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        Self::parse(Bytes::Mapped(MappedFile::open(path)?))
    }

    /// Reads a file that is in memory already.
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Self, GgufError> {
        Self::parse(Bytes::Owned(bytes))
    }

    fn parse(bytes: Bytes) -> Result<Self, GgufError> {
        let header = &bytes[..bytes.len().min(MAX_HEADER_BYTES)];
        let mut reader = Reader::new(header, bytes.len() > MAX_HEADER_BYTES);
        if reader.take(4, "the magic number")? != b"GGUF" {
            return Err(GgufError::NotGguf);
        }
        match reader.u32("the version")? {
            2 | 3 => {}
            version if version.swap_bytes() < 16 => return Err(GgufError::BigEndian),
            version => return Err(GgufError::Version { version }),
        }
        let tensor_count = reader.u64("the tensor count")?;
        let key_count = reader.u64("the metadata count")?;
        limit("tensors", tensor_count, MAX_TENSORS)?;
        limit("metadata keys", key_count, MAX_KEYS)?;

        let mut metadata = HashMap::new();
        for _ in 0..key_count {
            let key = name(&mut reader, "a metadata key")?;
            let stored = value::skip(&mut reader, &key)?;
            if metadata.contains_key(&key) {
                return Err(GgufError::Duplicate { name: key });
            }
            metadata.insert(key, stored);
        }

        let mut raw = Vec::new();
        for _ in 0..tensor_count {
            raw.push(RawTensor::read(&mut reader)?);
        }
        let mut file = Self { bytes: Bytes::Owned(Vec::new()), metadata, tensors: HashMap::new() };
        let table_end = reader.position();
        file.bytes = bytes;
        let alignment = file.alignment()?;
        let data_start = table_end.next_multiple_of(alignment);
        for tensor in raw {
            let (name, info) = tensor.locate(data_start, alignment, file.bytes.len())?;
            if file.tensors.insert(name.clone(), info).is_some() {
                return Err(GgufError::Duplicate { name });
            }
        }
        Ok(file)
    }

    /// Alignment of tensor data in bytes.
    fn alignment(&self) -> Result<usize, GgufError> {
        match self.unsigned("general.alignment")? {
            None => Ok(32),
            Some(n) if n.is_power_of_two() && n <= 1 << 20 => Ok(n as usize),
            Some(n) => Err(GgufError::Value {
                key: "general.alignment".into(),
                problem: format!("{n} is not a power of two up to 2^20"),
            }),
        }
    }

    /// The value of a metadata key.
    pub fn get(&self, key: &str) -> Option<Value<'_>> {
        self.metadata.get(key).map(|stored| stored.view(&self.bytes))
    }

    /// A string; an error if the key holds something else.
    pub fn string(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.typed(key, "a string", |value| match value {
            Value::String(s) => Some(s),
            _ => None,
        })
    }

    /// A non-negative integer of any width; an error if the key holds something else.
    pub fn unsigned(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.typed(key, "a non-negative integer", |value| match value {
            Value::Unsigned(n) => Some(n),
            Value::Signed(n) => n.try_into().ok(),
            _ => None,
        })
    }

    /// A number, integers included; an error if the key holds something else or a value that is not finite.
    pub fn float(&self, key: &str) -> Result<Option<f64>, GgufError> {
        self.typed(key, "a finite number", |value| match value {
            Value::Unsigned(n) => Some(n as f64),
            Value::Signed(n) => Some(n as f64),
            Value::Float(x) => x.is_finite().then_some(x),
            _ => None,
        })
    }

    /// A boolean; an error if the key holds something else.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.typed(key, "a boolean", |value| match value {
            Value::Bool(b) => Some(b),
            _ => None,
        })
    }

    /// An array; an error if the key holds something else.
    pub fn array(&self, key: &str) -> Result<Option<Array<'_>>, GgufError> {
        self.typed(key, "an array", |value| match value {
            Value::Array(array) => Some(array),
            _ => None,
        })
    }

    fn typed<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        convert: impl FnOnce(Value<'a>) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match convert(value) {
            Some(value) => Ok(Some(value)),
            None => Err(GgufError::Value { key: key.into(), problem: format!("{value} is not {wanted}") }),
        }
    }

    /// The metadata keys, in no particular order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    /// The tensor table, in no particular order.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &TensorInfo)> {
        self.tensors.iter().map(|(name, info)| (name.as_str(), info))
    }

    /// One entry of the tensor table.
    pub fn tensor(&self, name: &str) -> Option<&TensorInfo> {
        self.tensors.get(name)
    }

    /// Everything before the tensors' data: metadata and tensor table.
    pub(crate) fn header(&self) -> &[u8] {
        let starts = self.tensors.values().filter_map(|info| Some(info.range.as_ref()?.start));
        &self.bytes[..starts.min().unwrap_or(self.bytes.len())]
    }

    /// A tensor's bytes; `None` if there is none of that name, or its type is unknown.
    pub fn data(&self, name: &str) -> Option<&[u8]> {
        let range = self.tensors.get(name)?.range.clone()?;
        Some(&self.bytes[range])
    }
}

impl fmt::Debug for Gguf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gguf").field("keys", &self.metadata.len()).field("tensors", &self.tensors.len()).finish()
    }
}

/// A row of the tensor table before its place in the file is known: offsets count from the end of the table.
struct RawTensor {
    name: String,
    shape: Vec<usize>,
    ggml_type: u32,
    offset: u64,
}

impl RawTensor {
    fn read(reader: &mut Reader<'_>) -> Result<Self, GgufError> {
        let name = name(reader, "a tensor name")?;
        let dimensions = reader.u32("a tensor's dimension count")?;
        limit("dimensions of a tensor", dimensions.into(), MAX_DIMENSIONS.into())?;
        let mut shape = Vec::with_capacity(dimensions as usize);
        let mut elements = 1usize;
        for _ in 0..dimensions {
            let extent = usize::try_from(reader.u64("a tensor's dimension")?).ok();
            // A zero counts as one, so that the extents multiply without overflow in any order.
            let product = extent.and_then(|n| elements.checked_mul(n.max(1)));
            let (Some(extent), Some(product)) = (extent, product) else {
                return Err(GgufError::TensorTooLarge { name });
            };
            elements = product;
            shape.push(extent);
        }
        shape.reverse();
        Ok(Self { name, shape, ggml_type: reader.u32("a tensor's type")?, offset: reader.u64("a tensor's offset")? })
    }

    /// Checks that the tensor lies inside the file.
    fn locate(self, data_start: usize, alignment: usize, file_len: usize) -> Result<(String, TensorInfo), GgufError> {
        let Self { name, shape, ggml_type, offset } = self;
        let Some(dtype) = dtype_of(ggml_type) else {
            return Ok((name, TensorInfo { shape, ggml_type, range: None }));
        };
        if !offset.is_multiple_of(alignment as u64) {
            return Err(GgufError::TensorAlignment { name, offset, alignment });
        }
        let cols = shape.last().copied().unwrap_or(1);
        if !cols.is_multiple_of(dtype.block_len()) {
            return Err(GgufError::TensorBlocks { name, dtype, cols });
        }
        let elements: usize = shape.iter().product();
        let size = (elements / dtype.block_len()).checked_mul(dtype.block_bytes());
        let start = usize::try_from(offset).ok().and_then(|offset| data_start.checked_add(offset));
        let end = start.zip(size).and_then(|(start, size)| start.checked_add(size));
        match (start, end) {
            (Some(start), Some(end)) if end <= file_len => {
                Ok((name, TensorInfo { shape, ggml_type, range: Some(start..end) }))
            }
            _ => Err(GgufError::TensorOutside { name, file_len }),
        }
    }
}

/// Name of a GGML tensor type, for messages.
pub fn ggml_type_name(ggml_type: u32) -> &'static str {
    match ggml_type {
        0 => "F32",
        1 => "F16",
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        8 => "Q8_0",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        30 => "BF16",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => "unknown",
    }
}

/// The element type of a GGML type number, if this engine reads it.
fn dtype_of(ggml_type: u32) -> Option<DType> {
    Some(match ggml_type {
        0 => DType::F32,
        1 => DType::F16,
        2 => DType::Q4_0,
        3 => DType::Q4_1,
        6 => DType::Q5_0,
        7 => DType::Q5_1,
        8 => DType::Q8_0,
        11 => DType::Q3K,
        12 => DType::Q4K,
        13 => DType::Q5K,
        14 => DType::Q6K,
        20 => DType::IQ4NL,
        23 => DType::IQ4XS,
        30 => DType::BF16,
        _ => return None,
    })
}

fn limit(what: &'static str, count: u64, limit: u64) -> Result<(), GgufError> {
    if count > limit { Err(GgufError::TooMany { what, count, limit }) } else { Ok(()) }
}

fn name(reader: &mut Reader<'_>, what: &'static str) -> Result<String, GgufError> {
    let len = reader.u64(what)?;
    limit("bytes of a name", len, MAX_NAME_BYTES)?;
    let bytes = reader.take(len, what)?;
    std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| GgufError::Text { what: what.into() })
}

/// The file's bytes: mapped, or in memory.
enum Bytes {
    Mapped(MappedFile),
    Owned(Vec<u8>),
}

impl Deref for Bytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }
}

#[cfg(test)]
mod tests;
