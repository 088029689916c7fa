use std::{sync::Arc, time::Duration};

use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::WorkerId;

/// How busy a worker is. A reader ignores fields it does not know, and takes those that are missing for zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct LoadReport {
    /// Requests taking part in steps.
    pub running: u32,
    /// Requests accepted and not running.
    pub waiting: u32,
    /// Prompt tokens not computed yet, of all requests.
    pub prompt_tokens: u64,
    /// Sequences' tokens in the cache.
    pub cached_tokens: u64,
    /// KV pages free or evictable.
    pub pages_free: u32,
    /// All KV pages.
    pub pages: u32,
}

impl LoadReport {
    /// Whether there is as much to do as before. The cache, which fills a little with every token, is told along with
    /// that, up to a second late.
    fn is_like(&self, before: &Self) -> bool {
        let work = |report: &Self| (report.running, report.waiting, report.prompt_tokens);
        work(self) == work(before)
    }
}

/// Reports as they come, each with whom it is about.
pub type LoadStream = BoxStream<'static, (WorkerId, LoadReport)>;

/// Tells how busy workers are. Reports are hints: each may be lost, and none is waited for.
pub trait Loads: Send + Sync {
    /// Tells the others. Never blocks.
    fn report(&self, lease: WorkerId, report: &LoadReport);

    /// Everybody's reports from now on.
    fn reports(&self) -> LoadStream;
}

/// How often load is looked at.
const REPORT_PERIOD: Duration = Duration::from_millis(100);
/// A load like the one before is told after so many periods, for those who have come since.
const REPEAT_PERIODS: u32 = 10;

/// Publishes what `sample` returns, up to ten times a second while work comes and goes and once a second while it does
/// not, until the lease's holder is gone.
pub async fn report_load(
    loads: Arc<dyn Loads>,
    mut lease: watch::Receiver<Option<WorkerId>>,
    sample: impl Fn() -> LoadReport + Send,
) {
    let mut ticks = tokio::time::interval(REPORT_PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = None;
    let mut untold = 0;
    loop {
        ticks.tick().await;
        let Some(id) = *lease.borrow_and_update() else {
            if lease.changed().await.is_err() {
                return;
            }
            continue;
        };
        if lease.has_changed().is_err() {
            return;
        }
        let report = sample();
        untold += 1;
        let known = last.is_some_and(|(to, before)| to == id && report.is_like(&before));
        if !known || untold >= REPEAT_PERIODS {
            loads.report(id, &report);
            last = Some((id, report));
            untold = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{
        Mutex,
        atomic::{AtomicU32, Ordering},
    };

    use super::*;

    /// Keeps what is told.
    #[derive(Default)]
    struct Told(Mutex<Vec<LoadReport>>);

    impl Loads for Told {
        fn report(&self, _: WorkerId, report: &LoadReport) {
            self.0.lock().unwrap().push(*report);
        }

        fn reports(&self) -> LoadStream {
            Box::pin(futures::stream::empty())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_cache_that_fills_is_no_news_and_a_request_is() {
        let (told, asked, running) = (Arc::new(Told::default()), AtomicU32::new(0), Arc::new(AtomicU32::new(1)));
        let (_lease, lease) = watch::channel(Some(WorkerId(7)));
        let count = running.clone();
        let sample = move || LoadReport {
            running: count.load(Ordering::Relaxed),
            cached_tokens: u64::from(asked.fetch_add(1, Ordering::Relaxed)),
            ..LoadReport::default()
        };
        let reporting = tokio::spawn(report_load(told.clone(), lease, sample));
        tokio::time::sleep(Duration::from_millis(3_050)).await;
        let cached: Vec<u64> = told.0.lock().unwrap().iter().map(|report| report.cached_tokens).collect();
        assert_eq!(cached, [0, 10, 20, 30], "once a second");
        running.store(2, Ordering::Relaxed);
        tokio::time::sleep(REPORT_PERIOD).await;
        assert_eq!(told.0.lock().unwrap().last().unwrap().running, 2, "at once");
        reporting.abort();
    }

    #[test]
    fn a_report_with_fewer_or_more_fields_is_read() {
        let report: LoadReport = serde_json::from_str(r#"{"running": 3, "mood": "fine"}"#).unwrap();
        assert_eq!(report, LoadReport { running: 3, ..LoadReport::default() });
    }
}
