use std::{future::Future, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::{net::TcpListener, sync::watch};

use super::{ServerConfig, server::serve_router};
use crate::{
    telemetry::Metrics,
    worker::{EngineHandle, EngineStatus},
};

/// What a worker without clients shows of itself.
struct Status {
    engine: EngineHandle,
    metrics: Metrics,
    leaving: watch::Receiver<bool>,
}

/// Serves `/health` and `/metrics` of a worker that takes no requests, until `shutdown` and then `drain` have resolved.
/// It is unhealthy once `leaving` is true.
pub async fn serve_status(
    listener: TcpListener,
    engine: EngineHandle,
    metrics: Metrics,
    config: ServerConfig,
    leaving: watch::Receiver<bool>,
    shutdown: impl Future<Output = ()>,
    drain: impl Future<Output = ()>,
) {
    let status = Arc::new(Status { engine, metrics, leaving });
    let router = Router::new().route("/health", get(health)).route("/metrics", get(render)).with_state(status);
    serve_router(listener, router, config, shutdown, drain).await;
}

async fn health(State(status): State<Arc<Status>>) -> Response {
    match status.engine.status() {
        EngineStatus::Running if !*status.leaving.borrow() => "ok\n".into_response(),
        EngineStatus::Failed { reason } => (StatusCode::INTERNAL_SERVER_ERROR, reason + "\n").into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "leaving\n").into_response(),
    }
}

async fn render(State(status): State<Arc<Status>>) -> Response {
    let text = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, text)], status.metrics.render()).into_response()
}
