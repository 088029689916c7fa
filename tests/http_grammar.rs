//! Answers of a given form: JSON of a schema, a regular expression, choices, a grammar.

mod program;
mod support;

use std::thread;

use program::Server;
use serde_json::{Value, json};
use support::with;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";
const DRINKS: [&str; 3] = ["tea", "coffee", "water"];

/// A schema whose texts have an end.
fn person() -> Value {
    json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "drinks": {"type": "array", "items": {"enum": DRINKS}, "minItems": 1, "maxItems": 3},
            "adult": {"type": "boolean"},
        },
        "required": ["name", "age", "drinks", "adult"],
        "additionalProperties": false,
    })
}

/// Asks for somebody, in a chat.
fn question() -> Value {
    json!({
        "messages": [{"role": "user", "content": "Describe a person as JSON: name, age, drinks, adult."}],
        "max_tokens": 400,
        "response_format": {"type": "json_schema", "json_schema": {"name": "person", "schema": person()}},
    })
}

fn assert_is_person(text: &str) {
    let person: Value = serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let fields = person.as_object().unwrap();
    assert_eq!(fields.len(), 4, "{text}");
    assert!((1..=12).contains(&fields["name"].as_str().unwrap().chars().count()), "{text}");
    assert!(fields["age"].as_u64().unwrap() <= 120, "{text}");
    let drinks = fields["drinks"].as_array().unwrap();
    assert!((1..=3).contains(&drinks.len()), "{text}");
    assert!(drinks.iter().all(|drink| DRINKS.contains(&drink.as_str().unwrap())), "{text}");
    assert!(fields["adult"].is_boolean(), "{text}");
}

fn choices(server: &Server, path: &str, request: &Value) -> Vec<(String, String)> {
    let answer = server.answer(path, request);
    let text = |choice: &Value| choice["text"].as_str().or(choice["message"]["content"].as_str()).unwrap().to_owned();
    let finish = |choice: &Value| choice["finish_reason"].as_str().unwrap().to_owned();
    answer["choices"].as_array().unwrap().iter().map(|choice| (text(choice), finish(choice))).collect()
}

fn answer(server: &Server, path: &str, request: &Value) -> (String, String) {
    choices(server, path, request).remove(0)
}

fn streamed(server: &Server, path: &str, request: &Value) -> (String, String) {
    let chunks = server.streamed(path, request);
    let choices: Vec<&Value> = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap()).collect();
    let text = choices.iter().filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str()));
    let finish = choices.last().unwrap()["finish_reason"].as_str().unwrap();
    (text.collect(), finish.to_owned())
}

/// A completion of a given form.
fn completion(outputs: Value, fields: Value) -> Value {
    let request = json!({"prompt": "The answer is", "max_tokens": 60, "structured_outputs": outputs});
    with(request, fields)
}

#[test]
fn answers_fit_their_schema_greedy_and_drawn_whole_and_streamed() {
    let server = Server::shared();
    let greedy = with(question(), json!({"temperature": 0}));
    let drawn = (0..8).map(|seed| with(question(), json!({"temperature": 1, "seed": seed})));
    let mut texts = Vec::new();
    for request in std::iter::once(greedy).chain(drawn) {
        let (text, finish) = answer(&server, CHAT, &request);
        assert_eq!(finish, "stop", "{text}");
        assert_is_person(&text);
        assert_eq!(streamed(&server, CHAT, &request), (text.clone(), finish));
        texts.push(text);
    }
    texts.sort_unstable();
    texts.dedup();
    assert!(texts.len() > 4, "{texts:?}");
    server.wait_until_idle();
}

