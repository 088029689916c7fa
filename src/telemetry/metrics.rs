//! All metrics of a worker.

use std::time::Duration;

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
    TextEncoder, core::Collector,
};

use super::HandoffMetrics;
use crate::{
    cluster::{ModelKey, Role},
    transfer::TransferMetrics,
};

/// Seconds, from a millisecond to minutes: waiting for the first token.
const FIRST_TOKEN_BUCKETS: &[f64] =
    &[0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0];
/// Seconds: one step, or the gap between two tokens.
const STEP_BUCKETS: &[f64] =
    &[0.000_5, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 10.0];
/// Seconds, up to the hour that `--request-timeout` is: a whole request.
const REQUEST_BUCKETS: &[f64] =
    &[0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0];
/// How answers end, in the words of `finish_reason` where clients hear one. After an `error` a frontend may have
/// another worker go on.
const OUTCOMES: [&str; 6] = ["stop", "length", "tool_calls", "cancelled", "timeout", "error"];

/// All metrics of the process and the registry they are read from. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Metrics {
    registry: Registry,
    /// `engine_requests_total{endpoint,status}`: HTTP requests answered.
    pub requests: IntCounterVec,
    /// `engine_answers_total{outcome}`: answers ended, of which a request may have several.
    pub answers: IntCounterVec,
    /// From a request's arrival to the end of its answers, if all of them ended as they should.
    pub request_latency: Histogram,
    /// What the engine thread counts.
    pub engine: EngineMetrics,
    /// What is counted about sessions between workers and the pages they move.
    pub transfer: TransferMetrics,
}

/// The engine thread's metrics, each resolved to its labels once, so that a step touches atomics and nothing else.
#[derive(Debug, Clone)]
pub struct EngineMetrics {
    /// Requests that hold KV pages and take part in steps.
    pub running: IntGauge,
    /// Requests accepted and not running: not started yet, preempted, or prefilled elsewhere.
    pub waiting: IntGauge,
    /// Pages holding nothing.
    pub pages_free: IntGauge,
    /// Pages that no sequence uses, kept for prefix hits until they are needed.
    pub pages_cached: IntGauge,
    /// Pages in use by sequences.
    pub pages_owned: IntGauge,
    /// Pages lent to prefill workers, which fill them.
    pub pages_lent: IntGauge,
    /// Pages no longer wanted that a prefill worker may still write to.
    pub pages_quarantined: IntGauge,
    /// Prompt tokens of the requests started, found in the cache or not.
    pub prompt_tokens: IntCounter,
    /// Tokens generated.
    pub generation_tokens: IntCounter,
    /// Prompt tokens found in the cache.
    pub prefix_hit_tokens: IntCounter,
    /// Sequences that had to give back their pages and start again.
    pub preemptions: IntCounter,
    /// Prompts computed by this worker.
    pub prefills_local: IntCounter,
    /// Prompts computed by another worker, all but their last token.
    pub prefills_remote: IntCounter,
    /// What becomes of handoffs.
    pub handoffs: HandoffMetrics,
    /// Pages in host memory that stand in for a device's.
    pub staging: StagingMetrics,
    /// From submission to the first token.
    pub time_to_first_token: Histogram,
    /// Between two tokens of an answer.
    pub inter_token_latency: Histogram,
    step_prefill: Histogram,
    step_decode: Histogram,
    step_mixed: Histogram,
}

/// `engine_staging_pages{state}`: pages of host memory in which a decode worker's arrive that are meant for a device.
#[derive(Debug, Clone)]
pub struct StagingMetrics {
    /// Used by nobody.
    pub free: IntGauge,
    /// Of loans, in the place of theirs.
    pub lent: IntGauge,
    /// Copied to the device, the last of them perhaps long ago: who wants room looks.
    pub copying: IntGauge,
}

impl StagingMetrics {
    fn new(registry: &Registry) -> Self {
        let help = "Pages of host memory that KV pages on a device are staged in, by state.";
        let pages = registered(registry, IntGaugeVec::new(Opts::new("engine_staging_pages", help), &["state"]));
        let [free, lent, copying] = ["free", "lent", "copying"].map(|state| pages.with_label_values(&[state]));
        Self { free, lent, copying }
    }
}

/// What a step was made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepKind {
    /// Prompts only.
    Prefill,
    /// One token a sequence.
    Decode,
    /// Both.
    Mixed,
}

impl StepKind {
    /// The kind of a step of `sequences` of which `decodes` are only decoded.
    pub fn of(sequences: usize, decodes: usize) -> Self {
        match decodes {
            0 => Self::Prefill,
            _ if decodes == sequences => Self::Decode,
            _ => Self::Mixed,
        }
    }
}

