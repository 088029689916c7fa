use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

const TICK: Duration = Duration::from_millis(50);
/// A tick that takes this long: the process was stopped. No machine is that busy.
const GAP: Duration = Duration::from_secs(4);
/// After such a gap connections time out, leases run out and workers are given up, for so long.
const RECOVERY: Duration = Duration::from_secs(40);

/// Time in which this process ran: counted, so that a test which was itself stopped for a while, with all its
/// processes, blames nobody for it.
#[derive(Clone)]
pub(crate) struct Clock(Arc<Ticks>);

#[derive(Default)]
struct Ticks {
    all: AtomicU64,
    /// Until which tick the last gap excuses things.
    excused: AtomicU64,
}

fn ticks(time: Duration) -> u64 {
    (time.as_millis() / TICK.as_millis()) as u64
}

impl Clock {
    pub(crate) fn start() -> Self {
        let counted = Arc::new(Ticks::default());
        let counting = Arc::downgrade(&counted);
        thread::spawn(move || {
            while let Some(counted) = counting.upgrade() {
                let now = 1 + counted.all.fetch_add(1, Ordering::Relaxed);
                let before = Instant::now();
                thread::sleep(TICK);
                if before.elapsed() > GAP {
                    println!("this test was stopped for {:?}", before.elapsed());
                    counted.excused.store(now + ticks(RECOVERY), Ordering::Relaxed);
                }
            }
        });
        Self(counted)
    }

    pub(crate) fn now(&self) -> Duration {
        TICK * self.0.all.load(Ordering::Relaxed) as u32
    }

    /// Whether this process was stopped a while ago.
    pub(crate) fn excuses(&self) -> bool {
        self.0.all.load(Ordering::Relaxed) < self.0.excused.load(Ordering::Relaxed)
    }

    /// Sleeps, but not beyond a time.
    pub(crate) fn rest(&self, time: Duration, until: Duration) {
        thread::sleep(time.min(until.saturating_sub(self.now())));
    }
}
