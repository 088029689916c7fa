use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
    time::Duration,
};

use futures::StreamExt;
use tokio::{sync::watch, time::Instant};

use super::{
    FrontendMetrics,
    worker::{Worker, watch_over},
};
use crate::cluster::{LoadStream, Role, WorkerCard, WorkerId, WorkerSet};

/// The decode workers that are alive.
pub(super) struct Table {
    /// By lease, of which a process that was started again may have several for a while.
    workers: BTreeMap<WorkerId, Arc<Worker>>,
    /// Who serves a model, every process once.
    by_name: HashMap<String, Vec<Arc<Worker>>>,
    /// Models that nobody serves any more, and since when. They may be back in a moment: a worker is started anew, or
    /// an etcd that stood still for longer than a lease goes on, lets go of all workers, and they register again. Those
    /// that went longer ago than `patience` are forgotten.
    gone: HashMap<String, Instant>,
    /// How long requests wait for a model to come back.
    patience: Duration,
}

impl Table {
    pub(super) fn new(patience: Duration) -> Self {
        Self { workers: BTreeMap::new(), by_name: HashMap::new(), gone: HashMap::new(), patience }
    }

    /// The table for `live`, with the workers that were known before.
    fn next(&self, live: &WorkerSet) -> Self {
        let mut table = Self::new(self.patience);
        for (&lease, card) in live.iter().filter(|(_, card)| card.role == Role::Decode) {
            let known = self.workers.get(&lease).filter(|worker| worker.card == *card).cloned();
            let worker = known.unwrap_or_else(|| {
                let model = card.model.names.join(",");
                tracing::info!(worker = %lease, address = card.address, model, "a decode worker");
                let worker = Worker::new(lease, card.clone());
                tokio::spawn(watch_over(Arc::downgrade(&worker)));
                worker
            });
            table.workers.insert(lease, worker);
        }
        // A process that is back at its address is there under its old lease too until that runs out, which an etcd
        // that is started again puts off. Whatever is sent to either, one process gets it, unless it has another model.
        let mut newest = BTreeMap::new();
        for worker in table.workers.values() {
            let WorkerCard { address, model, model_key, .. } = &*worker.card;
            for name in &model.names {
                let known = newest.entry((name, address, *model_key)).or_insert(worker);
                if worker.started >= known.started {
                    *known = worker;
                }
            }
        }
        for ((name, ..), worker) in newest {
            table.by_name.entry(name.clone()).or_default().push(worker.clone());
        }
        for (lease, _) in self.workers.iter().filter(|(lease, _)| !table.workers.contains_key(lease)) {
            tracing::info!(worker = %lease, "a decode worker has gone");
        }
        let now = Instant::now();
        let before = self.gone.iter().map(|(name, &since)| (name, since));
        let gone = before.chain(self.by_name.keys().map(|name| (name, now)));
        let missed = gone.filter(|(name, since)| !table.by_name.contains_key(*name) && self.is_expected(*since));
        table.gone = missed.map(|(name, since)| (name.clone(), since)).collect();
        table
    }

    /// Whether those who went then may be back in a moment.
    fn is_expected(&self, since: Instant) -> bool {
        since.elapsed() < self.patience
    }

    /// Whether the last worker of `model` went a moment ago and none has come since; without a name, the last of all.
    pub(super) fn misses(&self, model: Option<&str>) -> bool {
        match model {
            Some(model) => self.gone.get(model).is_some_and(|&since| self.is_expected(since)),
            None => self.workers.is_empty() && self.gone.values().any(|&since| self.is_expected(since)),
        }
    }

    /// The workers that serve `model`, or, without a name, the only model there is: of one name, or of one key.
    pub(super) fn serving(&self, model: Option<&str>) -> Serving<'_> {
        let Some(first) = self.workers.values().next() else {
            return Serving::Nobody;
        };
        match model {
            Some(model) => match self.by_name.get(model) {
                Some(workers) => Serving::By(workers),
                None if self.misses(Some(model)) => Serving::Nobody,
                None => Serving::Unknown,
            },
            None => {
                let name = first.card.model.names.first();
                // While workers are updated one by one, those of one name have different keys.
                let is_same = |worker: &Arc<Worker>| {
                    worker.card.model_key == first.card.model_key || worker.card.model.names.first() == name
                };
                match name.and_then(|name| self.by_name.get(name)) {
                    Some(workers) if self.workers.values().all(is_same) => Serving::By(workers),
                    _ => Serving::Ambiguous,
                }
            }
        }
    }

    /// Any worker, to tell a client what is wrong with its request.
    pub(super) fn anybody(&self) -> Vec<Arc<Worker>> {
        self.workers.values().cloned().collect()
    }

    /// The models served, by name, each with one of the cards.
    pub(super) fn models(&self) -> BTreeMap<&str, &WorkerCard> {
        let cards = self.by_name.iter().filter_map(|(name, workers)| Some((name.as_str(), &*workers.first()?.card)));
        cards.collect()
    }

    /// How many workers there are.
    pub(super) fn len(&self) -> usize {
        self.workers.len()
    }
}

/// Who serves a model.
pub(super) enum Serving<'a> {
    /// These do.
    By(&'a [Arc<Worker>]),
    /// There are workers, for other models.
    Unknown,
    /// The request names no model, and there are several.
    Ambiguous,
    /// There is no worker at all, or those of this model went a moment ago.
    Nobody,
}

