//! Whether a prompt is prefilled here or handed off.

use std::time::Duration;

use super::{HandoffCosts, Limits, Policy};

/// Handoffs that a request may lose before it is prefilled by its own worker: a prompt that kills prefill workers must
/// not meet them all. Nor is a lost one tried again where nobody is known but those who may have lost it.
pub const HANDOFFS_MAX: u32 = 2;

/// What a decision about one prompt rests on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    /// Tokens of the prompt, its last one included, that the prefix index lacks.
    pub uncached_tokens: u32,
    /// Live prefill workers of this worker's model key.
    pub prefill_workers: u32,
    /// Jobs on the queue; `None` if it cannot be reached.
    pub queue_depth: Option<u64>,
    /// Handoffs of this request that a prefill worker took and did not complete.
    pub lost_handoffs: u32,
    /// What prefilling it here would take; `None` until that was measured.
    pub local: Option<Forecast>,
}

/// What prefilling a prompt here is expected to take, by what steps took lately.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// Until its first token.
    pub first_token: Duration,
    /// Between two tokens of the requests that generate meanwhile; `None`: there are none.
    pub gap: Option<Duration>,
}

/// Where a prompt is prefilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// By a prefill worker.
    Remote,
    /// By the decode worker itself.
    Local(Reason),
}

/// Why a prompt is prefilled by the decode worker itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Reason {
    /// [`Policy::Never`].
    Policy,
    /// All but the last token is in the prefix index.
    Cached,
    /// [`HANDOFFS_MAX`] handoffs were lost, or as many as there are workers.
    Lost,
    /// No prefill worker is alive.
    NoPrefillWorkers,
    /// The queue cannot be reached.
    Unreachable,
    /// Within [`Limits::max_local_prefill_length`].
    Short,
    /// The queue is as long as [`Limits::max_prefill_queue_size`] allows.
    Busy,
    /// The first token is expected earlier than from a prefill worker.
    Sooner,
}

/// Decides. Pure: the same situation, limits and measurements give the same answer.
pub fn decide(limits: &Limits, situation: &Situation, costs: &HandoffCosts, now: Duration) -> Decision {
    if limits.policy == Policy::Never {
        return Decision::Local(Reason::Policy);
    }
    // The last token stays here in any case.
    if situation.uncached_tokens <= 1 {
        return Decision::Local(Reason::Cached);
    }
    // Who has died is listed until its lease runs out.
    let lost = situation.lost_handoffs;
    if lost >= HANDOFFS_MAX || lost > 0 && lost >= situation.prefill_workers {
        return Decision::Local(Reason::Lost);
    }
    if situation.prefill_workers == 0 {
        return Decision::Local(Reason::NoPrefillWorkers);
    }
    let Some(queue_depth) = situation.queue_depth else {
        return Decision::Local(Reason::Unreachable);
    };
    match limits.policy {
        Policy::Never | Policy::Always => Decision::Remote,
        Policy::Threshold => by_thresholds(limits, situation, queue_depth),
        Policy::Auto => by_measurements(limits, situation, queue_depth, costs, now)
            .unwrap_or_else(|| by_thresholds(limits, situation, queue_depth)),
    }
}

fn by_thresholds(limits: &Limits, situation: &Situation, queue_depth: u64) -> Decision {
    if situation.uncached_tokens <= limits.max_local_prefill_length {
        return Decision::Local(Reason::Short);
    }
    if is_busy(limits, situation, queue_depth) { Decision::Local(Reason::Busy) } else { Decision::Remote }
}

fn is_busy(limits: &Limits, situation: &Situation, queue_depth: u64) -> bool {
    queue_depth >= u64::from(limits.max_prefill_queue_size) * u64::from(situation.prefill_workers)
}

