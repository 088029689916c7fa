//! Starting, hanging up, overload and leaving.

mod program;
mod support;

use std::{
    io::Write,
    net::TcpStream,
    process::{Command, Stdio},
};

use program::Server;
use serde_json::json;
use support::demo_model;

const COMPLETIONS: &str = "/v1/completions";

/// An answer long enough to still run when a test does something to it.
fn long() -> serde_json::Value {
    json!({"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": true, "stream": true, "temperature": 0})
}

#[test]
fn a_client_that_hangs_up_frees_its_pages() {
    let server = Server::start(&["--max-model-len", "1024", "--kv-blocks", "128"]);
    let mut events = server.stream(COMPLETIONS, &long());
    events.next().unwrap();
    assert!(server.metric("engine_running_requests") >= 1.0);
    drop(events);
    server.wait_until_idle();
    let generated = server.metric("engine_generation_tokens_total");
    assert!(generated < 900.0, "it ran to its end");

    // One that waits for a whole answer can hang up too.
    let body = json!({"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": true}).to_string();
    let mut connection = TcpStream::connect(server.address).unwrap();
    let head = format!(
        "POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    connection.write_all((head + &body).as_bytes()).unwrap();
    server.wait_until("it runs", |server| server.metric("engine_running_requests") >= 1.0);
    drop(connection);
    server.wait_until_idle();
    assert!(server.metric("engine_generation_tokens_total") < 1800.0, "it ran to its end");
}

#[test]
fn a_drain_ends_what_runs_and_refuses_what_comes() {
    let server = Server::start(&["--max-model-len", "1024", "--kv-blocks", "128"]);
    let mut request = long();
    request["max_tokens"] = 300.into();
    let whole = server.stream(COMPLETIONS, &request).finish();
    let mut events = server.stream(COMPLETIONS, &request);
    events.next().unwrap();
    server.signal("TERM");
    server.wait_until("it drains", |server| server.get("/health").status == 503);
    let refused = server.post(COMPLETIONS, &json!({"prompt": "Hi"}));
    assert_eq!(refused.error().0, 503);
    assert!(refused.says_when_to_come_back());
    let drained = events.finish();
    let text = |chunks: &[serde_json::Value]| -> String {
        chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap()).collect()
    };
    assert_eq!(text(&drained), text(&whole));
    assert!(server.wait().success(), "{}", server.log());
}

#[test]
fn a_second_signal_leaves_at_once() {
    let server = Server::start(&["--max-model-len", "1024", "--kv-blocks", "128"]);
    let mut events = server.stream(COMPLETIONS, &long());
    events.next().unwrap();
    server.signal("INT");
    server.wait_until("it drains", |server| server.get("/health").status == 503);
    assert_eq!((server.get("/health/live").status, server.get("/health/ready").status), (200, 503));
    server.signal("INT");
    assert_eq!(server.wait().code(), Some(130));
}

#[test]
fn too_many_requests_are_told_to_come_back() {
    let flags = ["--max-model-len", "1024", "--kv-blocks", "128", "--max-num-seqs", "1", "--max-waiting-requests", "1"];
    let server = Server::start(&flags);
    let mut running = server.stream(COMPLETIONS, &long());
    running.next().unwrap();
    let waiting = server.stream(COMPLETIONS, &long());
    let refused = server.post(COMPLETIONS, &json!({"prompt": "Hi"}));
    assert_eq!(refused.error().0, 429);
    assert!(refused.says_when_to_come_back());
    // It is not prepared, so what is wrong with it is not found.
    let unprepared = server.post(COMPLETIONS, &json!({"prompt": "Hi", "max_tokens": -1}));
    assert_eq!(unprepared.error(), refused.error());
    assert!(unprepared.says_when_to_come_back());
    drop((running, waiting));
    server.wait_until("there is room", |server| server.post(COMPLETIONS, &json!({"prompt": "Hi"})).status == 200);
}

#[test]
fn a_request_that_takes_too_long_is_broken_off() {
    let server = Server::start(&["--max-model-len", "1024", "--kv-blocks", "128", "--request-timeout", "0.05"]);
    let mut request = long();
    let chunks = server.stream(COMPLETIONS, &request).finish();
    assert_eq!(chunks.last().unwrap()["error"]["code"], "timeout");
    request["stream"] = false.into();
    assert_eq!(server.post(COMPLETIONS, &request).error().0, 504);
    assert_eq!(server.metric("engine_answers_total{outcome=\"timeout\"}"), 2.0);
    server.wait_until_idle();
}

