//! A connection to NATS, made again for ever.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use async_nats::{Client, ConnectOptions, Event, ServerAddr, connection::State};
use tokio::sync::watch;

use crate::cluster::{ClusterError, QueueError, jitter};

/// How long a connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long one answer may take, and all of publishing: a decode worker waits for that before it prefills itself.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(2);
/// Pings on a quiet connection; two without an answer end it.
const PING_PERIOD: Duration = Duration::from_secs(10);
/// How long a job may go without a sign of life before another worker gets it: three of the signs that workers give may
/// go missing. Far below the time after which a decode worker no longer waits for a claim
/// ([`LenderTimeouts::unclaimed`](crate::handoff::LenderTimeouts::unclaimed)), or the other's claim would come too
/// late.
const ACK_WAIT: Duration = Duration::from_secs(8);
/// Longest pause between attempts to connect.
const RECONNECT_PAUSE_MAX: Duration = Duration::from_secs(2);

/// How to reach NATS.
#[derive(Debug, Clone)]
pub struct NatsOptions {
    /// Its servers, as `nats://host:4222`.
    pub servers: Vec<String>,
    /// Certificates (PEM) that may have signed the servers'; `None`: the system's, if a server asks for TLS.
    pub ca: Option<PathBuf>,
    /// Certificate and key (PEM) to show.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Who to be.
    pub auth: NatsAuth,
    /// How long a job may go without a sign of life before another worker gets it.
    pub ack_wait: Duration,
}

impl NatsOptions {
    /// Plain connections to `servers`, as nobody in particular.
    pub fn new(servers: Vec<String>) -> Self {
        Self { servers, ca: None, identity: None, auth: NatsAuth::None, ack_wait: ACK_WAIT }
    }
}

/// Who to be at NATS.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NatsAuth {
    /// Nobody.
    #[default]
    None,
    /// A user with a password.
    Password {
        /// User.
        user: String,
        /// Password.
        password: String,
    },
    /// A credentials file: a JWT and its key.
    Credentials(PathBuf),
    /// A file with an nkey's seed.
    Nkey(PathBuf),
}

/// A connection that is made again for ever. Cheap to clone.
#[derive(Clone)]
pub(super) struct Connection {
    pub(super) client: Client,
    /// Counts connections made: whatever was asked over an earlier one is not answered any more.
    made: watch::Receiver<u64>,
}

impl Connection {
    pub(super) async fn new(options: &NatsOptions) -> Result<Self, ClusterError> {
        let servers = options.servers.iter().map(|server| {
            server.parse::<ServerAddr>().map_err(|error| {
                ClusterError::Option(format!("`{server}` is no NATS server ({error}): expected nats://host:4222"))
            })
        });
        let servers = servers.collect::<Result<Vec<_>, _>>()?;
        let (count, made) = watch::channel(0);
        let last_trouble = Mutex::new(String::new());
        let mut connect = ConnectOptions::new()
            .name("engine")
            .retry_on_initial_connect()
            .connection_timeout(CONNECT_TIMEOUT)
            .request_timeout(Some(REQUEST_TIMEOUT))
            .ping_interval(PING_PERIOD)
            .reconnect_delay_callback(reconnect_pause)
            .event_callback(move |event| {
                if event == Event::Connected {
                    count.send_modify(|count| *count += 1);
                }
                log(&event, &last_trouble);
                std::future::ready(())
            });
        if let Some(ca) = &options.ca {
            readable(ca)?;
            connect = connect.add_root_certificates(ca.clone()).require_tls(true);
        }
        if let Some((certificate, key)) = &options.identity {
            readable(certificate)?;
            readable(key)?;
            connect = connect.add_client_certificate(certificate.clone(), key.clone()).require_tls(true);
        }
        connect = match &options.auth {
            NatsAuth::None => connect,
            NatsAuth::Password { user, password } => connect.user_and_password(user.clone(), password.clone()),
            NatsAuth::Credentials(path) => {
                let text = read(path)?;
                connect.credentials(&text).map_err(|source| ClusterError::File { path: path.clone(), source })?
            }
            NatsAuth::Nkey(path) => connect.nkey(read(path)?.trim().to_owned()),
        };
        let client = connect
            .connect(servers)
            .await
            .map_err(|error| ClusterError::Option(format!("cannot use NATS: {error}")))?;
        Ok(Self { client, made })
    }

    /// Waits for a connection.
    pub(super) async fn connected(&self) {
        // An error would mean that the client is gone, and the rest with it.
        let _ = self.made.clone().wait_for(|made| *made > 0).await;
    }

    /// Which connection this is, counted from the start.
    pub(super) fn number(&self) -> u64 {
        *self.made.borrow()
    }

    /// Resolves when there is a later connection than `number`.
    pub(super) async fn left_behind(&self, number: u64) {
        // An error would mean that the client is gone, and the rest with it.
        let _ = self.made.clone().wait_for(|made| *made > number).await;
    }

    /// An error if there is no connection now. The client would otherwise keep what it is given until there is one.
    pub(super) fn check(&self) -> Result<(), QueueError> {
        match self.client.connection_state() {
            State::Connected => Ok(()),
            State::Pending | State::Disconnected => Err(QueueError::Unavailable("not connected to NATS".into())),
        }
    }
}

/// The pause before the `attempt`th attempt: a little longer each time, and not the same in all processes.
fn reconnect_pause(attempt: usize) -> Duration {
    let longest = Duration::from_millis(100).saturating_mul(attempt as u32).min(RECONNECT_PAUSE_MAX);
    jitter(longest)
}

/// What is wrong is said once, not at every attempt.
fn log(event: &Event, last_trouble: &Mutex<String>) {
    let mut last_trouble = last_trouble.lock().unwrap_or_else(PoisonError::into_inner);
    match event {
        Event::Connected => {
            last_trouble.clear();
            tracing::info!("connected to NATS");
        }
        Event::Disconnected => tracing::warn!("lost the connection to NATS; connecting again until it works"),
        Event::ServerError(_) | Event::ClientError(_) => {
            let trouble = event.to_string();
            if *last_trouble != trouble {
                tracing::warn!("NATS: {trouble}");
                *last_trouble = trouble;
            }
        }
        _ => tracing::debug!("NATS: {event}"),
    }
}

fn read(path: &PathBuf) -> Result<String, ClusterError> {
    std::fs::read_to_string(path).map_err(|source| ClusterError::File { path: path.clone(), source })
}

/// The client opens the file itself, at each connection; that it is there is checked now.
fn readable(path: &PathBuf) -> Result<(), ClusterError> {
    std::fs::File::open(path).map(drop).map_err(|source| ClusterError::File { path: path.clone(), source })
}
