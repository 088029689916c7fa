//! Workers as processes, each on cores of its own, or all on one device.

use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::http;
use crate::model::Model;
use crate::services::{self, Service};

/// How long a worker may take to be of use to others.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL_PAUSE: Duration = Duration::from_millis(2);

/// The program, and what its workers compute on.
pub(crate) struct Engine {
    pub(crate) program: PathBuf,
    /// The device of all workers; without one each is held to cores.
    pub(crate) device: Option<String>,
    /// Further flags of all workers.
    pub(crate) flags: Vec<String>,
}

impl Engine {
    /// Transports that are compared.
    pub(crate) fn transports(&self) -> &'static [&'static str] {
        if self.device.is_some() { &["cuda-ipc"] } else { &["shm", "tcp"] }
    }

    /// What workers on a device are told, so that no other way is measured in secret.
    pub(crate) fn way(&self) -> &'static [&'static str] {
        if self.device.is_some() { &["--transport", "cuda-ipc"] } else { &[] }
    }

    /// A worker of these cores or the device, with further flags.
    fn worker(&self, cores: &[usize], flags: Vec<String>) -> Result<Worker> {
        let mut command = if let Some(device) = &self.device {
            let mut command = Command::new(&self.program);
            command.args(["--device", device]);
            command
        } else {
            let list: Vec<String> = cores.iter().map(ToString::to_string).collect();
            let mut command = Command::new("taskset");
            command.args(["-c", &list.join(",")]).arg(&self.program).args(["--threads", &cores.len().to_string()]);
            command
        };
        command.args(flags).args(&self.flags).args(["--port", "0", "--log-level", "error"]);
        Worker::start(command)
    }
}

/// etcd and NATS.
pub(crate) struct Services {
    etcd: Service,
    nats: Service,
}

impl Services {
    pub(crate) fn start() -> Self {
        Self { etcd: services::etcd(), nats: services::nats() }
    }

    /// Flags of workers of the cluster `namespace`.
    fn flags(&self, namespace: &str) -> Vec<String> {
        ["--etcd", &self.etcd.url(), "--nats", &self.nats.url(), "--namespace", namespace].map(str::to_owned).into()
    }
}

/// A worker; killed when dropped.
pub(crate) struct Worker {
    child: Child,
    /// `host:port`.
    pub(crate) address: String,
}

impl Worker {
    /// One that serves alone, on these cores, with a thread on each; or on the device.
    pub(crate) fn alone(engine: &Engine, model: &Model, cores: &[usize]) -> Result<Self> {
        let mut flags = model.flags();
        flags.push("--standalone".into());
        engine.worker(cores, flags)
    }

    fn start(mut command: Command) -> Result<Self> {
        command.env_remove("ETCD_ENDPOINTS").env_remove("NATS_SERVER").env_remove("ENGINE_API_KEY");
        let mut child = command.stdout(Stdio::piped()).spawn().with_context(|| format!("cannot start {command:?}"))?;
        let mut stdout = BufReader::new(child.stdout.take().context("stdout is piped")?);
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        // What follows is for people; read, so that the pipe never fills.
        thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
        let address = line.trim().rsplit_once("http://").map(|(_, address)| address.to_owned());
        let Some(address) = address else { bail!("a worker did not start: {line}{:?}", child.wait()) };
        Ok(Self { child, address })
    }

    /// The value of a metric, by its name with labels.
    pub(crate) fn metric(&self, name: &str) -> Result<f64> {
        let text = http::get(&self.address, "/metrics")?;
        let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        let value = line.and_then(|line| line.rsplit(' ').next()?.parse().ok());
        value.with_context(|| format!("{} has no {name}", self.address))
    }

    /// Asks until a metric is as it should be.
    pub(crate) fn wait_until(&self, name: &str, holds: impl Fn(f64) -> bool) -> Result<()> {
        let started = Instant::now();
        while !holds(self.metric(name)?) {
            if started.elapsed() > PATIENCE {
                bail!("{name} of {} stays {}", self.address, self.metric(name)?);
            }
            thread::sleep(POLL_PAUSE);
        }
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // Either call fails only if the process has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A decode worker on core 0 and a prefill worker on core 1, or both on the device.
pub(crate) struct Pair {
    pub(crate) decode: Worker,
    pub(crate) prefill: Worker,
}

impl Pair {
    /// Starts both; `namespace` keeps pairs apart.
    pub(crate) fn start(
        engine: &Engine,
        services: &Services,
        namespace: &str,
        model: &Model,
        flags: &[&str],
    ) -> Result<Self> {
        let worker = |core, own: &[&str]| {
            let mut all = [model.flags(), services.flags(namespace)].concat();
            all.extend(flags.iter().chain(own).map(ToString::to_string));
            engine.worker(&[core], all)
        };
        let decode = worker(0, &["--max-local-prefill-length", "64"])?;
        let prefill = worker(1, &["--is-prefill-worker"])?;
        decode.wait_until("engine_prefill_workers", |workers| workers >= 1.0)?;
        decode.wait_until("engine_prefill_queue_depth", |depth| depth >= 0.0)?;
        Ok(Self { decode, prefill })
    }
}
