use serde::{Deserialize, de::IgnoredAny};
use serde_json::Value;

use super::Refused;

/// `response_format`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct ResponseFormat {
    #[serde(rename = "type")]
    pub(crate) kind: String,
    pub(crate) json_schema: Option<JsonSchema>,
    /// llama.cpp's: the schema itself, with either of the types that are JSON.
    pub(crate) schema: Option<Value>,
}

/// A schema, and what OpenAI wants to know about it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct JsonSchema {
    pub(crate) schema: Option<Value>,
    /// Models are not told these two.
    #[serde(rename = "name")]
    _name: Option<IgnoredAny>,
    #[serde(rename = "description")]
    _description: Option<IgnoredAny>,
    /// Whether answers have to fit the schema: here they always do.
    #[serde(rename = "strict")]
    _strict: Option<bool>,
}

/// `structured_outputs`: vLLM's, of which exactly one of the first five is to be given.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct StructuredOutputs {
    /// A schema, or the JSON text of one.
    pub(crate) json: Option<Value>,
    pub(crate) json_object: Option<bool>,
    pub(crate) regex: Option<String>,
    pub(crate) choice: Option<Vec<String>>,
    pub(crate) grammar: Option<String>,
    pub(crate) structural_tag: Option<Refused>,
    pub(crate) whitespace_pattern: Option<Refused>,
    pub(crate) disable_any_whitespace: Option<Refused>,
    pub(crate) disable_additional_properties: Option<Refused>,
}
