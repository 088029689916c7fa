//! Calls of functions, as models write them.

use serde::Deserialize;
use serde_json::value::RawValue;

/// A call of a function.
#[derive(Debug, Default, Clone, PartialEq)]
pub(crate) struct Call {
    /// Among the answer's calls.
    pub(crate) index: usize,
    pub(crate) name: String,
    /// JSON, as the model wrote it.
    pub(crate) arguments: String,
}

#[derive(Deserialize)]
struct Written<'a> {
    name: String,
    #[serde(borrow, alias = "parameters")]
    arguments: Option<&'a RawValue>,
}

impl From<Written<'_>> for Call {
    fn from(written: Written<'_>) -> Self {
        let arguments = match written.arguments {
            None => "{}".to_owned(),
            // Some write the JSON as a string.
            Some(raw) => serde_json::from_str(raw.get()).unwrap_or_else(|_| raw.get().to_owned()),
        };
        Self { index: 0, name: written.name, arguments }
    }
}

/// The call that `text` is.
pub(super) fn one(text: &str) -> Option<Call> {
    serde_json::from_str::<Written<'_>>(text).ok().map(Call::from)
}

/// The calls that `text` is made of.
pub(super) fn several(text: &str) -> Option<Vec<Call>> {
    let (mut rest, mut calls) = (text.trim(), Vec::new());
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Written<'_>>();
        calls.push(values.next()?.ok()?.into());
        rest = rest[values.byte_offset()..].trim_start_matches(|c: char| c.is_whitespace() || c == ';');
    }
    Some(calls)
}
