//! `engine doctor`: looks at a machine, the services and the cluster before the first request does.
//!
//! It goes in three steps. `facts` collects what there is, in thin files that only read. `checks` turns facts into
//! [`Finding`]s: what was looked at, whether it is in order, what was seen and what to do about it; they do no I/O, and
//! are tested as functions. `Report` prints the findings for people or as JSON, and says whether all is well.
//!
//! `kernels` is what `--gpu` does instead: it runs every kernel on a device.

mod checks;
mod facts;
mod finding;
mod kernels;

pub use finding::{Area, Finding, Level, Report};

use anyhow::Result;

use crate::{
    cli::{DoctorArgs, TransportArg},
    worker::{Gauge, Ways, default_kv_bytes},
};
use checks::Wanted;
use facts::{GpuFacts, HostFacts, RdmaFacts, ServicesFacts, measure_pairs};

/// Looks at everything and prints what it found. Whether nothing failed.
pub async fn run(args: DoctorArgs) -> Result<bool> {
    if let Some(words) = args.gpu {
        return Ok(tokio::task::spawn_blocking(move || kernels::run(&words, args.json)).await?);
    }
    let wanted = wanted(&args);
    let (host, gpus) = (HostFacts::collect(), GpuFacts::collect());
    let rdma = RdmaFacts::collect(&args.transports.rdma_wish());
    let services = ServicesFacts::collect(&args.cluster).await;

    let mut report = Report::default();
    report.extend(checks::host(&host));
    report.extend(checks::gpus(&gpus));
    report.extend(checks::rdma(&rdma, wanted));
    report.extend(checks::locked_memory(&host, &rdma, kv_bytes(&args, &host), wanted));
    report.extend(checks::services(&services));
    report.extend(checks::workers(&services));
    report.extend(checks::pairs(&services.workers, wanted));
    if args.measure {
        let token = args.cluster.cluster_token.as_deref();
        let gauge = Gauge::new(Ways::of(&args.transports)?.open().await?, &args.transports, token)?;
        let pairs = measure_pairs(services.workers.as_deref().unwrap_or_default(), token, &gauge).await;
        report.extend(checks::measured(&pairs, wanted));
    }
    print!("{}", if args.json { report.json() } else { report.text() });
    Ok(report.passed())
}

/// How pages are meant to travel, as the flags say.
fn wanted(args: &DoctorArgs) -> Wanted {
    match args.transports.transport {
        _ if args.transports.require_rdma => Wanted::Rdma,
        TransportArg::Rdma => Wanted::Rdma,
        TransportArg::Auto => Wanted::Any,
        TransportArg::CudaIpc | TransportArg::Shm | TransportArg::Tcp => Wanted::NoRdma,
    }
}

/// Bytes of the KV cache of a worker here.
fn kv_bytes(args: &DoctorArgs, host: &HostFacts) -> u64 {
    let default = || default_kv_bytes(host.available_bytes.unwrap_or(0));
    args.kv_cache_memory.unwrap_or_else(default) as u64
}
