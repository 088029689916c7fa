//! The frontend before workers in this process, over real sockets.

#[allow(dead_code, reason = "of the client, a part is used here")]
#[path = "../program/client.rs"]
mod client;
mod door;
mod losses;
#[path = "../served/mod.rs"]
mod served;
#[path = "../support/mod.rs"]
mod support;

use std::{
    net::{SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use client::{Events, Response};
use engine::{
    cluster::{CARD_SCHEMA, Cluster, Lease, ModelCard, ModelKey, Role, WorkerCard},
    frontend::{FrontendConfig, FrontendMetrics, serve},
    http::{self, ConnectionThreads, HttpToken, ServerConfig},
};
use serde_json::{Value, json};
use served::{Answer, Options, Worker};
use tokio::{runtime::Runtime, sync::oneshot};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
/// How long anything may take before a test gives up.
const PATIENCE: Duration = Duration::from_secs(120);

struct Front {
    address: SocketAddr,
    cluster: Cluster,
    metrics: FrontendMetrics,
    runtime: Arc<Runtime>,
    shutdown: Option<oneshot::Sender<()>>,
}

impl Front {
    fn start() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut FrontendConfig)) -> Self {
        // One thread, as the frontend's own.
        let runtime = Arc::new(tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap());
        let mut config = FrontendConfig {
            api_keys: Vec::new(),
            requests_max: 1024,
            body_bytes_max: 1 << 20,
            body_memory_max: 150 << 10,
            request_timeout: PATIENCE,
            patience: Duration::from_millis(300),
            cluster_token: None,
            allowed_origins: Vec::new(),
        };
        change(&mut config);
        let (cluster, metrics) = (Cluster::local(), FrontendMetrics::new());
        let bound = runtime.block_on(http::bind("127.0.0.1", 0)).unwrap();
        let (shutdown, told) = oneshot::channel();
        let guard = runtime.enter();
        let listener = bound.listen().unwrap();
        let address = listener.local_addr().unwrap();
        let server = ServerConfig {
            connections_max: 1024,
            drain_timeout: PATIENCE,
            threads: ConnectionThreads::start(2).unwrap(),
        };
        let (serving, counted) = (cluster.clone(), metrics.clone());
        drop(guard);
        let main = runtime.clone();
        thread::spawn(move || {
            let told = async { drop(told.await) };
            main.block_on(serve(listener, &serving, config, counted, server, told));
        });
        Self { address, cluster, metrics, runtime, shutdown: Some(shutdown) }
    }

    fn register(&self, address: SocketAddr, model: &str) -> Lease {
        let _guard = self.runtime.enter();
        self.cluster.discovery.register(card(address, model))
    }

    fn post(&self, path: &str, body: &Value) -> Response {
        client::post_bytes(self.address, path, body.to_string().as_bytes())
    }

    fn get(&self, path: &str) -> Response {
        client::request(self.address, "GET", path, &[], b"")
    }

    /// A metric's value, as whoever asks over HTTP is told.
    fn counts_as_asked(&self, name: &str) -> f64 {
        Self::value(&self.get("/metrics").text(), name)
    }

    /// A metric's value.
    fn counts(&self, name: &str) -> f64 {
        Self::value(&self.metrics.render(), name)
    }

    fn value(text: &str, name: &str) -> f64 {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        line.unwrap_or_else(|| panic!("no {name} in\n{text}"))
    }

    fn wait_until_there_are(&self, workers: usize) {
        wait_until("the workers are known", || self.counts("engine_frontend_workers") == workers as f64);
    }
}

fn card(address: SocketAddr, model: &str) -> WorkerCard {
    WorkerCard {
        schema: CARD_SCHEMA,
        version: "0".into(),
        role: Role::Decode,
        address: address.to_string(),
        session: Value::Null,
        transports: Vec::new(),
        staging: String::new(),
        host_id: "h".into(),
        local: None,
        model: ModelCard {
            names: vec![model.into()],
            max_model_len: 2048,
            source: format!("/models/{model}"),
            revision: None,
            load_format: "auto".into(),
            kv_cache_dtype: "f16".into(),
            block_size: 16,
            layers: 0,
            page_bytes: 0,
            page_order: String::new(),
            weights: String::new(),
        },
        model_key: ModelKey::of(model.as_bytes()),
    }
}

