//! Request bodies, parsed into types.

use std::sync::Arc;

use axum::{
    body::Body,
    http::{HeaderMap, StatusCode, header},
};
use serde::de::DeserializeOwned;

use super::{
    Serving,
    progress::{FrontendContext, JOURNAL_BYTES_MAX, Journal, malformed},
    types::instead_of,
};
use crate::{
    http::{ApiError, Received, SMALL_BODY_BYTES, discard, read_body},
    telemetry::TraceContext,
};

/// Longest message of the parser that is passed on: it may quote what the client sent.
const MESSAGE_CHARS_MAX: usize = 300;

/// Reads a JSON body into a `T`. Errors name the field.
pub(crate) async fn read_json<T: DeserializeOwned + Send + 'static>(
    headers: &HeaderMap,
    body: Body,
    serving: &Arc<Serving>,
) -> Result<T, ApiError> {
    if !is_json(headers) {
        discard(headers, body).await;
        let message = "Send the request body as JSON, with the header 'Content-Type: application/json'";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let received = read_body(headers, body, serving.config.body_bytes_max, &serving.bodies).await?;
    parse_received(received, serving, |bytes| parse_json(bytes)).await
}

/// Parses a body: a large one on a thread of its own, as what connections are served on has others to look after.
async fn parse_received<T: Send + 'static>(
    received: Received,
    serving: &Arc<Serving>,
    parse: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    let Received { bytes, memory: _memory } = received;
    if bytes.len() <= SMALL_BODY_BYTES {
        return parse(&bytes);
    }
    serving.encode(bytes.len(), move |_| parse(&bytes)).await?
}

/// As [`read_json`], for a request that generates: with what a frontend asks for in headers, and before the body.
pub(crate) async fn read_in_context<T: DeserializeOwned + Send + 'static>(
    headers: &HeaderMap,
    body: Body,
    serving: &Arc<Serving>,
) -> Result<(T, FrontendContext), ApiError> {
    let limit = serving.config.body_bytes_max;
    let (progress, journal_bytes) = FrontendContext::from_headers(headers, serving.config.cluster_token.as_ref())?;
    // One that cannot be read is ignored, as the standard says.
    let trace = headers.get(TraceContext::HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
    let Some(journal_bytes) = journal_bytes else {
        return Ok((read_json(headers, body, serving).await?, FrontendContext { progress, journal: None, trace }));
    };
    if journal_bytes > JOURNAL_BYTES_MAX {
        return Err(malformed());
    }
    let received = read_body(headers, body, limit + journal_bytes, &serving.bodies).await?;
    let vocab_size = serving.engine.config().vocab_size;
    let parse = move |bytes: &[u8]| {
        let (journal, request) = bytes.split_at_checked(journal_bytes).ok_or_else(malformed)?;
        let journal = Journal::parse(journal, vocab_size)?;
        Ok((parse_json(request)?, FrontendContext { progress, journal: Some(journal), trace }))
    };
    parse_received(received, serving, parse).await
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let media_type = value.split(';').next().unwrap_or_default().trim();
    media_type.eq_ignore_ascii_case("application/json")
}

/// Parses `bytes`. A wrong type, an unknown or a missing field is named in the error's `param`.
pub(crate) fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    // serde would take a list for a struct too, field by field.
    if bytes.trim_ascii_start().first().is_some_and(|&first| first != b'{') {
        let message = "The request body has to be a JSON object";
        return Err(ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message));
    }
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut deserializer).map_err(|error| {
        let path = error.path().to_string();
        let path = if path == "." { "" } else { path.as_str() };
        describe(path, error.inner())
    })?;
    deserializer.end().map_err(|error| describe("", &error))?;
    Ok(value)
}

fn describe(path: &str, error: &serde_json::Error) -> ApiError {
    let mut message: String = error.to_string().chars().take(MESSAGE_CHARS_MAX).collect();
    if !error.is_data() {
        message.insert_str(0, "The request body is not valid JSON: ");
        return ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", message);
    }
    let quoted = |prefix: &str| message.strip_prefix(prefix)?.split('`').next().map(str::to_owned);
    let below = |field: &str| match path {
        "" => field.to_owned(),
        path if path == field || path.ends_with(&format!(".{field}")) => path.to_owned(),
        path => format!("{path}.{field}"),
    };
    if let Some(field) = quoted("unknown field `") {
        let param = below(&field);
        let instead = instead_of(&param);
        return ApiError::unknown_parameter(param, instead);
    }
    if let Some(field) = quoted("missing field `") {
        return ApiError::missing(below(&field));
    }
    match path {
        "" => ApiError::new(StatusCode::BAD_REQUEST, "invalid_json", format!("Invalid request body: {message}")),
        path => ApiError::invalid(path.to_owned(), format!("Invalid value for '{path}': {message}")),
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only parsed")]
    struct Outer {
        number: f64,
        inner: Option<Vec<Inner>>,
        ignored: Option<serde::de::IgnoredAny>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code, reason = "only parsed")]
    struct Inner {
        name: String,
    }

    fn param(json: &str) -> Option<String> {
        parse_json::<Outer>(json.as_bytes()).unwrap_err().param().map(str::to_owned)
    }

    /// Where serde_json's feature `raw_value` is on, as one crate's wish has it for all, such a text is parsed as if it
    /// stood there, with a depth of its own: sixty of them within each other, in 50 kB, are more than a stack takes.
    #[test]
    fn a_text_stays_a_text_whatever_its_field_is_called() {
        let value: serde_json::Value = parse_json(br#"{"$serde_json::private::RawValue": "[1]"}"#).unwrap();
        assert!(value.is_object(), "{value}");
    }

    #[test]
    fn errors_name_the_field_they_are_about() {
        assert_eq!(param(r#"{"number": "1"}"#).unwrap(), "number");
        assert_eq!(param(r#"{"inner": []}"#).unwrap(), "number");
        assert_eq!(param(r#"{"number": 1, "strange": 2}"#).unwrap(), "strange");
        assert_eq!(param(r#"{"number": 1, "inner": [{"name": "a"}, {"name": 7}]}"#).unwrap(), "inner[1].name");
        assert_eq!(param(r#"{"number": 1, "inner": [{"name": "a", "odd": 7}]}"#).unwrap(), "inner[0].odd");
        assert_eq!(param(r#"{"number": 1, "inner": [{}]}"#).unwrap(), "inner[0].name");
        assert_eq!(param(r#"{"number": 1"#), None);
        assert_eq!(param("[]"), None);
        assert_eq!(param(r#"{"number": 1} x"#), None);
    }

    #[test]
    fn deep_nesting_is_an_error_and_no_stack_overflow() {
        let deep = "[".repeat(200_000);
        assert_eq!(param(&deep), None);
        assert_eq!(param(&format!(r#"{{"number": {deep}"#)), Some("number".into()));
        assert!(param(&format!(r#"{{"number": 1, "inner": {deep}"#)).unwrap().starts_with("inner[0]"));
        let free = format!(r#"{{"a": {deep}"#);
        assert!(parse_json::<serde_json::Value>(free.as_bytes()).is_err());
        let ignored = format!(r#"{{"number": 1, "ignored": {deep}{}}}"#, "]".repeat(200_000));
        assert!(parse_json::<Outer>(ignored.as_bytes()).is_ok());
    }

    #[test]
    fn a_message_does_not_quote_megabytes() {
        let body = format!(r#"{{"number": "{}"}}"#, "x".repeat(1 << 20));
        assert!(parse_json::<Outer>(body.as_bytes()).unwrap_err().to_json().len() < 1000);
    }
}
