use std::{
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, Weak},
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;

use super::{
    client::{self, Events, Response},
    signal,
};
use crate::support::demo_model;

/// How long anything may take before a test gives up. Not a measurement: the machine may be very busy.
const PATIENCE: Duration = Duration::from_secs(120);
/// Between two looks at something that is waited for: asking without a pause would take the server's core.
const POLL_PAUSE: Duration = Duration::from_millis(5);

/// A running server. It is killed when dropped.
pub(crate) struct Server {
    child: Mutex<Child>,
    pub(crate) address: SocketAddr,
    /// What it wrote to standard error so far.
    log: Arc<Mutex<String>>,
}

impl Server {
    /// Starts one with the demo model under the name `demo`, alone, and further flags.
    pub(crate) fn start(flags: &[&str]) -> Self {
        let model = demo_model();
        let model = ["--model", model.to_str().unwrap(), "--served-model-name", "demo", "--standalone"];
        Self::start_as(&[&model[..], flags].concat())
    }

    /// Starts one in any role, on a free port unless the flags name one.
    pub(crate) fn start_as(flags: &[&str]) -> Self {
        Self::start_under(&[], flags)
    }

    /// Starts one as an argument of another command, which must end as the same process.
    pub(crate) fn start_under(outer: &[&str], flags: &[&str]) -> Self {
        let words = [outer, &[env!("CARGO_BIN_EXE_engine")], flags].concat();
        let mut command = Command::new(words[0]);
        command.args(&words[1..]);
        if !flags.contains(&"--port") {
            command.args(["--port", "0"]);
        }
        // Whatever runs on this machine is not the test's business.
        command.env_remove("ETCD_ENDPOINTS").env_remove("NATS_SERVER");
        command.env_remove("ENGINE_API_KEY").stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let mut stdout = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let log = Arc::new(Mutex::new(String::new()));
        let mut stderr = BufReader::new(child.stderr.take().expect("stderr is piped"));
        let sink = log.clone();
        thread::spawn(move || {
            let mut line = String::new();
            while stderr.read_line(&mut line).is_ok_and(|read| read > 0) {
                sink.lock().unwrap().push_str(&line);
                line.clear();
            }
        });
        let mut line = String::new();
        stdout.read_line(&mut line).expect("stdout is read");
        let Some(address) = line.trim().rsplit_once("http://").and_then(|(_, address)| address.parse().ok()) else {
            let status = child.wait();
            panic!("the server did not start: {status:?}\n{line}{}", log.lock().unwrap());
        };
        // What follows is for people; read, so that the pipe never fills.
        thread::spawn(move || stdout.read_to_end(&mut Vec::new()));
        Self { child: Mutex::new(child), address, log }
    }

    /// One server for all tests of a file that need nothing special. It ends with the last of them.
    pub(crate) fn shared() -> Arc<Self> {
        Self::shared_with(&["--max-model-len", "1024", "--kv-blocks", "256"])
    }

    /// The same with other flags, the same ones in all tests of the file.
    pub(crate) fn shared_with(flags: &[&str]) -> Arc<Self> {
        static SHARED: Mutex<Weak<Server>> = Mutex::new(Weak::new());
        let mut shared = SHARED.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        shared.upgrade().unwrap_or_else(|| {
            let server = Arc::new(Self::start(flags));
            *shared = Arc::downgrade(&server);
            server
        })
    }

    /// `GET path`.
    pub(crate) fn get(&self, path: &str) -> Response {
        client::request(self.address, "GET", path, &[], b"")
    }

    /// `POST path` with JSON.
    pub(crate) fn post(&self, path: &str, body: &Value) -> Response {
        client::request(
            self.address,
            "POST",
            path,
            &[("Content-Type", "application/json")],
            body.to_string().as_bytes(),
        )
    }

    /// Any request.
    pub(crate) fn request(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Response {
        client::request(self.address, method, path, headers, body)
    }

    /// The answer to JSON that is sent by `POST`, which has to be one.
    pub(crate) fn answer(&self, path: &str, request: &Value) -> Value {
        let response = self.post(path, request);
        assert_eq!(response.status, 200, "{:.500}: {}\n{}", request.to_string(), response.text(), self.log());
        response.json()
    }

    /// The same answer as a stream: all its events.
    pub(crate) fn streamed(&self, path: &str, request: &Value) -> Vec<Value> {
        let mut request = request.clone();
        request["stream"] = true.into();
        self.stream(path, &request).finish()
    }

    /// `POST path` with JSON, to be read event by event.
    pub(crate) fn stream(&self, path: &str, body: &Value) -> Events {
        Events::open(self.address, path, body)
    }

    /// The value of a metric, by its name with labels.
    pub(crate) fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line = text.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(' ')));
        line.and_then(|line| line.rsplit(' ').next()?.parse().ok()).unwrap_or_else(|| panic!("no {name} in\n{text}"))
    }

    /// Asks until `holds`.
    pub(crate) fn wait_until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let started = Instant::now();
        while !holds(self) {
            assert!(started.elapsed() < PATIENCE, "still waiting until {what}\n{}", self.log());
            thread::sleep(POLL_PAUSE);
        }
    }

    /// Waits until no page belongs to a request.
    pub(crate) fn wait_until_idle(&self) {
        self.wait_until("all pages are free", |server| {
            server.metric("engine_kv_pages{state=\"owned\"}") == 0.0 && server.metric("engine_running_requests") == 0.0
        });
    }

    /// Sends a signal by name.
    pub(crate) fn signal(&self, name: &str) {
        signal::send(self.child.lock().unwrap().id(), name);
    }

    /// Waits for its end.
    pub(crate) fn wait(&self) -> ExitStatus {
        let started = Instant::now();
        loop {
            if let Some(status) = self.child.lock().unwrap().try_wait().expect("the child can be waited for") {
                return status;
            }
            assert!(started.elapsed() < PATIENCE, "the server does not end\n{}", self.log());
            thread::sleep(POLL_PAUSE);
        }
    }

    /// Resident memory in bytes.
    pub(crate) fn resident_bytes(&self) -> usize {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.lock().unwrap().id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("it runs");
        line.trim().trim_end_matches("kB").trim().parse::<usize>().unwrap() * 1024
    }

    /// What it wrote to standard error.
    pub(crate) fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let child = self.child.get_mut().unwrap_or_else(|poisoned| poisoned.into_inner());
        let _ = child.kill();
        let _ = child.wait();
    }
}
