use std::time::Duration;

use axum::{
    body::{Body, BodyDataStream},
    extract::Request,
    http::{HeaderMap, StatusCode, header},
};
use futures::StreamExt;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use super::{
    ApiError, Serving,
    progress::{JOURNAL_BYTES_MAX, Journal, Relay, malformed},
};

/// Longest pause between two pieces of a body.
const BODY_PAUSE_MAX: Duration = Duration::from_secs(30);
/// How much of a body that is too large is read and thrown away, so that the client gets to read the answer: one that
/// is still writing when the connection closes sees a reset instead.
const DISCARD_BYTES_MAX: u64 = 512 << 20;
/// How long that may take.
const DISCARD_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest message of the parser that is passed on: it may quote what the client sent.
const MESSAGE_CHARS_MAX: usize = 300;

/// Reads a JSON body of at most `limit` bytes into a `T`. Errors name the field.
pub(crate) async fn read_json<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
) -> Result<T, ApiError> {
    if !is_json(headers) {
        discard(headers, body).await;
        let message = "Send the request body as JSON, with the header 'Content-Type: application/json'";
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    parse_json(&read_body(headers, body, limit).await?)
}

/// As [`read_json`], for a request that generates: with what a frontend asks for in headers, and before the body.
pub(crate) async fn read_relayed<T: DeserializeOwned>(
    headers: &HeaderMap,
    body: Body,
    serving: &Serving,
) -> Result<(T, Relay), ApiError> {
    let limit = serving.config.body_bytes_max;
    let (progress, journal_bytes) = Relay::from_headers(headers, serving.config.cluster_token.as_deref())?;
    let Some(journal_bytes) = journal_bytes else {
        return Ok((read_json(headers, body, limit).await?, Relay { progress, journal: None }));
    };
    if journal_bytes > JOURNAL_BYTES_MAX {
        return Err(malformed());
    }
    let bytes = read_body(headers, body, limit + journal_bytes).await?;
    let (journal, request) = bytes.split_at_checked(journal_bytes).ok_or_else(malformed)?;
    let journal = Journal::parse(journal, serving.engine.limits().vocab_size)?;
    Ok((parse_json(request)?, Relay { progress, journal: Some(journal) }))
}

fn is_json(headers: &HeaderMap) -> bool {
    let Some(value) = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()) else { return false };
    let media_type = value.split(';').next().unwrap_or_default().trim();
    media_type.eq_ignore_ascii_case("application/json")
}

/// Reads a body of at most `limit` bytes.
pub(crate) async fn read_body(headers: &HeaderMap, body: Body, limit: usize) -> Result<Vec<u8>, ApiError> {
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > limit as u64) {
        discard(headers, body).await;
        return Err(too_large(limit));
    }
    let mut pieces = body.into_data_stream();
    let mut bytes = Vec::with_capacity(declared.unwrap_or(0) as usize);
    loop {
        match timeout(BODY_PAUSE_MAX, pieces.next()).await {
            Err(_) => {
                let message = "The request body did not arrive in time";
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message));
            }
            Ok(None) => return Ok(bytes),
            Ok(Some(Err(error))) => {
                let message = format!("The request body could not be read: {error}");
                return Err(ApiError::new(StatusCode::BAD_REQUEST, "body_unreadable", message));
            }
            Ok(Some(Ok(piece))) if bytes.len() + piece.len() > limit => {
                discard_rest(&mut pieces).await;
                return Err(too_large(limit));
            }
            Ok(Some(Ok(piece))) => bytes.extend_from_slice(&piece),
        }
    }
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("The request body is larger than {limit} bytes, the limit of this server (--max-body-size)");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

/// Reads what a request that is refused unread still sends.
pub(crate) async fn discard_body(request: Request) {
    let (head, body) = request.into_parts();
    discard(&head.headers, body).await;
}

/// Reads a body that nobody wants, within limits, so that its sender gets to read the answer.
async fn discard(headers: &HeaderMap, body: Body) {
    // A client that waits for "100 Continue" has sent nothing: it is told at once.
    if !headers.contains_key(header::EXPECT) {
        discard_rest(&mut body.into_data_stream()).await;
    }
}

async fn discard_rest(pieces: &mut BodyDataStream) {
    let read_all = async {
        let mut discarded = 0;
        while let Some(Ok(piece)) = pieces.next().await {
            discarded += piece.len() as u64;
            if discarded > DISCARD_BYTES_MAX {
                break;
            }
        }
    };
    // Out of time or not: the answer goes out now.
    let _ = timeout(DISCARD_TIME_MAX, read_all).await;
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
        return ApiError::unknown_parameter(&below(&field));
    }
    if let Some(field) = quoted("missing field `") {
        let field = below(&field);
        let message = format!("Missing required parameter: '{field}'");
        return ApiError::invalid(field, message);
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
    #[allow(dead_code)] // Only parsed.
    struct Outer {
        number: f64,
        inner: Option<Vec<Inner>>,
        ignored: Option<serde::de::IgnoredAny>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    #[allow(dead_code)] // Only parsed.
    struct Inner {
        name: String,
    }

    fn param(json: &str) -> Option<String> {
        parse_json::<Outer>(json.as_bytes()).unwrap_err().param().map(str::to_owned)
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
