//! The cluster's HTTP edge: one address for all decode workers.
//!
//! A request's way: `router` reads its body, `peek` the little of it that placing needs, `placement` chooses among the
//! live workers (`workers`, kept up to date from discovery), `dispatch` asks one after the other until one answers, and
//! `relay` passes the answer on. A streamed answer carries comments for the frontend alone (`api::progress`), which `events`
//! takes out; when its worker dies, they are what another needs to go on, and the client sees a pause. A whole answer is
//! asked for again.
//!
//! A frontend holds no state that matters: any number of them may stand side by side, and come and go.

mod dispatch;
mod events;
mod metrics;
mod peek;
mod placement;
mod relay;
mod role;
mod router;
mod upstream;
mod workers;

pub use metrics::FrontendMetrics;
pub use role::run;
pub use router::serve;

use std::{sync::Arc, time::Duration};

use hyper::header::HeaderValue;
use tokio::sync::watch;

use crate::{
    api::{BodyMemory, HttpToken},
    cluster::{Cluster, Role, WorkerFilter},
};

/// A frontend's limits and secrets.
#[derive(Debug, Clone)]
pub struct FrontendConfig {
    /// Clients have to know one of these; none: anyone may ask. They go on to the workers, which may have keys too.
    pub api_keys: Vec<String>,
    /// Bytes of a request's body at most.
    pub body_bytes_max: usize,
    /// Bytes of all large bodies together at most. They are kept until their answers end.
    pub body_memory_max: usize,
    /// How long an answer may take from its request, moves to other workers included.
    pub request_timeout: Duration,
    /// How long an answer whose worker was lost waits for one to continue it, where there is none, and how long after
    /// the last worker of a model went requests wait for one to come back.
    pub patience: Duration,
    /// What workers want to hear before they let answers be continued.
    pub cluster_token: Option<HttpToken>,
    /// Browsers' pages from these origins may ask; `*` allows all.
    pub allowed_origins: Vec<String>,
}

/// What handlers share.
pub(crate) struct Frontend {
    config: FrontendConfig,
    metrics: FrontendMetrics,
    table: watch::Receiver<Arc<workers::Table>>,
    token: Option<HeaderValue>,
    bodies: BodyMemory,
    /// Start, seconds since 1970: the models' `created`.
    started: u64,
    draining: std::sync::atomic::AtomicBool,
    in_flight: watch::Sender<()>,
}

/// Held while a request is answered; a drain waits for all of them.
struct InFlight {
    _receiver: watch::Receiver<()>,
    gauge: prometheus::IntGauge,
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

impl Frontend {
    fn new(cluster: &Cluster, config: FrontendConfig, metrics: FrontendMetrics) -> Arc<Self> {
        let live = cluster.discovery.workers(WorkerFilter::role(Role::Decode));
        let token = config.cluster_token.as_ref().map(HttpToken::header);
        Arc::new(Self {
            table: workers::follow(live, cluster.loads.reports(), config.patience, metrics.clone()),
            token,
            bodies: BodyMemory::of(config.body_memory_max),
            config,
            metrics,
            started: crate::api::unix_seconds(),
            draining: false.into(),
            in_flight: watch::Sender::new(()),
        })
    }

    /// Counts a request in, unless the frontend is going away.
    fn enter(&self) -> Result<InFlight, crate::api::ApiError> {
        // Counted before the flag is looked at: whoever sets the flag and then waits for the count misses nobody.
        self.metrics.in_flight.inc();
        let guard = InFlight { _receiver: self.in_flight.subscribe(), gauge: self.metrics.in_flight.clone() };
        if self.is_draining() { Err(crate::api::ApiError::draining()) } else { Ok(guard) }
    }

    fn is_draining(&self) -> bool {
        self.draining.load(std::sync::atomic::Ordering::SeqCst)
    }

    /// Refuses new requests from now on and returns when the last answer has been handed to its connection.
    async fn drain(&self) {
        self.draining.store(true, std::sync::atomic::Ordering::SeqCst);
        self.in_flight.closed().await;
    }
}
