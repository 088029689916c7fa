use prometheus::core::Collector;
use prometheus::{HistogramOpts, HistogramVec, IntCounter, IntCounterVec, Opts, Registry};

/// What is counted about sessions and the pages they move. Clones count together.
#[derive(Debug, Clone)]
pub struct TransferMetrics {
    /// `engine_transfer_bytes_total{transport}`: bytes of pages written to other workers.
    pub bytes: IntCounterVec,
    /// `engine_transfer_seconds{transport}`: of a write, from when its pages are computed to its end.
    pub seconds: HistogramVec,
    /// `engine_transfer_fallback_total`: sessions that go over TCP for want of anything faster.
    pub fallbacks: IntCounter,
    /// `engine_transfer_sessions_total{transport}`: sessions opened.
    pub sessions: IntCounterVec,
    /// `engine_transfer_refused_total`: connections turned away, and sessions ended for breaking the rules.
    pub refused: IntCounter,
}

impl TransferMetrics {
    /// Registers them. Panics if it is done twice with one registry.
    pub fn new(registry: &Registry) -> Self {
        let by_transport = |name, help| registered(registry, IntCounterVec::new(Opts::new(name, help), &["transport"]));
        let seconds =
            HistogramOpts::new("engine_transfer_seconds", "Of a write, from when its pages are computed to its end.")
                .buckets(vec![
                    1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
                ]);
        Self {
            bytes: by_transport("engine_transfer_bytes_total", "Bytes of KV pages written to other workers."),
            seconds: registered(registry, HistogramVec::new(seconds, &["transport"])),
            fallbacks: counter(
                registry,
                "engine_transfer_fallback_total",
                "Sessions that go over TCP for want of anything faster.",
            ),
            sessions: by_transport("engine_transfer_sessions_total", "Sessions opened."),
            refused: counter(
                registry,
                "engine_transfer_refused_total",
                "Connections turned away, and sessions ended for breaking the rules.",
            ),
        }
    }
}

impl Default for TransferMetrics {
    /// In a registry that nobody reads.
    fn default() -> Self {
        Self::new(&Registry::new())
    }
}

/// Registers a metric made from a constant name; both steps fail only on a malformed or repeated name.
fn registered<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("metric names are well-formed constants");
    registry.register(Box::new(metric.clone())).expect("metric names are distinct constants");
    metric
}

fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    registered(registry, IntCounter::new(name, help))
}
