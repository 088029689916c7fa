//! A cluster on one machine, as small as it gets: etcd, NATS, and a few workers.
#![allow(dead_code, unused_imports, reason = "each test uses some of it")]

mod model;
mod network;
mod whole;

pub(crate) use model::Model;
pub(crate) use network::Network;
pub(crate) use whole::answers_equal_those_of_one_process;

use std::{
    io::Write,
    net::{Ipv4Addr, TcpStream},
    sync::Arc,
    time::Duration,
};

use engine::cluster::{
    Cluster, ClusterOptions, EtcdOptions, ModelKey, NatsOptions, Role, WorkerCard, WorkerFilter, WorkerSet,
};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::{
    program::Server,
    services::{self, Service},
};

/// How long anything may take before a test gives up. Not a measurement: the machine may be very busy.
const PATIENCE: Duration = Duration::from_secs(120);
/// Where workers are unless flags say otherwise.
const NAMESPACE: &str = "engine";
/// Tokens of a prompt that is handed off, in tests that set a threshold of 64, and of one that is not.
pub(crate) const LONG: usize = 250;
pub(crate) const SHORT: usize = 20;

/// The services, which workers find by flags, and what all workers serve.
pub(crate) struct Cell {
    pub(crate) etcd: Service,
    pub(crate) nats: Service,
    pub(crate) model: Model,
    /// Prefill workers are on the other side of it, everybody else on this one.
    network: Option<Network>,
    /// Under which workers are started: nothing, or `env` and variables.
    environment: Vec<String>,
}

impl Cell {
    /// With the demo model.
    pub(crate) fn start() -> Self {
        Self::of(Model::demo())
    }

    /// With this model.
    pub(crate) fn of(model: Model) -> Self {
        Self::with_nats(services::nats(), model)
    }

    /// With this model, and a NATS that is somehow special.
    pub(crate) fn with_nats(nats: Service, model: Model) -> Self {
        Self { etcd: services::etcd(), nats, model, network: None, environment: Vec::new() }
    }

    /// With this model, and prefill workers at the other end of a network.
    pub(crate) fn across(network: Network, model: Model) -> Self {
        let (etcd, nats) = (services::etcd_on(network.here), services::nats_on(network.here));
        Self { etcd, nats, model, network: Some(network), environment: Vec::new() }
    }

    /// With these variables (`NAME=value`) in the environment of whatever is started from now on.
    pub(crate) fn set_environment(&mut self, variables: &[&str]) {
        self.environment = ["env"].iter().chain(variables).map(ToString::to_string).collect();
    }

    /// A decode worker with further flags.
    pub(crate) fn decode(&self, flags: &[&str]) -> Server {
        self.decode_of(&self.model, flags)
    }

    /// A decode worker of another model.
    pub(crate) fn decode_of(&self, model: &Model, flags: &[&str]) -> Server {
        let (context, pages) = (model.context.to_string(), model.pages.to_string());
        let defaults = [("--served-model-name", "demo"), ("--max-model-len", &context), ("--kv-blocks", &pages)];
        self.start_here(&[&model.flags(), &unless_in(flags, &defaults)[..], flags].concat())
    }

    /// A prefill worker with further flags, which takes its model from the cluster unless they name one.
    pub(crate) fn prefill(&self, flags: &[&str]) -> Server {
        let pages = self.model.pages.to_string();
        let services = self.services();
        let role = ["--is-prefill-worker", "--etcd", &services[0], "--nats", &services[1]];
        let flags = [&role, &unless_in(flags, &[("--kv-blocks", &pages)])[..], flags].concat();
        match &self.network {
            None => Server::start_under(&self.outer(), &flags),
            Some(network) => {
                let there = network.there.to_string();
                Server::start_under(&network.enter(), &[&flags[..], &["--host", &there]].concat())
            }
        }
    }

    /// A frontend with further flags.
    pub(crate) fn frontend(&self, flags: &[&str]) -> Server {
        self.start_here(&[&["frontend"], flags].concat())
    }

    /// A server in one process, to compare with.
    pub(crate) fn alone(&self) -> Server {
        self.model.alone()
    }

    /// A prompt of so many tokens. No two of different numbers begin alike.
    pub(crate) fn prompt(&self, number: usize, length: usize) -> Vec<u32> {
        self.model.prompt(number, length)
    }

    fn start_here(&self, flags: &[&str]) -> Server {
        let services = self.services();
        let here = self.network.as_ref().map_or(Ipv4Addr::LOCALHOST, |network| network.here).to_string();
        let flags = [flags, &["--etcd", &services[0], "--nats", &services[1], "--host", &here]].concat();
        Server::start_under(&self.outer(), &flags)
    }

    fn outer(&self) -> Vec<&str> {
        self.environment.iter().map(String::as_str).collect()
    }

    pub(crate) fn services(&self) -> [String; 2] {
        [self.etcd.url(), self.nats.url()]
    }

    /// Returns when a decode worker hands prompts off.
    pub(crate) fn wait_for_prefill_worker(&self, decode: &Server) {
        self.wait_for_prefill_workers(decode, 1);
    }

    /// Returns when a decode worker hands prompts off to `workers`.
    pub(crate) fn wait_for_prefill_workers(&self, decode: &Server, workers: usize) {
        self.wait_for_prefill_workers_in(NAMESPACE, decode, workers);
    }

