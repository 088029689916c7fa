//! Real etcd and nats-server processes, each on free ports with a directory of its own, to be killed and started again.
#![allow(dead_code, unused_imports, reason = "each test uses some of it")]

mod certificates;
mod proxy;
#[allow(clippy::duplicate_mod, reason = "some tests have no program, others have both")]
#[path = "../program/signal.rs"]
mod signal;

pub(crate) use certificates::Certificates;
pub(crate) use proxy::Proxy;

use std::{
    fs::File,
    io::{Read, Write},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU16, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use tempfile::TempDir;

/// How long a service may take to start. Not a measurement: the machine may be very busy.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at a service that is starting.
const POLL_PAUSE: Duration = Duration::from_millis(20);

/// A port nobody listens on at the moment, and that this process was never given before: what shall listen on it may
/// take a while to start. It is none of those that the system gives to connections, one of which might have it when its
/// service is started again.
pub(crate) fn free_port() -> u16 {
    static GIVEN: LazyLock<AtomicU16> = LazyLock::new(|| AtomicU16::new(rand::random()));
    loop {
        let port = 10_000 + GIVEN.fetch_add(1, Ordering::Relaxed) % 20_000;
        if TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).is_ok() {
            return port;
        }
    }
}

/// A service as a process. It is killed when dropped.
pub(crate) struct Service {
    name: &'static str,
    arguments: Vec<String>,
    pub(crate) address: SocketAddr,
    /// Where it says that it is ready: not always where it serves.
    health: SocketAddr,
    directory: TempDir,
    /// Where it keeps its data.
    data: PathBuf,
    ready: fn(SocketAddr) -> std::io::Result<bool>,
    child: Option<Child>,
}

/// An etcd of one member.
pub(crate) fn etcd() -> Service {
    etcd_with(&[])
}

/// An etcd of one member that listens on `host`.
pub(crate) fn etcd_on(host: Ipv4Addr) -> Service {
    etcd_as(host, &[])
}

/// An etcd of one member with further flags; with `--cert-file` among them it serves over TLS.
pub(crate) fn etcd_with(flags: &[&str]) -> Service {
    etcd_as(Ipv4Addr::LOCALHOST, flags)
}

fn etcd_as(host: Ipv4Addr, flags: &[&str]) -> Service {
    let metrics = free_port();
    let health = (Ipv4Addr::LOCALHOST, metrics).into();
    Service::start("etcd", host, etcd_ready, Some(health), |port, data| {
        let scheme = if flags.contains(&"--cert-file") { "https" } else { "http" };
        let client = format!("{scheme}://{host}:{port}");
        let peer = format!("http://127.0.0.1:{}", free_port());
        let mut arguments = Vec::new();
        for (flag, value) in [
            ("name", "test"),
            ("data-dir", data),
            ("listen-client-urls", &client),
            ("advertise-client-urls", &client),
            ("listen-peer-urls", &peer),
            ("initial-advertise-peer-urls", &peer),
            ("initial-cluster", &format!("test={peer}")),
            ("listen-metrics-urls", &format!("http://127.0.0.1:{metrics}")),
            ("logger", "zap"),
        ] {
            arguments.extend([format!("--{flag}"), value.to_owned()]);
        }
        arguments.extend(flags.iter().map(ToString::to_string));
        arguments
    })
}

/// A NATS server that keeps streams.
pub(crate) fn nats() -> Service {
    nats_with(&[])
}

/// A NATS server that keeps streams and listens on `host`.
pub(crate) fn nats_on(host: Ipv4Addr) -> Service {
    nats_as(host, &[])
}

/// A NATS server that keeps streams, with further flags.
pub(crate) fn nats_with(flags: &[&str]) -> Service {
    nats_as(Ipv4Addr::LOCALHOST, flags)
}

/// A NATS server that keeps streams, with lines of a configuration file.
pub(crate) fn nats_with_config(lines: &str) -> Service {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("nats.conf");
    std::fs::write(&path, lines).unwrap();
    // Read at the start, and needed for no longer.
    nats_with(&["-c", path.to_str().unwrap()])
}

fn nats_as(host: Ipv4Addr, flags: &[&str]) -> Service {
    Service::start("nats-server", host, nats_ready, None, |port, data| {
        let (host, port) = (host.to_string(), port.to_string());
        let arguments = ["-js", "-sd", data, "-a", &host, "-p", &port];
        arguments.iter().chain(flags).map(ToString::to_string).collect()
    })
}

/// etcd answers requests once it has a leader.
fn etcd_ready(address: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(b"GET /health HTTP/1.1\r\nHost: etcd\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer.contains("\"health\":\"true\""))
}

/// NATS greets.
fn nats_ready(address: SocketAddr) -> std::io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut greeting = [0; 5];
    stream.read_exact(&mut greeting)?;
    Ok(&greeting == b"INFO ")
}

impl Service {
    fn start(
        name: &'static str,
        host: Ipv4Addr,
        ready: fn(SocketAddr) -> std::io::Result<bool>,
        health: Option<SocketAddr>,
        arguments: impl FnOnce(u16, &str) -> Vec<String>,
    ) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("data");
        let port = free_port();
        let arguments = arguments(port, data.to_str().unwrap());
        let address = (host, port).into();
        let health = health.unwrap_or(address);
        let mut service = Self { name, arguments, address, health, directory, data, ready, child: None };
        service.restart();
        service
    }

    /// Starts it again with the data it has. It is ready on return.
    pub(crate) fn restart(&mut self) {
        self.kill();
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        // Debian puts servers where not every PATH looks.
        let path = format!("{}:/usr/sbin:/usr/local/sbin", std::env::var("PATH").unwrap_or_default());
        let mut command = Command::new(self.name);
        command.args(&self.arguments).env("PATH", path).stdin(Stdio::null());
        // etcd 3.4 refuses to start on a few architectures and variables; the tests' environment is not its business.
        for (name, _) in std::env::vars().filter(|(name, _)| name.starts_with("ETCD_")) {
            command.env_remove(name);
        }
        command.stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {}: {error} (make setup)", self.name));
        self.child = Some(child);
        let started = Instant::now();
        while !(self.ready)(self.health).unwrap_or(false) {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            if ended.is_some() || started.elapsed() > PATIENCE {
                panic!("{} did not start: {ended:?}\n{}", self.name, self.log());
            }
            thread::sleep(POLL_PAUSE);
        }
    }

    /// Starts it again without any data.
    pub(crate) fn restart_empty(&mut self) {
        self.kill();
        std::fs::remove_dir_all(&self.data).unwrap();
        self.restart();
    }

    /// Kills it as `kill -9` does.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// The process' number.
    pub(crate) fn id(&self) -> u32 {
        self.child.as_ref().expect("it runs").id()
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        signal::send(self.id(), name);
    }

    /// `http://…` or `nats://…`.
    pub(crate) fn url(&self) -> String {
        let tls = self.arguments.iter().any(|argument| argument == "--cert-file");
        let scheme = match (self.name, tls) {
            ("etcd", false) => "http",
            ("etcd", true) => "https",
            _ => "nats",
        };
        format!("{scheme}://{}", self.address)
    }

    fn log_path(&self) -> PathBuf {
        self.directory.path().join("log")
    }

    /// What it wrote so far.
    pub(crate) fn log(&self) -> String {
        std::fs::read_to_string(self.log_path()).unwrap_or_default()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.kill();
    }
}
