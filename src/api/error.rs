//! What the engine refuses, as clients are told.

use axum::http::StatusCode;

use crate::{engine::SubmitError, http::ApiError};

impl ApiError {
    /// The engine would not take it. `prompt_field` is how the client calls the prompt.
    pub(crate) fn not_taken(error: SubmitError, prompt_field: &'static str) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::EmptyPrompt | SubmitError::UnknownToken { .. } => Self::invalid(prompt_field, message),
            SubmitError::NothingLeft { .. } => Self::new(StatusCode::BAD_REQUEST, "invalid_journal", message),
            SubmitError::PromptTooLong { .. } => Self::context_length(prompt_field, message),
            SubmitError::QueueFull { .. } => Self::new(StatusCode::TOO_MANY_REQUESTS, "queue_full", message),
            SubmitError::ShuttingDown => Self::draining(),
        }
    }
}

#[cfg(test)]
mod tests {
    use axum::{http::header, response::IntoResponse};

    use super::*;

    #[test]
    fn a_full_queue_says_when_to_come_back() {
        let response = ApiError::not_taken(SubmitError::QueueFull { waiting: 3 }, "prompt").into_response();
        assert_eq!(response.status(), StatusCode::TOO_MANY_REQUESTS);
        assert!(response.headers().contains_key(header::RETRY_AFTER));
        assert!(!response.headers().contains_key("x-should-retry"), "it should");
    }

    #[test]
    fn what_the_engine_refuses_is_named_as_the_client_calls_it() {
        for field in ["messages", "prompt"] {
            let refused = ApiError::not_taken(SubmitError::PromptTooLong { prompt: 9, limit: 8 }, field);
            assert_eq!(refused.param(), Some(field));
            assert!(refused.to_json().contains(r#""code":"context_length_exceeded""#));
            assert_eq!(ApiError::not_taken(SubmitError::EmptyPrompt, field).param(), Some(field));
        }
    }
}