fn wait_until(what: &str, holds: impl Fn() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(started.elapsed() < PATIENCE, "still waiting until {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

fn busy(worker: &Worker) -> bool {
    let snapshot = worker.engine.snapshot();
    worker.gate.holds() || snapshot.running + snapshot.waiting > 0
}

/// A frontend before `count` workers of one model.
fn with_workers(count: usize, options: impl Fn() -> Options) -> (Front, Vec<Worker>, Vec<Lease>) {
    let front = Front::start();
    let workers: Vec<_> = (0..count).map(|_| Worker::start(options())).collect();
    let leases = workers.iter().map(|worker| front.register(worker.address, "m")).collect();
    front.wait_until_there_are(count);
    (front, workers, leases)
}

fn slow() -> Options {
    Options { step: Duration::from_millis(2), ..Options::default() }
}

fn streaming(path: &str) -> Value {
    let common = json!({
        "model": "m", "max_tokens": 60, "ignore_eos": true, "seed": 9, "stream": true,
        "stream_options": {"include_usage": true},
    });
    let mut request = common;
    match path {
        CHAT => request["messages"] = json!([{"role": "user", "content": "Go on."}]),
        _ => (request["prompt"], request["n"], request["logprobs"]) = (json!("Go on."), json!(2), json!(1)),
    }
    request
}

fn answer(events: &[Value]) -> Answer {
    let mut answer = Answer::default();
    for event in events {
        answer.take(&event.to_string());
    }
    answer.take("[DONE]");
    answer.anonymous()
}

/// What a worker that nobody disturbs answers.
fn undisturbed(path: &str, request: &Value) -> Answer {
    let worker = Worker::start(Options::default());
    answer(&Events::open(worker.address, path, request).finish())
}

#[test]
fn a_client_that_hangs_up_is_gone_at_the_worker_too() {
    let (front, workers, _leases) = with_workers(1, slow);
    let mut request = streaming(COMPLETIONS);
    request["max_tokens"] = json!(2000);
    let mut events = Events::open(front.address, COMPLETIONS, &request);
    events.next().unwrap();
    drop(events);
    wait_until("the frontend has let go", || front.counts("engine_frontend_requests_in_flight") == 0.0);
    wait_until("the worker has nothing to do", || !busy(&workers[0]));
}

#[test]
fn a_slow_client_gets_everything() {
    let (front, workers, _leases) = with_workers(1, Options::default);
    let mut request = streaming(COMPLETIONS);
    (request["max_tokens"], request["logprobs"]) = (json!(1500), json!(5));
    let events = Events::open(front.address, COMPLETIONS, &request);
    wait_until("the worker is done", || !busy(&workers[0]));
    assert_eq!(answer(&events.finish()), undisturbed(COMPLETIONS, &request));
}

#[test]
fn models_are_told_apart_and_listed_together() {
    let front = Front::start();
    let (one, two) = (Worker::start(Options::default()), Worker::start(Options { model: "n/2", ..Options::default() }));
    let _leases = [front.register(one.address, "m"), front.register(two.address, "n/2")];
    front.wait_until_there_are(2);
    for model in ["m", "n/2"] {
        let answer = front.post(COMPLETIONS, &json!({"model": model, "prompt": "a", "max_tokens": 1}));
        assert_eq!((answer.status, &answer.json()["model"]), (200, &json!(model)));
        assert_eq!(front.get(&format!("/v1/models/{model}")).json()["id"], model);
    }
    let list = front.get("/v1/models").json();
    let ids: Vec<_> = list["data"].as_array().unwrap().iter().map(|model| model["id"].as_str().unwrap()).collect();
    assert_eq!(ids, ["m", "n/2"]);
    assert_eq!(front.get("/v1/models/x").error().0, 404);
    let (status, param, _) = front.post(COMPLETIONS, &json!({"model": "x", "prompt": "a"})).error();
    assert_eq!((status, param.as_deref()), (404, Some("model")));
    let (status, param, _) = front.post(COMPLETIONS, &json!({"prompt": "a"})).error();
    assert_eq!((status, param.as_deref()), (400, Some("model")));
}

#[test]
fn a_large_body_is_read_as_a_small_one_is() {
    let front = Front::with(|config| config.body_memory_max = 8 << 20);
    let (one, two) = (Worker::start(Options::default()), Worker::start(Options { model: "n/2", ..Options::default() }));
    let _leases = [front.register(one.address, "m"), front.register(two.address, "n/2")];
    front.wait_until_there_are(2);
    for at in 0..16 {
        let model = ["m", "n/2"][at % 2];
        let body = json!({"model": model, "prompt": "a", "max_tokens": 1}).to_string() + &" ".repeat(512 << 10);
        // Unread, it would go to any worker, which might have the other model.
        let answer = client::post_bytes(front.address, COMPLETIONS, body.as_bytes());
        assert_eq!((answer.status, &answer.json()["model"]), (200, &json!(model)));
    }
}

#[test]
fn workers_come_and_go() {
    let front = Front::start();
    assert_eq!((front.get("/health").status, front.get("/health/ready").status), (200, 503));
    let worker = Worker::start(Options::default());
    let ask = || front.post(COMPLETIONS, &json!({"prompt": "a", "max_tokens": 1})).status;
    assert_eq!(ask(), 503);
    let lease = front.register(worker.address, "m");
    front.wait_until_there_are(1);
    assert_eq!((front.get("/health/ready").status, ask()), (200, 200));
    front.runtime.block_on(lease.withdraw());
    front.wait_until_there_are(0);
    assert_eq!((front.get("/health/ready").status, ask()), (503, 503));
}

#[test]
fn a_full_worker_is_passed_over_and_full_workers_are_said_to_be() {
    let (front, workers, _leases) =
        with_workers(2, || Options { max_num_seqs: 1, max_waiting_requests: 0, ..Options::default() });
    workers.iter().for_each(|worker| worker.gate.only(0));
    let address = front.address;
    let ask = move || {
        let body = json!({"model": "m", "prompt": "a", "max_tokens": 2}).to_string();
        client::post_bytes(address, COMPLETIONS, body.as_bytes())
    };
    let clients = [thread::spawn(ask), thread::spawn(ask)];
    wait_until("both are full", || workers.iter().all(busy));
    let response = ask();
    assert_eq!((response.status, response.says_when_to_come_back()), (429, true));
    workers.iter().for_each(|worker| worker.gate.open());
    assert!(clients.into_iter().all(|client| client.join().unwrap().status == 200));
}

#[test]
fn a_prompt_finds_the_worker_that_has_its_beginning() {
    let (front, _workers, _leases) = with_workers(4, Options::default);
    let beginning = "This is what the application tells the model every time. ".repeat(6);
    let cached = |question: &str| {
        let body = json!({"model": "m", "prompt": format!("{beginning}{question}"), "max_tokens": 1});
        front.post(COMPLETIONS, &body).json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!(cached("one?"), 0);
    assert!(["two?", "three?", "four?"].into_iter().all(|question| cached(question) > 16));
}

#[test]
fn a_prompt_finds_its_worker_when_all_have_registered_anew() {
    let (front, workers, leases) = with_workers(4, Options::default);
    let cached = |application: usize| {
        let prompt = format!("Application {application} tells the model this every time. ").repeat(6);
        let body = json!({"model": "m", "prompt": prompt, "max_tokens": 1});
        front.post(COMPLETIONS, &body).json()["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    (0..4).for_each(|application| assert_eq!(cached(application), 0));
    // As when etcd stood still for longer than a lease.
    drop(leases);
    front.wait_until_there_are(0);
    let _leases: Vec<_> = workers.iter().rev().map(|worker| front.register(worker.address, "m")).collect();
    front.wait_until_there_are(4);
    assert!((0..4).all(|application| cached(application) > 16));
}

#[test]
fn the_edge_guards_what_is_behind_it() {
    let front = Front::with(|config| {
        config.api_keys = vec!["key".into()];
        config.cluster_token = Some(HttpToken::of("token"));
        config.body_bytes_max = 1000;
    });
    let worker = Worker::start(Options { cluster_token: Some(HttpToken::of("token")), ..Options::default() });
    let _lease = front.register(worker.address, "m");
    front.wait_until_there_are(1);
    let body = json!({"model": "m", "prompt": "a", "max_tokens": 2, "stream": true}).to_string();
    let ask = |headers: &[(&str, &str)], body: &str| {
        let headers = [&[("Content-Type", "application/json")], headers].concat();
        client::request(front.address, "POST", COMPLETIONS, &headers, body.as_bytes())
    };
    assert_eq!(ask(&[], &body).status, 401);
    let key = ("Authorization", "Bearer key");
    let response = ask(&[key, ("X-Request-Id", "mine")], &body);
    assert_eq!((response.status, response.header("x-request-id")), (200, Some("mine")));
    assert!(!response.text().contains("\"t\":["), "{}", response.text());
    // A client's own word about progress is not passed on.
    let response = ask(&[key, ("X-Engine-Resume", "3"), ("X-Engine-Progress", "1")], &body);
    assert_eq!(response.status, 200);
    assert!(!response.text().contains("\"t\":["));
    assert_eq!(ask(&[key], &"x".repeat(2000)).status, 413);
    // The worker says what is wrong.
    assert_eq!(ask(&[key], "{\"model\": \"m\", \"prompt\": 7}").error(), {
        let direct = client::post_bytes(worker.address, COMPLETIONS, b"{\"model\": \"m\", \"prompt\": 7}");
        direct.error()
    });
    for body in ["no json", ""] {
        assert_eq!(ask(&[key], body).error().0, 400, "{body:?}");
    }
    assert_eq!(client::request(front.address, "GET", "/nowhere", &[key], b"").status, 404);
}

#[test]
fn another_model_that_has_a_workers_address_answers_nothing_in_its_place() {
    let front = Front::start();
    let (before, after) = (Worker::start(Options::default()), Worker::start(Options::default()));
    let mut gone = card(after.address, "m");
    gone.model_key = ModelKey::of(b"the weights of before");
    let _lease = {
        let _guard = front.runtime.enter();
        front.cluster.discovery.register(gone)
    };
    front.wait_until_there_are(1);
    let ask = || front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a", "max_tokens": 1}));
    let response = ask();
    assert_eq!((response.status, &response.json()["error"]["code"]), (503, &json!("no_workers")));
    let metrics = client::request(after.address, "GET", "/metrics", &[], b"").text();
    assert!(metrics.contains("\nengine_generation_tokens_total 0\n"), "{metrics}");
    let _lease = front.register(before.address, "m");
    front.wait_until_there_are(2);
    assert!((0..20).all(|_| ask().status == 200));
}

#[test]
fn no_more_requests_than_are_allowed_are_answered_at_a_time_and_others_are_told_so() {
    let front = Front::with(|config| config.requests_max = 1);
    let worker = Worker::start(Options::default());
    let _lease = front.register(worker.address, "m");
    front.wait_until_there_are(1);
    worker.gate.only(3);
    // As long as it streams, and not only until it begins to.
    let mut events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS));
    events.next().unwrap();
    let request = json!({"model": "m", "prompt": "a", "max_tokens": 1});
    let response = front.post(COMPLETIONS, &request);
    assert_eq!((response.status, response.says_when_to_come_back()), (429, true), "{}", response.text());
    assert_eq!(response.json()["error"]["code"], "too_many_requests");
    assert_eq!(front.get("/health/live").status, 200);
    worker.gate.open();
    events.finish();
    wait_until("its place is free", || front.counts("engine_frontend_requests_in_flight") == 0.0);
    assert_eq!(front.post(COMPLETIONS, &request).status, 200);
}

#[test]
fn large_bodies_share_a_bounded_memory_until_they_are_answered() {
    let (front, workers, _leases) = with_workers(1, Options::default);
    workers[0].gate.only(0);
    let large = |spaces: usize| {
        let request = json!({"model": "m", "prompt": "a", "max_tokens": 2}).to_string();
        request + &" ".repeat(spaces)
    };
    let (address, first) = (front.address, large(100 << 10));
    let answered = thread::spawn(move || client::post_bytes(address, COMPLETIONS, first.as_bytes()).status);
    wait_until("the first is with its worker", || busy(&workers[0]));
    assert!(front.counts_as_asked("engine_frontend_body_bytes") > 100e3);
    let refused = client::post_bytes(front.address, COMPLETIONS, large(100 << 10).as_bytes());
    assert_eq!((refused.status, refused.says_when_to_come_back()), (429, true));
    workers[0].gate.open();
    assert_eq!(answered.join().unwrap(), 200);
    wait_until("its memory is free", || front.counts_as_asked("engine_frontend_body_bytes") == 0.0);
    assert_eq!(client::post_bytes(front.address, COMPLETIONS, large(100 << 10).as_bytes()).status, 200);
}

#[test]
fn without_the_clusters_token_an_answer_is_not_continued_but_ends_clearly() {
    let (front, mut workers, _leases) =
        with_workers(2, || Options { cluster_token: Some(HttpToken::of("other")), ..slow() });
    // Its answer is not at its end when it dies.
    workers.iter().for_each(|worker| worker.gate.only(10));
    let mut events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS));
    (0..2).for_each(|_| drop(events.next().unwrap()));
    let at = workers.iter().position(busy).unwrap();
    workers.remove(at).kill();
    assert_eq!(events.finish().pop().unwrap()["error"]["code"], "workers_lost");
}

#[test]
fn a_deadline_ends_an_answer_wherever_it_is() {
    // Long enough for the head of an answer on a busy machine.
    let front = Front::with(|config| config.request_timeout = Duration::from_secs(10));
    let worker = Worker::start(Options::default());
    let _lease = front.register(worker.address, "m");
    front.wait_until_there_are(1);
    worker.gate.only(3);
    let events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS));
    assert_eq!(events.finish().pop().unwrap()["error"]["code"], "timeout");
    assert_eq!(front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a"})).status, 504);
    worker.gate.open();
    wait_until("the worker has nothing to do", || !busy(&worker));
}

