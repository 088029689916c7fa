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

use super::{ClusterError, Consumer, LoadReport, LoadStream, Loads, ModelKey, Queue, QueueDepth, QueueError, WorkerId};
use jobs::Jobs;

/// [`Queue`] and [`Loads`] over NATS.
pub struct Nats {
    connection: connection::Connection,
    jobs: Arc<Jobs>,
    namespace: String,
}

/// Where JetStream answers for an account.
const ACCOUNT: &str = "$JS.API.INFO";

/// The number of streams in JetStream's answer for an account.
fn streams_of(answer: &[u8]) -> Result<usize, String> {
    let answer: serde_json::Value = serde_json::from_slice(answer).map_err(|error| error.to_string())?;
    match (answer["streams"].as_u64(), answer["error"]["description"].as_str()) {
        (Some(streams), _) => Ok(streams as usize),
        (None, Some(error)) => Err(error.to_owned()),
        (None, None) => Err("an answer without a number of streams".to_owned()),
    }
}

/// What a NATS server says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NatsServer {
    /// Its version.
    pub version: String,
    /// Streams it keeps for this account, or why it keeps none.
    pub streams: Result<usize, String>,
}

impl Nats {
    /// Reads credentials, checks the servers' form, and begins to connect. A server that is away now is as good as one
    /// that goes away later.
    pub async fn new(options: NatsOptions, namespace: &str) -> Result<Self, ClusterError> {
        let connection = connection::Connection::new(&options).await?;
        let jobs = Jobs::new(connection.clone(), namespace, options.ack_wait);
        Ok(Self { connection, jobs: Arc::new(jobs), namespace: namespace.to_owned() })
    }

    /// Waits until the server answers, and asks it what it is.
    pub async fn server(&self) -> Result<NatsServer, String> {
        self.connection.connected().await;
        let client = &self.connection.client;
        // Not through the client's own account query, which expects fields that servers before 2.10 do not send.
        let streams = match client.request(ACCOUNT, Bytes::new()).await {
            Ok(answer) => streams_of(&answer.payload),
            Err(error) => Err(error.to_string()),
        };
        Ok(NatsServer { version: client.server_info().version, streams })
    }

    /// Waits until the server answers and keeps streams.
    pub async fn reachable(&self) -> Result<(), String> {
        self.connection.connected().await;
        self.jobs.stream_ready().await.map_err(|error| error.to_string())
    }
}

impl Queue for Nats {
    fn publish(&self, key: ModelKey, id: String, payload: Bytes) -> BoxFuture<'_, Result<(), QueueError>> {
        // It takes up to four answers, each of which may be late.
        let publishing = self.jobs.publish(key, id, payload);
        async {
            let published = tokio::time::timeout(connection::REQUEST_TIMEOUT, publishing).await;
            published.unwrap_or(Err(QueueError::Timeout(connection::REQUEST_TIMEOUT)))
        }
        .boxed()
    }

    fn consume(&self, key: ModelKey) -> Consumer {
        let (consumer, supplier) = Consumer::new();
        tokio::spawn(consumer::supply(self.jobs.clone(), key, supplier));
        consumer
    }

    fn depth(&self, key: ModelKey) -> BoxFuture<'_, Result<QueueDepth, QueueError>> {
        self.jobs.depth(key).boxed()
    }

    fn flush(&self) -> BoxFuture<'_, ()> {
        let flushed = tokio::time::timeout(connection::REQUEST_TIMEOUT, self.connection.client.flush());
        // If it cannot be reached, the jobs go to others after the acknowledgement time.
        async { drop(flushed.await) }.boxed()
    }

    fn dead_jobs(&self) -> u64 {
        self.jobs.dead.load(Ordering::Relaxed)
    }
}

impl Loads for Nats {
    fn report(&self, lease: WorkerId, report: &LoadReport) {
        loads::report(&self.connection, &self.namespace, lease, report);
    }

    fn reports(&self) -> LoadStream {
        loads::reports(&self.connection, &self.namespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_account_has_streams_or_says_why_not() {
        assert_eq!(streams_of(br#"{"type": "x", "memory": 0, "streams": 2, "consumers": 1}"#), Ok(2));
        let refused = br#"{"error": {"code": 503, "err_code": 10039, "description": "JetStream not enabled"}}"#;
        assert_eq!(streams_of(refused), Err("JetStream not enabled".to_owned()));
        assert!(streams_of(b"{}").is_err());
        assert!(streams_of(b"no json").is_err());
    }
}