#[test]
fn completions_take_the_same_and_vllms_forms() {
    let server = Server::shared();
    let schema = json!({"type": "array", "items": {"type": "integer", "maximum": 99, "minimum": 0}, "maxItems": 4});
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    for seed in 0..4 {
        let fields = json!({"seed": seed, "temperature": 1});
        let request = json!({"prompt": "Numbers:", "max_tokens": 100, "response_format": format});
        let of_format = answer(&server, COMPLETIONS, &with(request, fields.clone()));
        let text = schema.to_string();
        for outputs in [json!({"json": schema}), json!({"json": text})] {
            let request = json!({"prompt": "Numbers:", "max_tokens": 100, "structured_outputs": outputs});
            assert_eq!(answer(&server, COMPLETIONS, &with(request, fields.clone())), of_format);
        }
        let numbers: Vec<u8> = serde_json::from_str(&of_format.0).unwrap();
        assert!(numbers.len() <= 4 && numbers.iter().all(|&number| number < 100));

        let (text, finish) =
            answer(&server, COMPLETIONS, &completion(json!({"regex": "[a-f]{3}-[0-9]{2}"}), fields.clone()));
        let (letters, digits) = text.split_once('-').unwrap();
        assert!(letters.len() == 3 && letters.chars().all(|c| ('a'..='f').contains(&c)), "{text}");
        assert!(digits.len() == 2 && digits.parse::<u8>().is_ok() && finish == "stop", "{text}, {finish}");

        let outputs = json!({"choice": ["forty-two", "forty", "no, never"]});
        let (text, finish) = answer(&server, COMPLETIONS, &completion(outputs, fields.clone()));
        assert!(["forty-two", "forty", "no, never"].contains(&&*text) && finish == "stop", "{text}, {finish}");

        let outputs = json!({"grammar": "start: \"<\" word \">\"\nword: /[a-z]{1,8}/\n"});
        let (text, finish) = answer(&server, COMPLETIONS, &completion(outputs, fields));
        let word = text.strip_prefix('<').and_then(|text| text.strip_suffix('>')).unwrap();
        assert!((1..=8).contains(&word.len()) && word.chars().all(|c| c.is_ascii_lowercase()) && finish == "stop");
    }
    let request = with(completion(json!({"json_object": true}), json!({"seed": 1})), json!({"max_tokens": 3}));
    let (text, finish) = answer(&server, COMPLETIONS, &request);
    assert!(text.starts_with('{') && finish == "length", "{text}, {finish}");
}

#[test]
fn nothing_leaks_of_the_token_that_ends_an_answer() {
    let server = Server::shared();
    // It may end after any letter.
    let mut ended = 0;
    for seed in 0..6 {
        let fields = json!({"seed": seed, "temperature": 1, "skip_special_tokens": false, "max_tokens": 12});
        let (text, finish) = answer(&server, COMPLETIONS, &completion(json!({"regex": "[a-z ]+"}), fields));
        assert!(text.chars().all(|c| c == ' ' || c.is_ascii_lowercase()), "{text}");
        ended += usize::from(finish == "stop");
    }
    let fields = json!({"temperature": 0, "logit_bias": {"2": 100}, "skip_special_tokens": false});
    let (text, finish) = answer(&server, COMPLETIONS, &completion(json!({"regex": "[a-z]+"}), fields));
    assert!(text.len() <= 20 && finish == "stop", "{text}, {finish}");
    assert!(text.chars().all(|c| c.is_ascii_lowercase()), "{text}");
    assert!(ended < 6 || !text.is_empty());
}

#[test]
fn an_answer_ends_where_nothing_could_follow_whatever_else_is_asked_for() {
    let server = Server::shared();
    let choice = json!({"choice": ["yes", "no"]});
    for fields in [
        json!({"ignore_eos": true}),
        json!({"min_tokens": 20}),
        json!({"min_tokens": 20, "ignore_eos": true, "temperature": 0}),
        json!({"logit_bias": {"0": 100, "1": 100, "2": 100}}),
        json!({"presence_penalty": 2, "frequency_penalty": 2, "repetition_penalty": 1.5}),
        json!({"top_k": 1, "top_p": 0.1, "min_p": 0.5}),
        json!({"stop": ["never to be seen"]}),
    ] {
        let (text, finish) = answer(&server, COMPLETIONS, &completion(choice.clone(), fields.clone()));
        assert!(["yes", "no"].contains(&&*text) && finish == "stop", "{fields}: {text}, {finish}");
    }
    // It may end at once, and neither has to nor can where the end is not to be drawn.
    let fields = json!({"min_tokens": 5, "temperature": 0});
    let (text, finish) = answer(&server, COMPLETIONS, &completion(json!({"regex": "a?"}), fields));
    assert!(["", "a"].contains(&&*text) && finish == "stop", "{text}, {finish}");
    // What is left of a stop string.
    let fields = json!({"stop": ["o"]});
    let (text, finish) = answer(&server, COMPLETIONS, &completion(json!({"choice": ["yes, so"]}), fields));
    assert_eq!((text.as_str(), finish.as_str()), ("yes, s", "stop"));
    server.wait_until_idle();
}

#[test]
fn log_probabilities_are_the_models_own() {
    let server = Server::shared();
    let request = completion(json!({"regex": "[0-9]{4}"}), json!({"temperature": 0, "logprobs": 5}));
    let logprobs = server.post(COMPLETIONS, &request).json()["choices"][0]["logprobs"].clone();
    let tokens = logprobs["tokens"].as_array().unwrap();
    assert!(tokens.iter().all(|token| token.as_str().unwrap().chars().all(|c| c.is_ascii_digit())), "{tokens:?}");
    // Whatever the model would have liked better is among the alternatives.
    let alternatives = logprobs["top_logprobs"][0].as_object().unwrap();
    assert!(alternatives.keys().any(|token| token.parse::<u32>().is_err()), "{alternatives:?}");
    let best = alternatives.values().map(|logprob| logprob.as_f64().unwrap()).fold(f64::MIN, f64::max);
    assert!(logprobs["token_logprobs"][0].as_f64().unwrap() < best);
}