    /// The same in another namespace.
    pub(crate) fn wait_for_prefill_workers_in(&self, namespace: &str, decode: &Server, workers: usize) {
        decode.wait_until("it knows the prefill workers and the queue", |decode| {
            decode.metric("engine_prefill_workers") >= workers as f64
                && decode.metric("engine_prefill_queue_depth") >= 0.0
        });
        // They are known a moment before they ask for jobs. If that takes long, it finds the queue deserted meanwhile,
        // and knows of none until it looks again.
        let runtime = Runtime::new().unwrap();
        let (cluster, key) = (runtime.block_on(join_in(self, namespace)), model_key(decode));
        decode.wait_until("they ask for jobs, and it knows that they do", |decode| {
            runtime.block_on(cluster.queue.depth(key)).is_ok_and(|depth| depth.asking >= workers as u64)
                && decode.metric("engine_prefill_workers") >= workers as f64
        });
    }
}

/// The test's own way into the cluster.
pub(crate) async fn join(cell: &Cell) -> Cluster {
    join_in(cell, NAMESPACE).await
}

/// The same into another namespace.
async fn join_in(cell: &Cell, namespace: &str) -> Cluster {
    let etcd = EtcdOptions::new(vec![cell.etcd.url()]);
    let nats = NatsOptions::new(vec![cell.nats.url()]);
    Cluster::connect(ClusterOptions { namespace: namespace.to_owned(), etcd, nats }).await.unwrap()
}

/// The workers that are registered, once it `holds` for them.
pub(crate) async fn registered(
    cluster: &Cluster,
    filter: WorkerFilter,
    holds: impl FnMut(&Arc<WorkerSet>) -> bool,
) -> Arc<WorkerSet> {
    let mut workers = cluster.discovery.workers(filter);
    let there = tokio::time::timeout(PATIENCE, workers.wait_for(holds)).await;
    let there = there.expect("the workers are registered in time").unwrap();
    there.clone()
}

/// The card of a worker of this role.
pub(crate) async fn card(cluster: &Cluster, role: Role) -> Arc<WorkerCard> {
    let workers = registered(cluster, WorkerFilter::role(role), |workers| !workers.is_empty()).await;
    workers.values().next().unwrap().clone()
}

/// What a worker's model is known by.
fn model_key(worker: &Server) -> ModelKey {
    let text = worker.get("/metrics").text();
    let (_, key) = text.split_once("model_key=\"").unwrap_or_else(|| panic!("{text}"));
    key.split('"').next().unwrap().parse().unwrap()
}

/// Those flags that are not there.
pub(crate) fn unless_in<'a>(flags: &[&str], defaults: &[(&'a str, &'a str)]) -> Vec<&'a str> {
    let missing = defaults.iter().filter(|(flag, _)| !flags.contains(flag));
    missing.flat_map(|&(flag, value)| [flag, value]).collect()
}

/// Returns when a frontend knows so many decode workers.
pub(crate) fn wait_for_decode_workers(frontend: &Server, workers: usize) {
    frontend.wait_until("it knows the decode workers", |frontend| {
        frontend.metric("engine_frontend_workers") == workers as f64
    });
}

/// The sum of a metric.
pub(crate) fn sum(servers: &[Server], metric: &str) -> f64 {
    servers.iter().map(|server| server.metric(metric)).sum()
}

/// Token ids that no other length's prompt starts with, so that none is found in the cache.
pub(crate) fn prompt(length: usize) -> Vec<u32> {
    let family = if length >= LONG { 7 } else { length as u32 };
    (0..length as u32).map(|position| 100 + (family * 977 + position * 131) % 40_000).collect()
}

/// The tokens and log-probabilities of a greedy answer.
pub(crate) fn ask(server: &Server, prompt: &[u32]) -> Value {
    answer_to(server, &json!({"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 3, "ignore_eos": true}))
}

/// The answer to a request for a completion.
pub(crate) fn answer_to(server: &Server, request: &Value) -> Value {
    server.answer("/v1/completions", request)["choices"][0].clone()
}

/// Sends a request and does not wait for the answer.
pub(crate) fn leave_behind(server: &Server, prompt: &[u32]) -> TcpStream {
    let body = json!({"prompt": prompt, "max_tokens": 50, "ignore_eos": true}).to_string();
    let mut connection = TcpStream::connect(server.address).unwrap();
    let head = format!(
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + &body).as_bytes()).unwrap();
    connection
}

/// Waits until no page belongs to a request or is lent, nor one that stands in for it.
pub(crate) fn wait_until_idle(server: &Server) {
    let none = |server: &Server, state: &str| server.metric(&format!("engine_kv_pages{{state=\"{state}\"}}")) == 0.0;
    server.wait_until("all pages are back", |server| {
        ["owned", "lent", "quarantined"].iter().all(|state| none(server, state))
            && server.metric("engine_staging_pages{state=\"lent\"}") == 0.0
    });
}

/// A request for `tokens` tokens in answer to `prompt`, as a stream.
pub(crate) fn streamed(prompt: &[u32], tokens: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": true})
}

/// Flags that make a prefill worker take many steps for a prompt, so that something can be done to it in between.
pub(crate) const SLOWLY: [&str; 6] = ["--max-num-batched-tokens", "8", "--max-num-seqs", "8", "--threads", "1"];

/// A metric of handoffs.
pub(crate) fn handoffs(server: &Server, outcome: &str) -> f64 {
    server.metric(&format!("engine_handoffs_total{{outcome=\"{outcome}\"}}"))
}

/// Handoffs that were granted so far.
pub(crate) fn granted(server: &Server) -> f64 {
    server.metric("engine_handoff_seconds_count{phase=\"queue\"}")
}

/// Prompts that were computed `local`ly or `remote`ly.
pub(crate) fn prefills(server: &Server, place: &str) -> f64 {
    server.metric(&format!("engine_prefills_total{{where=\"{place}\"}}"))
}

/// Pages in a state.
pub(crate) fn pages(server: &Server, state: &str) -> f64 {
    server.metric(&format!("engine_kv_pages{{state=\"{state}\"}}"))
}