#[test]
fn answers_are_counted_by_how_they_end() {
    let server = Server::start(&["--max-model-len", "1024", "--kv-blocks", "128"]);
    let counted = |outcome: &str| server.metric(&format!("engine_answers_total{{outcome=\"{outcome}\"}}"));
    let requests = || server.metric("engine_e2e_request_latency_seconds_count");
    for stream in [false, true] {
        let cut = json!({"prompt": "Hi", "max_tokens": 2, "ignore_eos": true, "n": 2, "stream": stream});
        let whole = json!({"prompt": "Hi", "structured_outputs": {"choice": ["yes"]}, "stream": stream});
        for request in [cut, whole] {
            assert_eq!(server.post(COMPLETIONS, &request).status, 200);
        }
    }
    assert_eq!((counted("length"), counted("stop"), requests()), (4.0, 2.0, 4.0));
    let mut events = server.stream(COMPLETIONS, &long());
    events.next().unwrap();
    drop(events);
    server.wait_until("it is counted", |_| counted("cancelled") == 1.0);
    assert_eq!((counted("length"), counted("timeout"), requests()), (4.0, 0.0, 4.0));
}

#[test]
fn a_key_is_needed_where_there_is_one() {
    let server = Server::start(&["--api-key", "open sesame", "--max-model-len", "1024", "--kv-blocks", "128"]);
    let key = |value: &'static str| [("Authorization", value)];
    assert_eq!(server.get("/v1/models").error().0, 401);
    assert_eq!(server.post(COMPLETIONS, &json!({"prompt": "Hi"})).error().0, 401);
    assert_eq!(server.request("GET", "/v1/models", &key("Bearer open"), b"").error().0, 401);
    assert_eq!(server.request("GET", "/v1/models", &key("open sesame"), b"").error().0, 401);
    assert_eq!(server.request("GET", "/v1/models", &key("Bearer open sesame"), b"").status, 200);
    for health in ["/health", "/v1/health", "/ping", "/health/live", "/health/ready"] {
        assert_eq!(server.get(health).status, 200);
    }
    assert!(server.get("/metrics").text().contains("engine_requests_total{endpoint=\"/v1/models\",status=\"401\"}"));
    assert!(!server.log().contains("sesame"));
}

/// Runs the program to its end with flags that cannot work, and returns its exit status and what it said.
fn fails(flags: &[&str]) -> (Option<i32>, String) {
    fails_under(&[], flags)
}

/// The same, with these variables.
fn fails_under(variables: &[(&str, &str)], flags: &[&str]) -> (Option<i32>, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
    command.args(flags).envs(variables.iter().copied()).stdin(Stdio::null());
    let output = command.output().unwrap();
    (output.status.code(), String::from_utf8(output.stderr).unwrap())
}

#[test]
fn who_stands_alone_takes_no_notice_of_the_services_that_the_environment_names() {
    for services in [
        &[("ETCD_ENDPOINTS", "http://127.0.0.1:1"), ("NATS_SERVER", "nats://127.0.0.1:1")][..],
        // Not even if it is wrong.
        &[("ETCD_ENDPOINTS", "")],
        &[("ETCD_USER", "u")],
    ] {
        let (code, text) = fails_under(services, &["--standalone", "--model", "/no/such/model.gguf", "--port", "0"]);
        assert!(code == Some(1) && text.contains("/no/such/model.gguf"), "{text}");
    }
}

#[test]
fn what_cannot_start_says_what_to_do() {
    let model = demo_model();
    let model = model.to_str().unwrap();
    let server = Server::start(&["--max-model-len", "1024", "--kv-blocks", "128"]);
    let port = server.address.port().to_string();
    let (code, text) = fails(&["--model", model, "--port", &port]);
    assert!(code == Some(1) && text.contains("--port"), "{text}");
    let (code, text) = fails(&["--model", "/no/such/model.gguf", "--port", "0"]);
    assert!(code == Some(1) && text.contains("/no/such/model.gguf"), "{text}");
    let (code, text) = fails(&["--model", "/no/such/model.gguf", "--port", "0", "--log-format", "json"]);
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    let message = last["fields"]["message"].as_str().unwrap();
    assert!(code == Some(1) && message.contains("/no/such/model.gguf"), "{text}");
    let (code, text) = fails(&["--model", model, "--port", "0", "--max-model-len", "100000"]);
    assert!(code == Some(1) && text.contains("--max-model-len"), "{text}");
    let (code, text) = fails(&["--model", model, "--kv-cache-memory", "lots"]);
    assert!(code == Some(2) && text.contains("2GiB"), "{text}");
    let (code, text) = fails(&[]);
    assert!(code == Some(2) && text.contains("--model"), "{text}");
}