impl EngineMetrics {
    /// Records the duration of a step.
    pub fn observe_step(&self, kind: StepKind, duration: Duration) {
        let histogram = match kind {
            StepKind::Prefill => &self.step_prefill,
            StepKind::Decode => &self.step_decode,
            StepKind::Mixed => &self.step_mixed,
        };
        histogram.observe(duration.as_secs_f64());
    }
}

impl Metrics {
    /// Fresh metrics in a registry of their own.
    pub fn new() -> Self {
        let registry = Registry::new();
        register_build_info(&registry);
        let steps = histograms(&registry, "engine_step_seconds", "Duration of one step.", &["kind"], STEP_BUCKETS);
        let pages = IntGaugeVec::new(Opts::new("engine_kv_pages", "KV pages by state."), &["state"]);
        let pages = registered(&registry, pages);
        let requests = counters(&registry, "engine_requests_total", "HTTP requests answered.", &["endpoint", "status"]);
        let answers = counters(&registry, "engine_answers_total", "Answers by how they ended.", &["outcome"]);
        for outcome in OUTCOMES {
            // There from the start: a series that begins with its first event hides that one from `rate`.
            answers.with_label_values(&[outcome]);
        }
        let request_latency = histogram(
            &registry,
            "engine_e2e_request_latency_seconds",
            "From a request's arrival to the end of its answers, none of them cancelled or broken off.",
            REQUEST_BUCKETS,
        );
        let prefills = counters(&registry, "engine_prefills_total", "Prompts by who computed them.", &["where"]);
        let engine = EngineMetrics {
            running: gauge(&registry, "engine_running_requests", "Requests taking part in steps."),
            waiting: gauge(&registry, "engine_waiting_requests", "Requests accepted and not running."),
            pages_free: pages.with_label_values(&["free"]),
            pages_cached: pages.with_label_values(&["cached"]),
            pages_owned: pages.with_label_values(&["owned"]),
            pages_lent: pages.with_label_values(&["lent"]),
            pages_quarantined: pages.with_label_values(&["quarantined"]),
            prompt_tokens: counter(&registry, "engine_prompt_tokens_total", "Prompt tokens of requests started."),
            generation_tokens: counter(&registry, "engine_generation_tokens_total", "Tokens generated."),
            prefix_hit_tokens: counter(
                &registry,
                "engine_prefix_hit_tokens_total",
                "Prompt tokens whose keys and values were found in the cache.",
            ),
            preemptions: counter(&registry, "engine_preemptions_total", "Sequences preempted for lack of KV pages."),
            prefills_local: prefills.with_label_values(&["local"]),
            prefills_remote: prefills.with_label_values(&["remote"]),
            handoffs: HandoffMetrics::new(&registry),
            staging: StagingMetrics::new(&registry),
            time_to_first_token: histogram(
                &registry,
                "engine_time_to_first_token_seconds",
                "From submission to the first token.",
                FIRST_TOKEN_BUCKETS,
            ),
            inter_token_latency: histogram(
                &registry,
                "engine_inter_token_latency_seconds",
                "Between two tokens of an answer.",
                STEP_BUCKETS,
            ),
            step_prefill: steps.with_label_values(&["prefill"]),
            step_decode: steps.with_label_values(&["decode"]),
            step_mixed: steps.with_label_values(&["mixed"]),
        };
        let transfer = TransferMetrics::new(&registry);
        Self { registry, requests, answers, request_latency, engine, transfer }
    }

    /// Adds `engine_model_info{model,role,device,model_key}`, which is 1: what this worker serves, to be joined with
    /// the rest. Panics if it is done twice.
    pub fn set_model(&self, model: &str, role: Role, device: &str, key: ModelKey) {
        let info = Opts::new("engine_model_info", "1, with what this worker serves in labels.")
            .const_label("model", model)
            .const_label("role", role.as_str())
            .const_label("device", device)
            .const_label("model_key", key.to_string());
        registered(&self.registry, IntGauge::with_opts(info)).set(1);
    }

    /// Everything in Prometheus' text format.
    pub fn render(&self) -> String {
        let mut text = Vec::new();
        // Writing to memory cannot fail, and the encoder writes UTF-8 only.
        let _ = TextEncoder::new().encode(&self.registry.gather(), &mut text);
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Registers a metric made from a constant name; both steps fail only on a malformed or repeated name, which the first
/// test to make a [`Metrics`] would find.
pub(super) fn registered<C: Collector + Clone + 'static>(registry: &Registry, metric: prometheus::Result<C>) -> C {
    let metric = metric.expect("metric names are well-formed constants");
    registry.register(Box::new(metric.clone())).expect("metric names are distinct constants");
    metric
}

/// `engine_build_info{version}`, which is 1: what is running, to be joined with the rest.
pub(crate) fn register_build_info(registry: &Registry) {
    let info = Opts::new("engine_build_info", "1, with the version in a label.");
    registered(registry, IntGauge::with_opts(info.const_label("version", env!("CARGO_PKG_VERSION")))).set(1);
}

pub(super) fn gauge(registry: &Registry, name: &str, help: &str) -> IntGauge {
    registered(registry, IntGauge::new(name, help))
}

pub(super) fn counter(registry: &Registry, name: &str, help: &str) -> IntCounter {
    registered(registry, IntCounter::new(name, help))
}

fn histogram(registry: &Registry, name: &str, help: &str, buckets: &[f64]) -> Histogram {
    registered(registry, Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets.to_vec())))
}

