use std::time::Duration;

use super::Situation;

/// What prefilling has cost lately, here and remotely: exponentially weighted means, for [`Policy::Auto`](super::Policy::Auto).
///
/// Times predicted from it are seconds to the first token. Measurements of handoffs are forgotten after a minute without
/// one, since a queue that was slow once, and is avoided for it, would otherwise stay slow for ever.
#[derive(Debug, Clone, Default)]
pub struct CostModel {
    /// Seconds to compute a prompt token here.
    local_token: Mean,
    /// Seconds of a step that only decodes.
    decode_step: Mean,
    /// Seconds from the grant to the mailbox word, for each token: computing, and what of the transfer does not hide behind it.
    remote_token: Mean,
    /// Seconds a job waits, for each place in the queue.
    queue_place: Mean,
    handoff_observed: Option<Duration>,
}

/// After that long, what was measured of handoffs says nothing about the next.
const STALE_AFTER: Duration = Duration::from_secs(60);

/// Exponentially weighted: each sample counts for a fifth.
#[derive(Debug, Clone, Copy, Default)]
struct Mean(Option<f64>);

impl Mean {
    fn observe(&mut self, sample: f64) {
        self.0 = Some(self.0.map_or(sample, |mean| mean + (sample - mean) / 5.0));
    }
}

impl CostModel {
    /// A step of this worker took so long and computed so many prompt tokens, perhaps none, beside what it decoded.
    pub fn observe_step(&mut self, prompt_tokens: u32, took: Duration) {
        if prompt_tokens == 0 {
            self.decode_step.observe(took.as_secs_f64());
        } else {
            let prefill = took.as_secs_f64() - self.decode_step.0.unwrap_or(0.0);
            self.local_token.observe(prefill.max(0.0) / f64::from(prompt_tokens));
        }
    }

    /// A handoff was claimed `queued` after it was enqueued with `ahead` other jobs for each prefill worker, and its
    /// `tokens` were here `granted` after the grant.
    pub fn observe_handoff(&mut self, ahead: u64, queued: Duration, tokens: u32, granted: Duration, now: Duration) {
        if self.is_stale(now) {
            (self.remote_token, self.queue_place) = Default::default();
        }
        self.queue_place.observe(queued.as_secs_f64() / (ahead + 1) as f64);
        self.remote_token.observe(granted.as_secs_f64() / f64::from(tokens.max(1)));
        self.handoff_observed = Some(now);
    }

    /// Until the first token, if it is prefilled here.
    pub(super) fn local(&self, situation: &Situation) -> Option<Duration> {
        let tokens = situation.backlog_tokens as f64 + f64::from(situation.uncached_tokens);
        let steps = (tokens / f64::from(situation.chunk_tokens.max(1))).ceil();
        let decoding = if situation.running > 0 { steps * self.decode_step.0.unwrap_or(0.0) } else { 0.0 };
        seconds(tokens * self.local_token.0? + decoding)
    }

    /// Until the first token, if it is prefilled remotely.
    pub(super) fn remote(&self, situation: &Situation, queue_depth: u64, now: Duration) -> Option<Duration> {
        if self.is_stale(now) {
            return None;
        }
        let places = (queue_depth / u64::from(situation.prefill_workers.max(1)) + 1) as f64;
        let computing = f64::from(situation.uncached_tokens) * self.remote_token.0?;
        seconds(places * self.queue_place.0? + computing)
    }

    /// Between two tokens of the requests that run, while this one is prefilled here. `None`: nobody runs, or unknown.
    pub(super) fn gap(&self, situation: &Situation) -> Option<Duration> {
        if situation.running == 0 {
            return None;
        }
        let chunk = situation.uncached_tokens.min(situation.chunk_tokens);
        seconds(self.decode_step.0.unwrap_or(0.0) + f64::from(chunk) * self.local_token.0?)
    }

    fn is_stale(&self, now: Duration) -> bool {
        self.handoff_observed.is_none_or(|observed| now.saturating_sub(observed) > STALE_AFTER)
    }
}

fn seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_follows_its_samples() {
        let mut mean = Mean::default();
        mean.observe(1.0);
        assert_eq!(mean.0, Some(1.0));
        mean.observe(2.0);
        assert_eq!(mean.0, Some(1.2));
        (0..100).for_each(|_| mean.observe(5.0));
        assert!((mean.0.unwrap() - 5.0).abs() < 1e-6);
    }

    #[test]
    fn a_step_that_also_decodes_charges_prompts_for_their_part() {
        let mut costs = CostModel::default();
        costs.observe_step(0, Duration::from_millis(10));
        costs.observe_step(100, Duration::from_millis(110));
        assert!((costs.local_token.0.unwrap() - 0.001).abs() < 1e-9);
    }
}
