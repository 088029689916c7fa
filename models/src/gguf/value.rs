use std::fmt;
use std::ops::Range;

use super::GgufError;
use super::reader::Reader;

/// Arrays inside arrays are skipped down to this depth; no known file has any.
const MAX_NESTING: u32 = 4;

/// Value types of GGUF metadata, by their number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl Kind {
    fn new(number: u32) -> Option<Self> {
        use Kind::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64].into_iter().find(|k| *k as u32 == number)
    }

    /// Bytes of one value; the least there can be for strings (their length) and arrays (type and count).
    fn bytes(self) -> usize {
        match self {
            Self::U8 | Self::I8 | Self::Bool => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 | Self::String => 8,
            Self::Array => 12,
        }
    }
}

/// Where a checked value lies in the file.
#[derive(Debug, Clone)]
pub(super) struct Stored {
    kind: Kind,
    range: Range<usize>,
}

impl Stored {
    /// The value, read from the bytes it was checked in.
    pub(super) fn view<'a>(&self, bytes: &'a [u8]) -> Value<'a> {
        Value::decode(self.kind, &bytes[self.range.clone()])
    }
}

/// Steps over the value of `key`, checking all of it.
pub(super) fn skip(reader: &mut Reader<'_>, key: &str) -> Result<Stored, GgufError> {
    let kind = read_kind(reader, key)?;
    let start = reader.position();
    skip_value(reader, kind, key, 0)?;
    Ok(Stored { kind, range: start..reader.position() })
}

fn read_kind(reader: &mut Reader<'_>, key: &str) -> Result<Kind, GgufError> {
    let number = reader.u32(key)?;
    Kind::new(number).ok_or_else(|| GgufError::ValueType { key: key.into(), kind: number })
}

fn skip_value(reader: &mut Reader<'_>, kind: Kind, key: &str, depth: u32) -> Result<(), GgufError> {
    match kind {
        Kind::String => {
            let len = reader.u64(key)?;
            let text = reader.take(len, key)?;
            std::str::from_utf8(text).map_err(|_| GgufError::Text { what: format!("metadata key `{key}`") })?;
        }
        Kind::Array => {
            if depth == MAX_NESTING {
                return Err(GgufError::Nesting { key: key.into(), limit: MAX_NESTING });
            }
            let element = read_kind(reader, key)?;
            let count = reader.u64(key)?;
            // Each element takes at least its least size, so the loop below ends within the file's length.
            let least = count.saturating_mul(element.bytes() as u64);
            if least > reader.left() as u64 {
                return Err(reader.too_short(key, least));
            }
            match element {
                Kind::String | Kind::Array => {
                    for _ in 0..count {
                        skip_value(reader, element, key, depth + 1)?;
                    }
                }
                _ => {
                    reader.take(least, key)?;
                }
            }
        }
        _ => {
            reader.take(kind.bytes() as u64, key)?;
        }
    }
    Ok(())
}

/// A metadata value, borrowed from the file.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Value<'a> {
    /// Any of the unsigned integers.
    Unsigned(u64),
    /// Any of the signed integers.
    Signed(i64),
    /// f32 (widened exactly) or f64.
    Float(f64),
    /// A boolean.
    Bool(bool),
    /// Text.
    String(&'a str),
    /// A list of values of one type.
    Array(Array<'a>),
}

impl<'a> Value<'a> {
    /// Decodes a value [`skip_value`] has accepted: `bytes` are long enough, and text is UTF-8.
    fn decode(kind: Kind, bytes: &'a [u8]) -> Self {
        match kind {
            Kind::U8 => Self::Unsigned(bytes[0].into()),
            Kind::I8 => Self::Signed((bytes[0] as i8).into()),
            Kind::U16 => Self::Unsigned(u16::from_le_bytes(head(bytes)).into()),
            Kind::I16 => Self::Signed(i16::from_le_bytes(head(bytes)).into()),
            Kind::U32 => Self::Unsigned(u32::from_le_bytes(head(bytes)).into()),
            Kind::I32 => Self::Signed(i32::from_le_bytes(head(bytes)).into()),
            Kind::F32 => Self::Float(f32::from_le_bytes(head(bytes)).into()),
            Kind::Bool => Self::Bool(bytes[0] != 0),
            Kind::String => {
                let len = u64::from_le_bytes(head(bytes)) as usize;
                // Checked when the file was opened; empty rather than a panic should the file have been changed since.
                Self::String(bytes.get(8..8 + len).and_then(|text| std::str::from_utf8(text).ok()).unwrap_or(""))
            }
            Kind::Array => {
                let element = Kind::new(u32::from_le_bytes(head(bytes))).unwrap_or(Kind::U8);
                let len = u64::from_le_bytes(head(&bytes[4..])) as usize;
                Self::Array(Array { element, len, bytes: &bytes[12..] })
            }
            Kind::U64 => Self::Unsigned(u64::from_le_bytes(head(bytes))),
            Kind::I64 => Self::Signed(i64::from_le_bytes(head(bytes))),
            Kind::F64 => Self::Float(f64::from_le_bytes(head(bytes))),
        }
    }
}

impl fmt::Display for Value<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unsigned(n) => write!(f, "{n}"),
            Self::Signed(n) => write!(f, "{n}"),
            Self::Float(x) => write!(f, "{x}"),
            Self::Bool(b) => write!(f, "{b}"),
            Self::String(s) => write!(f, "{:?}", s.chars().take(40).collect::<String>()),
            Self::Array(array) => write!(f, "an array of {} values", array.len),
        }
    }
}

/// The first `N` bytes.
fn head<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[..N]);
    out
}

/// A metadata array, borrowed from the file. Elements are decoded as they are asked for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Array<'a> {
    element: Kind,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as strings; `None` if they are something else.
    pub fn strings(&self) -> Option<impl Iterator<Item = &'a str> + use<'a>> {
        let mut rest = self.bytes;
        (self.element == Kind::String).then(|| {
            (0..self.len).map_while(move |_| {
                let (len, tail) = rest.split_first_chunk::<8>()?;
                let text = tail.get(..u64::from_le_bytes(*len) as usize)?;
                rest = &tail[text.len()..];
                std::str::from_utf8(text).ok()
            })
        })
    }

    /// The elements as signed integers; `None` if they are something else, or do not fit.
    pub fn integers(&self) -> Option<impl Iterator<Item = i64> + use<'a>> {
        let values = self.numbers()?;
        let fits = |value: Value<'_>| match value {
            Value::Unsigned(n) => n.try_into().ok(),
            Value::Signed(n) => Some(n),
            _ => None,
        };
        self.numbers()?.all(|v| fits(v).is_some()).then(|| values.filter_map(fits))
    }

    /// The elements as floating-point numbers; `None` if they are something else.
    pub fn floats(&self) -> Option<impl Iterator<Item = f64> + use<'a>> {
        matches!(self.element, Kind::F32 | Kind::F64).then_some(())?;
        Some(self.numbers()?.filter_map(|value| match value {
            Value::Float(x) => Some(x),
            _ => None,
        }))
    }

    /// The elements of an array of a type of fixed size.
    fn numbers(&self) -> Option<impl Iterator<Item = Value<'a>> + use<'a>> {
        let element = self.element;
        (!matches!(element, Kind::String | Kind::Array)).then(|| {
            self.bytes.chunks_exact(element.bytes()).take(self.len).map(move |bytes| Value::decode(element, bytes))
        })
    }
}
