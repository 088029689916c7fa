//! A frontend and its workers as processes, over real etcd and NATS, with workers killed and stopped under an answer.

#[path = "served/answer.rs"]
mod answer;
mod cell;
mod program;
mod services;
mod support;

use std::{
    thread,
    time::{Duration, Instant},
};

use answer::Answer;
use cell::Cell;
use program::{Server, client::Events};
use serde_json::{Value, json};

/// How long anything may take before a test gives up. Not a measurement: the machine may be very busy.
const PATIENCE: Duration = Duration::from_secs(120);
const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

fn frontend(cell: &Cell) -> Server {
    Server::start_as(&["frontend", "--etcd", &cell.etcd.url(), "--nats", &cell.nats.url()])
}

fn know(frontend: &Server, workers: usize) {
    frontend
        .wait_until("it knows the workers", |frontend| frontend.metric("engine_frontend_workers") == workers as f64);
}

/// So long an answer that a worker is still at it when a client has read its beginning.
fn request() -> Value {
    json!({
        "model": "demo", "prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "ignore_eos": true,
        "stream": true, "stream_options": {"include_usage": true},
    })
}

/// The text and the end of a streamed answer, whose chunks all belong together.
fn told(events: &[Value]) -> (String, Value) {
    let id = |event: &Value| (event["id"].clone(), event["created"].clone());
    assert!(events.iter().all(|event| id(event) == id(&events[0])), "{events:?}");
    let text = events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect();
    (text, events.last().unwrap()["usage"]["completion_tokens"].clone())
}

/// The worker that is answering, as soon as one is: what the client reads may be the last one's words.
fn busy(workers: &mut Vec<Server>) -> Server {
    let running = |worker: &Server| worker.metric("engine_running_requests") >= 1.0;
    let started = Instant::now();
    loop {
        if let Some(at) = workers.iter().position(running) {
            return workers.remove(at);
        }
        assert!(started.elapsed() < PATIENCE, "nobody answers");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_answer_outlives_a_worker_that_is_killed_and_one_that_is_stopped() {
    let cell = Cell::start();
    let mut workers: Vec<_> = (0..3).map(|_| cell.decode(&["--threads", "1"])).collect();
    let frontend = frontend(&cell);
    know(&frontend, 3);
    let expected = told(&workers[0].stream(COMPLETIONS, &request()).finish());

    let mut events: Events = frontend.stream(COMPLETIONS, &request());
    (0..10).for_each(|_| drop(events.next().expect("it goes on")));
    busy(&mut workers).signal("KILL");
    (0..10).for_each(|_| drop(events.next().expect("another goes on")));
    let stopped = busy(&mut workers);
    stopped.signal("STOP");
    assert_eq!(told(&events.finish()), expected, "{}", frontend.log());
    assert_eq!(frontend.metric("engine_frontend_migrations_total"), 2.0);
    assert_eq!(frontend.metric("engine_frontend_broken_total"), 0.0);

    // The killed one's lease runs out; the stopped one comes back when it goes on.
    stopped.signal("CONT");
    know(&frontend, 2);
    workers.push(stopped);
    // Whatever was cancelled is gone at the workers too.
    workers.iter().for_each(cell::wait_until_idle);
    let whole = json!({"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0});
    frontend.answer(COMPLETIONS, &whole);
}

const DRINKS: [&str; 3] = ["tea", "coffee", "water"];

/// Asks for two lists of people as JSON: hundreds of tokens, none of them filled in without being drawn.
fn people() -> Value {
    let person = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 10},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "drinks": {"type": "array", "items": {"enum": DRINKS}, "minItems": 2, "maxItems": 2},
        },
        "required": ["name", "age", "drinks"],
        "additionalProperties": false,
    });
    let schema = json!({
        "type": "object",
        "properties": {"people": {"type": "array", "items": person, "minItems": 10, "maxItems": 12}},
        "required": ["people"],
        "additionalProperties": false,
    });
    json!({
        "model": "demo", "messages": [{"role": "user", "content": "Name some people, as JSON."}],
        "max_tokens": 900, "temperature": 1, "seed": 11, "n": 2, "logprobs": true,
        "response_format": {"type": "json_schema", "json_schema": {"name": "people", "schema": schema}},
        "stream": true, "stream_options": {"include_usage": true},
    })
}

fn assert_are_people(text: &str) {
    let all: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let people = all["people"].as_array().unwrap();
    assert!(all.as_object().unwrap().len() == 1 && (10..=12).contains(&people.len()), "{text}");
    for person in people {
        assert_eq!(person.as_object().unwrap().len(), 3, "{text}");
        assert!((1..=10).contains(&person["name"].as_str().unwrap().chars().count()), "{text}");
        assert!(person["age"].as_u64().unwrap() <= 120, "{text}");
        let drinks = person["drinks"].as_array().unwrap();
        assert!(drinks.len() == 2 && drinks.iter().all(|drink| DRINKS.contains(&drink.as_str().unwrap())), "{text}");
    }
}

/// What a client has of a streamed answer, however it was cut into events.
fn whole(events: &[Value]) -> Answer {
    let mut answer = Answer::default();
    events.iter().for_each(|event| answer.take(&event.to_string()));
    answer.anonymous()
}

