use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How long a decode worker that did not answer is left alone, the first time and at most: twice as long each time.
/// Less than its jobs wait to be claimed ([`unclaimed`](crate::handoff::LenderTimeouts::unclaimed)).
const PAUSE: [Duration; 2] = [Duration::from_secs(5), Duration::from_secs(10)];

/// Decode workers that did not answer when they were called. That takes long to find out, which not each of their jobs
/// has to.
#[derive(Default)]
pub(super) struct Silent(Mutex<HashMap<String, Silence>>);

struct Silence {
    until: Instant,
    pause: Duration,
}

impl Silent {
    /// For how much longer this one is left alone.
    pub(super) fn pause(&self, instance: &str) -> Duration {
        let left = |silence: &Silence| silence.until.saturating_duration_since(Instant::now());
        self.lock().get(instance).map(left).unwrap_or_default()
    }

    /// It did not answer.
    pub(super) fn insert(&self, instance: &str) {
        let ([first, longest], now) = (PAUSE, Instant::now());
        let mut silent = self.lock();
        // Those that nobody has called since are forgotten.
        silent.retain(|_, silence| now < silence.until + longest);
        let pause = silent.get(instance).map_or(first, |silence| longest.min(2 * silence.pause));
        silent.insert(instance.to_owned(), Silence { until: now + pause, pause });
    }

    /// It answered, whatever it was.
    pub(super) fn remove(&self, instance: &str) {
        self.lock().remove(instance);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Silence>> {
        // Nothing is left half done in it by a panic.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
