//! A connection to etcd, made again whenever it is lost.

use std::{path::PathBuf, sync::Arc, time::Duration};

use etcd_client::{Certificate, Client, ConnectOptions, Error, Identity, TlsOptions};
use tokio::{sync::Mutex, time::timeout};

use crate::cluster::{ClusterError, jitter};

/// How long one call may take. Well under a third of a lease's life, so that a lost answer does not cost the lease.
pub(super) const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// Pings on a quiet connection: a watch on a dead one would wait for ever. etcd takes more than one in five seconds
/// amiss.
const PING_PERIOD: Duration = Duration::from_secs(10);
/// How long the answer to a ping may take.
const PING_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause after the first failure; it doubles with each further one.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// Longest pause between attempts.
const BACKOFF_LAST: Duration = Duration::from_secs(2);

/// How to reach etcd.
#[derive(Debug, Clone)]
pub struct EtcdOptions {
    /// Its endpoints, as `http://host:2379`.
    pub endpoints: Vec<String>,
    /// Certificates (PEM) that may have signed the server's; `None`: the system's.
    pub ca: Option<PathBuf>,
    /// Certificate and key (PEM) to show.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// User and password.
    pub user: Option<(String, String)>,
    /// Life of a registration that is not renewed. It is renewed three times as often.
    pub lease_ttl: Duration,
}

impl EtcdOptions {
    /// Plain connections to `endpoints`, and leases of ten seconds.
    pub fn new(endpoints: Vec<String>) -> Self {
        Self { endpoints, ca: None, identity: None, user: None, lease_ttl: Duration::from_secs(10) }
    }
}

/// A way to etcd that is made when it is first needed and kept. Cheap to clone.
#[derive(Clone)]
pub(super) struct Connection {
    options: Arc<EtcdOptions>,
    connect: ConnectOptions,
    client: Arc<Mutex<Option<Client>>>,
}

impl Connection {
    pub(super) fn new(options: EtcdOptions) -> Result<Self, ClusterError> {
        let mut connect = ConnectOptions::new()
            .with_connect_timeout(CALL_TIMEOUT)
            .with_keep_alive(PING_PERIOD, PING_TIMEOUT)
            .with_keep_alive_while_idle(true)
            .with_auto_token_refresh(true)
            // A member cut off from its cluster says so instead of keeping silent.
            .with_require_leader(true);
        let tls = options.endpoints.iter().any(|endpoint| endpoint.starts_with("https://"));
        for endpoint in &options.endpoints {
            let plain = endpoint.starts_with("http://");
            if plain && (options.ca.is_some() || options.identity.is_some()) {
                return Err(ClusterError::Option(format!(
                    "etcd's endpoint {endpoint} is not encrypted, but certificates are given: write https://"
                )));
            }
        }
        if tls || options.ca.is_some() || options.identity.is_some() {
            let mut config = TlsOptions::new();
            config = match &options.ca {
                Some(path) => config.ca_certificate(Certificate::from_pem(read(path)?)),
                None => config.with_native_roots(),
            };
            if let Some((certificate, key)) = &options.identity {
                config = config.identity(Identity::from_pem(read(certificate)?, read(key)?));
            }
            connect = connect.with_tls(config);
        }
        if let Some((name, password)) = &options.user {
            connect = connect.with_user(name, password);
        }
        Ok(Self { options: Arc::new(options), connect, client: Arc::default() })
    }

    pub(super) fn lease_ttl(&self) -> Duration {
        self.options.lease_ttl
    }

    /// A client. Without a user this does not touch the network; with one it logs in first.
    pub(super) async fn client(&self) -> Result<Client, String> {
        let mut client = self.client.lock().await;
        if let Some(client) = &*client {
            return Ok(client.clone());
        }
        let connecting = Client::connect(&self.options.endpoints, Some(self.connect.clone()));
        let connected =
            timeout(CALL_TIMEOUT, connecting).await.map_err(|_| late())?.map_err(|error| describe(&error))?;
        Ok(client.insert(connected).clone())
    }

    /// One call, in bounded time.
    pub(super) async fn call<T>(&self, call: impl AsyncFnOnce(Client) -> Result<T, Error>) -> Result<T, String> {
        let client = self.client().await?;
        timeout(CALL_TIMEOUT, call(client)).await.map_err(|_| late())?.map_err(|error| describe(&error))
    }
}

fn read(path: &PathBuf) -> Result<Vec<u8>, ClusterError> {
    std::fs::read(path).map_err(|source| ClusterError::File { path: path.clone(), source })
}

fn late() -> String {
    format!("no answer within {CALL_TIMEOUT:?}")
}

/// The server's words, without the client's frame around them.
pub(super) fn describe(error: &Error) -> String {
    match error {
        Error::GRpcStatus(status) => status.message().to_owned(),
        other => other.to_string(),
    }
}

/// Pauses between attempts: doubling, and never in step with the other processes that lost the same server.
pub(super) struct Backoff {
    next: Duration,
    attempts: u32,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Self { next: BACKOFF_FIRST, attempts: 0 }
    }

    /// Notes a failure, says so the first time, and waits.
    pub(super) async fn failed(&mut self, what: &str, error: &str) {
        if self.attempts == 0 {
            tracing::warn!("{what}: {error}; trying again until it works");
        } else {
            tracing::debug!("{what}: {error}");
        }
        self.attempts += 1;
        tokio::time::sleep(jitter(self.next)).await;
        self.next = (self.next * 2).min(BACKOFF_LAST);
    }

    /// Notes a success, and says so if there were failures.
    pub(super) fn succeeded(&mut self, what: &str) {
        if self.attempts > 0 {
            tracing::info!("{what}: works again");
        }
        *self = Self::new();
    }
}