/// Keeps a table of the live workers, and of how busy they are, until the last reader is gone.
pub(super) fn follow(
    mut live: watch::Receiver<Arc<WorkerSet>>,
    mut loads: LoadStream,
    patience: Duration,
    metrics: FrontendMetrics,
) -> watch::Receiver<Arc<Table>> {
    let first = Arc::new(Table::new(patience).next(&live.borrow_and_update()));
    metrics.workers.set(first.len() as i64);
    let (sender, receiver) = watch::channel(first);
    tokio::spawn(async move {
        let mut reports_end = false;
        loop {
            tokio::select! {
                changed = live.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let table = sender.borrow().next(&live.borrow_and_update());
                    let count = table.len();
                    sender.send_replace(Arc::new(table));
                    // Only now: whoever reads it finds them.
                    metrics.workers.set(count as i64);
                }
                report = loads.next(), if !reports_end => match report {
                    Some((lease, report)) => {
                        if let Some(worker) = sender.borrow().workers.get(&lease) {
                            worker.note(&report);
                        }
                    }
                    None => reports_end = true,
                },
                () = sender.closed() => return,
            }
        }
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ModelKey, tests::card};

    #[tokio::test(start_paused = true)]
    async fn a_model_is_missed_for_a_while_after_its_last_worker_went() {
        const PATIENCE: Duration = Duration::from_secs(10);
        let live = |workers: &[(u64, &str)]| -> WorkerSet {
            let card = |model: &str| {
                let mut card = card(Role::Decode, ModelKey::of(model.as_bytes()), "127.0.0.1:1");
                card.model.names = vec![model.into()];
                Arc::new(card)
            };
            workers.iter().map(|&(lease, model)| (WorkerId(lease), card(model))).collect()
        };
        let table = Table::new(PATIENCE).next(&live(&[(1, "a"), (2, "a"), (3, "b")]));
        let table = table.next(&live(&[(2, "a"), (3, "b")]));
        assert!(!table.misses(Some("a")), "one is left");
        let table = table.next(&live(&[(3, "b")]));
        assert!(table.misses(Some("a")) && !table.misses(Some("x")) && !table.misses(None));
        assert!(matches!(table.serving(Some("a")), Serving::Nobody));
        assert!(matches!(table.serving(Some("x")), Serving::Unknown));
        tokio::time::advance(PATIENCE / 2).await;
        let table = table.next(&live(&[]));
        assert!(table.misses(Some("a")) && table.misses(Some("b")) && table.misses(None));
        tokio::time::advance(PATIENCE / 2).await;
        assert!(!table.misses(Some("a")) && table.misses(Some("b")) && table.misses(None));
        let table = table.next(&live(&[(4, "b")]));
        assert!(matches!(table.serving(Some("a")), Serving::Unknown));
        assert!(table.gone.is_empty(), "one is back, the other forgotten");
    }

    #[tokio::test]
    async fn a_request_that_names_no_model_is_for_the_only_name_whatever_weights_it_stands_for() {
        let serving = |workers: &[(&str, &str)]| {
            let card = |port: u64, weights: &str, name: &str| {
                let mut card = card(Role::Decode, ModelKey::of(weights.as_bytes()), &format!("127.0.0.1:{port}"));
                card.model.names = vec![name.into()];
                Arc::new(card)
            };
            let live = (1..).zip(workers).map(|(at, &(weights, name))| (WorkerId(at), card(at, weights, name)));
            let live: WorkerSet = live.collect();
            let table = Table::new(Duration::ZERO).next(&live);
            match table.serving(None) {
                Serving::By(workers) => Some(workers.len()),
                _ => None,
            }
        };
        assert_eq!(serving(&[("old", "a"), ("new", "a"), ("old", "a")]), Some(3), "in the midst of an update");
        assert_eq!(serving(&[("w", "a"), ("w", "b")]), Some(1), "one model under two names");
        assert_eq!(serving(&[("v", "a"), ("w", "b")]), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_process_is_asked_under_the_lease_that_came_last_and_under_each_name_that_it_has_or_had() {
        let card = |weights: &str, port: u64, names: &[&str]| {
            let mut card = card(Role::Decode, ModelKey::of(weights.as_bytes()), &format!("127.0.0.1:{port}"));
            card.model.names = names.iter().map(ToString::to_string).collect();
            Arc::new(card)
        };
        let leases = |table: &Table, name: &str| {
            let mut leases: Vec<u64> = table.by_name[name].iter().map(|worker| worker.lease.0).collect();
            leases.sort_unstable();
            leases
        };
        let old = [(5, card("w", 1, &["a", "b"])), (6, card("w", 2, &["a"]))];
        // A lease's number says nothing of when it was granted, unless both are found at once.
        let new = [(3, card("w", 1, &["a"])), (4, card("w", 1, &["a", "c"])), (7, card("v", 1, &["a"]))];
        let live = |workers: &[(u64, Arc<WorkerCard>)]| -> WorkerSet {
            workers.iter().map(|(lease, card)| (WorkerId(*lease), card.clone())).collect()
        };
        let table = Table::new(Duration::ZERO).next(&live(&old));
        assert_eq!((leases(&table, "a"), leases(&table, "b")), (vec![5, 6], vec![5]));
        tokio::time::advance(Duration::from_secs(1)).await;
        let table = table.next(&live(&[&old[..], &new].concat()));
        assert_eq!(leases(&table, "a"), [4, 6, 7], "another model at the same address is another worker");
        assert_eq!((leases(&table, "b"), leases(&table, "c")), (vec![5], vec![4]));
        assert_eq!(table.len(), 5);
    }
}
