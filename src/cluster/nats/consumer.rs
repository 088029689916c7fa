//! Taking jobs off a NATS stream.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use async_nats::jetstream::{self, AckKind, consumer::PullConsumer, message::Acker};
use futures::{FutureExt, StreamExt, future::BoxFuture};
use tokio::{runtime::Handle, time::timeout};

use super::{
    connection::REQUEST_TIMEOUT,
    jobs::{DELIVERIES_MAX, Jobs},
};
use crate::cluster::{Delivery, ModelKey, QueueError, Settle, queue::Supplier};

/// How long the server keeps one request for a job. Short: a request of a consumer that is gone can swallow a job until
/// it is given back.
const PULL_TIME: Duration = Duration::from_secs(5);
/// Pause after an error.
const PAUSE: Duration = Duration::from_millis(250);

/// Pulls jobs one by one, as they are wanted, until the consumer is gone.
pub(super) async fn supply(jobs: Arc<Jobs>, key: ModelKey, mut supplier: Supplier) {
    let mut consumer = None;
    let mut failing = false;
    while supplier.demand.recv().await.is_some() {
        let delivery = loop {
            if supplier.jobs.is_closed() {
                return;
            }
            match pull(&jobs, key, &mut consumer).await {
                Ok(Some(message)) => {
                    if let Some(delivery) = admit(&jobs, message).await {
                        break delivery;
                    }
                }
                Ok(None) => {}
                Err(error) => {
                    if !failing {
                        tracing::warn!("cannot take prefill jobs: {error}; trying again until it works");
                    }
                    failing = true;
                    tokio::select! {
                        () = tokio::time::sleep(PAUSE) => {}
                        () = supplier.jobs.closed() => return,
                    }
                    continue;
                }
            }
            if failing {
                tracing::info!("taking prefill jobs works again");
                failing = false;
            }
        };
        // If nobody takes it any more, dropping it gives it back.
        if supplier.jobs.send(delivery).await.is_err() {
            return;
        }
    }
}

/// One request for one job: `None` if there was none for [`PULL_TIME`].
///
/// The consumer in `known` is used as long as jobs come over the connection it was found by. Otherwise it is looked up
/// anew: a server that has lost it, with its stream or alone, may answer requests to it with silence.
async fn pull(
    jobs: &Jobs,
    key: ModelKey,
    known: &mut Option<(u64, PullConsumer)>,
) -> Result<Option<jetstream::Message>, QueueError> {
    let connection = jobs.connection.number();
    let consumer = match known.take() {
        Some((found_by, consumer)) if found_by == connection => consumer,
        _ => jobs.consumer(key).await?,
    };
    jobs.connection.check()?;
    let failed = |error: &dyn std::fmt::Display| QueueError::Unavailable(error.to_string());
    let mut answers = consumer.batch().max_messages(1).expires(PULL_TIME).messages().await.map_err(|e| failed(&e))?;
    tokio::select! {
        answer = answers.next() => {
            let message = answer.transpose().map_err(|error| failed(&error))?;
            if message.is_some() {
                *known = Some((connection, consumer));
            }
            Ok(message)
        }
        // The server forgets requests when the connection breaks.
        () = jobs.connection.left_behind(connection) => Ok(None),
    }
}

/// Makes a delivery of a message, or gives up a job that nobody survives.
async fn admit(jobs: &Arc<Jobs>, message: jetstream::Message) -> Option<Delivery> {
    let attempt = message.info().map_or(1, |info| u32::try_from(info.delivered).unwrap_or(u32::MAX));
    let (message, acker) = message.split();
    let id = message.headers.as_ref().and_then(|headers| headers.get(async_nats::header::NATS_MESSAGE_ID));
    let id = id.map(|id| id.as_str().to_owned()).unwrap_or_default();
    let settle = NatsSettle { jobs: jobs.clone(), acker: Arc::new(acker), id, attempt, runtime: Handle::current() };
    if attempt <= DELIVERIES_MAX {
        return Some(Delivery::new(message.payload, attempt, Box::new(settle)));
    }
    if let Err(error) = settle.bury("it was delivered too often").await {
        tracing::warn!("cannot take a dead job off the queue: {error}");
    }
    None
}

struct NatsSettle {
    jobs: Arc<Jobs>,
    acker: Arc<Acker>,
    id: String,
    attempt: u32,
    runtime: Handle,
}

impl NatsSettle {
    async fn say(jobs: &Jobs, acker: &Acker, kind: AckKind) -> Result<(), QueueError> {
        jobs.connection.check()?;
        match timeout(REQUEST_TIMEOUT, acker.ack_with(kind)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error)) => Err(QueueError::Unavailable(error.to_string())),
            Err(_) => Err(QueueError::Timeout(REQUEST_TIMEOUT)),
        }
    }
}

impl Settle for NatsSettle {
    fn ack(&self) -> BoxFuture<'_, Result<(), QueueError>> {
        Self::say(&self.jobs, &self.acker, AckKind::Ack).boxed()
    }

    fn in_progress(&self) -> BoxFuture<'_, Result<(), QueueError>> {
        Self::say(&self.jobs, &self.acker, AckKind::Progress).boxed()
    }

    fn nak(&self, delay: Duration) -> BoxFuture<'_, Result<(), QueueError>> {
        let delay = (!delay.is_zero()).then_some(delay);
        Self::say(&self.jobs, &self.acker, AckKind::Nak(delay)).boxed()
    }

    fn bury(&self, reason: &str) -> BoxFuture<'_, Result<(), QueueError>> {
        let reason = reason.to_owned();
        let buried = async move {
            // If this fails the job comes again, and is counted then.
            Self::say(&self.jobs, &self.acker, AckKind::Term).await?;
            self.jobs.dead.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(job = self.id, attempt = self.attempt, reason, "gave up a prefill job");
            Ok(())
        };
        buried.boxed()
    }

    fn abandon(&self) {
        let (jobs, acker) = (self.jobs.clone(), self.acker.clone());
        self.runtime.spawn(async move {
            // If this fails the server gives it to another after the acknowledgement time.
            let _ = Self::say(&jobs, &acker, AckKind::Nak(None)).await;
        });
    }
}