#[test]
fn neighbours_notice_nothing_and_are_not_noticed() {
    let server = Server::shared();
    let plain: Vec<Value> =
        (0..4).map(|i| json!({"prompt": format!("Story {i}:"), "max_tokens": 60, "seed": i, "logprobs": 2})).collect();
    let formed: Vec<Value> = (0..4)
        .map(|seed| completion(json!({"json": person()}), json!({"seed": seed, "temperature": 1, "max_tokens": 200})))
        .collect();
    let all: Vec<Value> = plain.into_iter().zip(formed).flat_map(|(plain, formed)| [plain, formed]).collect();
    let ask = |request: &Value| server.post(COMPLETIONS, request).json()["choices"].clone();
    let alone: Vec<Value> = all.iter().map(ask).collect();
    let together: Vec<Value> = thread::scope(|scope| {
        let asked: Vec<_> = all.iter().map(|request| scope.spawn(move || ask(request))).collect();
        asked.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    assert_eq!(together, alone);
}

#[test]
fn several_choices_each_fit() {
    let server = Server::shared();
    let request = with(question(), json!({"n": 2, "seed": 3, "temperature": 1}));
    let both = choices(&server, CHAT, &request);
    both.iter().for_each(|(text, _)| assert_is_person(text));
    assert_ne!(both[0], both[1]);
    let single = with(question(), json!({"seed": 3, "temperature": 1}));
    assert_eq!(answer(&server, CHAT, &single), both[0]);
}

#[test]
fn a_preempted_answer_goes_on_in_its_grammar() {
    let requests: Vec<Value> = (0..6)
        .map(|seed| {
            completion(
                json!({"regex": "([a-z]{2,9} ){60}"}),
                json!({"seed": seed, "temperature": 1, "max_tokens": 150}),
            )
        })
        .collect();
    let roomy = Server::shared();
    let alone: Vec<_> = requests.iter().map(|request| answer(&roomy, COMPLETIONS, request)).collect();
    let tight = Server::start(&["--max-model-len", "256", "--kv-blocks", "20"]);
    let together: Vec<_> = thread::scope(|scope| {
        let tight = &tight;
        let asked: Vec<_> =
            requests.iter().map(|request| scope.spawn(move || answer(tight, COMPLETIONS, request))).collect();
        asked.into_iter().map(|answer| answer.join().unwrap()).collect()
    });
    assert_eq!(together, alone);
    assert!(tight.metric("engine_preemptions_total") > 0.0);
}

#[test]
fn what_cannot_be_a_grammar_is_refused_with_a_reason() {
    let server = Server::shared();
    let format = |schema: Value| json!({"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}});
    let outputs = |outputs: Value| json!({"structured_outputs": outputs});
    let deep = format!("start: {}\"a\"{}", "(".repeat(500), ")".repeat(500));
    for (fields, param, reason) in [
        (format(json!({"type": "strange"})), "response_format.json_schema.schema", "strange"),
        (format(json!({"const": "a".repeat(100_000)})), "response_format.json_schema.schema", "too large"),
        (outputs(json!({"regex": "a("})), "structured_outputs.regex", "unclosed group (at '(')"),
        (outputs(json!({"regex": "(?=a)b"})), "structured_outputs.regex", "look-around"),
        (outputs(json!({"choice": []})), "structured_outputs.choice", "nothing to choose"),
        (outputs(json!({"grammar": "start: missing"})), "structured_outputs.grammar", "missing"),
        (outputs(json!({"grammar": deep})), "structured_outputs.grammar", "too large"),
        (outputs(json!({"regex": "a", "choice": ["a"]})), "structured_outputs", "exactly one"),
    ] {
        for (path, request) in [
            (COMPLETIONS, json!({"prompt": "a", "max_tokens": 4})),
            (CHAT, json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 4})),
        ] {
            let (status, named, message) = server.post(path, &with(request, fields.clone())).error();
            assert_eq!((status, named.as_deref()), (400, Some(param)), "{message}");
            assert!(message.contains(reason) && message.contains(param), "{message}");
        }
    }
}

#[test]
fn a_grammar_that_becomes_too_much_to_follow_ends_in_an_error() {
    let server = Server::shared();
    // What it may be is known only after 22 letters: as many states as there are beginnings.
    let request =
        completion(json!({"regex": "[ab]*a[ab]{22}c"}), json!({"temperature": 1, "max_tokens": 900, "seed": 1}));
    let response = server.post(COMPLETIONS, &request);
    if response.status != 200 {
        assert_eq!(response.status, 400, "{}", response.text());
    }
    server.wait_until_idle();
    let (text, _) = answer(&server, COMPLETIONS, &completion(json!({"choice": ["fine"]}), json!({})));
    assert_eq!(text, "fine");
}
