use std::{collections::BTreeMap, sync::Arc};

use bytes::Bytes;
use tokio::{
    sync::{oneshot, watch},
    task::JoinHandle,
};

use super::{ModelKey, Role, WorkerCard, WorkerId};

/// The live workers a watcher asked for.
pub type WorkerSet = BTreeMap<WorkerId, Arc<WorkerCard>>;

/// Who is alive, and the configuration they share. Its methods start background tasks on the current tokio runtime and
/// return at once, whether or not the service behind them can be reached.
pub trait Discovery: Send + Sync {
    /// Announces a worker until the lease is withdrawn or dropped.
    fn register(&self, card: WorkerCard) -> Lease;

    /// The live workers that match, kept up to date. Empty until they are known; while the service is away, what was
    /// known last.
    fn workers(&self, filter: WorkerFilter) -> watch::Receiver<Arc<WorkerSet>>;

    /// The live limits of a model, JSON as it was put, not looked into here; `None` while there are none.
    fn config(&self, key: ModelKey) -> watch::Receiver<Option<Bytes>>;
}

/// Which workers to watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WorkerFilter {
    /// Those of one model; `None`: of all.
    pub model_key: Option<ModelKey>,
    /// Those that do this; `None`: either.
    pub role: Option<Role>,
}

impl WorkerFilter {
    /// Workers of all models that do `role`.
    pub const fn role(role: Role) -> Self {
        Self { model_key: None, role: Some(role) }
    }

    /// Workers of one model that do `role`.
    pub const fn of(model_key: ModelKey, role: Role) -> Self {
        Self { model_key: Some(model_key), role: Some(role) }
    }

    /// Whether a worker is among those asked for.
    pub fn matches(&self, card: &WorkerCard) -> bool {
        self.model_key.is_none_or(|key| key == card.model_key) && self.role.is_none_or(|role| role == card.role)
    }
}

/// A registration in force. Dropping it withdraws it in the background.
#[derive(Debug)]
pub struct Lease {
    id: watch::Receiver<Option<WorkerId>>,
    /// Dropping it, or sending, ends the task.
    stop: Option<oneshot::Sender<()>>,
    task: Option<JoinHandle<()>>,
}

impl Lease {
    /// A lease that `task` keeps. It ends, having withdrawn the registration, when `stop`'s receiver resolves either
    /// way.
    pub(crate) fn new(id: watch::Receiver<Option<WorkerId>>, stop: oneshot::Sender<()>, task: JoinHandle<()>) -> Self {
        Self { id, stop: Some(stop), task: Some(task) }
    }

    /// The worker's incarnation: `None` until the first is granted, and then always the last one granted. A change
    /// means that the others have seen the worker disappear: whatever was agreed under the old id is void.
    pub fn id(&self) -> watch::Receiver<Option<WorkerId>> {
        self.id.clone()
    }

    /// Deregisters: the others see the worker go at once rather than when its lease runs out. Returns when that is done
    /// or clearly cannot be.
    pub async fn withdraw(mut self) {
        drop(self.stop.take());
        if let Some(task) = self.task.take() {
            // A task that panicked leaves a lease that runs out by itself.
            let _ = task.await;
        }
    }
}