/// `None` if what was measured does not decide it.
fn by_measurements(
    limits: &Limits,
    situation: &Situation,
    queue_depth: u64,
    costs: &HandoffCosts,
    now: Duration,
) -> Option<Decision> {
    let local = situation.local?;
    if local.gap.is_some_and(|gap| gap > limits.itl_target()) && !is_busy(limits, situation, queue_depth) {
        return Some(Decision::Remote);
    }
    let ahead = queue_depth / u64::from(situation.prefill_workers.max(1));
    let remote = costs.expect(situation.uncached_tokens, ahead, now)?;
    Some(if remote < local.first_token { Decision::Remote } else { Decision::Local(Reason::Sooner) })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn situation() -> Situation {
        Situation { uncached_tokens: 2_000, prefill_workers: 3, queue_depth: Some(0), lost_handoffs: 0, local: None }
    }

    fn takes(first_token_ms: u64, gap_ms: Option<u64>) -> Option<Forecast> {
        Some(Forecast { first_token: Duration::from_millis(first_token_ms), gap: gap_ms.map(Duration::from_millis) })
    }

    fn limits(policy: Policy) -> Limits {
        Limits { policy, max_local_prefill_length: 1_000, max_prefill_queue_size: 2, itl_target_ms: 60.0 }
    }

    fn decided(policy: Policy, situation: Situation) -> Decision {
        decide(&limits(policy), &situation, &HandoffCosts::default(), NOW)
    }

    /// 0.5 ms a token, 100 ms a place in the queue.
    fn costs() -> HandoffCosts {
        let mut costs = HandoffCosts::default();
        costs.observe(0, Duration::from_millis(100), 1_000, Duration::from_millis(500), NOW);
        costs
    }

    #[test]
    fn the_threshold_rule_is_a_long_prompt_a_live_worker_and_a_short_queue() {
        let decided = |situation| decided(Policy::Threshold, situation);
        assert_eq!(decided(situation()), Decision::Remote);
        assert_eq!(decided(Situation { uncached_tokens: 1_001, ..situation() }), Decision::Remote);
        assert_eq!(decided(Situation { uncached_tokens: 1_000, ..situation() }), Decision::Local(Reason::Short));
        assert_eq!(decided(Situation { queue_depth: Some(5), ..situation() }), Decision::Remote);
        assert_eq!(decided(Situation { queue_depth: Some(6), ..situation() }), Decision::Local(Reason::Busy));
        assert_eq!(decided(Situation { prefill_workers: 0, ..situation() }), Decision::Local(Reason::NoPrefillWorkers));
        assert_eq!(decided(Situation { queue_depth: None, ..situation() }), Decision::Local(Reason::Unreachable));
        assert_eq!(decided(Situation { lost_handoffs: 2, ..situation() }), Decision::Local(Reason::Lost));
    }

    #[test]
    fn a_lost_handoff_is_tried_again_once_and_only_if_there_is_somebody_else() {
        for policy in [Policy::Threshold, Policy::Always, Policy::Auto] {
            let decided = |lost_handoffs, prefill_workers| {
                decided(policy, Situation { lost_handoffs, prefill_workers, ..situation() })
            };
            assert_eq!(decided(1, 2), Decision::Remote);
            assert_eq!(decided(1, 1), Decision::Local(Reason::Lost));
            assert_eq!(decided(2, 9), Decision::Local(Reason::Lost));
        }
    }

    #[test]
    fn always_needs_somebody_to_do_it_and_something_to_do() {
        let decided = |situation| decided(Policy::Always, situation);
        let eager = Situation { uncached_tokens: 2, queue_depth: Some(1_000), ..situation() };
        assert_eq!(decided(eager), Decision::Remote);
        assert_eq!(decided(Situation { uncached_tokens: 1, ..eager }), Decision::Local(Reason::Cached));
        assert_eq!(decided(Situation { prefill_workers: 0, ..eager }), Decision::Local(Reason::NoPrefillWorkers));
        assert_eq!(decided(Situation { queue_depth: None, ..eager }), Decision::Local(Reason::Unreachable));
        assert_eq!(decided(Situation { lost_handoffs: 2, ..eager }), Decision::Local(Reason::Lost));
    }

    #[test]
    fn never_is_never() {
        assert_eq!(decided(Policy::Never, situation()), Decision::Local(Reason::Policy));
    }

    #[test]
    fn auto_takes_the_earlier_first_token() {
        let auto = |situation| decide(&limits(Policy::Auto), &situation, &costs(), NOW);
        // There 0.1 s + 1.0 s.
        assert_eq!(auto(Situation { local: takes(1_101, None), ..situation() }), Decision::Remote);
        let sooner = Situation { local: takes(1_099, None), ..situation() };
        assert_eq!(auto(sooner), Decision::Local(Reason::Sooner));
        // Thirty jobs for three workers.
        let busy = Situation { queue_depth: Some(30), local: takes(2_000, None), ..situation() };
        assert_eq!(auto(busy), Decision::Local(Reason::Sooner));
        assert_eq!(auto(Situation { queue_depth: Some(2), ..busy }), Decision::Remote);
    }

    #[test]
    fn auto_spares_the_requests_that_run() {
        let auto = |situation| decide(&limits(Policy::Auto), &situation, &costs(), NOW);
        let sooner = |gap_ms| Situation { local: takes(100, gap_ms), ..situation() };
        assert_eq!(auto(sooner(None)), Decision::Local(Reason::Sooner));
        assert_eq!(auto(sooner(Some(60))), Decision::Local(Reason::Sooner));
        assert_eq!(auto(sooner(Some(61))), Decision::Remote);
        assert_eq!(auto(Situation { queue_depth: Some(6), ..sooner(Some(61)) }), Decision::Local(Reason::Sooner));
        assert_eq!(
            auto(Situation { prefill_workers: 0, ..sooner(Some(61)) }),
            Decision::Local(Reason::NoPrefillWorkers)
        );
    }

    #[test]
    fn auto_goes_by_the_thresholds_until_it_has_measured_and_when_that_was_long_ago() {
        let decided = |local, costs: &HandoffCosts, now| {
            decide(&limits(Policy::Auto), &Situation { local, ..situation() }, costs, now)
        };
        assert_eq!(decided(takes(1, None), &HandoffCosts::default(), NOW), Decision::Remote);
        assert_eq!(decided(None, &costs(), NOW), Decision::Remote);
        assert_eq!(decided(takes(1, None), &costs(), NOW), Decision::Local(Reason::Sooner));
        assert_eq!(decided(takes(1, None), &costs(), NOW + Duration::from_secs(61)), Decision::Remote);
    }
}
