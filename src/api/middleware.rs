use std::{sync::Arc, time::Instant};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::{ApiError, Serving, extract::discard_body};
use crate::{cluster::ModelKey, telemetry::TraceContext};

/// Header in which a frontend says for which model's worker a request is: its [`ModelKey`].
pub(crate) const MODEL_KEY_HEADER: HeaderName = HeaderName::from_static("x-engine-model-key");
pub(super) static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id that is taken over from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// Gives every answer its request's id, counts it and logs it.
pub(crate) async fn observe(State(serving): State<Arc<Serving>>, request: Request, next: Next) -> Response {
    let started = Instant::now();
    let id = request_id(&request);
    let method = request.method().clone();
    let trace = request.headers().get(TraceContext::HEADER).cloned();
    let endpoint = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    // Paths nobody serves share a label: clients must not be able to make new ones.
    let endpoint = endpoint.as_ref().map_or("other", MatchedPath::as_str);
    let status = response.status();
    serving.metrics.requests.with_label_values(&[endpoint, status.as_str()]).inc();
    let headers_ms = started.elapsed().as_millis() as u64;
    let trace = trace.as_ref().and_then(|value| value.to_str().ok()).unwrap_or_default();
    tracing::debug!(
        %method, trace, endpoint, status = status.as_u16(), id = id.to_str().unwrap_or_default(), headers_ms,
        "answered"
    );
    let headers = response.headers_mut();
    headers.insert(&REQUEST_ID, id);
    if serving.drain.has_begun() || status == StatusCode::PAYLOAD_TOO_LARGE {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

/// The client's own id, if it is sensible, or a new one.
pub(crate) fn request_id(request: &Request) -> HeaderValue {
    let sensible = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        !bytes.is_empty() && bytes.len() <= REQUEST_ID_BYTES_MAX && bytes.iter().all(u8::is_ascii_graphic)
    };
    let fresh = || HeaderValue::from_str(&format!("req-{}", Uuid::new_v4().simple())).ok();
    let given = request.headers().get(&REQUEST_ID).filter(sensible).cloned();
    given.or_else(fresh).unwrap_or(HeaderValue::from_static("req"))
}

/// Lets requests pass that are for this model, as far as they say. A frontend that has not heard yet of a worker's end
/// may find another in its place, whose name for its model is the same and whose weights are others.
pub(crate) async fn require_model(State(serving): State<Arc<Serving>>, request: Request, next: Next) -> Response {
    let is_ours = |key: &HeaderValue| {
        let key: Option<ModelKey> = key.to_str().ok().and_then(|key| key.parse().ok());
        key.is_some_and(|key| key.as_bytes()[..] == serving.engine.config().model_key[..])
    };
    if request.headers().get(MODEL_KEY_HEADER).is_none_or(is_ours) {
        return next.run(request).await;
    }
    discard_body(request).await;
    let message = "The request is for the worker that had this address before, whose model is another";
    ApiError::new(StatusCode::MISDIRECTED_REQUEST, "other_model", message).into_response()
}

/// Lets requests with one of the keys pass; all, if there are none.
pub(crate) async fn require_key(State(keys): State<Arc<[String]>>, request: Request, next: Next) -> Response {
    // A browser asks for permission without the key.
    if keys.is_empty() || request.method() == Method::OPTIONS {
        return next.run(request).await;
    }
    let bearer = request.headers().get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    let message = match bearer {
        Some(key) if is_one_of(key, &keys) => return next.run(request).await,
        Some(_) => "Incorrect API key provided",
        None => "You didn't provide an API key; send it as 'Authorization: Bearer KEY'",
    };
    discard_body(request).await;
    ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).into_response()
}

/// Compares in a time that depends neither on where the key differs nor on how long it is: digests of all are compared.
fn is_one_of(key: &[u8], keys: &[String]) -> bool {
    let digest = blake3::hash(key);
    let equal = keys.iter().map(|known| blake3::hash(known.as_bytes()).as_bytes().ct_eq(digest.as_bytes()));
    equal.fold(subtle::Choice::from(0), |any, one| any | one).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_of_the_keys_opens_and_nothing_else_does() {
        let keys = ["one".to_owned(), "two".to_owned()];
        assert!(is_one_of(b"one", &keys));
        assert!(is_one_of(b"two", &keys));
        assert!(!is_one_of(b"", &keys));
        assert!(!is_one_of(b"on", &keys));
    }
}
