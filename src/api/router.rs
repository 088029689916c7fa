use std::{future::Future, sync::Arc};

use axum::{
    Router,
    middleware::from_fn_with_state,
    routing::{get, post},
};
use tokio::net::TcpListener;

use super::{
    ApiConfig, Serving,
    chat::chat_completions,
    completions::completions,
    info::{health, metrics, model, models},
    middleware::{observe, require_model},
    tokenize::{detokenize, tokenize},
};
use crate::{
    engine::EngineHandle,
    http::{ServerConfig, cors, fallbacks, probes, require_key, serve_router},
    telemetry::Metrics,
};

/// What there is to ask of a worker or a frontend, for those who ask for something else. Other servers' names of the
/// same are left out.
pub(crate) const SERVED: &str = "POST /v1/chat/completions, POST /v1/completions, POST /tokenize, POST /detokenize, \
                                 GET /v1/models, GET /v1/models/{id}, GET /health, GET /health/live, \
                                 GET /health/ready, GET /version, GET /metrics";

/// Serves until `shutdown` resolves, then drains: new requests get 503, running ones end, the connections close.
pub async fn serve(
    listener: TcpListener,
    api: ApiConfig,
    engine: EngineHandle,
    metrics: Metrics,
    config: ServerConfig,
    shutdown: impl Future<Output = ()>,
) {
    let serving = Serving::new(api, engine, metrics);
    let drained = serving.clone();
    serve_router(listener, router(serving), config, shutdown, async move { drained.drain.run().await }).await;
}

/// All endpoints. Those that show nothing of the model's work are open; the others want a key if there is one.
pub(crate) fn router(serving: Arc<Serving>) -> Router {
    let keys: Arc<[String]> = serving.config.api_keys.clone().into();
    let guarded = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(completions))
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
        .route_layer(from_fn_with_state(serving.clone(), require_model))
        .route_layer(from_fn_with_state(keys, require_key));
    let router = probes(guarded, health, health).route("/metrics", get(metrics));
    let router = fallbacks(router, SERVED).layer(from_fn_with_state(serving.clone(), observe));
    let origins = &serving.config.allowed_origins;
    let router = if origins.is_empty() { router } else { router.layer(cors(origins)) };
    router.with_state(serving)
}
