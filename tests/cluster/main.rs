//! Discovery and the queue over real etcd and NATS servers that are killed, restarted, robbed of their data and cut
//! off.

mod discovery;
mod joining;
mod loads;
mod queue;
mod secured;
#[path = "../services/mod.rs"]
mod services;

use std::time::Duration;

use engine::cluster::{
    CARD_SCHEMA, Etcd, EtcdOptions, Lease, ModelCard, ModelKey, Nats, NatsOptions, Role, WorkerCard, WorkerId,
};

/// How long anything may take before a test gives up. Not a measurement: the machine may be very busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// The shortest lease etcd grants, for tests in which leases run out. In the others a busy machine must not make them.
const SHORT_LEASE: Duration = Duration::from_secs(2);
/// Time without a sign of life after which a job goes to another.
const ACK_WAIT: Duration = Duration::from_secs(1);

fn key(name: &str) -> ModelKey {
    ModelKey::of(name.as_bytes())
}

fn card(role: Role, model: &str, address: &str) -> WorkerCard {
    WorkerCard {
        schema: CARD_SCHEMA,
        version: "test".into(),
        role,
        address: address.into(),
        session: serde_json::Value::Null,
        transports: vec!["tcp".into()],
        staging: String::new(),
        host_id: "host".into(),
        local: None,
        model: ModelCard {
            names: vec![model.into()],
            max_model_len: 1024,
            source: model.into(),
            revision: None,
            load_format: "auto".into(),
            kv_cache_dtype: "f16".into(),
            block_size: 16,
            layers: 0,
            page_bytes: 0,
            page_order: String::new(),
            weights: String::new(),
        },
        model_key: key(model),
    }
}

fn etcd_at(url: &str, namespace: &str) -> Etcd {
    Etcd::new(EtcdOptions::new(vec![url.into()]), namespace).unwrap()
}

/// Whose workers' leases run out soon.
fn forgetful_etcd_at(url: &str, namespace: &str) -> Etcd {
    Etcd::new(EtcdOptions { lease_ttl: SHORT_LEASE, ..EtcdOptions::new(vec![url.into()]) }, namespace).unwrap()
}

async fn nats_at(url: &str, namespace: &str) -> Nats {
    Nats::new(NatsOptions { ack_wait: ACK_WAIT, ..NatsOptions::new(vec![url.into()]) }, namespace).await.unwrap()
}

/// What `future` yields; a test that hangs fails instead.
async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.unwrap_or_else(|_| panic!("still waiting for {what}"))
}

/// The id once it is another than `old`.
async fn granted(lease: &Lease, old: Option<WorkerId>) -> WorkerId {
    let mut id = lease.id();
    let new = soon("a lease", id.wait_for(|id| id.is_some() && *id != old)).await.unwrap();
    new.unwrap()
}
