use std::time::Duration;

use prometheus::{Gauge, Histogram, IntCounter, IntGauge, Registry};

use super::metrics::{counter, counters, gauge, histograms, registered};
use crate::handoff::Outcome;

/// Seconds, from a tenth of a millisecond to minutes.
const BUCKETS: &[f64] = &[
    0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];

/// What becomes of handoffs, and how long their parts take. Each worker sees its own part.
#[derive(Debug, Clone)]
pub struct HandoffMetrics {
    /// `engine_prefill_workers`: live prefill workers that a decode worker knows; 0 while none takes jobs.
    pub workers: IntGauge,
    /// `engine_prefill_queue_depth`: jobs that wait for one; see [`HandoffMetrics::set_queue_depth`].
    queue_depth: Gauge,
    /// `engine_dead_jobs_total`: jobs this prefill worker took off the queue because nobody could do them.
    pub dead_jobs: IntCounter,
    outcomes: [IntCounter; Outcome::ALL.len()],
    phases: [Histogram; HandoffPhase::ALL.len()],
}

/// A part of a handoff.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HandoffPhase {
    /// From the decision to the claim, seen by the decode worker.
    Queue,
    /// From the claim to its answer, seen by the prefill worker.
    Claim,
    /// From the answer to the last page being computed, seen by the prefill worker. On a device it is what whoever
    /// copies or sends pages finds: where those before are still on their way, it is later than it was.
    Compute,
    /// From there to the word in the mailbox: the part of the transfer that computing did not hide.
    Transfer,
    /// From the grant to the word being found, seen by the decode worker.
    Remote,
    /// Time the word lay in the mailbox at most: since the look before the one that found it.
    Pickup,
}

impl HandoffPhase {
    const ALL: [Self; 6] = [Self::Queue, Self::Claim, Self::Compute, Self::Transfer, Self::Remote, Self::Pickup];

    const fn label(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Claim => "claim",
            Self::Compute => "compute",
            Self::Transfer => "transfer",
            Self::Remote => "remote",
            Self::Pickup => "pickup",
        }
    }
}

impl HandoffMetrics {
    pub(super) fn new(registry: &Registry) -> Self {
        let outcomes = counters(registry, "engine_handoffs_total", "Remote prefills by how they ended.", &["outcome"]);
        let phases = histograms(registry, "engine_handoff_seconds", "Parts of remote prefills.", &["phase"], BUCKETS);
        let help = "Jobs that wait for a prefill worker; NaN while the queue cannot be reached.";
        let metrics = Self {
            workers: gauge(
                registry,
                "engine_prefill_workers",
                "Live prefill workers of this model; 0 while none takes jobs.",
            ),
            queue_depth: registered(registry, Gauge::new("engine_prefill_queue_depth", help)),
            dead_jobs: counter(
                registry,
                "engine_dead_jobs_total",
                "Prefill jobs given up: delivered too often, or not to be read.",
            ),
            outcomes: Outcome::ALL.map(|outcome| outcomes.with_label_values(&[outcome.label()])),
            phases: HandoffPhase::ALL.map(|phase| phases.with_label_values(&[phase.label()])),
        };
        metrics.set_queue_depth(None);
        metrics
    }

    /// Notes how many jobs wait. `None`: the queue cannot be reached, and no number is right. NaN is one that no alert
    /// and no `max` takes for a depth.
    pub fn set_queue_depth(&self, depth: Option<u64>) {
        self.queue_depth.set(depth.map_or(f64::NAN, |depth| depth as f64));
    }

    /// Counts a handoff's end.
    pub fn count(&self, outcome: Outcome) {
        if let Some(at) = Outcome::ALL.iter().position(|&known| known == outcome) {
            self.outcomes[at].inc();
        }
    }

    /// Records how long a part took.
    pub fn observe(&self, phase: HandoffPhase, duration: Duration) {
        if let Some(at) = HandoffPhase::ALL.iter().position(|&known| known == phase) {
            self.phases[at].observe(duration.as_secs_f64());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_cannot_be_reached_has_no_depth() {
        let metrics = HandoffMetrics::new(&Registry::new());
        assert!(metrics.queue_depth.get().is_nan());
        metrics.set_queue_depth(Some(3));
        assert_eq!(metrics.queue_depth.get(), 3.0);
        metrics.set_queue_depth(None);
        assert!(metrics.queue_depth.get().is_nan());
    }
}
