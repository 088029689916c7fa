//! An answer that was cut off anywhere goes on, on another worker, as if it had not been.

#[allow(dead_code, reason = "of the client, a part is used here")]
#[path = "program/client.rs"]
mod client;
mod served;
mod support;

use std::{collections::BTreeSet, time::Duration};

use engine::http::HttpToken;
use serde_json::{Value, json};
use served::{Answer, Options, Worker};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A server-sent event as a frontend sees it.
#[derive(Debug, Clone)]
struct Event {
    /// JSON of the comments before it, a line each.
    progress: String,
    data: String,
}

/// Asks as a frontend does. `journal`: where the answer is.
fn relayed(worker: &Worker, path: &str, request: &Value, journal: &str) -> Vec<Event> {
    let length = journal.len().to_string();
    let mut headers = vec![("Content-Type", "application/json"), ("X-Engine-Progress", "1")];
    if !journal.is_empty() {
        headers.push(("X-Engine-Resume", &length));
    }
    let body = format!("{journal}{request}");
    let response = client::request(worker.address, "POST", path, &headers, body.as_bytes());
    assert_eq!(response.status, 200, "{}\n{body}", response.text());
    let text = response.text();
    let events = text.strip_suffix("\n\n").expect("events end with an empty line").split("\n\n");
    events
        .map(|event| {
            let (mut progress, mut data) = (String::new(), None);
            for line in event.lines() {
                match line.strip_prefix(": ") {
                    Some(json) => progress.extend([json, "\n"]),
                    None => assert!(data.replace(line.to_owned()).is_none(), "one line of data an event: {event:?}"),
                }
            }
            Event { progress, data: data.unwrap() }
        })
        .collect()
}

fn merged<'a>(events: impl IntoIterator<Item = &'a Event>) -> Answer {
    let mut answer = Answer::default();
    for event in events {
        answer.take(event.data.strip_prefix("data: ").unwrap());
    }
    answer
}

/// Cuts the answer to `request` after every event, continues it on another worker, and there again cuts it in the
/// middle.
fn assert_cuts_do_not_show(path: &str, request: Value) -> Answer {
    assert_cuts_do_not_show_on(start, path, request)
}

fn assert_cuts_do_not_show_on(start: impl Fn() -> Worker, path: &str, mut request: Value) -> Answer {
    let (first, second, third) = (start(), start(), start());
    request["stream"] = true.into();
    request["stream_options"] = json!({"include_usage": true, "continuous_usage_stats": true});
    let whole = relayed(&first, path, &request, "");
    let expected = merged(&whole);
    assert_eq!((expected.done, expected.ids.len(), expected.usage.len()), (1, 1, 1));
    for cut in 1..whole.len() {
        let journal: String = whole[..cut].iter().map(|event| event.progress.as_str()).collect();
        let rest = relayed(&second, path, &request, &journal);
        assert_eq!(merged(whole[..cut].iter().chain(&rest)), expected, "cut after {cut}: {:?}", whole[cut - 1]);
        let middle = rest.len() / 2;
        if middle > 0 {
            let journal: String = rest[..middle].iter().fold(journal, |all, event| all + &event.progress);
            let last = relayed(&third, path, &request, &journal);
            let all = whole[..cut].iter().chain(&rest[..middle]).chain(&last);
            assert_eq!(merged(all), expected, "cut after {cut} and {middle}");
        }
    }
    expected
}

fn start() -> Worker {
    Worker::start(Options { step: Duration::from_micros(300), ..Options::default() })
}

#[test]
fn a_chat_goes_on_where_it_was_cut() {
    let messages = json!([{"role": "user", "content": "Tell me something."}]);
    let answer = assert_cuts_do_not_show(CHAT, json!({"messages": messages, "max_tokens": 40, "ignore_eos": true}));
    assert_eq!((answer.choices[0].roles, &answer.choices[0].finishes[..]), (1, &[json!("length")][..]));
    // To the end that the model sets, with log-probabilities.
    let request = json!({"messages": messages, "max_tokens": 400, "seed": 3, "logprobs": true, "top_logprobs": 2});
    let answer = assert_cuts_do_not_show(CHAT, request);
    assert_eq!(answer.choices[0].finishes, ["stop"]);
    assert_eq!(answer.choices[0].logprobs.len() as u64, answer.usage[0]["completion_tokens"].as_u64().unwrap());
}

