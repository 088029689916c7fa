//! What the routers of all servers have: probes, answers to what is not served, and leave for browsers' pages.

use axum::{
    Router,
    extract::Request,
    handler::Handler,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use serde::Serialize;
use tower_http::cors::{AllowHeaders, AllowOrigin, Any, CorsLayer};

use super::{ApiError, Json, body::discard_body, error::SHOULD_RETRY, middleware::REQUEST_ID};

/// Adds what every process answers to those that look after it; `health` under each name that they may know for it.
pub(crate) fn probes<S, T, U>(router: Router<S>, health: impl Handler<T, S>, ready: impl Handler<U, S>) -> Router<S>
where
    S: Clone + Send + Sync + 'static,
    T: 'static,
    U: 'static,
{
    router
        .route("/health", get(health.clone()))
        .route("/v1/health", get(health.clone()))
        .route("/ping", get(health.clone()).post(health))
        .route("/health/live", get(live))
        .route("/health/ready", get(ready))
        .route("/version", get(version))
}

/// `GET /health/live`, and a frontend's `/health`: 200 for as long as the process runs. Restarting it helps nobody.
pub(crate) async fn live() -> &'static str {
    "ok\n"
}

/// `/version`.
#[derive(Serialize)]
struct Version {
    version: &'static str,
}

/// `GET /version`.
async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// The answer with a process's metrics.
pub(crate) fn exposition(text: String) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// Errors of OpenAI's shape for what is not served; `served` is what is.
pub(crate) fn fallbacks<S: Clone + Send + Sync + 'static>(router: Router<S>, served: &'static str) -> Router<S> {
    let not_found = move |request: Request| not_found(request, served);
    router.method_not_allowed_fallback(method_not_allowed).fallback(not_found)
}

async fn not_found(request: Request, served: &str) -> ApiError {
    let path: String = request.uri().path().chars().take(200).collect();
    let message = format!("Unknown request URL: {} {path}; this server has: {served}", request.method());
    discard_body(request).await;
    ApiError::new(StatusCode::NOT_FOUND, "unknown_url", message)
}

async fn method_not_allowed(request: Request) -> ApiError {
    let message = format!("Method {} is not allowed for {}", request.method(), request.uri().path());
    discard_body(request).await;
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", message)
}

/// Lets browsers' pages from `origins` ask; `*` stands for all.
pub(crate) fn cors(origins: &[String]) -> CorsLayer {
    let origin = if origins.iter().any(|origin| origin == "*") {
        AllowOrigin::any()
    } else {
        AllowOrigin::list(origins.iter().filter_map(|origin| origin.parse::<HeaderValue>().ok()))
    };
    // Whatever it asks for: OpenAI's own client sends a dozen headers (`x-stainless-…`), and none of them opens
    // anything.
    let cors = CorsLayer::new().allow_origin(origin).allow_methods(Any).allow_headers(AllowHeaders::mirror_request());
    // Pages see no others but the most usual; by the first two that client decides whether to ask again.
    cors.expose_headers([SHOULD_RETRY, header::RETRY_AFTER, REQUEST_ID.clone()])
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn pages_of_an_origin_that_may_ask_see_what_clients_go_by() {
        let router = Router::new().route("/", get(|| async { "hello" })).layer(cors(&["https://a.example".to_owned()]));
        let ask = |origin: &str| Request::get("/").header(header::ORIGIN, origin).body(Body::empty()).unwrap();
        let answer = router.clone().oneshot(ask("https://a.example")).await.unwrap();
        assert_eq!(answer.headers()[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://a.example");
        let shown = answer.headers()[header::ACCESS_CONTROL_EXPOSE_HEADERS].to_str().unwrap();
        assert_eq!(shown, "x-should-retry,retry-after,x-request-id");
        let other = router.oneshot(ask("https://b.example")).await.unwrap();
        assert!(!other.headers().contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));
    }
}
