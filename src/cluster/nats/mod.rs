//! The queue over NATS JetStream, and load reports over core NATS.
//!
//! ```text
//! {namespace}.prefill.{model_key}   jobs: a work-queue stream, one durable pull consumer a model
//! {namespace}.load.{lease_id}       load reports, neither stored nor acknowledged
//! ```

mod connection;
mod consumer;
mod jobs;
mod loads;

pub use connection::{NatsAuth, NatsOptions};

use std::sync::{Arc, atomic::Ordering};

use bytes::Bytes;
use futures::{FutureExt, future::BoxFuture};

use super::{ClusterError, Consumer, LeaseId, LoadReport, LoadStream, Loads, ModelKey, Queue, QueueDepth, QueueError};
use jobs::Jobs;

/// [`Queue`] and [`Loads`] over NATS.
pub struct Nats {
    connection: connection::Connection,
    jobs: Arc<Jobs>,
    namespace: String,
}

impl Nats {
    /// Reads credentials, checks the servers' form, and begins to connect. A server that is away now is as good as one that
    /// goes away later.
    pub async fn new(options: NatsOptions, namespace: &str) -> Result<Self, ClusterError> {
        let connection = connection::Connection::new(&options).await?;
        let jobs = Jobs::new(connection.clone(), namespace, options.ack_wait);
        Ok(Self { connection, jobs: Arc::new(jobs), namespace: namespace.to_owned() })
    }

    /// Waits until the server answers and keeps streams.
    pub async fn reachable(&self) -> Result<(), String> {
        self.connection.connected().await;
        self.jobs.stream_ready().await.map_err(|error| error.to_string())
    }
}

impl Queue for Nats {
    fn publish(&self, key: ModelKey, id: String, payload: Bytes) -> BoxFuture<'_, Result<(), QueueError>> {
        self.jobs.publish(key, id, payload).boxed()
    }

    fn consume(&self, key: ModelKey) -> Consumer {
        let (consumer, supplier) = Consumer::new();
        tokio::spawn(consumer::supply(self.jobs.clone(), key, supplier));
        consumer
    }

    fn depth(&self, key: ModelKey) -> BoxFuture<'_, Result<QueueDepth, QueueError>> {
        self.jobs.depth(key).boxed()
    }

    fn dead_jobs(&self) -> u64 {
        self.jobs.dead.load(Ordering::Relaxed)
    }
}

impl Loads for Nats {
    fn report(&self, lease: LeaseId, report: &LoadReport) {
        loads::report(&self.connection, &self.namespace, lease, report);
    }

    fn reports(&self) -> LoadStream {
        loads::reports(&self.connection, &self.namespace)
    }
}
