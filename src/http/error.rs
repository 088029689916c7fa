//! Errors in the shape that OpenAI's clients read.

use std::{borrow::Cow, ops::RangeInclusive};

use axum::{
    http::{HeaderName, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

/// What a client is told when its request cannot be served: OpenAI's `{"error": {message, type, param, code}}`.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

/// When whoever is refused may come back.
const RETRY_AFTER_SECONDS: RangeInclusive<u16> = 1..=3;
/// Characters of what a client sent that a message repeats.
const SHOWN_CHARS_MAX: usize = 40;

/// What a client sent, as far as a message repeats it.
pub(crate) fn shown(text: &str) -> String {
    text.chars().take(SHOWN_CHARS_MAX).collect()
}

/// Header by which OpenAI's clients are told whether to try again; without it they do after any 5xx.
pub(super) const SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

#[derive(Serialize)]
struct ErrorBody<'a> {
    error: ErrorFields<'a>,
}

#[derive(Serialize)]
struct ErrorFields<'a> {
    message: &'a str,
    #[serde(rename = "type")]
    kind: &'static str,
    param: Option<&'a str>,
    code: Option<&'static str>,
}

impl ApiError {
    /// An error without a field to blame.
    pub(crate) fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> Self {
        Self { status, message: message.into(), param: None, code: Some(code) }
    }

    /// 400 because of the field `param`.
    pub(crate) fn invalid(param: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            message: message.into(),
            param: Some(param.into().into_owned()),
            code: Some("invalid_value"),
        }
    }

    /// 400 because the field `param` is needed.
    pub(crate) fn missing(param: impl Into<Cow<'static, str>>) -> Self {
        let param = param.into();
        let message = format!("Missing required parameter: '{param}'");
        Self::invalid(param, message)
    }

    /// 400 because `param` asks for something this server does not do.
    pub(crate) fn unsupported(param: impl Into<Cow<'static, str>>, detail: &str) -> Self {
        let param = param.into();
        let message = format!("'{param}' is not supported by this server: {detail}");
        Self { code: Some("unsupported_parameter"), ..Self::invalid(param, message) }
    }

    /// 400 because `param` is no parameter of the endpoint. `instead`: what to send in its place, if that is known.
    pub(crate) fn unknown_parameter(param: String, instead: Option<&str>) -> Self {
        let mut message = format!("Unrecognized request argument supplied: {param}");
        if let Some(instead) = instead {
            message.push_str("; ");
            message.push_str(instead);
        }
        Self { code: Some("unknown_parameter"), ..Self::invalid(param, message) }
    }

    /// 404 because no such model is served.
    pub(crate) fn unknown_model(model: &str, served: &[String]) -> Self {
        let mut shown: String = model.chars().take(200).collect();
        if shown.len() < model.len() {
            shown.push('…');
        }
        let message = format!("The model '{shown}' does not exist; this server has: {}", served.join(", "));
        Self { status: StatusCode::NOT_FOUND, code: Some("model_not_found"), ..Self::invalid("model", message) }
    }

    /// 400 because the prompt does not fit the context.
    pub(crate) fn context_length(param: &'static str, message: impl Into<String>) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::invalid(param, message) }
    }

    /// 503 while draining.
    pub(crate) fn draining() -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "draining", "The server is shutting down")
    }

    /// 503: the answer broke off because this engine is going away.
    pub(crate) fn aborted() -> Self {
        let message = "The engine could not complete the answer; the server's log says why";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "aborted", message)
    }

    /// 500: the answer broke off where the model had nothing more to say. It would there again.
    pub(crate) fn impossible() -> Self {
        let message = "The model gave no possible token (its numbers are not finite)";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "no_possible_token", message)
    }

    /// 400: the answer broke off where its grammar took too much to follow. It would there again.
    pub(crate) fn lost_track() -> Self {
        let message = "The answer broke off: its grammar became too complex to follow (too many ways to go on, or too \
                       many states of its regular expressions), or left no token that the request lets be drawn. Make \
                       it simpler.";
        Self::new(StatusCode::BAD_REQUEST, "grammar_too_complex", message)
    }

    /// 500: something that should not happen, wherever it is asked for.
    pub(crate) fn internal(message: &str) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// 429: others' grammars take long to compile.
    pub(crate) fn compilers_busy() -> Self {
        let message = "Other requests' grammars are being compiled, and take long: try again later";
        Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message)
    }

    /// 503: the engine thread is gone.
    pub(crate) fn engine_failed() -> Self {
        let message = "The engine has failed; the server's log says why, and a restart is needed";
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "engine_failed", message)
    }

    /// 504: the answer took longer than `--request-timeout`.
    pub(crate) fn timeout() -> Self {
        let message = "The answer took longer than this server allows (--request-timeout)";
        Self::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message)
    }

    /// What is wrong, in words.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// The field that is to blame.
    #[cfg(test)]
    pub(crate) fn param(&self) -> Option<&str> {
        self.param.as_deref()
    }

    /// The JSON body, as an event of a stream that has begun carries it too.
    pub(crate) fn to_json(&self) -> String {
        let kind = match self.status {
            StatusCode::UNAUTHORIZED => "authentication_error",
            StatusCode::NOT_FOUND => "not_found_error",
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_server_error() => "server_error",
            _ => "invalid_request_error",
        };
        let error = ErrorFields { message: &self.message, kind, param: self.param.as_deref(), code: self.code };
        // Strings and options of strings always serialise.
        serde_json::to_string(&ErrorBody { error }).unwrap_or_default()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, self.to_json()).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if matches!(self.status, StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE) {
            // Not at the same time as everybody else who hears of it now.
            headers.insert(header::RETRY_AFTER, rand::random_range(RETRY_AFTER_SECONDS).into());
        }
        // It would end there again, and as late.
        if matches!(self.code, Some("no_possible_token" | "timeout")) {
            headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn an_error_has_openais_shape() {
        let body = ApiError::invalid("top_p", "too large").to_json();
        assert_eq!(
            body,
            r#"{"error":{"message":"too large","type":"invalid_request_error","param":"top_p","code":"invalid_value"}}"#
        );
    }

    #[test]
    fn who_cannot_answer_at_the_moment_says_when_to_come_back() {
        for error in [ApiError::draining(), ApiError::aborted(), ApiError::engine_failed()] {
            let response = error.into_response();
            assert_eq!(response.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert!(response.headers().contains_key(header::RETRY_AFTER));
        }
        assert!(!ApiError::impossible().into_response().headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn those_who_are_refused_together_do_not_come_back_together() {
        let told = |_| ApiError::draining().into_response().headers()[header::RETRY_AFTER].as_bytes().to_vec();
        let told: HashSet<Vec<u8>> = (0..200).map(told).collect();
        let expected: HashSet<Vec<u8>> = RETRY_AFTER_SECONDS.map(|seconds| seconds.to_string().into_bytes()).collect();
        assert_eq!(told, expected);
    }

    #[test]
    fn what_would_fail_again_says_so() {
        for error in [ApiError::impossible(), ApiError::timeout()] {
            let response = error.into_response();
            assert!(response.status().is_server_error());
            assert_eq!(response.headers()[SHOULD_RETRY], "false");
        }
    }
}
