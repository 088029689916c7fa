//! The live workers, from the keys they register.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::Bytes;
use tokio::sync::watch;

use super::mirror::{Change, Mirror};
use crate::cluster::{WorkerCard, WorkerFilter, WorkerId, WorkerSet};

/// Follows `mirror` and tells `told` the workers in it until nobody listens.
pub(super) async fn watch(
    mut mirror: Mirror,
    filter: WorkerFilter,
    lease_ttl: Duration,
    told: watch::Sender<Arc<WorkerSet>>,
) {
    let mut workers = Workers::new(filter, lease_ttl);
    loop {
        let deadline = workers.next_deadline();
        let forget = async {
            match deadline {
                Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            change = mirror.next() => workers.apply(change, Instant::now()),
            () = forget => match mirror.is_following() {
                true => workers.forget(Instant::now()),
                // Nor can anybody register.
                false => workers.put_off(Instant::now()),
            },
            () = told.closed() => return,
        }
        if mirror.has_more() {
            continue;
        }
        told.send_if_modified(|known| {
            let changed = **known != workers.live;
            if changed {
                *known = Arc::new(workers.live.clone());
            }
            changed
        });
    }
}

/// The live set, from changes of keys. Pure: the clock is an argument.
struct Workers {
    filter: WorkerFilter,
    live: WorkerSet,
    /// Workers that a store which lost its data does not know. They are most likely alive and about to register again,
    /// so they stay until then, or until this time.
    doubtful: BTreeMap<WorkerId, Instant>,
    /// Twice a lease's life with a store that can be reached: by then whoever lives has noticed the loss of its lease
    /// and registered again.
    patience: Duration,
}

impl Workers {
    fn new(filter: WorkerFilter, lease_ttl: Duration) -> Self {
        Self { filter, live: WorkerSet::new(), doubtful: BTreeMap::new(), patience: 2 * lease_ttl }
    }

    fn apply(&mut self, change: Change, now: Instant) {
        match change {
            Change::Put { key, value } => self.put(&key, &value),
            Change::Delete { key } => {
                if let Some(id) = lease_of(&key) {
                    self.remove(id);
                }
            }
            Change::All { entries, continuous } => {
                let listed: Vec<_> = entries.iter().filter_map(|(key, _)| lease_of(key)).collect();
                let missing: Vec<_> = self.live.keys().copied().filter(|id| !listed.contains(id)).collect();
                for id in missing {
                    if continuous {
                        self.remove(id);
                    } else {
                        // The store may have been away since the last list.
                        self.doubtful.insert(id, now + self.patience);
                    }
                }
                for (key, value) in entries {
                    self.put(&key, &value);
                }
            }
        }
    }

    fn put(&mut self, key: &str, value: &Bytes) {
        let Some(id) = lease_of(key) else {
            tracing::warn!(key, "a worker's key in etcd does not end in a lease id; ignored");
            return;
        };
        let card = match WorkerCard::from_json(value) {
            Ok(card) => card,
            Err(error) => {
                tracing::warn!(key, error, "a worker's card cannot be read; the worker is ignored");
                self.remove(id);
                return;
            }
        };
        if !self.filter.matches(&card) {
            return;
        }
        // The same worker back again: what stood in for it is no longer needed.
        let succeeded = |known: &WorkerCard| known.role == card.role && known.address == card.address;
        self.doubtful.remove(&id);
        let replaced: Vec<_> = self
            .doubtful
            .keys()
            .copied()
            .filter(|id| self.live.get(id).is_some_and(|known| succeeded(known)))
            .collect();
        for id in replaced {
            self.remove(id);
        }
        self.live.insert(id, Arc::new(card));
    }

    fn remove(&mut self, id: WorkerId) {
        self.live.remove(&id);
        self.doubtful.remove(&id);
    }

    fn next_deadline(&self) -> Option<Instant> {
        self.doubtful.values().min().copied()
    }

    /// Gives all that are doubtful as much time as if the store had lost its data now.
    fn put_off(&mut self, now: Instant) {
        let until = now + self.patience;
        self.doubtful.values_mut().for_each(|deadline| *deadline = until);
    }

    fn forget(&mut self, now: Instant) {
        let over: Vec<_> = self.doubtful.iter().filter(|(_, deadline)| **deadline <= now).map(|(id, _)| *id).collect();
        for id in over {
            self.remove(id);
        }
    }
}

pub(super) fn lease_of(key: &str) -> Option<WorkerId> {
    key.rsplit('/').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{ModelKey, Role, card::tests::card};

    const TTL: Duration = Duration::from_secs(10);

    fn entry(id: u64, address: &str) -> (String, Bytes) {
        let card = card(Role::Decode, ModelKey::of(b"m"), address);
        (format!("/engine/n/workers/k/decode/{}", WorkerId(id)), card.to_json().into())
    }

    fn put(id: u64, address: &str) -> Change {
        let (key, value) = entry(id, address);
        Change::Put { key, value }
    }

    fn all(entries: &[(u64, &str)], continuous: bool) -> Change {
        Change::All { entries: entries.iter().map(|(id, address)| entry(*id, address)).collect(), continuous }
    }

    fn ids(workers: &Workers) -> Vec<u64> {
        workers.live.keys().map(|id| id.0).collect()
    }

    #[test]
    fn a_list_after_compaction_takes_away_what_is_not_in_it() {
        let mut workers = Workers::new(WorkerFilter::default(), TTL);
        let now = Instant::now();
        workers.apply(all(&[(1, "a:1"), (2, "b:1")], true), now);
        workers.apply(all(&[(2, "b:1"), (3, "c:1")], true), now);
        assert_eq!(ids(&workers), [2, 3]);
    }

    #[test]
    fn an_empty_store_takes_away_nobody_until_there_was_time_to_come_back() {
        let mut workers = Workers::new(WorkerFilter::default(), TTL);
        let now = Instant::now();
        workers.apply(all(&[(1, "a:1"), (2, "b:1")], true), now);
        workers.apply(all(&[], false), now);
        assert_eq!(ids(&workers), [1, 2]);
        workers.apply(put(7, "a:1"), now);
        assert_eq!(ids(&workers), [2, 7], "the one that came back is there once");
        workers.forget(now + 2 * TTL);
        assert_eq!(ids(&workers), [7], "the other did not come back");
        assert_eq!(workers.next_deadline(), None);
    }

    #[test]
    fn while_an_empty_store_is_away_nobody_can_register_and_nobody_is_forgotten() {
        let mut workers = Workers::new(WorkerFilter::default(), TTL);
        let mut now = Instant::now();
        workers.apply(all(&[(1, "a:1")], true), now);
        workers.apply(all(&[], false), now);
        for _ in 0..3 {
            now += 2 * TTL;
            assert_eq!(workers.next_deadline(), Some(now));
            workers.put_off(now);
            workers.forget(now);
            assert_eq!(ids(&workers), [1]);
        }
        // It is back, and away for a while once more, and back again.
        for _ in 0..3 {
            now += TTL;
            workers.apply(all(&[], false), now);
        }
        assert_eq!(workers.next_deadline(), Some(now + 2 * TTL));
        workers.forget(now + 2 * TTL);
        assert_eq!(ids(&workers), [0; 0]);
    }

    #[test]
    fn a_worker_that_restarts_under_its_old_address_is_a_second_one_until_the_first_lease_is_over() {
        let mut workers = Workers::new(WorkerFilter::default(), TTL);
        let now = Instant::now();
        workers.apply(put(1, "a:1"), now);
        workers.apply(put(2, "a:1"), now);
        assert_eq!(ids(&workers), [1, 2]);
        workers.apply(Change::Delete { key: entry(1, "").0 }, now);
        assert_eq!(ids(&workers), [2]);
    }

    #[test]
    fn what_cannot_be_read_is_left_out() {
        let mut workers = Workers::new(WorkerFilter::role(Role::Decode), TTL);
        let now = Instant::now();
        workers.apply(Change::Put { key: entry(1, "").0, value: Bytes::from_static(b"{}") }, now);
        workers.apply(Change::Put { key: "/engine/n/workers/readme".into(), value: entry(1, "").1 }, now);
        let prefill = card(Role::Prefill, ModelKey::of(b"m"), "p:1").to_json();
        workers.apply(Change::Put { key: entry(3, "").0, value: prefill.into() }, now);
        assert_eq!(ids(&workers), [0; 0]);
    }
}
