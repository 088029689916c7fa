use std::{sync::Arc, time::Duration};

use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::LeaseId;

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

/// Reports as they come, each with whom it is about.
pub type LoadStream = BoxStream<'static, (LeaseId, LoadReport)>;

/// Tells how busy workers are. Reports are hints: each may be lost, and none is waited for.
pub trait Loads: Send + Sync {
    /// Tells the others. Never blocks.
    fn report(&self, lease: LeaseId, report: &LoadReport);

    /// Everybody's reports from now on.
    fn reports(&self) -> LoadStream;
}

/// How often load is looked at.
const REPORT_PERIOD: Duration = Duration::from_millis(100);
/// An unchanged load is repeated after so many periods, for those who have come since.
const REPEAT_PERIODS: u32 = 10;

/// Publishes what `sample` returns, ten times a second while it changes and once a second while it does not, until the
/// lease's holder is gone.
pub async fn report_load(
    loads: Arc<dyn Loads>,
    mut lease: watch::Receiver<Option<LeaseId>>,
    sample: impl Fn() -> LoadReport + Send,
) {
    let mut ticks = tokio::time::interval(REPORT_PERIOD);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut last = None;
    let mut unchanged = 0;
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
        unchanged += 1;
        if last != Some((id, report)) || unchanged >= REPEAT_PERIODS {
            loads.report(id, &report);
            last = Some((id, report));
            unchanged = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_with_fewer_or_more_fields_is_read() {
        let report: LoadReport = serde_json::from_str(r#"{"running": 3, "mood": "fine"}"#).unwrap();
        assert_eq!(report, LoadReport { running: 3, ..LoadReport::default() });
    }
}
