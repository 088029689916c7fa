//! Discovery over etcd.
//!
//! ```text
//! /engine/{namespace}/workers/{model_key}/{decode|prefill}/{lease_id}   a WorkerCard
//! /engine/{namespace}/config/{model_key}                               live limits
//! ```
//!
//! A registration hangs on a lease (`lease`); the live set is a mirror of a range of keys (`mirror`) read as cards
//! (`workers`). Each is a task of its own that outlives any absence of the server.

mod connection;
mod lease;
mod mirror;
mod workers;

pub use connection::EtcdOptions;

use std::sync::Arc;

use bytes::Bytes;
use etcd_client::{GetOptions, KeyValue};
use tokio::sync::{oneshot, watch};

use super::{ClusterError, Discovery, Lease, ModelKey, WorkerCard, WorkerFilter, WorkerId, WorkerSet};
use connection::Connection;
use mirror::{Change, Mirror, Range};

/// [`Discovery`] over etcd.
pub struct Etcd {
    connection: Connection,
    root: String,
}

impl Etcd {
    /// Reads certificates and checks the endpoints' form. Nothing is connected yet: a server that is away now is as
    /// good as one that goes away later.
    pub fn new(options: EtcdOptions, namespace: &str) -> Result<Self, ClusterError> {
        Ok(Self { connection: Connection::new(options)?, root: format!("/engine/{namespace}") })
    }

    /// The server's version.
    pub async fn version(&self) -> Result<String, String> {
        self.connection.call(async |mut client| client.status().await).await.map(|status| status.version().to_owned())
    }

    /// All workers that are registered now, with their cards, or why those cannot be read.
    pub async fn cards(&self) -> Result<Vec<(WorkerId, Result<WorkerCard, String>)>, String> {
        let (prefix, all) = (format!("{}/workers/", self.root), GetOptions::new().with_prefix());
        let listed = self.connection.call(async |mut client| client.get(prefix, Some(all)).await).await?;
        let card = |entry: &KeyValue| {
            let lease = workers::lease_of(entry.key_str().ok()?)?;
            Some((lease, WorkerCard::from_json(entry.value())))
        };
        Ok(listed.kvs().iter().filter_map(card).collect())
    }

    /// Waits until the server answers.
    pub async fn reachable(&self) -> Result<(), String> {
        self.connection.call(async |mut client| client.get(self.root.as_str(), None).await).await.map(drop)
    }
}

impl Discovery for Etcd {
    fn register(&self, card: WorkerCard) -> Lease {
        let directory = format!("{}/workers/{}/{}", self.root, card.model_key, card.role);
        let (sender, receiver) = watch::channel(None);
        let (stop, stopped) = oneshot::channel();
        let keeper = lease::Keeper::new(self.connection.clone(), directory, card.to_json(), sender);
        Lease::new(receiver, stop, tokio::spawn(keeper.run(stopped)))
    }

    fn workers(&self, filter: WorkerFilter) -> watch::Receiver<Arc<WorkerSet>> {
        let prefix = match (filter.model_key, filter.role) {
            (Some(key), Some(role)) => format!("{}/workers/{key}/{role}/", self.root),
            (Some(key), None) => format!("{}/workers/{key}/", self.root),
            (None, _) => format!("{}/workers/", self.root),
        };
        let mirror = Mirror::new(self.connection.clone(), Range::Prefix(prefix));
        let (sender, receiver) = watch::channel(Arc::default());
        tokio::spawn(workers::watch(mirror, filter, self.connection.lease_ttl(), sender));
        receiver
    }

    fn config(&self, key: ModelKey) -> watch::Receiver<Option<Bytes>> {
        let mut mirror = Mirror::new(self.connection.clone(), Range::Key(format!("{}/config/{key}", self.root)));
        let (sender, receiver) = watch::channel(None);
        tokio::spawn(async move {
            loop {
                let change = tokio::select! {
                    change = mirror.next() => change,
                    () = sender.closed() => return,
                };
                let config = match change {
                    Change::Put { value, .. } => Some(value),
                    Change::Delete { .. } => None,
                    Change::All { entries, continuous } => match entries.into_iter().next() {
                        Some((_, value)) => Some(value),
                        None if continuous => None,
                        // A store that has lost its data has not been told to change anything.
                        None => continue,
                    },
                };
                if mirror.has_more() {
                    continue;
                }
                sender.send_if_modified(|known| {
                    let changed = *known != config;
                    *known = config;
                    changed
                });
            }
        });
        receiver
    }
}