#[test]
fn an_answer_that_goes_on_elsewhere_keeps_its_salt() {
    // So slow that its first event does not tell of the whole answer, though it may be sent late.
    let first = Worker::start(Options { step: Duration::from_millis(5), ..Options::default() });
    let second = start();
    let prompt = "Tell me something that nobody else may know of. ".repeat(4);
    let salted = |salt: Option<&str>| {
        json!({
            "prompt": prompt, "max_tokens": 200, "ignore_eos": true, "cache_salt": salt, "stream": true,
            "stream_options": {"include_usage": true},
        })
    };
    let whole = relayed(&first, COMPLETIONS, &salted(Some("tea")), "");
    // However many steps it tells of, it is not all of them.
    let journal = &whole[0].progress;
    relayed(&second, COMPLETIONS, &salted(Some("tea")), journal);
    // It left its pages with the second worker, for others with its salt.
    let found = |salt| {
        let usage = merged(&relayed(&second, COMPLETIONS, &salted(salt), "")).usage;
        usage[0]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    assert_eq!([found(None), found(Some("coffee"))], [0; 2]);
    assert!(found(Some("tea")) >= 16);
}

#[test]
fn a_limit_beyond_the_context_or_none_is_what_is_left_of_it() {
    let start = || Worker::start(Options { max_model_len: 64, step: Duration::from_micros(300), ..Options::default() });
    let messages = json!([{"role": "user", "content": "Tell me something."}]);
    let completion = json!({"prompt": "a"});
    let chat = json!({ "messages": messages });
    let with_both = json!({ "messages": messages, "max_tokens": 3 });
    for (path, mut request, field, limit) in [
        (COMPLETIONS, completion.clone(), "max_tokens", 64_000),
        (COMPLETIONS, completion, "max_tokens", -1),
        (CHAT, chat, "max_tokens", 64_000),
        (CHAT, with_both, "max_completion_tokens", -1),
    ] {
        (request[field], request["ignore_eos"]) = (limit.into(), true.into());
        let answer = assert_cuts_do_not_show_on(start, path, request);
        assert_eq!(
            (&answer.choices[0].finishes[..], &answer.usage[0]["total_tokens"]),
            (&[json!("length")][..], &json!(64))
        );
    }
}

#[test]
fn a_stop_string_across_the_cut_is_found() {
    let free = json!({"prompt": "Once", "max_tokens": 60, "ignore_eos": true, "seed": 5});
    let text = assert_cuts_do_not_show(COMPLETIONS, free.clone()).choices[0].text.clone();
    let chars: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    for window in chars.windows(7).skip(chars.len() / 3).step_by(chars.len() / 5) {
        let stop = &text[window[0]..window[6]];
        for (logprobs, include) in [(None, false), (Some(1), false), (Some(0), true)] {
            let mut request = free.clone();
            // The second begins often and never ends.
            request["stop"] = json!([stop, format!("{}never", &stop[..text[window[0]..window[4]].len()])]);
            request["logprobs"] = json!(logprobs);
            request["include_stop_str_in_output"] = include.into();
            let choice = &assert_cuts_do_not_show(COMPLETIONS, request).choices[0];
            assert_eq!(choice.finishes, ["stop"]);
            assert_eq!(choice.text.contains(stop), include);
        }
    }
}

#[test]
fn choices_that_ended_stay_ended() {
    let request = json!({"prompt": ["One", "Two"], "n": 3, "seed": 1, "max_tokens": 30, "min_tokens": 2});
    let answer = assert_cuts_do_not_show(COMPLETIONS, request);
    assert_eq!(answer.choices.len(), 6);
    let stopped = answer.choices.iter().filter(|choice| choice.finishes == ["stop"]).count();
    assert!(stopped > 0 && stopped < 6, "{stopped}");
}

#[test]
fn an_echoed_prompt_is_shown_once() {
    for logprobs in [None, Some(2)] {
        for max_tokens in [0, 12] {
            let request = json!({
                "prompt": "Grüße an alle 🙂", "echo": true, "max_tokens": max_tokens, "logprobs": logprobs, "n": 2,
                "ignore_eos": true,
            });
            let answer = assert_cuts_do_not_show(COMPLETIONS, request);
            assert!(answer.choices.iter().all(|choice| choice.text.starts_with("Grüße an alle 🙂")));
        }
    }
}

#[test]
fn penalties_and_seeds_go_on_where_they_were() {
    // No seed: the first worker's is carried along.
    let request = json!({
        "prompt": "Count", "max_tokens": 24, "temperature": 1.3, "frequency_penalty": 0.7, "repetition_penalty": 1.2,
        "logit_bias": {"100": 3}, "min_tokens": 20, "stop_token_ids": [260, 28],
    });
    assert_cuts_do_not_show(COMPLETIONS, request);
}

#[test]
fn an_answer_goes_on_in_its_grammar() {
    let schema = json!({
        "type": "object", "additionalProperties": false, "required": ["a", "b"],
        "properties": {
            "a": {"enum": ["Grüße", "stop"]},
            "b": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
    });
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
    let request = json!({"prompt": "a", "max_tokens": 300, "response_format": format, "n": 2, "seed": 1});
    let answer = assert_cuts_do_not_show(COMPLETIONS, request);
    for choice in &answer.choices {
        assert_eq!(choice.finishes, ["stop"], "{}", choice.text);
        let value: Value =
            serde_json::from_str(&choice.text).unwrap_or_else(|error| panic!("{error}: {}", choice.text));
        assert!(value["b"].is_array());
    }
    for (outputs, logprobs) in
        [(json!({"regex": "[0-9]{9}"}), None), (json!({"choice": ["stop here", "sto p"]}), Some(2))]
    {
        let request = json!({"prompt": "a", "max_tokens": 60, "structured_outputs": outputs, "logprobs": logprobs});
        let answer = assert_cuts_do_not_show(COMPLETIONS, request);
        assert_eq!(answer.choices[0].finishes, ["stop"]);
    }
}

#[test]
fn calls_and_thoughts_go_on_where_they_were() {
    let template = "{% if tools %}{{ tools | tojson }}{{ '<tool_call>' }}{% else %}<think>{% endif %}";
    let start = || Worker::start(Options { template, step: Duration::from_micros(300), ..Options::default() });
    let parameters = json!({
        "type": "object", "additionalProperties": false, "required": ["a"],
        "properties": {"a": {"enum": ["Grüße", "stop"]}},
    });
    let tools = json!([{"type": "function", "function": {"name": "f", "parameters": parameters}}]);
    let messages = json!([{"role": "user", "content": "a"}]);
    let request = json!({
        "messages": messages, "tools": tools, "tool_choice": "required", "parallel_tool_calls": false, "seed": 1,
        "max_tokens": 200, "logprobs": true, "n": 2, "include_reasoning": false,
    });
    let answer = assert_cuts_do_not_show_on(start, CHAT, request);
    for choice in &answer.choices {
        assert_eq!((&*choice.text, &choice.calls[0]["function"]["name"]), ("", &json!("f")));
        assert_eq!((choice.calls.len(), &choice.finishes[..]), (1, &[json!("tool_calls")][..]));
    }
    assert_ne!(answer.choices[0].calls[0]["id"], answer.choices[1].calls[0]["id"]);
    let request = json!({"messages": messages, "max_tokens": 60, "seed": 5, "ignore_eos": true});
    let answer = assert_cuts_do_not_show_on(start, CHAT, request);
    assert!(answer.choices[0].text.is_empty() && answer.choices[0].thoughts.len() > 60, "{answer:?}");
}

#[test]
fn calls_of_a_list_go_on_behind_those_that_were_told() {
    let template = "{{ tools | tojson }}[TOOL_CALLS] [";
    // What usage says of the cache would tell where the answer went on.
    let prefix_caching = false;
    let step = Duration::from_micros(300);
    let start = || Worker::start(Options { template, prefix_caching, step, ..Options::default() });
    let tool = |name: &str| {
        let parameters = json!({"type": "object", "properties": {}, "additionalProperties": false});
        json!({"type": "function", "function": {"name": name, "parameters": parameters}})
    };
    let request = json!({
        "messages": [{"role": "user", "content": "a"}], "tools": [tool("f"), tool("g")], "tool_choice": "required",
        "seed": 1, "max_tokens": 200, "n": 8,
    });
    let answer = assert_cuts_do_not_show_on(start, CHAT, request);
    let calls: Vec<&Value> = answer.choices.iter().flat_map(|choice| &choice.calls).collect();
    assert!(calls.len() > answer.choices.len(), "some answers make several: {calls:?}");
    let ids: BTreeSet<&str> = calls.iter().map(|call| call["id"].as_str().unwrap()).collect();
    assert!(ids.len() == calls.len() && ids.iter().all(|id| id.len() == 9), "{ids:?}");
    for choice in answer.choices.iter().filter(|choice| choice.finishes == ["tool_calls"]) {
        assert_eq!(choice.text, "");
    }
}

/// Ids of a choice's prompt and of its own tokens, as the events tell them.
fn ids(events: &[Event], index: usize) -> [Vec<Value>; 2] {
    let mut ids = [Vec::new(), Vec::new()];
    for event in events {
        let Ok(chunk) = serde_json::from_str::<Value>(event.data.strip_prefix("data: ").unwrap()) else { continue };
        for choice in chunk["choices"].as_array().unwrap().iter().filter(|choice| choice["index"] == index) {
            for (told, all) in
                [(&chunk["prompt_token_ids"], 0), (&choice["prompt_token_ids"], 0), (&choice["token_ids"], 1)]
            {
                ids[all].extend(told.as_array().into_iter().flatten().cloned());
            }
        }
    }
    ids
}

#[test]
fn ids_of_tokens_are_told_once_wherever_an_answer_is_cut() {
    let template = "{% if tools %}{{ tools | tojson }}{{ '<tool_call>' }}{% else %}hello{% endif %}";
    let start = || Worker::start(Options { template, step: Duration::from_micros(300), ..Options::default() });
    let (first, second) = (start(), start());
    let messages = json!([{"role": "user", "content": "a"}]);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    for (path, mut request) in [
        (COMPLETIONS, json!({"prompt": ["One and", "Two"], "n": 2, "ignore_eos": true, "max_tokens": 20})),
        (COMPLETIONS, json!({"prompt": "One and", "logprobs": 1, "stop": ["e", "to"], "echo": true})),
        (CHAT, json!({"messages": messages, "ignore_eos": true})),
        (CHAT, json!({"messages": messages, "tools": tools, "tool_choice": "required", "parallel_tool_calls": false})),
    ] {
        request["max_tokens"] = request.get("max_tokens").cloned().unwrap_or(json!(100));
        (request["seed"], request["return_token_ids"]) = (json!(5), json!(true));
        let whole = client::post_bytes(first.address, path, request.to_string().as_bytes()).json();
        let of_choice = |choice: &Value| {
            let prompt = whole["prompt_token_ids"].as_array().or(choice["prompt_token_ids"].as_array());
            [prompt.unwrap().clone(), choice["token_ids"].as_array().unwrap().clone()]
        };
        let expected: Vec<_> = whole["choices"].as_array().unwrap().iter().map(of_choice).collect();
        let [prompts, tokens] = [0, 1].map(|which| expected.iter().map(|ids| ids[which].len() as u64).sum::<u64>());
        let n = request["n"].as_u64().unwrap_or(1);
        let usage = [&whole["usage"]["prompt_tokens"], &whole["usage"]["completion_tokens"]];
        assert_eq!([prompts / n, tokens].map(|count| json!(count)).each_ref(), usage);
        request["stream"] = true.into();
        let events = relayed(&first, path, &request, "");
        let told = |events: &[Event]| (0..expected.len()).map(|index| ids(events, index)).collect::<Vec<_>>();
        assert_eq!(told(&events), expected, "{request}");
        for cut in 1..events.len() {
            let journal: String = events[..cut].iter().map(|event| event.progress.as_str()).collect();
            let rest = relayed(&second, path, &request, &journal);
            assert_eq!(told(&[&events[..cut], &rest[..]].concat()), expected, "{request} cut after {cut}");
        }
    }
}

#[test]
fn nobody_else_sees_progress() {
    let worker = start();
    let request = json!({"prompt": "a", "max_tokens": 3, "stream": true});
    let json = [("Content-Type", "application/json")];
    let plain = client::request(worker.address, "POST", COMPLETIONS, &json, request.to_string().as_bytes());
    assert!(
        !plain.text().contains("\n: {")
            && plain.text().starts_with("data: {")
            && plain.text().ends_with("data: [DONE]\n\n")
    );

    let guarded = Worker::start(Options { cluster_token: Some(HttpToken::of("secret")), ..Options::default() });
    let ask = |headers: &[(&str, &str)]| {
        let headers = [&json[..], headers].concat();
        client::request(guarded.address, "POST", COMPLETIONS, &headers, request.to_string().as_bytes())
    };
    let progress = ("X-Engine-Progress", "1");
    assert!(!ask(&[progress]).text().contains("\"t\":["));
    assert!(!ask(&[progress, ("X-Engine-Cluster-Token", "guess")]).text().contains("\"t\":["));
    assert!(
        !ask(&[progress, ("X-Engine-Cluster-Token", "secret")]).text().contains("\"t\":["),
        "it is never sent itself"
    );
    let shown = HttpToken::of("secret").to_string();
    assert!(ask(&[progress, ("X-Engine-Cluster-Token", &shown)]).text().contains("\"t\":["));
    assert_eq!(ask(&[("X-Engine-Resume", "0")]).error().0, 403);
}

#[test]
fn a_worker_whose_template_is_told_otherwise_says_so() {
    let template = "{% if shout %}HELLO{% else %}hello{% endif %}";
    let start = |shout: bool| {
        let template_kwargs = json!({ "shout": shout }).as_object().unwrap().clone();
        Worker::start(Options { template, template_kwargs, step: Duration::from_micros(300), ..Options::default() })
    };
    let (loud, quiet) = (start(true), start(false));
    let messages = json!([{"role": "user", "content": "a"}]);
    let mut request = json!({"messages": messages, "max_tokens": 8, "ignore_eos": true, "stream": true});
    let status = |worker: &Worker, request: &Value| {
        let whole = relayed(&loud, CHAT, request, "");
        let journal: String = whole[..2].iter().map(|event| event.progress.as_str()).collect();
        let length = journal.len().to_string();
        let headers = [("Content-Type", "application/json"), ("X-Engine-Resume", length.as_str())];
        let body = format!("{journal}{request}");
        client::request(worker.address, "POST", CHAT, &headers, body.as_bytes()).status
    };
    assert_eq!((status(&loud, &request), status(&quiet, &request)), (200, 409));
    // Where the request says it, both are told the same.
    request["chat_template_kwargs"] = json!({"shout": true});
    assert_eq!(status(&quiet, &request), 200);
}

#[test]
fn a_worker_that_would_answer_otherwise_says_so() {
    let first = start();
    let request = json!({"prompt": "a", "max_tokens": 8, "ignore_eos": true, "stream": true});
    let whole = relayed(&first, COMPLETIONS, &request, "");
    // How many steps an event tells of is a matter of time.
    let journal: String = whole[..whole.len() / 2].iter().map(|event| event.progress.as_str()).collect();
    let ask = |worker: &Worker, journal: &str, request: &Value, length: usize| {
        let length = length.to_string();
        let headers = [("Content-Type", "application/json"), ("X-Engine-Resume", length.as_str())];
        let body = format!("{journal}{request}");
        client::request(worker.address, "POST", COMPLETIONS, &headers, body.as_bytes()).status
    };
    assert_eq!(ask(&first, &journal, &request, journal.len()), 200);
    let shorter = Worker::start(Options { max_model_len: 1024, ..Options::default() });
    assert_eq!(ask(&shorter, &journal, &request, journal.len()), 409);
    // Of the same name, and perhaps at the same address by now.
    let tuned = Worker::start(Options { weights: "tuned", ..Options::default() });
    assert_eq!(ask(&tuned, &journal, &request, journal.len()), 409);
    let mut other = request.clone();
    other["temperature"] = json!(0.5);
    assert_eq!(ask(&first, &journal, &other, journal.len()), 409);
    other = request.clone();
    other["structured_outputs"] = json!({"regex": "(?s:.*)"});
    assert_eq!(ask(&first, &journal, &other, journal.len()), 409);
    other = request.clone();
    other["cache_salt"] = "tea".into();
    assert_eq!(ask(&first, &journal, &other, journal.len()), 409);
    other = request.clone();
    other["stream"] = false.into();
    assert_eq!(ask(&first, &journal, &other, journal.len()), 400);
    assert_eq!(ask(&first, &journal, &request, journal.len() + 10_000), 400);
    assert_eq!(ask(&first, "", &request, 0), 400);
    assert_eq!(ask(&first, &journal, &request, usize::MAX), 400);
    let complete: String = whole.iter().map(|event| event.progress.as_str()).collect();
    let more = format!("{complete}{{\"i\":0,\"t\":[1,2,3,4,5,6,7,8]}}\n");
    assert_eq!(ask(&first, &more, &request, more.len()), 400);
}
