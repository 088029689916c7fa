//! Calls of functions, as models write them.

use serde::{Deserialize, Deserializer, de::IgnoredAny};
use serde_json::Value;

/// A call of a function.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Call {
    /// Among the answer's calls.
    pub(crate) index: usize,
    pub(crate) name: String,
    /// JSON.
    pub(crate) arguments: String,
}

#[derive(Deserialize)]
struct Written {
    name: String,
    #[serde(default, alias = "parameters", deserialize_with = "given")]
    arguments: Option<Value>,
}

/// That they are null, which some schemas allow, is not that there are none.
fn given<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

impl From<Written> for Call {
    fn from(written: Written) -> Self {
        let arguments = match written.arguments {
            None | Some(Value::Null) => "{}".to_owned(),
            // Some write the JSON as a string.
            Some(Value::String(text)) if serde_json::from_str::<IgnoredAny>(&text).is_ok() => text,
            Some(value) => value.to_string(),
        };
        Self { index: 0, name: written.name, arguments }
    }
}

/// The call that `text`, between marks of its own, is.
pub(super) fn one(text: &str) -> Result<Call, serde_json::Error> {
    serde_json::from_str::<Written>(text).map(Call::from)
}

/// Whether what is no call might be the first part of one, up to somewhere amid a text.
pub(super) fn breaks_off_in_text(error: &serde_json::Error) -> bool {
    error.is_eof() && error.to_string().starts_with("EOF while parsing a string")
}

/// The calls that `text` is made of. Nothing marks them, so an object with nothing but a name is none.
pub(super) fn several(text: &str) -> Option<Vec<Call>> {
    let (mut rest, mut calls) = (text.trim(), Vec::new());
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Written>();
        let written = values.next()?.ok().filter(|written| written.arguments.is_some())?;
        calls.push(written.into());
        rest = rest[values.byte_offset()..].trim_start_matches(|c: char| c.is_whitespace() || c == ';');
    }
    Some(calls)
}
