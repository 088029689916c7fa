//! Places of workers: whoever sits there is replaced when it is killed.

use std::sync::Mutex;

use engine::cluster::Role;

use crate::{cell::Cell, program::Server, services::free_port};

/// Few pages, so that cached prompts are thrown out and requests are preempted.
const DECODE: [&str; 12] = [
    "--max-local-prefill-length",
    "128",
    "--max-prefill-queue-size",
    "4",
    "--max-num-seqs",
    "16",
    "--max-num-batched-tokens",
    "256",
    "--max-model-len",
    "2048",
    "--served-model-name",
    "demo",
];
/// Small steps, so that a prompt takes many.
const PREFILL: [&str; 5] = ["--is-prefill-worker", "--max-num-batched-tokens", "32", "--max-num-seqs", "4"];

pub(crate) struct Seat {
    name: String,
    pub(crate) role: Role,
    pub(crate) number: usize,
    /// Of its cache.
    pub(crate) pages: usize,
    flags: Vec<String>,
    worker: Mutex<Server>,
}

impl Seat {
    pub(crate) fn new(cell: &Cell, role: Role, number: usize) -> Self {
        let (role_flags, pages) = match role {
            Role::Decode => (&DECODE[..], 400),
            Role::Prefill => (&PREFILL[..], 300),
        };
        let mut flags: Vec<String> = cell.model.flags().iter().chain(role_flags).map(ToString::to_string).collect();
        let mut add = |flag: &str, value: String| flags.extend([flag.to_owned(), value]);
        add("--kv-blocks", pages.to_string());
        add("--threads", "1".to_owned());
        add("--etcd", cell.etcd.url());
        add("--nats", cell.nats.url());
        // Pages travel both ways.
        add("--transport", if number.is_multiple_of(2) { "auto" } else { "tcp" }.to_owned());
        // Some come back where they were, and must not be mistaken for the old ones.
        if number == 1 {
            add("--port", free_port().to_string());
            if role == Role::Decode {
                add("--session-port", free_port().to_string());
            }
        }
        let worker = Mutex::new(start(&flags));
        Self { name: format!("{role} worker {number}"), role, number, pages, flags, worker }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn with<T>(&self, act: impl FnOnce(&Server) -> T) -> T {
        act(&self.worker.lock().unwrap())
    }

    /// Puts another worker in the place of one that is ending.
    pub(crate) fn restart(&self) {
        let mut worker = self.worker.lock().unwrap();
        worker.wait();
        *worker = start(&self.flags);
    }

    /// Only ever stopped: what it loses track of adds up.
    pub(crate) fn lives_long(&self) -> bool {
        self.number == 0
    }
}

fn start(flags: &[String]) -> Server {
    Server::start_as(&flags.iter().map(String::as_str).collect::<Vec<_>>())
}
