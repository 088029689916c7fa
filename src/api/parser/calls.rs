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

impl Written {
    /// The call, which was read from `text`.
    fn into_call(self, text: &str) -> Call {
        let arguments = match self.arguments {
            None | Some(Value::Null) => "{}".to_owned(),
            // Some write the JSON as a string.
            Some(Value::String(json)) if serde_json::from_str::<IgnoredAny>(&json).is_ok() => json,
            // The model's own text: its numbers may have more digits than a value keeps.
            Some(value) => arguments_in(text).map_or_else(|| value.to_string(), str::to_owned),
        };
        Call { index: 0, name: self.name, arguments }
    }
}

/// The text of a call's arguments, if the call is an object.
fn arguments_in(call: &str) -> Option<&str> {
    let mut rest = call.trim_start().strip_prefix('{')?;
    loop {
        let (field, after) = read::<String>(rest)?;
        let value = after.trim_start().strip_prefix(':')?.trim_start();
        let (IgnoredAny, after) = read(value)?;
        if field == "arguments" || field == "parameters" {
            return Some(&value[..value.len() - after.len()]);
        }
        rest = after.trim_start().strip_prefix(',')?;
    }
}

/// The value that `text` begins with, and what follows it.
fn read<'a, T: Deserialize<'a>>(text: &'a str) -> Option<(T, &'a str)> {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<T>();
    let value = values.next()?.ok()?;
    Some((value, &text[values.byte_offset()..]))
}

/// The call that `text`, between marks of its own, is.
pub(super) fn one(text: &str) -> Result<Call, serde_json::Error> {
    serde_json::from_str::<Written>(text).map(|written| written.into_call(text))
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
        let (call, after) = rest.split_at(values.byte_offset());
        calls.push(written.into_call(call));
        rest = after.trim_start_matches(|c: char| c.is_whitespace() || c == ';');
    }
    Some(calls)
}
