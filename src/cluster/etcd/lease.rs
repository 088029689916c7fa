use std::time::Duration;

use etcd_client::{Client, Error, PutOptions};
use tokio::{
    sync::{oneshot, watch},
    time::timeout,
};

use super::connection::{Backoff, CALL_TIMEOUT, Connection, describe};
use crate::cluster::{WorkerId, jitter};

/// Longest pause before a lost registration is made anew: those who lost theirs together do not come back together.
const REGRANT_SPREAD: Duration = Duration::from_secs(1);

/// Keeps one registration: a key on a lease that is renewed, and made anew under another lease when it is lost.
pub(super) struct Keeper {
    connection: Connection,
    directory: String,
    card: Vec<u8>,
    id: watch::Sender<Option<WorkerId>>,
}

/// Why renewing ended.
enum Ended {
    /// The server no longer knows the lease: the others have seen this worker go.
    Lost,
    /// The server cannot be asked.
    Unreachable(String),
}

impl Keeper {
    pub(super) fn new(
        connection: Connection,
        directory: String,
        card: Vec<u8>,
        id: watch::Sender<Option<WorkerId>>,
    ) -> Self {
        Self { connection, directory, card, id }
    }

    /// Runs until `stop` resolves, and then takes the registration back.
    pub(super) async fn run(self, mut stop: oneshot::Receiver<()>) {
        let mut held = None;
        tokio::select! {
            _ = &mut stop => {}
            () = self.keep(&mut held) => {}
        }
        if let Some(lease) = held {
            // If it cannot be revoked it runs out by itself.
            let revoked = self.connection.call(async |client| client.lease_client().revoke(lease).await).await;
            match revoked {
                Ok(_) => tracing::info!(lease = %WorkerId(lease as u64), "deregistered"),
                Err(error) => tracing::warn!("cannot deregister: {error}; the lease runs out by itself"),
            }
        }
    }

    /// Never ends. `held` is the lease that may exist at any time.
    async fn keep(&self, held: &mut Option<i64>) {
        let mut backoff = Backoff::new();
        loop {
            let (lease, ttl) = match self.register(held).await {
                Ok(registered) => registered,
                Err(error) => {
                    backoff.failed("cannot register with etcd", &error).await;
                    continue;
                }
            };
            backoff.succeeded("registering with etcd");
            let id = WorkerId(lease as u64);
            tracing::info!(lease = %id, "registered");
            self.id.send_replace(Some(id));
            self.renew(lease, ttl).await;
            *held = None;
            tracing::warn!(lease = %id, "the registration's lease is lost; registering anew under another");
            tokio::time::sleep(REGRANT_SPREAD.saturating_sub(jitter(REGRANT_SPREAD))).await;
        }
    }

    /// A new lease and the card on it: the lease and its life in the server's opinion.
    async fn register(&self, held: &mut Option<i64>) -> Result<(i64, Duration), String> {
        let seconds = self.connection.lease_ttl().as_secs().max(1) as i64;
        if let Some(half) = held.take() {
            // A lease from an attempt whose put failed. Should its put come through after all, it is gone with it.
            self.connection.call(async |client| client.lease_client().revoke(half).await).await?;
        }
        let granted = self.connection.call(async |client| client.lease_client().grant(seconds, None).await).await?;
        *held = Some(granted.id());
        let key = format!("{}/{}", self.directory, WorkerId(granted.id() as u64));
        let options = PutOptions::new().with_lease(granted.id());
        self.connection.call(async |mut client| client.put(key, self.card.clone(), Some(options)).await).await?;
        Ok((granted.id(), Duration::from_secs(granted.ttl().max(1) as u64)))
    }

    /// Renews until the server says that the lease is gone. While the server is away the lease may live on: only the
    /// server knows.
    async fn renew(&self, lease: i64, ttl: Duration) {
        let mut backoff = Backoff::new();
        let what = "cannot renew the registration in etcd";
        loop {
            let ended = match self.connection.client().await {
                Ok(client) => {
                    renew_over_one_stream(client, lease, ttl / 3, || {
                        backoff.succeeded("renewing the registration in etcd")
                    })
                    .await
                }
                Err(error) => Ended::Unreachable(error),
            };
            match ended {
                Ended::Lost => return,
                Ended::Unreachable(error) => backoff.failed(what, &error).await,
            }
        }
    }
}

async fn renew_over_one_stream(client: Client, lease: i64, period: Duration, mut renewed: impl FnMut()) -> Ended {
    // After one that is late there is time for others before the lease ends.
    let patience = period.min(CALL_TIMEOUT);
    let late = || Ended::Unreachable(format!("no answer within {patience:?}"));
    let opened = match timeout(patience, client.lease_client().keep_alive(lease)).await {
        Ok(opened) => opened,
        Err(_) => return late(),
    };
    let (mut keeper, mut answers) = match opened {
        Ok(opened) => opened,
        // The client's word for an answer without time to live.
        Err(Error::LeaseKeepAliveError(_)) => return Ended::Lost,
        Err(error) => return Ended::Unreachable(describe(&error)),
    };
    renewed();
    loop {
        tokio::time::sleep(period).await;
        if let Err(error) = keeper.keep_alive().await {
            return Ended::Unreachable(describe(&error));
        }
        match timeout(patience, answers.message()).await {
            Ok(Ok(Some(answer))) if answer.ttl() > 0 => {}
            Ok(Ok(Some(_))) => return Ended::Lost,
            Ok(Ok(None)) => return Ended::Unreachable("the server closed the connection".into()),
            Ok(Err(error)) => return Ended::Unreachable(describe(&error)),
            Err(_) => return late(),
        }
    }
}
