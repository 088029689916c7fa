use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

const TICK: Duration = Duration::from_millis(50);

/// Time in which this process ran: counted, so that a test which was itself stopped for a while, with all its processes,
/// blames nobody for it.
#[derive(Clone)]
pub(crate) struct Clock(Arc<AtomicU64>);

impl Clock {
    pub(crate) fn start() -> Self {
        let ticks = Arc::new(AtomicU64::new(0));
        let counted = Arc::downgrade(&ticks);
        thread::spawn(move || {
            while let Some(ticks) = counted.upgrade() {
                ticks.fetch_add(1, Ordering::Relaxed);
                drop(ticks);
                thread::sleep(TICK);
            }
        });
        Self(ticks)
    }

    pub(crate) fn now(&self) -> Duration {
        TICK * self.0.load(Ordering::Relaxed) as u32
    }

    /// Sleeps, but not beyond a time.
    pub(crate) fn rest(&self, time: Duration, until: Duration) {
        thread::sleep(time.min(until.saturating_sub(self.now())));
    }
}
