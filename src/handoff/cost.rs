use std::time::Duration;

/// What handoffs have cost lately: exponentially weighted means, for [`Policy::Auto`](super::Policy::Auto).
///
/// They are forgotten after a minute without a handoff, since a queue that was slow once, and is avoided for it, would
/// otherwise stay slow for ever.
#[derive(Debug, Clone, Default)]
pub struct HandoffCosts {
    /// Seconds from the grant to the mailbox word, for each token: computing, and what of the transfer does not hide
    /// behind it.
    token: Option<f64>,
    /// Seconds a job waits, for each place in the queue.
    queue_place: Option<f64>,
    observed: Option<Duration>,
}

/// After that long, what was measured of handoffs says nothing about the next.
const STALE_AFTER: Duration = Duration::from_secs(60);
/// What the latest handoff counts for in a mean.
const WEIGHT: f64 = 0.2;

impl HandoffCosts {
    /// A handoff was claimed `queued` after it was enqueued with `ahead` other jobs for each prefill worker, and its
    /// `tokens` were here `granted` after the grant.
    pub fn observe(&mut self, ahead: u64, queued: Duration, tokens: u32, granted: Duration, now: Duration) {
        if self.is_stale(now) {
            *self = Self::default();
        }
        mean(&mut self.queue_place, queued.as_secs_f64() / (ahead + 1) as f64);
        mean(&mut self.token, granted.as_secs_f64() / f64::from(tokens.max(1)));
        self.observed = Some(now);
    }

    /// Until the first token of a prompt that is handed off now, behind `ahead` other jobs for each prefill worker.
    pub(super) fn expect(&self, tokens: u32, ahead: u64, now: Duration) -> Option<Duration> {
        if self.is_stale(now) {
            return None;
        }
        let seconds = (ahead + 1) as f64 * self.queue_place? + f64::from(tokens) * self.token?;
        Duration::try_from_secs_f64(seconds).ok()
    }

    fn is_stale(&self, now: Duration) -> bool {
        self.observed.is_none_or(|observed| now.saturating_sub(observed) > STALE_AFTER)
    }
}

fn mean(mean: &mut Option<f64>, sample: f64) {
    *mean = Some(mean.map_or(sample, |mean| mean + (sample - mean) * WEIGHT));
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn costs(queued_ms: u64) -> HandoffCosts {
        let mut costs = HandoffCosts::default();
        costs.observe(1, Duration::from_millis(queued_ms), 1_000, Duration::from_millis(500), NOW);
        costs
    }

    #[test]
    fn a_prompt_waits_for_those_before_it_and_takes_time_for_each_token() {
        assert_eq!(costs(200).expect(2_000, 2, NOW), Some(Duration::from_millis(3 * 100 + 1_000)));
        assert_eq!(HandoffCosts::default().expect(2_000, 2, NOW), None);
    }

    #[test]
    fn a_mean_follows_its_samples_and_is_forgotten_after_a_minute() {
        let mut costs = costs(200);
        for _ in 0..50 {
            costs.observe(0, Duration::from_secs(1), 1_000, Duration::ZERO, NOW);
        }
        let expected = costs.expect(1_000, 0, NOW).unwrap();
        assert!(expected > Duration::from_millis(995) && expected < Duration::from_millis(1_005), "{expected:?}");
        let later = NOW + Duration::from_secs(61);
        assert_eq!(costs.expect(1_000, 0, later), None);
        costs.observe(0, Duration::from_secs(9), 1_000, Duration::ZERO, later);
        assert_eq!(costs.expect(1_000, 0, later), Some(Duration::from_secs(9)));
    }
}