#[test]
fn a_drain_ends_what_runs_and_refuses_what_comes() {
    let (mut front, workers, _leases) = with_workers(1, slow);
    workers[0].gate.only(5);
    let events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS));
    drop(front.shutdown.take());
    wait_until("it drains", || front.get("/health/ready").status == 503);
    assert_eq!(front.get("/health").status, 200);
    assert_eq!(front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a"})).status, 503);
    workers[0].gate.open();
    assert_eq!(answer(&events.finish()).usage[0]["completion_tokens"], 120);
    let address = front.address;
    wait_until("it is gone", || TcpStream::connect(address).is_err());
}

#[test]
fn many_clients_get_each_their_own_answer() {
    let (front, _workers, _leases) = with_workers(3, Options::default);
    let reference = Worker::start(Options::default());
    let clients: Vec<_> = (0..24)
        .map(|client| {
            let (address, reference) = (front.address, reference.address);
            thread::spawn(move || {
                for round in 0..4 {
                    let mut request = streaming(COMPLETIONS);
                    request["prompt"] = json!(format!("{client} {round}"));
                    let ask = |address| answer(&Events::open(address, COMPLETIONS, &request).finish());
                    assert_eq!(ask(address), ask(reference));
                }
            })
        })
        .collect();
    clients.into_iter().for_each(|client| client.join().unwrap());
}
