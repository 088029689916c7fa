use prometheus::{
    Encoder, Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
    core::Collector,
};

use crate::telemetry::register_build_info;

/// Seconds: what a frontend adds is below the first, what a model takes is in the others.
const FIRST_DATA_BUCKETS: &[f64] =
    &[0.000_5, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];

/// What a frontend counts. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FrontendMetrics {
    registry: Registry,
    /// `engine_requests_total{endpoint,status}`, as the workers have it.
    pub(super) requests: IntCounterVec,
    /// Live decode workers.
    pub(super) workers: IntGauge,
    /// Requests being answered.
    pub(super) in_flight: IntGauge,
    /// Requests that another worker was asked after one had refused or failed, before anything had reached the client.
    pub(super) retries: IntCounter,
    /// Answers continued by another worker.
    pub(super) migrations: IntCounter,
    /// Answers broken off because no worker could go on with them.
    pub(super) broken: IntCounter,
    /// Bytes of large requests' bodies that are kept until their answers end.
    pub(super) body_bytes: IntGauge,
    pub(super) journal_bytes: IntGauge,
    /// From a request's arrival to the first data for its client.
    pub(super) first_data: Histogram,
}

impl FrontendMetrics {
    /// Fresh metrics in a registry of their own.
    pub fn new() -> Self {
        let registry = Registry::new();
        register_build_info(&registry);
        let counter = |name: &str, help: &str| registered(&registry, IntCounter::new(name, help));
        let gauge = |name: &str, help: &str| registered(&registry, IntGauge::new(name, help));
        let requests = Opts::new("engine_requests_total", "HTTP requests answered.");
        let first_data = HistogramOpts::new(
            "engine_frontend_time_to_first_data_seconds",
            "From a request's arrival to the first data for its client.",
        );
        Self {
            requests: registered(&registry, IntCounterVec::new(requests, &["endpoint", "status"])),
            workers: gauge("engine_frontend_workers", "Live decode workers."),
            in_flight: gauge("engine_frontend_requests_in_flight", "Requests being answered."),
            retries: counter("engine_frontend_retries_total", "Requests sent to another worker after one failed."),
            migrations: counter("engine_frontend_migrations_total", "Answers continued by another worker."),
            broken: counter(
                "engine_frontend_broken_total",
                "Answers broken off for want of a worker to continue them.",
            ),
            body_bytes: gauge("engine_frontend_body_bytes", "Bytes of large requests kept until they are answered."),
            journal_bytes: gauge("engine_frontend_journal_bytes", "Bytes kept of answers so that they can move."),
            first_data: registered(&registry, Histogram::with_opts(first_data.buckets(FIRST_DATA_BUCKETS.to_vec()))),
            registry,
        }
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Writing to memory cannot fail, and the encoder writes UTF-8 only.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Default for FrontendMetrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Registers a metric made from a constant name; both steps fail only on a malformed or repeated name, which any test
/// of a frontend would find.
fn registered<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("metric names are well-formed constants");
    registry.register(Box::new(metric.clone())).expect("metric names are distinct constants");
    metric
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::assert_documented;

    #[test]
    fn every_metric_is_rendered_under_its_documented_name() {
        let metrics = FrontendMetrics::new();
        metrics.requests.with_label_values(&["/v1/completions", "200"]).inc();
        metrics.first_data.observe(0.001);
        let text = metrics.render();
        for expected in [
            "engine_requests_total{endpoint=\"/v1/completions\",status=\"200\"} 1",
            concat!("engine_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "engine_frontend_workers 0",
            "engine_frontend_requests_in_flight 0",
            "engine_frontend_retries_total 0",
            "engine_frontend_migrations_total 0",
            "engine_frontend_broken_total 0",
            "engine_frontend_body_bytes 0",
            "engine_frontend_journal_bytes 0",
            "engine_frontend_time_to_first_data_seconds_count 1",
        ] {
            assert!(text.contains(expected), "{expected} not in\n{text}");
        }
        assert_documented(&text);
    }
}
