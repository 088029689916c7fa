//! Ends a process whose device hangs.

use std::{num::NonZeroU64, time::Duration};

use tokio::time::{MissedTickBehavior, interval};

use crate::engine::EngineHandle;

/// How often one looks.
const LOOK_PERIOD: Duration = Duration::from_secs(1);

/// Ends the process once a step has taken `step_time_max`; without that, never. A device that hangs does not say so:
/// the engine thread waits for it, all requests wait behind that, and `/health` is fine. Of a process that ends,
/// everybody knows what to think: whoever looks after it starts it again, answers in progress go on at other workers,
/// and prompts are prefilled elsewhere.
pub(super) fn watch(engine: &EngineHandle, step_time_max: Option<Duration>) {
    let Some(limit) = step_time_max.filter(|limit| !limit.is_zero()) else { return };
    let engine = engine.clone();
    tokio::spawn(async move {
        hung(|| engine.step_under_way(), limit).await;
        tracing::error!(
            "a step has not ended within {} s: the device must hang, and this process ends (--step-timeout)",
            limit.as_secs_f64()
        );
        // SAFETY: it takes a number and does not return. An orderly end would wait for the engine thread, and the
        // driver's for the device.
        unsafe { libc::_exit(1) }
    });
}

/// Returns when one and the same step has been under way for `limit`. That is counted in looks and not by the clock: a
/// process that was stopped for a while, and goes on, has computed nothing in the meantime.
async fn hung(step_under_way: impl Fn() -> Option<NonZeroU64>, limit: Duration) {
    let mut looks = interval(LOOK_PERIOD);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut seen, mut time) = (None, Duration::ZERO);
    while time < limit {
        looks.tick().await;
        let step = step_under_way();
        time = if step.is_some() && step == seen { time + LOOK_PERIOD } else { Duration::ZERO };
        seen = step;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use tokio::time::{Instant, timeout};

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_step_that_does_not_end_is_noticed() {
        let looks = Cell::new(0);
        let started = Instant::now();
        // Others come before it.
        let step = || {
            looks.set(looks.get() + 1);
            NonZeroU64::new(looks.get().min(5))
        };
        hung(step, LIMIT).await;
        assert_eq!(started.elapsed(), LIMIT + 4 * LOOK_PERIOD);
    }

    #[tokio::test(start_paused = true)]
    async fn neither_steps_that_follow_each_other_nor_waiting_for_work_is_taken_for_it() {
        let looks = Cell::new(0);
        let step = || {
            looks.set(looks.get() + 1);
            NonZeroU64::new(looks.get())
        };
        assert!(timeout(100 * LIMIT, hung(step, LIMIT)).await.is_err());
        assert!(timeout(100 * LIMIT, hung(|| None, LIMIT)).await.is_err());
    }
}
