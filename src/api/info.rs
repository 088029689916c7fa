use std::sync::Arc;

use axum::{
    extract::{Path, State},
    http::{HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde::Serialize;

use super::{ApiError, Json, Serving};
use crate::worker::EngineStatus;

/// A model in `/v1/models`.
#[derive(Serialize)]
pub(crate) struct ModelCard {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
}

/// `/v1/models`.
#[derive(Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<ModelCard>,
}

fn card(serving: &Serving, name: &str) -> ModelCard {
    ModelCard {
        id: name.to_owned(),
        object: "model",
        created: serving.started,
        owned_by: "engine",
        root: serving.config.model_root.clone(),
        parent: None,
        max_model_len: serving.max_model_len(),
    }
}

/// `GET /v1/models`.
pub(crate) async fn models(State(serving): State<Arc<Serving>>) -> Json<ModelList> {
    let data = serving.config.model_names.iter().map(|name| card(&serving, name)).collect();
    Json(ModelList { object: "list", data })
}

/// `GET /v1/models/{id}`; ids may have slashes.
pub(crate) async fn model(
    State(serving): State<Arc<Serving>>,
    Path(name): Path<String>,
) -> Result<Json<ModelCard>, ApiError> {
    serving.check_model(Some(&name))?;
    Ok(Json(card(&serving, &name)))
}

/// `GET /health/live`, and a frontend's `/health`: 200 for as long as the process runs. Restarting it helps nobody.
pub(crate) async fn live() -> &'static str {
    "ok\n"
}

/// `GET /health`, or `/health/ready`: 200 while requests are taken.
pub(crate) async fn health(State(serving): State<Arc<Serving>>) -> Result<&'static str, ApiError> {
    match serving.engine.status() {
        EngineStatus::Failed { .. } => Err(ApiError::engine_failed()),
        EngineStatus::Running if !serving.is_draining() => Ok("ok\n"),
        _ => Err(ApiError::draining()),
    }
}

/// `/version`.
#[derive(Serialize)]
pub(crate) struct Version {
    version: &'static str,
}

/// `GET /version`.
pub(crate) async fn version() -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION") })
}

/// `GET /metrics`, in Prometheus' text format.
pub(crate) async fn metrics(State(serving): State<Arc<Serving>>) -> Response {
    exposition(serving.metrics.render())
}

/// The answer with a process's metrics.
pub(crate) fn exposition(text: String) -> Response {
    let kind = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}
