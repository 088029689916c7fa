//! A cluster: services, a frontend, and mocks in a few processes.

use std::{net::SocketAddr, process::Command, sync::Arc};

use anyhow::{Context, Result, bail};
use engine::cluster::{
    Cluster, ClusterOptions, EtcdOptions, Joined, NatsOptions, Needs, Role, WorkerFilter, WorkerSet, join,
};
use tempfile::TempDir;
use tokio::{runtime::Runtime, sync::watch};

#[allow(dead_code, reason = "only GET is used")]
#[path = "../suite/http.rs"]
pub(crate) mod http;

use super::{
    Size,
    counters::{self, Histogram},
    process::Process,
    services::{self, Service, free_port},
};

const PROGRAM: &str = env!("CARGO_BIN_EXE_engine");
/// Workers of one process: sessions are open files, and a process has only so many.
pub(crate) const WORKERS_A_PROCESS: usize = 30;
/// Milliseconds a step takes, and microseconds a prompt's token: those of a small model on a small GPU.
const PACE: [&str; 4] = ["--step-time", "20", "--prompt-token-time", "100"];

/// Everything, killed when dropped.
pub(crate) struct Cell {
    pub(crate) frontend: Process,
    pub(crate) mocks: Vec<Process>,
    pub(crate) etcd: Service,
    pub(crate) nats: Service,
    /// Where NATS tells about itself.
    pub(crate) nats_monitor: SocketAddr,
    size: Size,
    workers: watch::Receiver<Arc<WorkerSet>>,
    _cluster: Cluster,
    _runtime: Runtime,
    folder: TempDir,
}

fn local(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

impl Cell {
    /// Starts it, and returns when the frontend knows all decode workers and each of them all prefill workers.
    pub(crate) fn start(size: Size) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let monitor = free_port();
        let (etcd, nats) = (services::etcd(), services::nats_with(&["-m", &monitor.to_string()]));
        let address = local(free_port());
        let mut command = program(&etcd, &nats, &["frontend", "--port", &address.port().to_string()]);
        command.args(["--max-requests", "4096"]);
        let frontend = Process::start("engine frontend", command, address, &folder.path().join("frontend.log"))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let options = ClusterOptions {
            namespace: "engine".into(),
            etcd: EtcdOptions::new(vec![etcd.url()]),
            nats: NatsOptions::new(vec![nats.url()]),
        };
        let Joined::Member(cluster) = runtime.block_on(join(options, Needs::EtcdAndNats))? else {
            bail!("the services were named")
        };
        let workers = {
            let _context = runtime.enter();
            cluster.discovery.workers(WorkerFilter::default())
        };
        let mut cell = Self {
            frontend,
            mocks: Vec::new(),
            etcd,
            nats,
            nats_monitor: local(monitor),
            size,
            workers,
            _cluster: cluster,
            _runtime: runtime,
            folder,
        };
        let processes = (size.decode + size.prefill).div_ceil(WORKERS_A_PROCESS);
        for index in 0..processes {
            // As even as it gets.
            let share = |all: usize| all * (index + 1) / processes - all * index / processes;
            let mock = cell.mock(&format!("mock-{index}"), share(size.decode), share(size.prefill))?;
            cell.mocks.push(mock);
        }
        cell.wait_until_known(size)?;
        Ok(cell)
    }

    /// Starts mocks in a process.
    fn mock(&self, name: &str, decode: usize, prefill: usize) -> Result<Process> {
        let address = local(free_port());
        let flags = ["mock", "--port", &address.port().to_string()];
        let mut command = program(&self.etcd, &self.nats, &flags);
        command.args(["--decode-workers", &decode.to_string(), "--prefill-workers", &prefill.to_string()]);
        command.args(PACE).args(["--max-local-prefill-length", "64"]);
        Process::start("engine mock", command, address, &self.folder.path().join(format!("{name}.log")))
    }

    fn wait_until_known(&mut self, size: Size) -> Result<()> {
        let address = self.frontend.address;
        self.frontend.wait_until(|| {
            http::get(&address.to_string(), "/metrics")
                .is_ok_and(|text| counters::value(&text, "engine_frontend_workers") == Some(size.decode as f64))
        })?;
        let workers = self.workers.clone();
        self.frontend.wait_until(|| workers.borrow().len() == size.decode + size.prefill)?;
        // The queue's depth is known too: from now on prompts are handed off.
        for address in self.addresses(Role::Decode) {
            self.frontend.wait_until(|| {
                http::get(&address, "/metrics").is_ok_and(|text| {
                    counters::value(&text, "engine_prefill_workers") == Some(size.prefill as f64)
                        && counters::value(&text, "engine_prefill_queue_depth").is_some_and(|depth| depth >= 0.0)
                })
            })?;
        }
        Ok(())
    }

    fn addresses(&self, role: Role) -> Vec<String> {
        let workers = self.workers.borrow().clone();
        workers.values().filter(|card| card.role == role).map(|card| card.address.clone()).collect()
    }

    /// A metric's sum over all decode workers.
    pub(crate) fn sum(&self, metric: &str) -> Result<f64> {
        let mut sum = 0.0;
        for address in self.addresses(Role::Decode) {
            sum += counters::value(&http::get(&address, "/metrics")?, metric).unwrap_or(0.0);
        }
        Ok(sum)
    }

    /// How long jobs have waited for their claim, of all decode workers.
    pub(crate) fn queue_waits(&self) -> Result<Histogram> {
        let mut all = Histogram::default();
        for address in self.addresses(Role::Decode) {
            all.add(&http::get(&address, "/metrics")?, "engine_handoff_seconds_bucket{phase=\"queue\",le=\"");
        }
        Ok(all)
    }

    /// A prefill worker comes, is known to all, and goes.
    pub(crate) fn come_and_go(&mut self) -> Result<()> {
        let one = self.mock("one", 0, 1)?;
        self.wait_until_known(Size { prefill: self.size.prefill + 1, ..self.size })?;
        let told = Command::new("kill").args(["-s", "TERM", &one.id().to_string()]).status();
        if !told.context("kill")?.success() {
            bail!("the worker has ended before it was told to");
        }
        self.wait_until_known(self.size)
    }
}

/// The program as part of the cluster.
fn program(etcd: &Service, nats: &Service, arguments: &[&str]) -> Command {
    let mut command = Command::new(PROGRAM);
    command.args(arguments).args(["--etcd", &etcd.url(), "--nats", &nats.url()]);
    command.env_remove("ETCD_ENDPOINTS").env_remove("NATS_SERVER").env_remove("ENGINE_API_KEY");
    command
}
