//! What servers and the system count, read at two moments.

use std::time::Instant;

use anyhow::{Context, Result};

use super::{
    cell::{Cell, http},
    process,
};

/// Everything that only ever grows, and a few things that do not, at one moment.
pub(crate) struct Counters {
    at: Instant,
    etcd_cpu: f64,
    /// Bytes that etcd has sent to its clients.
    pub(crate) etcd_bytes: f64,
    /// Changes that etcd has told to watchers, each counted for each.
    pub(crate) etcd_events: f64,
    pub(crate) etcd_watchers: f64,
    nats_cpu: f64,
    nats_in: f64,
    nats_out: f64,
    nats_bytes: f64,
    frontend_cpu: f64,
    pub(crate) frontend_bytes: f64,
    mocks_cpu: f64,
}

impl Counters {
    pub(crate) fn read(cell: &Cell) -> Result<Self> {
        let etcd = http::get(&cell.etcd.address.to_string(), "/metrics")?;
        let etcd = |name| value(&etcd, name).with_context(|| format!("etcd has no {name}"));
        let nats: serde_json::Value = serde_json::from_str(&http::get(&cell.nats_monitor.to_string(), "/varz")?)?;
        let nats = |name: &str| nats[name].as_f64().with_context(|| format!("NATS has no {name}"));
        let mut mocks_cpu = 0.0;
        for mock in &cell.mocks {
            mocks_cpu += mock.cpu()?;
        }
        Ok(Self {
            at: Instant::now(),
            etcd_cpu: process::cpu(cell.etcd.id())?,
            etcd_bytes: etcd("etcd_network_client_grpc_sent_bytes_total")?,
            etcd_events: etcd("etcd_debugging_mvcc_events_total")?,
            etcd_watchers: etcd("etcd_debugging_mvcc_watcher_total")?,
            nats_cpu: process::cpu(cell.nats.id())?,
            nats_in: nats("in_msgs")?,
            nats_out: nats("out_msgs")?,
            nats_bytes: nats("out_bytes")?,
            frontend_cpu: cell.frontend.cpu()?,
            frontend_bytes: process::resident_bytes(cell.frontend.id())?,
            mocks_cpu,
        })
    }
}

/// What happens a second.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rates {
    /// Cores kept busy.
    pub(crate) etcd_cores: f64,
    pub(crate) nats_cores: f64,
    pub(crate) frontend_cores: f64,
    pub(crate) mocks_cores: f64,
    pub(crate) etcd_bytes: f64,
    /// Messages into NATS, and out of it.
    pub(crate) nats_in: f64,
    pub(crate) nats_out: f64,
    pub(crate) nats_bytes: f64,
}

impl Rates {
    pub(crate) fn between(before: &Counters, after: &Counters) -> Self {
        let seconds = (after.at - before.at).as_secs_f64();
        let rate = |counter: fn(&Counters) -> f64| (counter(after) - counter(before)) / seconds;
        Self {
            etcd_cores: rate(|counters| counters.etcd_cpu),
            nats_cores: rate(|counters| counters.nats_cpu),
            frontend_cores: rate(|counters| counters.frontend_cpu),
            mocks_cores: rate(|counters| counters.mocks_cpu),
            etcd_bytes: rate(|counters| counters.etcd_bytes),
            nats_in: rate(|counters| counters.nats_in),
            nats_out: rate(|counters| counters.nats_out),
            nats_bytes: rate(|counters| counters.nats_bytes),
        }
    }
}

/// The value of a metric, by its name with labels.
pub(crate) fn value(text: &str, name: &str) -> Option<f64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
}

/// A histogram's buckets: upper bounds, and how many values are below each.
#[derive(Debug, Default)]
pub(crate) struct Histogram(Vec<(f64, f64)>);

impl Histogram {
    /// Adds one of Prometheus' text format, whose lines begin with `prefix`, up to the bound.
    pub(crate) fn add(&mut self, text: &str, prefix: &str) {
        let buckets = text.lines().filter_map(|line| {
            let (bound, count) = line.strip_prefix(prefix)?.split_once("\"} ")?;
            Some((bound.replace("+Inf", "inf").parse().ok()?, count.parse().ok()?))
        });
        for (at, (bound, count)) in buckets.enumerate() {
            match self.0.get_mut(at) {
                Some(bucket) => bucket.1 += count,
                None => self.0.push((bound, count)),
            }
        }
    }

    /// What has come since `earlier`.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let before = |at: usize| earlier.0.get(at).map_or(0.0, |bucket| bucket.1);
        Self(self.0.iter().enumerate().map(|(at, &(bound, count))| (bound, count - before(at))).collect())
    }

    /// The value below which `percent` of all lie, between the bounds of its bucket as if they were spread evenly
    /// there.
    pub(crate) fn percentile(&self, percent: f64) -> f64 {
        let wanted = self.0.last().map_or(0.0, |bucket| bucket.1) * percent / 100.0;
        let (mut low, mut below) = (0.0, 0.0);
        for &(bound, count) in &self.0 {
            if count >= wanted && count > below {
                let high = if bound.is_finite() { bound } else { low };
                return low + (high - low) * (wanted - below) / (count - below);
            }
            (low, below) = (bound, count);
        }
        f64::NAN
    }
}
