use std::{sync::Arc, time::Instant};

use axum::{
    extract::{MatchedPath, Request, State},
    http::{HeaderName, HeaderValue, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::Serving;
use crate::{
    cluster::ModelKey,
    http::{ApiError, REQUEST_ID, discard_body, request_id},
    telemetry::TraceContext,
};

/// Header in which a frontend says for which model's worker a request is: its [`ModelKey`].
pub(crate) const MODEL_KEY_HEADER: HeaderName = HeaderName::from_static("x-engine-model-key");

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
