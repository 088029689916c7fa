//! The frontend's endpoints.

use std::{collections::BTreeMap, future::Future, sync::Arc};

use axum::{
    Router,
    body::Body,
    extract::{MatchedPath, Path, Request, State},
    http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header, uri::PathAndQuery},
    middleware::{Next, from_fn_with_state},
    response::Response,
    routing::{get, post},
};
use bytes::Bytes;
use tokio::net::TcpListener;

use super::{
    Frontend, FrontendConfig, FrontendMetrics,
    dispatch::{Asked, Attempts, Failure, Placed, no_workers},
    relay::Relay,
};
use crate::{
    api::{ListedModel, ModelList, SERVED},
    cluster::{Cluster, WorkerCard},
    http::{
        ApiError, Json, ServerConfig, cors, discard, exposition, fallbacks, live, probes, read_body, request_id,
        require_key, serve_router,
    },
};

/// Headers of an answer that are about its connection (RFC 9110, 7.6.1), or that are set again.
const NOT_PASSED_BACK: [HeaderName; 8] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::DATE,
];

/// Serves until `shutdown` resolves, then drains: new requests get 503, running ones end, the connections close.
pub async fn serve(
    listener: TcpListener,
    cluster: &Cluster,
    config: FrontendConfig,
    metrics: FrontendMetrics,
    server: ServerConfig,
    shutdown: impl Future<Output = ()>,
) {
    let frontend = Frontend::new(cluster, config, metrics);
    let drained = frontend.clone();
    let drain = async move { drained.drain.run().await };
    serve_router(listener, router(frontend), server, shutdown, drain).await;
}

fn router(frontend: Arc<Frontend>) -> Router {
    let keys: Arc<[String]> = frontend.config.api_keys.clone().into();
    let guarded = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*id}", get(model))
        .route("/v1/chat/completions", post(ask))
        .route("/v1/completions", post(ask))
        .route("/tokenize", post(ask))
        .route("/detokenize", post(ask))
        .route_layer(from_fn_with_state(keys, require_key));
    let router = probes(guarded, live, ready).route("/metrics", get(metrics));
    let router = fallbacks(router, SERVED).layer(from_fn_with_state(frontend.clone(), observe));
    let origins = &frontend.config.allowed_origins;
    let router = if origins.is_empty() { router } else { router.layer(cors(origins)) };
    router.with_state(frontend)
}

/// A request for a worker.
async fn ask(
    State(frontend): State<Arc<Frontend>>,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    // Admitted before the body is read, which takes memory; counted in after it, so that a drain waits for no slow
    // body.
    let admission = match frontend.admit() {
        Ok(admission) => admission,
        Err(error) => {
            discard(&headers, body).await;
            return Err(error);
        }
    };
    let body = read_body(&headers, body, frontend.config.body_bytes_max, &frontend.bodies).await?;
    let in_flight = frontend.enter(admission)?;
    let path = uri.path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    let asked = Asked::new(path, &headers, body, frontend.config.request_timeout).await;
    let mut attempts = Attempts::default();
    loop {
        let placed = frontend.place(&asked, &Bytes::new(), None, &mut attempts).await;
        let Placed { mut exchange, booking } = match placed {
            Ok(placed) => placed,
            Err(Failure::Error(error)) => return Err(error),
            Err(Failure::Refused(status, headers, body)) => return Ok(passed_back(status, &headers, body.into())),
        };
        let (status, headers) = (exchange.response.status(), exchange.response.headers().clone());
        if asked.streams() && status == StatusCode::OK {
            let placed = Placed { exchange, booking };
            let relay = Relay::new(frontend, Arc::new(asked), placed, attempts, in_flight);
            return Ok(passed_back(status, &headers, Body::new(relay)));
        }
        // Whole before any of it goes on: if the worker dies over it, another can be asked.
        let worker = &booking.worker;
        match frontend.guard(worker, asked.deadline, async { Ok(exchange.collect().await?) }).await? {
            Ok(body) => {
                worker.keep(exchange);
                frontend.metrics.first_data.observe(asked.arrived.elapsed().as_secs_f64());
                return Ok(passed_back(status, &headers, body.into()));
            }
            Err(error) => attempts.lost(worker, &error)?,
        }
    }
}

