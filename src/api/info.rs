use std::sync::Arc;

use axum::{
    extract::{Path, State},
    response::Response,
};
use serde::Serialize;

use super::Serving;
use crate::{
    engine::EngineStatus,
    http::{ApiError, Json, exposition},
};

/// A model in `/v1/models`.
#[derive(Serialize)]
pub(crate) struct ListedModel {
    id: String,
    object: &'static str,
    created: u64,
    owned_by: &'static str,
    root: String,
    parent: Option<String>,
    max_model_len: usize,
}

impl ListedModel {
    pub(crate) fn new(name: &str, created: u64, root: &str, max_model_len: usize) -> Self {
        let (id, root) = (name.to_owned(), root.to_owned());
        Self { id, object: "model", created, owned_by: "engine", root, parent: None, max_model_len }
    }
}

/// `/v1/models`.
#[derive(Serialize)]
pub(crate) struct ModelList {
    object: &'static str,
    data: Vec<ListedModel>,
}

impl ModelList {
    pub(crate) fn of(models: impl Iterator<Item = ListedModel>) -> Self {
        Self { object: "list", data: models.collect() }
    }
}

fn listed(serving: &Serving, name: &str) -> ListedModel {
    ListedModel::new(name, serving.started, &serving.config.model_root, serving.max_model_len())
}

/// `GET /v1/models`.
pub(crate) async fn models(State(serving): State<Arc<Serving>>) -> Json<ModelList> {
    Json(ModelList::of(serving.config.model_names.iter().map(|name| listed(&serving, name))))
}

/// `GET /v1/models/{id}`; ids may have slashes.
pub(crate) async fn model(
    State(serving): State<Arc<Serving>>,
    Path(name): Path<String>,
) -> Result<Json<ListedModel>, ApiError> {
    serving.check_model(Some(&name))?;
    Ok(Json(listed(&serving, &name)))
}

/// `GET /health`, or `/health/ready`: 200 while requests are taken.
pub(crate) async fn health(State(serving): State<Arc<Serving>>) -> Result<&'static str, ApiError> {
    match serving.engine.status() {
        EngineStatus::Failed { .. } => Err(ApiError::engine_failed()),
        EngineStatus::Running if !serving.drain.has_begun() => Ok("ok\n"),
        _ => Err(ApiError::draining()),
    }
}

/// `GET /metrics`, in Prometheus' text format.
pub(crate) async fn metrics(State(serving): State<Arc<Serving>>) -> Response {
    exposition(serving.metrics.render())
}