#[test]
fn an_answer_of_a_given_form_outlives_workers_that_are_killed() {
    let cell = Cell::start();
    let mut workers: Vec<_> = (0..3).map(|_| cell.decode(&["--threads", "1"])).collect();
    let frontend = frontend(&cell);
    know(&frontend, 3);
    let expected = whole(&frontend.stream(CHAT, &people()).finish());
    assert_eq!(expected.choices.len(), 2);
    for choice in &expected.choices {
        assert_are_people(&choice.text);
        assert_eq!((choice.roles, &choice.finishes[..]), (1, &[json!("stop")][..]));
        assert!(choice.logprobs.len() > 150, "too short to be cut twice: {}", choice.text);
    }
    assert_ne!(expected.choices[0].text, expected.choices[1].text);

    let mut events: Events = frontend.stream(CHAT, &people());
    for more in [5, 20] {
        (0..more).for_each(|_| drop(events.next().expect("it goes on")));
        busy(&mut workers).signal("KILL");
    }
    assert_eq!(whole(&events.finish()), expected, "{}", frontend.log());
    assert_eq!(frontend.metric("engine_frontend_migrations_total"), 2.0);
    assert_eq!(frontend.metric("engine_frontend_broken_total"), 0.0);
    workers.iter().for_each(cell::wait_until_idle);
}

/// Mocks in the cell's cluster, or in another of these services.
fn mock(cell: &Cell, flags: &[&str]) -> Server {
    let (etcd, nats) = (cell.etcd.url(), cell.nats.url());
    let pace = cell::unless_in(flags, &[("--step-time", "1"), ("--prompt-token-time", "1")]);
    let fixed = ["--max-model-len", "2048", "--max-local-prefill-length", "64", "--etcd", &etcd, "--nats", &nats];
    Server::start_as(&[&["mock"], &pace[..], &fixed, flags].concat())
}

fn text(server: &Server, prompt: &str) -> String {
    let request = json!({"model": "mock", "prompt": prompt, "max_tokens": 24, "temperature": 0, "ignore_eos": true});
    server.answer(COMPLETIONS, &request)["choices"][0]["text"].as_str().unwrap().to_owned()
}

#[test]
fn a_frontend_follows_its_cluster_and_leaves_when_told() {
    let cell = Cell::start();
    let frontend = frontend(&cell);
    assert_eq!((frontend.get("/health").status, frontend.get("/health/ready").status), (200, 503));
    let refused = frontend.post(COMPLETIONS, &request());
    assert_eq!((refused.status, refused.says_when_to_come_back()), (503, true), "nobody is there to answer");
    let mock = mock(&cell, &["--decode-workers", "3", "--step-time", "20"]);
    know(&frontend, 3);
    assert_eq!(frontend.get("/v1/models").json()["data"][0]["id"], "mock");
    let asked = |tokens: usize| {
        json!({
            "model": "mock", "prompt": "a", "max_tokens": tokens, "ignore_eos": true, "stream": true,
            "stream_options": {"include_usage": true},
        })
    };
    let stream = frontend.stream(COMPLETIONS, &asked(100));
    // Half a minute's worth, so that a worker is busy while it leaves.
    let mut long = mock.stream(COMPLETIONS, &asked(1500));
    long.next().expect("it has begun");
    mock.wait_until("it is seen to be busy", |mock| mock.metric("engine_running_requests") >= 1.0);
    mock.signal("TERM");
    know(&frontend, 0);
    assert!(mock.metric("engine_running_requests") >= 1.0, "whoever leaves is out of sight before it is done");
    frontend.signal("TERM");
    assert_eq!(stream.finish().last().unwrap()["usage"]["completion_tokens"], 100);
    assert!(frontend.wait().success(), "{}", frontend.log());
    drop(long);
    assert!(mock.wait().success(), "{}", mock.log());
}

#[test]
fn mocks_prefill_for_each_other_and_no_page_goes_astray() {
    let cell = Cell::start();
    // Where there is nobody to prefill for it, the same model says the same.
    let alone = mock(&cell, &["--namespace", "alone"]);
    for transport in ["shm", "tcp"] {
        let flags =
            ["--decode-workers", "2", "--prefill-workers", "2", "--namespace", transport, "--transport", transport];
        // It is the first decode worker that answers here.
        let mock = mock(&cell, &flags);
        cell.wait_for_prefill_workers_in(transport, &mock, 2);
        let prompts: Vec<String> = (0..6).map(|i| format!("{i} ").repeat(300)).collect();
        let texts: Vec<_> = prompts.iter().map(|prompt| text(&mock, prompt)).collect();
        assert_eq!(cell::prefills(&mock, "remote"), 6.0, "{}", mock.log());
        for (prompt, told) in prompts.iter().zip(&texts) {
            assert_eq!(text(&alone, prompt), *told, "{transport}");
        }
        assert!(texts.windows(2).all(|pair| pair[0] != pair[1]), "{texts:?}");
        assert_eq!(mock.metric("engine_transfer_refused_total"), 0.0, "{}", mock.log());
    }
}