/// A worker's answer as the client's.
fn passed_back(status: StatusCode, headers: &HeaderMap, body: Body) -> Response {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    // Those that it names are about the connection too.
    let named = headers.get_all(header::CONNECTION).iter().filter_map(|value| value.to_str().ok());
    let named: Vec<&str> = named.flat_map(|value| value.split(',')).map(str::trim).collect();
    let is_named = |name: &HeaderName| named.iter().any(|named| named.eq_ignore_ascii_case(name.as_str()));
    let passed = headers.iter().filter(|(name, _)| !NOT_PASSED_BACK.contains(name) && !is_named(name));
    response.headers_mut().extend(passed.map(|(name, value)| (name.clone(), value.clone())));
    response
}

fn listed(frontend: &Frontend, name: &str, card: &WorkerCard) -> ListedModel {
    ListedModel::new(name, frontend.started, &card.model.source, card.model.max_model_len)
}

/// `GET /v1/models`: those of all workers.
async fn models(State(frontend): State<Arc<Frontend>>) -> Json<ModelList> {
    let table = frontend.table.borrow().clone();
    Json(ModelList::of(table.models().into_iter().map(|(name, card)| listed(&frontend, name, card))))
}

/// `GET /v1/models/{id}`; ids may have slashes.
async fn model(State(frontend): State<Arc<Frontend>>, Path(name): Path<String>) -> Result<Json<ListedModel>, ApiError> {
    let table = frontend.table.borrow().clone();
    let models: BTreeMap<&str, &WorkerCard> = table.models();
    match models.get(name.as_str()) {
        Some(card) => Ok(Json(listed(&frontend, &name, card))),
        None => {
            let served: Vec<String> = models.into_keys().map(str::to_owned).collect();
            Err(ApiError::unknown_model(&name, &served))
        }
    }
}

/// `GET /health/ready`: 200 while requests can be answered.
async fn ready(State(frontend): State<Arc<Frontend>>) -> Result<&'static str, ApiError> {
    if frontend.drain.has_begun() {
        return Err(ApiError::draining());
    }
    if frontend.table.borrow().len() == 0 {
        return Err(no_workers());
    }
    Ok("ready\n")
}

/// `GET /metrics`, in Prometheus' text format.
async fn metrics(State(frontend): State<Arc<Frontend>>) -> Response {
    frontend.metrics.body_bytes.set(frontend.bodies.used() as i64);
    frontend.metrics.journal_bytes.set(frontend.journals.used() as i64);
    exposition(frontend.metrics.render())
}

/// Gives every request an id that its worker logs too, counts it and logs it.
async fn observe(State(frontend): State<Arc<Frontend>>, mut request: Request, next: Next) -> Response {
    let id = request_id(&request);
    request.headers_mut().insert("x-request-id", id.clone());
    let endpoint = request.extensions().get::<MatchedPath>().cloned();
    let mut response = next.run(request).await;
    let endpoint = endpoint.as_ref().map_or("other", MatchedPath::as_str);
    let status = response.status();
    frontend.metrics.requests.with_label_values(&[endpoint, status.as_str()]).inc();
    tracing::debug!(endpoint, status = status.as_u16(), id = id.to_str().unwrap_or_default(), "answered");
    let headers = response.headers_mut();
    headers.insert("x-request-id", id);
    if frontend.drain.has_begun() || status == StatusCode::PAYLOAD_TOO_LARGE {
        headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    response
}

#[cfg(test)]
mod tests {
    use axum::response::IntoResponse;

    use super::*;

    #[test]
    fn what_a_worker_says_of_trying_again_reaches_the_client() {
        let worker = ApiError::timeout().into_response();
        let passed = passed_back(worker.status(), worker.headers(), Body::empty());
        assert_eq!(passed.status(), worker.status());
        assert_eq!(passed.headers()["x-should-retry"], "false");
    }

    #[test]
    fn what_is_about_the_workers_connection_does_not_reach_the_client() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Hop"),
            ("connection", "x-other-hop"),
            ("x-hop", "1"),
            ("x-other-hop", "1"),
            ("keep-alive", "timeout=60"),
            ("trailer", "x-sum"),
            ("upgrade", "h2c"),
            ("content-type", "text/plain"),
        ] {
            headers.append(name, HeaderValue::from_static(value));
        }
        let passed = passed_back(StatusCode::OK, &headers, Body::empty());
        assert_eq!(passed.headers().keys().collect::<Vec<_>>(), ["content-type"]);
    }
}
