//! The cluster's HTTP edge: one address for all decode workers.
//!
//! A request's way: `router` reads its body, `peek` the little of it that placing needs, `placement` chooses among the
//! live workers (`workers`, kept up to date from discovery), `dispatch` asks one after the other (`worker`) until one
//! answers, and `relay` passes the answer on. A streamed answer carries comments for the frontend alone
//! (`api::progress`), which `events` takes out; when its worker dies, they are what another needs to go on, and the
//! client sees a pause. A whole answer is asked for again.
//!
//! A frontend holds no state that matters: any number of them may stand side by side, and come and go.

mod dispatch;
mod events;
#[cfg(test)]
mod fake;
mod metrics;
mod peek;
mod placement;
mod relay;
mod role;
mod router;
mod upstream;
mod worker;
mod workers;

pub use metrics::FrontendMetrics;
pub use role::run;
pub use router::serve;

use std::{sync::Arc, time::Duration};

use hyper::{StatusCode, header::HeaderValue};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use crate::{
    api::unix_seconds,
    cluster::{Cluster, Role, WorkerFilter},
    http::{self, ApiError, Drain, HttpToken, MemoryBudget},
};

/// A frontend's limits and secrets.
#[derive(Debug, Clone)]
pub struct FrontendConfig {
    /// Clients have to know one of these; none: anyone may ask. They go on to the workers, which may have keys too.
    pub api_keys: Vec<String>,
    /// Requests at a time; a further one is refused.
    pub requests_max: usize,
    /// Bytes of a request's body at most.
    pub body_bytes_max: usize,
    /// Bytes of all large bodies together at most, and as many of what is needed to continue answers elsewhere. Both
    /// are kept until the answers end.
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
    /// As many requests as may still be taken.
    admitted: Arc<Semaphore>,
    bodies: MemoryBudget,
    /// What answers need to go on elsewhere.
    journals: MemoryBudget,
    /// Start, seconds since 1970: the models' `created`.
    started: u64,
    drain: Drain,
}

/// Permission to be answered, which a request needs from before its body is read until its answer has ended.
struct Admission {
    _permit: OwnedSemaphorePermit,
}

/// Held while a request is answered.
struct InFlight {
    _drain_waits: http::InFlight,
    _admission: Admission,
    /// Declared last, because fields drop in order: whoever reads 0 in the gauge finds a free permit.
    _counted: Counted,
}

/// One in a gauge.
struct Counted(prometheus::IntGauge);

impl Counted {
    fn new(gauge: prometheus::IntGauge) -> Self {
        gauge.inc();
        Self(gauge)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Frontend {
    fn new(cluster: &Cluster, config: FrontendConfig, metrics: FrontendMetrics) -> Arc<Self> {
        let live = cluster.discovery.workers(WorkerFilter::role(Role::Decode));
        let token = config.cluster_token.as_ref().map(HttpToken::header);
        Arc::new(Self {
            table: workers::follow(live, cluster.loads.reports(), config.patience, metrics.clone()),
            token,
            admitted: Arc::new(Semaphore::new(config.requests_max.min(Semaphore::MAX_PERMITS))),
            bodies: MemoryBudget::of(config.body_memory_max),
            journals: MemoryBudget::of(config.body_memory_max),
            config,
            metrics,
            started: unix_seconds(),
            drain: Drain::new(),
        })
    }

    /// Takes a request, unless there are as many as may be. The connections beyond these stay free for those who are
    /// refused, and for whoever asks whether the frontend is there.
    fn admit(&self) -> Result<Admission, ApiError> {
        let Ok(permit) = self.admitted.clone().try_acquire_owned() else {
            let message = "The server has as many requests as it takes at a time (--max-requests); try again later";
            return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_requests", message));
        };
        Ok(Admission { _permit: permit })
    }

    /// Counts a request in, unless the frontend is going away.
    fn enter(&self, admission: Admission) -> Result<InFlight, ApiError> {
        let _drain_waits = self.drain.enter()?;
        let _counted = Counted::new(self.metrics.in_flight.clone());
        Ok(InFlight { _drain_waits, _admission: admission, _counted })
    }
}
