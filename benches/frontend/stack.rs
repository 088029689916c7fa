//! A frontend, its workers and their services, each a process.

use std::{net::SocketAddr, path::Path, process::Command};

use anyhow::{Context, Result};
use tempfile::TempDir;

#[allow(dead_code, reason = "only GET is used")]
#[path = "../suite/http.rs"]
mod http;

use super::{
    process::Process,
    services::{self, Service, free_port},
};

/// Workers behind each frontend, and sequences that each takes: more than there are clients.
pub(crate) const WORKERS: usize = 2;
const MAX_NUM_SEQS: &str = "256";
const PROGRAM: &str = env!("CARGO_BIN_EXE_engine");

/// How fast workers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Pace {
    /// They take no time.
    Unbounded,
    /// A token every 7 ms or so: the mocker's own pace.
    Model,
}

/// All that is needed to answer.
pub(crate) struct Stack {
    pub(crate) model: String,
    pub(crate) frontend: Process,
    pub(crate) workers: Process,
    /// A worker that speaks HTTP itself.
    pub(crate) worker: Option<SocketAddr>,
    _nats: Service,
    _etcd: Service,
    _folder: TempDir,
}

fn local(port: u16) -> SocketAddr {
    ([127, 0, 0, 1], port).into()
}

/// The frontend has heard of a model: its name, and where its files are.
fn model(address: SocketAddr) -> Option<(String, String)> {
    let models: serde_json::Value = serde_json::from_str(&http::get(&address.to_string(), "/v1/models").ok()?).ok()?;
    let model = &models["data"][0];
    Some((model["id"].as_str()?.to_owned(), model["root"].as_str().unwrap_or_default().to_owned()))
}

/// `engine mock`.
fn mock(folder: &Path, flags: &[&str]) -> Result<Process> {
    let address = local(free_port());
    let mut command = Command::new(PROGRAM);
    command.args([
        "mock",
        "--port",
        &address.port().to_string(),
        "--prompt-token-time",
        "0",
        "--max-num-seqs",
        MAX_NUM_SEQS,
    ]);
    command.args(flags).env_remove("ETCD_ENDPOINTS").env_remove("NATS_SERVER");
    let mut workers = Process::start("engine mock", command, address, &folder.join("workers.log"))?;
    workers.wait_until(|| model(address).is_some())?;
    Ok(workers)
}

impl Stack {
    /// Ours.
    pub(crate) fn engine(pace: Pace) -> Result<Self> {
        let (etcd, nats, folder) = (services::etcd(), services::nats(), tempfile::tempdir()?);
        let step = match pace {
            Pace::Unbounded => "0",
            Pace::Model => "7",
        };
        let cluster = ["--etcd", &etcd.url(), "--nats", &nats.url()];
        let decode_workers = WORKERS.to_string();
        let flags = [&["--decode-workers", &decode_workers, "--step-time", step][..], &cluster].concat();
        let workers = mock(folder.path(), &flags)?;
        let address = local(free_port());
        let mut command = Command::new(PROGRAM);
        command.args(["frontend", "--port", &address.port().to_string()]).args(cluster).env_remove("ENGINE_API_KEY");
        let frontend = Process::start("engine frontend", command, address, &folder.path().join("frontend.log"))?;
        let worker = Some(workers.address);
        Self { model: String::new(), frontend, workers, worker, _nats: nats, _etcd: etcd, _folder: folder }.ready()
    }

    /// The peer.
    pub(crate) fn dynamo(python: &Path, pace: Pace) -> Result<Self> {
        let (etcd, nats, folder) = (services::etcd(), services::nats(), tempfile::tempdir()?);
        // The same tokenizer and template: the mock's model, while a mock has it.
        let files = folder.path().join("mock");
        {
            let mock = mock(folder.path(), &[])?;
            let (_, root) = model(mock.address).context("the mock has a model")?;
            std::fs::create_dir(&files)?;
            for file in std::fs::read_dir(root)? {
                let file = file?;
                std::fs::copy(file.path(), files.join(file.file_name()))?;
            }
        }
        let part = |module: &str| {
            let mut command = Command::new(python);
            command.args(["-m", module, "--discovery-backend", "etcd", "--event-plane", "nats"]);
            command.env("ETCD_ENDPOINTS", etcd.url()).env("NATS_SERVER", nats.url()).current_dir(folder.path());
            // Nobody is to be told of this, and nothing looked for elsewhere.
            command.env("HF_HUB_OFFLINE", "1").env("DYN_HTTP_HOST", "127.0.0.1").env("DYN_TCP_RPC_HOST", "127.0.0.1");
            command
        };
        let ratio = match pace {
            Pace::Unbounded => "1000000",
            Pace::Model => "1",
        };
        let mut command = part("dynamo.mocker");
        command.arg("--model-path").arg(&files).args(["--model-name", "mock", "--speedup-ratio", ratio]);
        command.args(["--num-workers", &WORKERS.to_string(), "--max-num-seqs", MAX_NUM_SEQS]);
        let workers = Process::start("dynamo.mocker", command, local(0), &folder.path().join("workers.log"))?;
        let address = local(free_port());
        let mut command = part("dynamo.frontend");
        command.args(["--http-port", &address.port().to_string()]);
        let frontend = Process::start("dynamo.frontend", command, address, &folder.path().join("frontend.log"))?;
        Self { model: String::new(), frontend, workers, worker: None, _nats: nats, _etcd: etcd, _folder: folder }
            .ready()
    }

    /// Waits until the frontend knows the model.
    fn ready(mut self) -> Result<Self> {
        let address = self.frontend.address;
        let mut found = None;
        self.frontend.wait_until(|| {
            found = model(address);
            found.is_some()
        })?;
        self.model = found.context("it was there a moment ago")?.0;
        Ok(self)
    }
}