pub(super) fn counters(registry: &Registry, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
    registered(registry, IntCounterVec::new(Opts::new(name, help), labels))
}

pub(super) fn histograms(
    registry: &Registry,
    name: &str,
    help: &str,
    labels: &[&str],
    buckets: &[f64],
) -> HistogramVec {
    registered(registry, HistogramVec::new(HistogramOpts::new(name, help).buckets(buckets.to_vec()), labels))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Every metric that is rendered here is in this folder's README.md, where operators look it up.
    pub(crate) fn assert_documented(rendered: &str) {
        let table = include_str!("README.md");
        let names = rendered.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        let told = |name: &str| [format!("`{name}`"), format!("`{name}{{")].iter().any(|text| table.contains(text));
        let untold: Vec<&str> = names.filter(|name| !told(name)).collect();
        assert!(untold.is_empty(), "{untold:?}");
    }

    #[test]
    fn every_metric_is_rendered_under_its_documented_name() {
        let metrics = Metrics::new();
        metrics.requests.with_label_values(&["/v1/completions", "200"]).inc();
        metrics.engine.observe_step(StepKind::Mixed, Duration::from_millis(3));
        metrics.transfer.bytes.with_label_values(&["tcp"]).inc_by(7);
        metrics.transfer.seconds.with_label_values(&["tcp"]).observe(0.001);
        metrics.transfer.sessions.with_label_values(&["tcp"]).inc();
        let key = ModelKey::of(b"m");
        metrics.set_model("demo", Role::Prefill, "cpu", key);
        let info = format!("engine_model_info{{device=\"cpu\",model=\"demo\",model_key=\"{key}\",role=\"prefill\"}} 1");
        let text = metrics.render();
        for expected in [
            "engine_requests_total{endpoint=\"/v1/completions\",status=\"200\"} 1",
            concat!("engine_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
            "engine_answers_total{outcome=\"stop\"} 0",
            "engine_answers_total{outcome=\"cancelled\"} 0",
            "engine_e2e_request_latency_seconds_count 0",
            "engine_time_to_first_token_seconds_count 0",
            "engine_inter_token_latency_seconds_count 0",
            "engine_prompt_tokens_total 0",
            "engine_generation_tokens_total 0",
            "engine_prefix_hit_tokens_total 0",
            "engine_running_requests 0",
            "engine_waiting_requests 0",
            "engine_kv_pages{state=\"free\"} 0",
            "engine_kv_pages{state=\"cached\"} 0",
            "engine_kv_pages{state=\"owned\"} 0",
            "engine_kv_pages{state=\"lent\"} 0",
            "engine_kv_pages{state=\"quarantined\"} 0",
            "engine_staging_pages{state=\"lent\"} 0",
            "engine_preemptions_total 0",
            "engine_prefills_total{where=\"local\"} 0",
            "engine_prefills_total{where=\"remote\"} 0",
            "engine_handoffs_total{outcome=\"completed\"} 0",
            "engine_handoff_seconds_count{phase=\"pickup\"} 0",
            "engine_step_seconds_count{kind=\"mixed\"} 1",
            "engine_prefill_workers 0",
            "engine_prefill_queue_depth NaN",
            "engine_dead_jobs_total 0",
            "engine_transfer_bytes_total{transport=\"tcp\"} 7",
            "engine_transfer_seconds_count{transport=\"tcp\"} 1",
            "engine_transfer_fallback_total 0",
            "engine_transfer_sessions_total{transport=\"tcp\"} 1",
            "engine_transfer_refused_total 0",
            &info,
        ] {
            assert!(text.contains(expected), "{expected} not in\n{text}");
        }
        assert_documented(&text);
        assert_dashboard_finds_all(&text);
    }

    /// Every metric that the dashboard asks for is among those that are rendered.
    fn assert_dashboard_finds_all(rendered: &str) {
        let dashboard = include_str!("../../examples/grafana.json");
        let words = dashboard.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'));
        for name in words.filter(|word| word.starts_with("engine_")) {
            let name = name.strip_suffix("_bucket").unwrap_or(name);
            assert!(rendered.contains(&format!("# TYPE {name} ")), "{name}");
        }
    }
}
