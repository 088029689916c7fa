//! A cluster on one machine, as small as it gets: etcd, NATS, and workers with the demo model.
#![allow(dead_code, reason = "each test uses some of it")]

use serde_json::{Value, json};

use crate::{
    program::Server,
    services::{self, Service},
    support::demo_model,
};

/// Tokens of a prompt that is handed off, in tests that set a threshold of 64, and of one that is not.
pub(crate) const LONG: usize = 250;
pub(crate) const SHORT: usize = 20;

/// The services. Workers find them by flags.
pub(crate) struct Cell {
    pub(crate) etcd: Service,
    pub(crate) nats: Service,
}

impl Cell {
    pub(crate) fn start() -> Self {
        Self { etcd: services::etcd(), nats: services::nats() }
    }

    /// A decode worker with further flags.
    pub(crate) fn decode(&self, flags: &[&str]) -> Server {
        let (etcd, nats, model) = (self.etcd.url(), self.nats.url(), demo_model());
        let model = ["--model", model.to_str().unwrap(), "--served-model-name", "demo"];
        let cluster = ["--max-model-len", "1024", "--etcd", &etcd, "--nats", &nats];
        Server::start_as(&[&model[..], &cluster, pages_unless_in(flags), flags].concat())
    }

    /// A prefill worker with further flags, which takes its model from the cluster.
    pub(crate) fn prefill(&self, flags: &[&str]) -> Server {
        let (etcd, nats) = (self.etcd.url(), self.nats.url());
        let role = ["--is-prefill-worker", "--etcd", &etcd, "--nats", &nats];
        Server::start_as(&[&role[..], pages_unless_in(flags), flags].concat())
    }

    /// Returns when a decode worker hands prompts off.
    pub(crate) fn wait_for_prefill_worker(&self, decode: &Server) {
        decode.wait_until("it knows a prefill worker and the queue", |decode| {
            decode.metric("engine_prefill_workers") >= 1.0 && decode.metric("engine_prefill_queue_depth") >= 0.0
        });
    }
}

/// Enough pages for most tests, and little memory.
fn pages_unless_in(flags: &[&str]) -> &'static [&'static str] {
    if flags.contains(&"--kv-blocks") { &[] } else { &["--kv-blocks", "256"] }
}

/// Token ids that no other length's prompt starts with, so that none is found in the cache.
pub(crate) fn prompt(length: usize) -> Vec<u32> {
    let family = if length >= LONG { 7 } else { length as u32 };
    (0..length as u32).map(|position| 100 + (family * 977 + position * 131) % 40_000).collect()
}

/// The tokens and log-probabilities of a greedy answer.
pub(crate) fn ask(server: &Server, prompt: &[u32]) -> Value {
    let request = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 3, "ignore_eos": true});
    let response = server.post("/v1/completions", &request);
    assert_eq!(response.status, 200, "{}\n{}", response.text(), server.log());
    response.json()["choices"][0].clone()
}

/// Waits until no page belongs to a request or is lent.
pub(crate) fn wait_until_idle(server: &Server) {
    let none = |server: &Server, state: &str| server.metric(&format!("engine_kv_pages{{state=\"{state}\"}}")) == 0.0;
    server.wait_until("all pages are back", |server| {
        ["owned", "lent", "quarantined"].iter().all(|state| none(server, state))
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
