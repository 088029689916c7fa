//! What the processes of a cluster know of each other, and the queue between them.
//!
//! Three traits: [`Discovery`] (who is alive, and live configuration), [`Queue`] (prefill jobs) and [`Loads`] (how busy
//! workers are). Each has an implementation over real services (`etcd`, NATS) and one in the process ([`Local`]), and
//! nothing above can tell them apart. Losing a service never stops anything: what was known last stays until it is
//! known to be wrong, publishing fails at once instead of hanging, and connections are made again in the background for
//! ever.
//!
//! Jobs and session addresses are opaque here: bytes, and a JSON value. Workers go by what a handoff calls them.

mod address;
mod card;
mod discovery;
mod etcd;
mod find_model;
mod join;
mod load;
mod local;
mod model_key;
mod nats;
mod queue;

pub use address::{advertised_host, host_id};
pub use card::{CARD_SCHEMA, LocalView, ModelCard, Role, WorkerCard};
pub use discovery::{Discovery, Lease, WorkerFilter, WorkerSet};
pub use etcd::{Etcd, EtcdOptions};
pub use find_model::{SeveralModels, find_model};
pub use join::{ClusterError, ClusterOptions, Joined, LocalServices, Needs, join};
pub use load::{LoadReport, LoadStream, Loads, report_load};
pub use local::Local;
pub use model_key::{ModelKey, ParseModelKeyError, Versions};
pub use nats::{Nats, NatsAuth, NatsOptions, NatsServer};
pub use queue::{Consumer, Delivery, Queue, QueueDepth, QueueError, Settle};

pub use crate::handoff::WorkerId;

#[cfg(test)]
pub(crate) use card::tests;

use std::{sync::Arc, time::Duration};

/// A worker's or frontend's way to the others. Cheap to clone.
#[derive(Clone)]
pub struct Cluster {
    /// Who is alive.
    pub discovery: Arc<dyn Discovery>,
    /// Prefill jobs.
    pub queue: Arc<dyn Queue>,
    /// How busy workers are.
    pub loads: Arc<dyn Loads>,
}

impl Cluster {
    /// A cluster inside this process, for tests.
    pub fn local() -> Self {
        let local = Arc::new(Local::new());
        Self { discovery: local.clone(), queue: local.clone(), loads: local }
    }
}

/// Something between half of `duration` and all of it: processes that lost the same server do not come back in step.
fn jitter(duration: Duration) -> Duration {
    duration.mul_f64(rand::random_range(0.5..1.0))
}

impl std::fmt::Debug for Cluster {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cluster").finish_non_exhaustive()
    }
}
