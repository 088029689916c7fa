//! A range of etcd's keys, followed through losses of the connection, of history and of data.

use std::{collections::VecDeque, time::Duration};

use bytes::Bytes;
use etcd_client::{Event, EventType, GetOptions, KeyValue, WatchOptions, WatchStream};
use tokio::time::timeout;

use super::connection::{Backoff, Connection, describe};

/// How long opening a watch may take.
const OPEN_TIMEOUT: Duration = Duration::from_secs(2);

/// Keys to follow.
pub(super) enum Range {
    /// One key.
    Key(String),
    /// All that begin so.
    Prefix(String),
}

/// What happened to the keys.
#[derive(Debug)]
pub(super) enum Change {
    /// These are all there are.
    All {
        entries: Vec<(String, Bytes)>,
        /// Whether whatever is missing was deleted. If not, the store may have lost its data, or be another; what was
        /// deleted in one that has not is yet to come, as [`Change::Delete`].
        continuous: bool,
    },
    /// A key was put.
    Put { key: String, value: Bytes },
    /// A key was deleted, or its lease ran out.
    Delete { key: String },
}

/// A range of keys as the server has them, followed for ever: listed once, then watched. After a loss of the connection
/// the range is listed again and the watch goes on where it ended: the one alone would not tell what was deleted, the
/// other not that the server has lost its data, if its count of revisions has caught up meanwhile. If the server no
/// longer knows what happened since, or is not the one it was, all begins anew.
pub(super) struct Mirror {
    connection: Connection,
    range: Range,
    stream: Option<WatchStream>,
    position: Option<Position>,
    /// Whether the range was listed since the connection was lost.
    listed: bool,
    /// Whether `position` was given up because the store is not the one it was.
    lost_data: bool,
    pending: VecDeque<Change>,
    backoff: Backoff,
}

/// Up to where the store has been followed.
#[derive(Clone, Copy)]
struct Position {
    cluster: u64,
    revision: i64,
}

impl Position {
    /// Whether a store that says so of itself can be the one that was followed up to here.
    fn is_before(self, cluster: u64, revision: i64) -> bool {
        cluster == self.cluster && revision >= self.revision
    }
}

impl Mirror {
    pub(super) fn new(connection: Connection, range: Range) -> Self {
        let (stream, position, pending) = (None, None, VecDeque::new());
        let (listed, lost_data, backoff) = (false, false, Backoff::new());
        Self { connection, range, stream, position, listed, lost_data, pending, backoff }
    }

    /// The next change, whenever there is one. The first is always [`Change::All`]. Cancel-safe.
    pub(super) async fn next(&mut self) -> Change {
        loop {
            if let Some(change) = self.pending.pop_front() {
                return change;
            }
            if let Err(error) = self.advance().await {
                (self.stream, self.listed) = (None, false);
                self.backoff.failed("cannot watch etcd", &error).await;
            }
        }
    }

    /// Whether more has come than was told. Between a list and what the watch tells from where it ended, keys go back
    /// to what they were for a moment: only what is left in the end is worth telling.
    pub(super) fn has_more(&self) -> bool {
        !self.pending.is_empty()
    }

    /// Whether the server is followed, for all that is known.
    pub(super) fn is_following(&self) -> bool {
        self.stream.is_some()
    }

    /// Lists, opens the watch, or waits for its next message: whatever is next.
    async fn advance(&mut self) -> Result<(), String> {
        let Some(position) = self.position.filter(|_| self.listed) else {
            return self.list().await;
        };
        let Some(stream) = &mut self.stream else {
            let client = self.connection.client().await?;
            let (key, options) = match &self.range {
                Range::Key(key) => (key, WatchOptions::new()),
                Range::Prefix(prefix) => (prefix, WatchOptions::new().with_prefix()),
            };
            let options = options.with_start_revision(position.revision + 1).with_progress_notify();
            let mut client = client.watch_client();
            let opened = timeout(OPEN_TIMEOUT, client.watch(key.as_str(), Some(options))).await;
            let opened = opened.map_err(|_| format!("no answer within {OPEN_TIMEOUT:?}"))?;
            self.stream = Some(opened.map_err(|error| describe(&error))?);
            return Ok(());
        };
        let message = stream.message().await.map_err(|error| describe(&error))?;
        let message = message.ok_or("the server closed the watch")?;
        let (cluster, revision) = message.header().map_or((0, 0), |header| (header.cluster_id(), header.revision()));
        // The message that a watch was created says where the member is that keeps it, which may be behind the one that
        // listed. (A store that really went back is noticed by the list.) And the one that it is cancelled says 0 if
        // what it was to tell was compacted.
        let says_how_far = !message.created() && !message.canceled();
        let revision = if says_how_far { revision } else { revision.max(position.revision) };
        if !position.is_before(cluster, revision) {
            self.start_over(true);
            return Ok(());
        }
        if message.canceled() {
            if message.compact_revision() == 0 {
                return Err(format!("the watch was cancelled: {}", message.cancel_reason()));
            }
            tracing::info!("etcd has forgotten some of what happened meanwhile; reading all of it again");
            self.start_over(false);
            return Ok(());
        }
        self.backoff.succeeded("watching etcd");
        let mut reached = position.revision;
        for event in message.events() {
            if let Some(kv) = event.kv() {
                reached = reached.max(kv.mod_revision());
                self.pending.push_back(change(event, kv));
            }
        }
        if message.events().is_empty() && !message.created() {
            // A progress report: nothing happened up to here. The message that a watch was created says where the store
            // is, not what has been delivered.
            reached = reached.max(revision);
        }
        self.position = Some(Position { cluster, revision: reached });
        Ok(())
    }

    async fn list(&mut self) -> Result<(), String> {
        let (key, options) = match &self.range {
            Range::Key(key) => (key.as_str(), GetOptions::new()),
            Range::Prefix(prefix) => (prefix.as_str(), GetOptions::new().with_prefix()),
        };
        let answer = self.connection.call(async |mut client| client.get(key, Some(options)).await).await?;
        let header = answer.header().ok_or("an answer without header")?;
        let (cluster, revision) = (header.cluster_id(), header.revision());
        if self.position.is_some_and(|position| !position.is_before(cluster, revision)) {
            self.start_over(true);
        }
        let entries = answer.kvs().iter().map(|kv| (key_of(kv), value_of(kv))).collect();
        let continuous = self.position.is_none() && !self.lost_data;
        self.pending.push_back(Change::All { entries, continuous });
        // The watch goes on where it ended.
        self.position.get_or_insert(Position { cluster, revision });
        (self.listed, self.lost_data) = (true, false);
        Ok(())
    }

    fn start_over(&mut self, lost_data: bool) {
        if lost_data {
            tracing::warn!("etcd has lost its data or is another one; reading all of it again");
        }
        self.stream = None;
        self.position = None;
        // The changes not looked at yet came before.
        self.lost_data |= lost_data;
    }
}

fn change(event: &Event, kv: &KeyValue) -> Change {
    match event.event_type() {
        EventType::Put => Change::Put { key: key_of(kv), value: value_of(kv) },
        EventType::Delete => Change::Delete { key: key_of(kv) },
    }
}

fn key_of(kv: &KeyValue) -> String {
    String::from_utf8_lossy(kv.key()).into_owned()
}

fn value_of(kv: &KeyValue) -> Bytes {
    Bytes::copy_from_slice(kv.value())
}
