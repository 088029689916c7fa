//! The tasks of a prefill worker beside its engine thread: one takes jobs off the queue, one carries to `borrowing` what
//! the writers and the engine say, and one for each session listens to a decode worker.

use std::{sync::Arc, time::Duration};

use prometheus::IntCounter;
use serde::Deserialize;
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};

use super::borrowing::{Note, SharedBorrowing, lock};
use crate::{
    cluster::{Cluster, ModelKey, WorkerCard, WorkerSet},
    handoff::{BorrowerEvent, ToPrefill, WorkerId},
    transfer::{ConnectError, Connector, SessionAddresses},
};

/// How long opening a session may take.
pub(super) const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// Between two looks at handoffs that take too long.
const TICK: Duration = Duration::from_millis(100);

/// What the tasks of a prefill worker share.
#[derive(Clone)]
pub(super) struct Tasks {
    pub(super) borrowing: SharedBorrowing,
    pub(super) connector: Connector,
    /// Those that are alive.
    pub(super) decode_workers: watch::Receiver<Arc<WorkerSet>>,
    pub(super) cluster: Cluster,
    pub(super) key: ModelKey,
    pub(super) lease: watch::Receiver<Option<WorkerId>>,
    pub(super) dead_jobs: IntCounter,
}

/// Takes jobs off the queue while there is room for them.
pub(super) async fn pull(tasks: Tasks, mut leaving: watch::Receiver<bool>) {
    let mut jobs = tasks.cluster.queue.consume(tasks.key);
    let mut alive = tasks.decode_workers.clone();
    let room_changed = lock(&tasks.borrowing).room_changed();
    let pulling = async {
        loop {
            while !lock(&tasks.borrowing).has_room() {
                room_changed.notified().await;
            }
            let rest = lock(&tasks.borrowing).rest(&alive.borrow_and_update());
            if !rest.is_zero() {
                // Whoever comes may be within reach.
                let _ = timeout(rest, alive.changed()).await;
            }
            let Some(job) = jobs.next().await else { return };
            lock(&tasks.borrowing).deliver(job);
        }
    };
    tokio::select! {
        () = pulling => {}
        _ = leaving.wait_for(|&leaving| leaving) => {}
    }
}

impl Tasks {
    /// Takes in what the writers and the engine say, and looks at the clock.
    pub(super) async fn take_notes(self, mut notes: mpsc::UnboundedReceiver<Note>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                note = notes.recv() => match note {
                    Some(Note::Connect { decode, addresses }) => {
                        tokio::spawn(self.clone().session(decode, addresses));
                    }
                    Some(note) => lock(&self.borrowing).take(note),
                    None => return,
                },
                _ = ticks.tick() => {
                    lock(&self.borrowing).on(BorrowerEvent::Tick);
                    let dead = self.cluster.queue.dead_jobs();
                    self.dead_jobs.inc_by(dead.saturating_sub(self.dead_jobs.get()));
                }
            }
        }
    }

    /// Opens a session and listens to it until it ends.
    async fn session(self, decode: WorkerId, addresses: serde_json::Value) {
        let own = self.lease.borrow().unwrap_or(WorkerId::UNREGISTERED);
        let (opened, tried, pause) = match SessionAddresses::deserialize(&addresses) {
            Ok(addresses) => {
                let opened = self.connector.connect(&addresses, own).await;
                let tried = !matches!(opened, Err(ConnectError::Silent));
                (opened.map_err(|error| error.to_string()), tried, self.connector.pause(&addresses))
            }
            Err(error) => (Err(format!("the job's addresses cannot be read: {error}")), false, Duration::ZERO),
        };
        let mut session = match opened {
            Ok(session) => session,
            Err(error) => {
                let known = self.decode_workers.borrow().clone();
                let alive = is_listed(&known, decode, &addresses);
                tracing::warn!(worker = %decode, %error, alive, "no session to a decode worker");
                // That it is missing says nothing before the set is known; then the job comes again, until it was tried
                // enough.
                let gone = !alive && !known.is_empty();
                if tried && !gone {
                    lock(&self.borrowing).miss(decode);
                }
                return lock(&self.borrowing).on(BorrowerEvent::ConnectFailed { decode, gone, pause });
            }
        };
        let id = session.id();
        lock(&self.borrowing).connected(decode, &session);
        let outlived = self.outlived(decode);
        tokio::pin!(outlived);
        loop {
            let message = tokio::select! {
                message = session.receive() => message,
                () = &mut outlived => {
                    tracing::info!(worker = %decode, "its lease has gone: its session is of no more use");
                    break;
                }
            };
            let Some(message) = message else { break };
            match ToPrefill::decode(&message) {
                Ok(message) => lock(&self.borrowing).on(BorrowerEvent::Message { session: id, message }),
                Err(error) => {
                    tracing::warn!(worker = %decode, %error, "a decode worker is left");
                    break;
                }
            }
        }
        tracing::info!(worker = %decode, "the session to a decode worker ended");
        // The writer stops first: what is said to be over must be.
        drop(session);
        lock(&self.borrowing).disconnected(id);
    }

    /// Returns when a decode worker's lease has gone and no job of it is left. If it lives on it does so under another
    /// lease, and later jobs open a session by that name.
    async fn outlived(&self, decode: WorkerId) {
        let mut alive = self.decode_workers.clone();
        // One that is not known yet may be soon.
        let _ = timeout(CONNECT_TIME_MAX, alive.wait_for(|alive| alive.contains_key(&decode))).await;
        // While nobody is known, that says nothing of any.
        let gone = alive.wait_for(|alive| !alive.is_empty() && !alive.contains_key(&decode)).await.is_ok();
        if !gone {
            // Nobody looks any more.
            return std::future::pending().await;
        }
        while lock(&self.borrowing).holds_of(decode) {
            sleep(TICK).await;
        }
    }
}

/// Whether a job's decode worker is alive: under the lease that the job names, or where it takes sessions, if it has
/// lost that lease and is back under another.
fn is_listed(workers: &WorkerSet, decode: WorkerId, addresses: &serde_json::Value) -> bool {
    let instance = SessionAddresses::instance_of(addresses);
    let is_back = |card: &Arc<WorkerCard>| SessionAddresses::instance_of(&card.session) == instance;
    workers.contains_key(&decode) || (instance.is_some() && workers.values().any(is_back))
}

/// Returns when no job is held any more.
pub(super) async fn emptied(borrowing: &SharedBorrowing) {
    let room_changed = lock(borrowing).room_changed();
    while lock(borrowing).held() > 0 {
        // That may have been told to the one who pulls.
        let _ = timeout(TICK, room_changed.notified()).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cluster::{Role, tests::card};

    #[test]
    fn a_decode_worker_that_is_back_under_another_lease_is_known_by_where_it_takes_sessions() {
        let at = |instance: &str| json!({ "instance": instance });
        let carded =
            |session| Arc::new(WorkerCard { session, ..card(Role::Decode, ModelKey::of(b"m"), "10.0.0.1:8000") });
        let workers = WorkerSet::from([(WorkerId(2), carded(at("one"))), (WorkerId(3), carded(Value::Null))]);
        for (lease, addresses, expected) in
            [(2, at("another"), true), (1, at("one"), true), (1, at("another"), false), (1, Value::Null, false)]
        {
            assert_eq!(is_listed(&workers, WorkerId(lease), &addresses), expected, "{lease} {addresses}");
        }
    }
}
