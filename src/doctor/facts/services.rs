//! etcd, NATS, and the workers that are registered.

use std::time::Duration;

use futures::future::join_all;
use tokio::time::timeout;

use super::http;
use crate::{
    cli::ClusterArgs,
    cluster::{Etcd, LocalServices, Nats, NatsServer, WorkerCard, WorkerId},
};

/// How long a service may take to answer.
const TIME_MAX: Duration = Duration::from_secs(3);

/// What became of asking a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::doctor) enum ServiceState<T> {
    /// None was named.
    NotNamed,
    /// It answered.
    Answers(T),
    /// It did not, or cannot be used as described.
    Fails(String),
}

/// See the module.
#[derive(Debug, Clone)]
pub(in crate::doctor) struct ServicesFacts {
    pub(in crate::doctor) namespace: String,
    /// Where etcd is.
    pub(in crate::doctor) etcd_at: String,
    /// Its version.
    pub(in crate::doctor) etcd: ServiceState<String>,
    /// By how much its clock is ahead.
    pub(in crate::doctor) etcd_ahead_seconds: Option<i64>,
    /// Where NATS is.
    pub(in crate::doctor) nats_at: String,
    pub(in crate::doctor) nats: ServiceState<NatsServer>,
    /// What is missing of the services of this machine, if none were named.
    pub(in crate::doctor) local: Option<LocalServices>,
    /// `None`: etcd did not say.
    pub(in crate::doctor) workers: Option<Vec<Worker>>,
}

/// A registered worker.
#[derive(Debug, Clone)]
pub(in crate::doctor) struct Worker {
    pub(in crate::doctor) lease: WorkerId,
    /// What it says of itself, or why that cannot be read.
    pub(in crate::doctor) card: Result<WorkerCard, String>,
    /// What it answers here.
    pub(in crate::doctor) health: Result<Health, String>,
}

/// What a worker's `/health` said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::doctor) struct Health {
    pub(in crate::doctor) status: u16,
    /// By how much its clock is ahead.
    pub(in crate::doctor) ahead_seconds: Option<i64>,
}

impl ServicesFacts {
    pub(in crate::doctor) async fn collect(args: &ClusterArgs) -> Self {
        let mut options = args.options();
        let mut local = None;
        if options.etcd.endpoints.is_empty() && options.nats.servers.is_empty() {
            let found = LocalServices::of_this_machine().await;
            local = Some(found);
            if found.is_cluster() {
                options.use_this_machine();
            }
        }
        let (etcd_at, nats_at) = (options.etcd.endpoints.join(", "), options.nats.servers.join(", "));
        let plain = options.etcd.endpoints.first().and_then(|endpoint| endpoint.strip_prefix("http://"));
        let plain = plain.map(|address| address.trim_end_matches('/').to_owned());
        let clock = async {
            let answer = http::get(&plain?, "/version").await.ok()?;
            answer.ahead_seconds
        };
        let etcd = async {
            if options.etcd.endpoints.is_empty() {
                return (ServiceState::NotNamed, None);
            }
            match Etcd::new(options.etcd, &options.namespace) {
                Ok(etcd) => ask_etcd(&etcd).await,
                Err(error) => (ServiceState::Fails(error.to_string()), None),
            }
        };
        let nats = async {
            if options.nats.servers.is_empty() {
                return ServiceState::NotNamed;
            }
            let asking = async {
                let nats = Nats::new(options.nats, &options.namespace).await.map_err(|error| error.to_string())?;
                nats.server().await
            };
            timeout(TIME_MAX, asking).await.unwrap_or_else(|_| Err(late())).into()
        };
        let ((etcd, workers), nats, etcd_ahead_seconds) = tokio::join!(etcd, nats, clock);
        Self { namespace: options.namespace, etcd_at, etcd, etcd_ahead_seconds, nats_at, nats, local, workers }
    }
}

async fn ask_etcd(etcd: &Etcd) -> (ServiceState<String>, Option<Vec<Worker>>) {
    let asking = async {
        let version = etcd.version().await?;
        let cards = etcd.cards().await?;
        Ok::<_, String>((version, cards))
    };
    match timeout(TIME_MAX, asking).await.unwrap_or_else(|_| Err(late())) {
        Ok((version, cards)) => (ServiceState::Answers(version), Some(join_all(cards.into_iter().map(look_at)).await)),
        Err(error) => (ServiceState::Fails(error), None),
    }
}

async fn look_at((lease, card): (WorkerId, Result<WorkerCard, String>)) -> Worker {
    let health = match &card {
        Ok(card) => http::get(&card.address, "/health").await,
        Err(_) => Err("its address is not known".to_owned()),
    };
    let health = health.map(|answer| Health { status: answer.status, ahead_seconds: answer.ahead_seconds });
    Worker { lease, card, health }
}

fn late() -> String {
    format!("no answer within {TIME_MAX:?}")
}

impl<T> From<Result<T, String>> for ServiceState<T> {
    fn from(result: Result<T, String>) -> Self {
        match result {
            Ok(value) => Self::Answers(value),
            Err(error) => Self::Fails(error),
        }
    }
}
