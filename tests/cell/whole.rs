//! A whole cluster: etcd, NATS, a frontend, two decode and two prefill workers. Whoever computes what, and however
//! pages travel, clients get every token and log-probability that one process would have given them.

use std::thread;

use serde_json::{Value, json};

use super::{Cell, sum, wait_for_decode_workers, wait_until_idle};
use crate::program::Server;

/// Prompts above the threshold and below: on page borders and beside them, several chunks long.
const LENGTHS: [usize; 14] = [5, 31, 32, 48, 63, 64, 65, 66, 81, 128, 200, 211, 300, 420];
const THRESHOLD: usize = 64;
const COMPLETIONS: &str = "/v1/completions";

/// Greedy and drawn, whole and streamed: each prompt in another way, and no two that begin alike.
fn questions(cell: &Cell) -> Vec<Value> {
    let question = |(number, &length): (usize, &usize)| {
        json!({
            "prompt": cell.prompt(number, length), "max_tokens": 8 + number, "ignore_eos": true, "logprobs": 3,
            "seed": number, "temperature": if number % 3 == 1 { 0.9 } else { 0.0 }, "stream": number % 2 == 1,
        })
    };
    LENGTHS.iter().enumerate().map(question).collect()
}

fn length(question: &Value) -> usize {
    question["prompt"].as_array().unwrap().len()
}

/// The text, the tokens and all their log-probabilities.
fn ask(server: &Server, question: &Value) -> Value {
    if question["stream"] == false {
        return server.answer(COMPLETIONS, question)["choices"].clone();
    }
    let events = server.stream(COMPLETIONS, question).finish();
    let choice = |event: &Value| event["choices"][0].clone();
    let text: String = events.iter().map(|event| choice(event)["text"].as_str().unwrap().to_owned()).collect();
    let all = |field: &str| -> Value {
        events
            .iter()
            .flat_map(|event| choice(event)["logprobs"][field].as_array().cloned().unwrap_or_default())
            .collect()
    };
    let ends: Vec<_> =
        events.iter().map(|event| choice(event)["finish_reason"].clone()).filter(|end| !end.is_null()).collect();
    json!([text, all("tokens"), all("token_logprobs"), all("top_logprobs"), ends])
}

/// Starts it, asks it everything at once, and compares. Workers get `--transport` and the further flags of their role.
pub(crate) fn answers_equal_those_of_one_process(cell: &Cell, transport: &str, decode: &[&str], prefill: &[&str]) {
    let threshold = THRESHOLD.to_string();
    let flags = ["--transport", transport, "--max-local-prefill-length", &threshold, "--max-prefill-queue-size", "64"];
    let flags = [&flags, decode].concat();
    let decodes = [cell.decode(&flags), cell.decode(&flags)];
    let flags = [&["--transport", transport, "--max-num-batched-tokens", "128"], prefill].concat();
    let prefills = [cell.prefill(&flags), cell.prefill(&flags)];
    let frontend = cell.frontend(&[]);
    wait_for_decode_workers(&frontend, decodes.len());
    decodes.iter().for_each(|decode| cell.wait_for_prefill_workers(decode, prefills.len()));

    let questions = questions(cell);
    // All at once, so that nobody gets everything.
    let answers: Vec<Value> = thread::scope(|scope| {
        let asking: Vec<_> = questions.iter().map(|question| scope.spawn(|| ask(&frontend, question))).collect();
        asking.into_iter().map(|asking| asking.join().unwrap()).collect()
    });
    let alone = cell.alone();
    for (question, answer) in questions.iter().zip(&answers) {
        assert_eq!(*answer, ask(&alone, question), "a prompt of {} tokens", length(question));
    }

    let long: Vec<usize> = questions.iter().map(length).filter(|&length| length > THRESHOLD).collect();
    let short = (questions.len() - long.len()) as f64;
    let prefilled = |place: &str| sum(&decodes, &format!("engine_prefills_total{{where=\"{place}\"}}"));
    assert_eq!((prefilled("remote"), prefilled("local")), (long.len() as f64, short));
    assert_eq!(sum(&decodes, "engine_handoffs_total{outcome=\"completed\"}"), long.len() as f64);
    // Who prefilled counts it when it hears that its word is there, of which others may hear first.
    prefills.iter().for_each(wait_until_idle);
    assert_eq!(sum(&prefills, "engine_handoff_seconds_count{phase=\"compute\"}"), long.len() as f64);
    assert!(sum(&prefills, &format!("engine_transfer_bytes_total{{transport=\"{transport}\"}}")) > 0.0);
    for (workers, metric) in [
        (&decodes, "engine_requests_total{endpoint=\"/v1/completions\",status=\"200\"}"),
        (&prefills, "engine_handoff_seconds_count{phase=\"compute\"}"),
    ] {
        for worker in workers {
            assert!(worker.metric(metric) > 0.0, "somebody had nothing to do");
            wait_until_idle(worker);
        }
    }
    assert_eq!(frontend.metric("engine_frontend_retries_total"), 0.0);
}
