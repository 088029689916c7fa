//! The stream of prefill jobs, and putting jobs on it.

use std::{
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    time::Duration,
};

use async_nats::jetstream::{
    self, Context,
    consumer::{AckPolicy, PullConsumer, pull},
    context::PublishErrorKind,
    message::PublishMessage,
    stream::{self, DiscardPolicy, RetentionPolicy, StorageType},
};
use bytes::Bytes;
use tokio::time::timeout;

use super::connection::{Connection, REQUEST_TIMEOUT};
use crate::cluster::{ModelKey, QueueDepth, QueueError};

/// Times a job is delivered before it is taken for one that kills its workers.
pub(super) const DELIVERIES_MAX: u32 = 5;
/// Deliveries after which the server itself stops. The ones between are for taking the job off the queue.
const SERVER_DELIVERIES_MAX: i64 = DELIVERIES_MAX as i64 + 5;
/// Jobs a model's queue holds; beyond that, publishing is refused and decode workers prefill themselves.
const JOBS_MAX: i64 = 10_000;
/// Jobs of a model under way at a time.
const JOBS_UNDER_WAY_MAX: i64 = 10_000;
/// Jobs that have been here for so long have long been done by their decode workers: they are of models that are gone,
/// or were acked just before the server was killed, which may then keep them for good.
const JOB_AGE_MAX: Duration = Duration::from_secs(3600);
/// A consumer nobody has used for so long is of a model that is gone.
const CONSUMER_IDLE_MAX: Duration = Duration::from_secs(24 * 3600);
/// Time in which two jobs of one id are one.
const DUPLICATE_WINDOW: Duration = Duration::from_secs(120);

/// The stream of prefill jobs of a namespace.
pub(super) struct Jobs {
    pub(super) connection: Connection,
    context: Context,
    namespace: String,
    ack_wait: Duration,
    /// Whether the stream was there when it was last looked for.
    stream_known: AtomicBool,
    /// Jobs given up.
    pub(super) dead: AtomicU64,
}

impl Jobs {
    pub(super) fn new(connection: Connection, namespace: &str, ack_wait: Duration) -> Self {
        let mut context = jetstream::new(connection.client.clone());
        context.set_timeout(REQUEST_TIMEOUT);
        let (stream_known, dead) = (AtomicBool::new(false), AtomicU64::new(0));
        Self { connection, context, namespace: namespace.to_owned(), ack_wait, stream_known, dead }
    }

    fn stream_name(&self) -> String {
        format!("{}-prefill", self.namespace)
    }

    fn subject(&self, key: ModelKey) -> String {
        format!("{}.prefill.{key}", self.namespace)
    }

    fn stream_config(&self) -> stream::Config {
        stream::Config {
            name: self.stream_name(),
            description: Some("Prefill jobs of engine".into()),
            subjects: vec![format!("{}.prefill.>", self.namespace)],
            retention: RetentionPolicy::WorkQueue,
            storage: StorageType::File,
            discard: DiscardPolicy::New,
            max_messages_per_subject: JOBS_MAX,
            discard_new_per_subject: true,
            max_age: JOB_AGE_MAX,
            duplicate_window: DUPLICATE_WINDOW,
            ..stream::Config::default()
        }
    }

    fn consumer_config(&self, key: ModelKey) -> pull::Config {
        pull::Config {
            durable_name: Some(key.to_string()),
            filter_subject: self.subject(key),
            ack_policy: AckPolicy::Explicit,
            ack_wait: self.ack_wait,
            max_deliver: SERVER_DELIVERIES_MAX,
            max_ack_pending: JOBS_UNDER_WAY_MAX,
            inactive_threshold: CONSUMER_IDLE_MAX,
            ..pull::Config::default()
        }
    }

    /// Makes sure that the stream is there, whatever became of the one that was.
    pub(super) async fn stream_ready(&self) -> Result<(), QueueError> {
        self.connection.check()?;
        let made = timeout(REQUEST_TIMEOUT, self.context.get_or_create_stream(self.stream_config())).await;
        made.map_err(|_| QueueError::Timeout(REQUEST_TIMEOUT))?.map_err(refused)?;
        self.stream_known.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// The consumer of a model, made if there is none.
    pub(super) async fn consumer(&self, key: ModelKey) -> Result<PullConsumer, QueueError> {
        self.stream_ready().await?;
        let made = self.context.create_consumer_on_stream(self.consumer_config(key), self.stream_name());
        timeout(REQUEST_TIMEOUT, made).await.map_err(|_| QueueError::Timeout(REQUEST_TIMEOUT))?.map_err(refused)
    }

    pub(super) async fn publish(&self, key: ModelKey, id: String, payload: Bytes) -> Result<(), QueueError> {
        if !self.stream_known.load(Ordering::Relaxed) {
            self.stream_ready().await?;
        }
        match self.publish_once(key, &id, payload.clone()).await {
            // The server came back without its storage.
            Err(PublishError::NoStream) => {
                self.stream_known.store(false, Ordering::Relaxed);
                self.stream_ready().await?;
                self.publish_once(key, &id, payload).await.map_err(QueueError::from)
            }
            other => other.map_err(QueueError::from),
        }
    }

    async fn publish_once(&self, key: ModelKey, id: &str, payload: Bytes) -> Result<(), PublishError> {
        self.connection.check().map_err(PublishError::Other)?;
        let message = PublishMessage::build().message_id(id).payload(payload);
        let late = || PublishError::Other(QueueError::Timeout(REQUEST_TIMEOUT));
        let acknowledged = async { self.context.send_publish(self.subject(key), message).await?.await };
        match timeout(REQUEST_TIMEOUT, acknowledged).await.map_err(|_| late())? {
            Ok(_) => Ok(()),
            Err(error) => Err(match error.kind() {
                PublishErrorKind::StreamNotFound => PublishError::NoStream,
                PublishErrorKind::TimedOut => late(),
                PublishErrorKind::BrokenPipe => PublishError::Other(QueueError::Unavailable(error.to_string())),
                _ => PublishError::Other(refused(error)),
            }),
        }
    }

    pub(super) async fn depth(&self, key: ModelKey) -> Result<QueueDepth, QueueError> {
        self.connection.check()?;
        // One question where the consumer is there, as it nearly always is.
        let asked = self.context.get_consumer_from_stream::<pull::Config, _, _>(key.to_string(), self.stream_name());
        let consumer = match timeout(REQUEST_TIMEOUT, asked).await {
            Ok(Ok(consumer)) => consumer,
            Ok(Err(_)) => self.consumer(key).await?,
            Err(_) => return Err(QueueError::Timeout(REQUEST_TIMEOUT)),
        };
        let info = consumer.cached_info();
        // The server forgets who asked when the connection breaks.
        let asking = info.num_waiting as u64;
        Ok(QueueDepth { waiting: info.num_pending, delivered: info.num_ack_pending as u64, asking })
    }
}

enum PublishError {
    /// Nobody keeps messages of this subject.
    NoStream,
    Other(QueueError),
}

impl From<PublishError> for QueueError {
    fn from(error: PublishError) -> Self {
        match error {
            PublishError::NoStream => Self::Refused("no stream takes the jobs".into()),
            PublishError::Other(error) => error,
        }
    }
}

/// An error of the server's, with its cause.
fn refused(error: impl std::error::Error) -> QueueError {
    let text = match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    QueueError::Refused(text)
}
