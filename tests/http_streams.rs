//! What a client is told of an answer, and when.

#[allow(dead_code, reason = "of the client, a part is used here")]
#[path = "program/client.rs"]
mod client;
#[allow(unused_imports, reason = "of the workers, a part is used here")]
mod served;
mod support;

use serde_json::{Value, json};
use served::{Options, Worker};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

#[test]
fn ids_of_tokens_are_those_of_the_text() {
    let worker = Worker::start(Options::default());
    let post = |path: &str, body: Value| client::post_bytes(worker.address, path, body.to_string().as_bytes()).json();
    let request =
        json!({"prompt": "One and", "ignore_eos": true, "max_tokens": 30, "seed": 5, "return_token_ids": true});
    let choice = post(COMPLETIONS, request)["choices"][0].clone();
    let text = |ids: &Value| post("/detokenize", json!({ "tokens": ids }))["prompt"].as_str().unwrap().to_owned();
    assert_eq!(text(&choice["prompt_token_ids"]), "One and");
    let shown = choice["text"].as_str().unwrap().trim_end_matches('\u{fffd}');
    assert!(shown.len() > 20 && text(&choice["token_ids"]).starts_with(shown), "{choice}");
}

#[test]
fn a_step_is_told_of_whether_or_not_it_has_text() {
    // The first token is but a part of a character.
    let outputs = json!({"choice": ["🙂🙂🙂🙂"]});
    let messages = json!([{"role": "user", "content": "a"}]);
    let opening = json!({"role": "assistant", "content": ""});
    for (path, mut request) in [(COMPLETIONS, json!({"prompt": "a"})), (CHAT, json!({ "messages": messages }))] {
        request["structured_outputs"] = outputs.clone();
        (request["max_tokens"], request["stream"]) = (json!(3), json!(true));
        let worker = Worker::start(Options::default());
        worker.gate.only(1);
        let mut events = client::Events::open(worker.address, path, &request);
        if path == CHAT {
            assert_eq!(events.next().unwrap()["choices"][0]["delta"], opening);
        }
        let first = events.next().unwrap()["choices"][0].clone();
        assert_eq!(first["text"].as_str().or(first["delta"]["content"].as_str()), Some(""), "{first}");
        worker.gate.only(1);
        assert!(events.next().unwrap()["choices"][0]["finish_reason"].is_null());
        worker.gate.open();
        assert_eq!(events.finish().pop().unwrap()["choices"][0]["finish_reason"], "length");
    }
}

#[test]
fn an_answer_that_is_looked_through_opens_with_its_first_token() {
    let template = "{% if tools %}{{ tools | tojson }}{{ '<tool_call>' }}{% endif %}";
    let worker = Worker::start(Options { template, ..Options::default() });
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let request = json!({
        "messages": [{"role": "user", "content": "a"}], "tools": tools, "tool_choice": "required",
        "parallel_tool_calls": false, "max_tokens": 200, "stream": true,
    });
    worker.gate.only(1);
    let mut events = client::Events::open(worker.address, CHAT, &request);
    assert_eq!(events.next().unwrap()["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    worker.gate.open();
    let call = events.next().unwrap()["choices"][0]["delta"]["tool_calls"][0].clone();
    assert_eq!(call["function"]["name"], "f");
    // As the model wrote them, white space and all.
    let arguments = call["function"]["arguments"].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(arguments).unwrap(), json!({}));
}
