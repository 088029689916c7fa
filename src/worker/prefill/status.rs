//! What a prefill worker serves over HTTP: its health and metrics, and measuring.

use std::{future::Future, sync::Arc};

use axum::{
    Router,
    extract::{Path, State},
    http::{HeaderMap, StatusCode},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use futures::future::BoxFuture;
use tokio::{
    net::TcpListener,
    sync::{Mutex, watch},
};

use super::measure::Measured;
use crate::{
    cluster::WorkerId,
    engine::{EngineHandle, EngineStatus},
    http::{HttpToken, Json, ServerConfig, exposition, fallbacks, probes, serve_router},
    telemetry::Metrics,
};

/// What there is to ask, for those who ask for something else: clients that took it for a worker with an API above all.
const SERVED: &str = "GET /health, GET /health/live, GET /health/ready, GET /version, GET /metrics; it is a prefill \
                      worker, and requests go to decode workers or a frontend";

/// Measures how fast pages reach the decode worker of this lease; an error is for people.
pub(super) type Measure = Box<dyn Fn(WorkerId) -> BoxFuture<'static, Result<Measured, String>> + Send + Sync>;

/// What a worker without clients shows of itself, and does for its cluster.
pub(super) struct Shown {
    /// Is it well?
    pub(super) engine: EngineHandle,
    /// What it counts.
    pub(super) metrics: Metrics,
    /// It is unhealthy once this is true.
    pub(super) leaving: watch::Receiver<bool>,
    /// Who does not know it has nothing measured.
    pub(super) cluster_token: Option<HttpToken>,
    /// How it measures.
    pub(super) measure: Measure,
}

struct Status {
    shown: Shown,
    /// One at a time.
    measuring: Mutex<()>,
}

/// Serves `/health`, `/version` and `/metrics` of a worker that takes no requests, under the same names as one that
/// does, until `shutdown` and then `drain` have resolved. `POST /measure/{lease}` has it measure its way to the decode
/// worker of that lease.
pub(super) async fn serve(
    listener: TcpListener,
    shown: Shown,
    config: ServerConfig,
    shutdown: impl Future<Output = ()>,
    drain: impl Future<Output = ()>,
) {
    let status = Arc::new(Status { shown, measuring: Mutex::default() });
    let router = Router::new().route("/metrics", get(metrics)).route("/measure/{lease}", post(measure_one));
    let router = fallbacks(probes(router, health, health), SERVED).with_state(status);
    serve_router(listener, router, config, shutdown, drain).await;
}

async fn health(State(status): State<Arc<Status>>) -> Response {
    match status.shown.engine.status() {
        EngineStatus::Running if !*status.shown.leaving.borrow() => "ok\n".into_response(),
        EngineStatus::Failed { reason } => (StatusCode::INTERNAL_SERVER_ERROR, reason + "\n").into_response(),
        _ => (StatusCode::SERVICE_UNAVAILABLE, "leaving\n").into_response(),
    }
}

async fn metrics(State(status): State<Arc<Status>>) -> Response {
    exposition(status.shown.metrics.render())
}

async fn measure_one(State(status): State<Arc<Status>>, Path(lease): Path<String>, headers: HeaderMap) -> Response {
    if !status.shown.cluster_token.as_ref().is_none_or(|token| token.is_in(&headers)) {
        return (StatusCode::FORBIDDEN, "the cluster tokens differ\n").into_response();
    }
    let Ok(lease) = lease.parse() else {
        return (StatusCode::BAD_REQUEST, "a lease is sixteen hexadecimal digits\n").into_response();
    };
    let Ok(_alone) = status.measuring.try_lock() else {
        return (StatusCode::CONFLICT, "somebody measures already\n").into_response();
    };
    match (status.shown.measure)(lease).await {
        Ok(measured) => Json(measured).into_response(),
        Err(error) => (StatusCode::BAD_GATEWAY, error + "\n").into_response(),
    }
}
