//! Bad input is answered at once, with the right status and the name of the field, and never reaches the engine.

mod program;
mod support;

use std::sync::atomic::{AtomicBool, Ordering};

use program::{Server, client::post_bytes};
use serde_json::{Value, json};
use support::with;

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// A chat request with `fields` put over a good one.
fn chat(fields: Value) -> Value {
    with(json!({"model": "demo", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}), fields)
}

/// A completion request with `fields` put over a good one.
fn completion(fields: Value) -> Value {
    with(json!({"model": "demo", "prompt": "Hi", "max_tokens": 4}), fields)
}

/// Each is refused with the status, and its error names the field.
fn check(server: &Server, path: &str, status: u16, cases: impl IntoIterator<Item = (&'static str, Value)>) {
    for (param, request) in cases {
        let (actual, named, message) = server.post(path, &request).error();
        let shown: String = request.to_string().chars().take(300).collect();
        assert_eq!((actual, named.as_deref()), (status, Some(param)), "{shown}: {message}");
        let field = param.rsplit('.').next().unwrap().split('[').next().unwrap();
        assert!(message.contains(field), "{message:?} does not name {param}");
    }
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    let server = Server::shared();
    for (path, request) in [(CHAT, chat as fn(Value) -> Value), (COMPLETIONS, completion)] {
        let cases = [
            ("temperature", json!({"temperature": -1})),
            ("temperature", json!({"temperature": 2.1})),
            ("top_p", json!({"top_p": 1.5})),
            ("top_p", json!({"top_p": 0})),
            ("top_k", json!({"top_k": -2})),
            ("min_p", json!({"min_p": 2})),
            ("repetition_penalty", json!({"repetition_penalty": 0})),
            ("presence_penalty", json!({"presence_penalty": 3})),
            ("frequency_penalty", json!({"frequency_penalty": -3})),
            ("n", json!({"n": 0})),
            ("n", json!({"n": 1000})),
            ("max_tokens", json!({"max_tokens": 0})),
            ("max_tokens", json!({"max_tokens": -5})),
            ("min_tokens", json!({"min_tokens": 5})),
            ("min_tokens", json!({"min_tokens": 5000, "max_tokens": 5000})),
            ("logit_bias", json!({"logit_bias": {"50": 101}})),
            ("logit_bias", json!({"logit_bias": {"many": 1}})),
            ("logit_bias", json!({"logit_bias": {"99999999": 1}})),
            ("stop", json!({"stop": ""})),
            ("stop", json!({"stop": vec!["x"; 65]})),
            ("stop_token_ids", json!({"stop_token_ids": [9999999]})),
            ("stream_options", json!({"stream_options": {"include_usage": true}})),
            ("cache_salt", json!({"cache_salt": ""})),
        ];
        check(&server, path, 400, cases.map(|(param, fields)| (param, request(fields))));
    }
    check(
        &server,
        CHAT,
        400,
        [
            ("top_logprobs", chat(json!({"top_logprobs": 3}))),
            ("top_logprobs", chat(json!({"logprobs": true, "top_logprobs": 21}))),
            ("max_completion_tokens", chat(json!({"max_completion_tokens": 0}))),
            ("messages", chat(json!({"messages": []}))),
            ("messages[0].role", chat(json!({"messages": [{"role": "wizard", "content": "Hi"}]}))),
            ("messages[1].content", chat(json!({"messages": [{"role": "user", "content": "Hi"}, {"role": "user"}]}))),
            (
                "messages[0].tool_calls[0].function.arguments",
                chat(json!({"messages": [{"role": "assistant", "tool_calls": [
                    {"function": {"name": "f", "arguments": [1]}}]}]})),
            ),
        ],
    );
    check(
        &server,
        COMPLETIONS,
        400,
        [
            ("logprobs", completion(json!({"logprobs": 21}))),
            ("prompt", completion(json!({"prompt": []}))),
            ("prompt", completion(json!({"prompt": ""}))),
            ("prompt", completion(json!({"prompt": [[]]}))),
            ("prompt", completion(json!({"prompt": [9999999]}))),
            ("prompt", completion(json!({"prompt": vec!["a"; 129]}))),
        ],
    );
}

#[test]
fn wrong_types_and_unknown_fields_are_refused_by_name() {
    let server = Server::shared();
    check(
        &server,
        CHAT,
        400,
        [
            ("temperature", chat(json!({"temperature": "hot"}))),
            ("n", chat(json!({"n": 1.5}))),
            ("stream", chat(json!({"stream": "yes"}))),
            ("stop[1]", chat(json!({"stop": ["a", 1]}))),
            ("messages", chat(json!({"messages": "Hi"}))),
            ("messages[0].content", chat(json!({"messages": [{"role": "user", "content": 7}]}))),
            (
                "messages[0].content[0].text",
                chat(json!({"messages": [{"role": "user", "content": [{"type": "text"}]}]})),
            ),
            ("messages[0].role", chat(json!({"messages": [{"content": "Hi"}]}))),
            ("temprature", chat(json!({"temprature": 1}))),
            ("cache_salt", chat(json!({"cache_salt": 7}))),
            ("cache_salt", chat(json!({"cache_salt": ["a"]}))),
            ("stream_options.usage", chat(json!({"stream": true, "stream_options": {"usage": true}}))),
            ("nvext.top_k", chat(json!({"nvext": {"top_k": 1}}))),
        ],
    );
    check(
        &server,
        COMPLETIONS,
        400,
        [
            ("prompt", completion(json!({"prompt": {"text": "Hi"}}))),
            ("prompt", completion(json!({"prompt": null}))),
            ("messages", completion(json!({"messages": []}))),
        ],
    );
    check(&server, "/tokenize", 400, [("prompt", json!({})), ("text", json!({"text": "Hi"}))]);
    check(&server, "/detokenize", 400, [("tokens", json!({})), ("tokens", json!({"tokens": [9999999]}))]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let server = Server::shared();
    let image = json!([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:"}}]}]);
    check(
        &server,
        CHAT,
        400,
        [
            ("tools", chat(json!({"tools": [{"type": "function", "function": {"name": "f"}}]}))),
            ("tool_choice", chat(json!({"tool_choice": "required"}))),
            ("functions", chat(json!({"functions": [{"name": "f"}]}))),
            ("response_format", chat(json!({"response_format": {"type": "structural_tag"}}))),
            ("structured_outputs.structural_tag", chat(json!({"structured_outputs": {"structural_tag": "{}"}}))),
            ("audio", chat(json!({"audio": {"voice": "alloy", "format": "wav"}}))),
            ("modalities", chat(json!({"modalities": ["text", "audio"]}))),
            ("prediction", chat(json!({"prediction": {"type": "content", "content": "x"}}))),
            ("reasoning_effort", chat(json!({"reasoning_effort": "high"}))),
            ("reasoning_effort", chat(json!({"reasoning_effort": "utmost"}))),
            ("verbosity", chat(json!({"verbosity": "low"}))),
            ("web_search_options", chat(json!({"web_search_options": {"search_context_size": "low"}}))),
            ("moderation", chat(json!({"moderation": {"model": "m"}}))),
            ("return_prompt_text", chat(json!({"return_prompt_text": true}))),
            ("include_reasoning", chat(json!({"include_reasoning": false}))),
            ("echo", chat(json!({"echo": true}))),
            ("documents", chat(json!({"documents": [{"text": "x"}]}))),
            ("chat_template", chat(json!({"chat_template": "{{ messages }}"}))),
            ("chat_template_kwargs.tools", chat(json!({"chat_template_kwargs": {"tools": []}}))),
            (
                "chat_template_kwargs.add_generation_prompt",
                chat(json!({"chat_template_kwargs": {"a": 1, "add_generation_prompt": false}})),
            ),
            ("messages[0].content[0].type", chat(json!({"messages": image}))),
        ],
    );
    check(
        &server,
        COMPLETIONS,
        400,
        [
            ("suffix", completion(json!({"suffix": "end"}))),
            ("best_of", completion(json!({"best_of": 3}))),
            ("prompt_embeds", completion(json!({"prompt_embeds": "AAAA"}))),
        ],
    );
    let hi = json!([{"role": "user", "content": "Hi"}]);
    let tokenize = json!({"messages": hi, "chat_template_kwargs": {"bos_token": "x"}});
    check(&server, "/tokenize", 400, [("chat_template_kwargs.bos_token", tokenize)]);
    let tokenize = json!({"messages": hi, "chat_template": "{{ messages }}"});
    check(&server, "/tokenize", 400, [("chat_template", tokenize)]);
}

#[test]
fn what_only_vllm_has_is_refused_by_name_where_it_asks_for_something() {
    let server = Server::shared();
    for (path, request) in [(CHAT, chat as fn(Value) -> Value), (COMPLETIONS, completion)] {
        let cases = [
            ("use_beam_search", json!({"use_beam_search": true})),
            ("length_penalty", json!({"length_penalty": 0.8})),
            ("spaces_between_special_tokens", json!({"spaces_between_special_tokens": false})),
            ("bad_words", json!({"bad_words": ["x"]})),
            ("allowed_token_ids", json!({"allowed_token_ids": [1]})),
            ("truncate_prompt_tokens", json!({"truncate_prompt_tokens": 5})),
            ("truncation_side", json!({"truncation_side": "left"})),
            ("logprob_token_ids", json!({"logprob_token_ids": [1]})),
            ("prompt_logprobs", json!({"prompt_logprobs": 0})),
            ("return_tokens_as_token_ids", json!({"return_tokens_as_token_ids": true})),
            ("priority", json!({"priority": 1})),
            ("kv_transfer_params", json!({"kv_transfer_params": {"do_remote_decode": true}})),
            ("ec_transfer_params", json!({"ec_transfer_params": {"a": 1}})),
            ("routed_experts_prompt_start", json!({"routed_experts_prompt_start": 1})),
            ("repetition_detection", json!({"repetition_detection": {"max_pattern_size": 4}})),
            ("watermarking", json!({"watermarking": true})),
            ("early_stopping", json!({"early_stopping": true})),
            ("thinking_token_budget", json!({"thinking_token_budget": 100})),
            ("nvext.annotations", json!({"nvext": {"annotations": ["request_id"]}})),
            ("guided_json", json!({"guided_json": {"type": "object"}})),
            ("guided_choice", json!({"guided_choice": ["a", "b"]})),
        ];
        check(&server, path, 400, cases.map(|(param, fields)| (param, request(fields))));
        let (_, _, message) = server.post(path, &request(json!({"guided_regex": "a+"}))).error();
        assert!(message.contains("use 'structured_outputs'"), "{message}");
    }
}

#[test]
fn what_other_servers_call_otherwise_is_refused_with_a_hint() {
    let server = Server::shared();
    for (param, hint) in [
        ("enable_thinking", "chat_template_kwargs"),
        ("n_predict", "max_tokens"),
        ("num_predict", "max_tokens"),
        ("max_new_tokens", "max_tokens"),
        ("thinking", "reasoning_effort"),
        ("reasoning_format", "reasoning_effort"),
        ("content", "'prompt'"),
        ("repeat_penalty", "repetition_penalty"),
        ("cache_prompt", "cache_salt"),
        ("grammar", "Lark's syntax"),
        ("json_schema", "'response_format' takes it"),
        ("num_ctx", "--max-model-len"),
    ] {
        let (status, named, message) = server.post(CHAT, &chat(json!({ param: 1 }))).error();
        assert_eq!((status, named.as_deref()), (400, Some(param)));
        assert!(message.contains(hint), "{message}");
    }
}

#[test]
fn what_clients_note_in_messages_is_passed_over() {
    let server = Server::shared();
    let call = json!({"id": "c", "extra_content": {}, "function": {"name": "f", "arguments": "{}", "colour": "red"}});
    let messages = json!([
        {"role": "user", "content": "Hi", "colour": "red", "refusal": "no", "annotations": [{"type": "x"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "user", "content": "And?"},
    ]);
    let response = server.post(CHAT, &chat(json!({ "messages": messages })));
    assert_eq!(response.status, 200, "{}", response.text());
}

#[test]
fn harmless_fields_of_openai_are_accepted() {
    let server = Server::shared();
    let fields = json!({
        "user": "me", "metadata": {"a": "b"}, "store": false, "service_tier": "auto", "tools": [],
        "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
        "parallel_tool_calls": true, "n": null, "logit_bias": null, "stop": null, "seed": 3, "prompt_cache_key": "k",
        "safety_identifier": "s",
    });
    assert_eq!(server.post(CHAT, &chat(fields)).status, 200);
    let fields = json!({"user": "me", "suffix": null, "best_of": 1, "echo": false, "logprobs": null});
    assert_eq!(server.post(COMPLETIONS, &completion(fields)).status, 200);
}

#[test]
fn fields_of_vllm_that_ask_for_nothing_are_accepted() {
    let server = Server::shared();
    let neutral = json!({
        "use_beam_search": false, "length_penalty": 1.0, "spaces_between_special_tokens": true, "bad_words": [],
        "allowed_token_ids": null, "truncate_prompt_tokens": null, "prompt_logprobs": null, "priority": 0,
        "return_tokens_as_token_ids": null, "return_token_ids": false, "logits_processors": null, "cache_salt": null,
        "kv_transfer_params": null, "vllm_xargs": {}, "guided_json": null, "guided_regex": null, "guided_choice": null,
        "guided_grammar": null, "guided_decoding_backend": null, "guided_whitespace_pattern": null,
        "structured_outputs": null, "seed": -1, "top_k": 40.0, "max_tokens": 4.0, "truncation_side": null,
        "logprob_token_ids": null, "return_token_offsets": false, "return_mm_kwargs": true, "mm_payload": "none",
        "nvext": {"annotations": []},
        "routed_experts_prompt_start": 0, "ec_transfer_params": null, "repetition_detection": null,
        "watermarking": null, "early_stopping": false, "thinking_token_budget": -1, "request_id": "r",
        "session_id": "s", "stream_interval": 1, "prompt_cache_options": {"mode": "explicit"},
    });
    let response = server.post(COMPLETIONS, &with(completion(neutral.clone()), json!({"prompt_embeds": null})));
    assert_eq!(response.status, 200, "{}", response.text());
    let of_chats = json!({
        "include_reasoning": true, "echo": false, "documents": null, "chat_template": null,
        "mm_processor_kwargs": null, "media_io_kwargs": null, "return_prompt_text": null, "reasoning_effort": null,
        "chat_template_kwargs": {"enable_thinking": false, "tools": null},
    });
    let response = server.post(CHAT, &with(chat(neutral), of_chats));
    assert_eq!(response.status, 200, "{}", response.text());
    let of_tokenize = json!({"chat_template": null, "mm_processor_kwargs": null, "media_io_kwargs": null});
    assert_eq!(server.post("/tokenize", &with(json!({"prompt": "Hi"}), of_tokenize)).status, 200);
}

#[test]
fn a_request_that_names_no_model_gets_the_only_one() {
    let server = Server::shared();
    for model in [json!(""), Value::Null] {
        assert_eq!(server.post(CHAT, &chat(json!({ "model": model }))).status, 200);
    }
}

#[test]
fn an_unknown_model_or_url_is_not_found() {
    let server = Server::shared();
    check(&server, CHAT, 404, [("model", chat(json!({"model": "gpt-4"})))]);
    check(&server, COMPLETIONS, 404, [("model", completion(json!({"model": "gpt-4"})))]);
    assert_eq!(server.get("/v1/models/gpt-4").error().0, 404);
    let (status, _, message) = server.get("/v1/unknown").error();
    let served = message.strip_prefix("Unknown request URL: GET /v1/unknown; this server has: ").expect(&message);
    assert_eq!(status, 404);
    for endpoint in served.split(", ") {
        let (method, path) = endpoint.split_once(' ').unwrap();
        let path = path.replace("{id}", "demo");
        assert!(![404, 405].contains(&server.request(method, &path, &[], b"").status), "{endpoint}");
    }
    assert_eq!(server.get(CHAT).error().0, 405);
    assert_eq!(server.get("/v1/models/demo").json()["id"], "demo");
}

#[test]
fn bodies_that_are_no_json_are_refused() {
    let server = Server::shared();
    for body in ["", "{", "null", "[]", "7", "\"x\"", "{\"model\": \"demo\",}", "{} {}"] {
        assert_eq!(post_bytes(server.address, CHAT, body.as_bytes()).error().0, 400, "{body:?}");
    }
    assert_eq!(post_bytes(server.address, CHAT, b"{\"model\": \"\xff\"}").error().0, 400);
    let form = [("Content-Type", "application/x-www-form-urlencoded")];
    assert_eq!(server.request("POST", CHAT, &form, b"{}").error().0, 415);
    let gzip = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")];
    let (status, _, message) = server.request("POST", CHAT, &gzip, b"\x1f\x8b\x08\0").error();
    assert_eq!((status, message.contains("uncompressed")), (415, true), "{message}");
    let charset = [("Content-Type", "application/json; charset=utf-8")];
    assert_eq!(server.request("POST", CHAT, &charset, chat(json!({})).to_string().as_bytes()).status, 200);
}

#[test]
fn deep_nesting_is_refused_wherever_it_stands() {
    let server = Server::shared();
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    for field in
        ["messages", "stop", "logit_bias", "temperature", "chat_template_kwargs", "tools", "tool_choice", "unknown"]
    {
        let body = format!(r#"{{"model": "demo", "{field}": {deep}}}"#);
        assert_eq!(post_bytes(server.address, CHAT, body.as_bytes()).error().0, 400, "{field}");
    }
    assert_eq!(post_bytes(server.address, CHAT, deep.as_bytes()).error().0, 400);
    let body =
        format!(r#"{{"model": "demo", "messages": [{{"role": "user", "content": "Hi"}}], "functions": {deep}}}"#);
    assert_eq!(post_bytes(server.address, CHAT, body.as_bytes()).error().1.as_deref(), Some("functions"));
}

#[test]
fn what_is_passed_over_may_be_nested_to_any_depth() {
    let server = Server::shared();
    let deep = format!("{}{}", "[".repeat(200_000), "]".repeat(200_000));
    let body = format!(r#"{{"messages": [{{"role": "user", "content": "Hi", "note": {deep}}}], "max_tokens": 1}}"#);
    assert_eq!(post_bytes(server.address, CHAT, body.as_bytes()).status, 200);
}

#[test]
fn a_body_of_twice_the_limit_is_refused_and_the_client_gets_to_read_why() {
    let server = Server::shared();
    // Far more than buffers take, and no more than a slow machine reads before the server gives up.
    let body = vec![b' '; 32 << 20];
    for path in [CHAT, COMPLETIONS, "/tokenize"] {
        let (status, _, message) = post_bytes(server.address, path, &body).error();
        assert_eq!(status, 413);
        assert!(message.contains("--max-body-size"), "{message}");
    }
}

#[test]
fn a_prompt_50_times_the_context_is_refused_while_others_are_served() {
    let server = Server::shared();
    let long = "All happy families are alike. ".repeat(50 * 1024 / 6);
    let refuse = || {
        check(
            &server,
            COMPLETIONS,
            400,
            [
                ("prompt", completion(json!({"prompt": long}))),
                ("prompt", completion(json!({"prompt": vec![1; 50 * 1024]}))),
                ("prompt", completion(json!({"prompt": "x".repeat(1 << 20)}))),
            ],
        );
        check(&server, CHAT, 400, [("messages", chat(json!({"messages": [{"role": "user", "content": long}]})))]);
    };
    refuse();
    // Some such prompt is being worked on all the while that others ask for everything else, and are answered.
    let served = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..3)
            .map(|_| {
                scope.spawn(|| {
                    while !served.load(Ordering::Relaxed) {
                        refuse();
                    }
                })
            })
            .collect();
        let mut events =
            server.stream(COMPLETIONS, &completion(json!({"max_tokens": 40, "ignore_eos": true, "stream": true})));
        while events.next().is_some() {
            assert_eq!(server.get("/health").status, 200);
        }
        assert_eq!(server.post(COMPLETIONS, &completion(json!({}))).status, 200);
        assert!(senders.iter().all(|sender| !sender.is_finished()), "one of the refusals failed");
        served.store(true, Ordering::Relaxed);
    });
    let code = server.post(COMPLETIONS, &completion(json!({"prompt": long}))).json()["error"]["code"].clone();
    assert_eq!(code, "context_length_exceeded");
}

#[test]
fn a_text_longer_than_what_is_counted_is_refused_by_its_bytes() {
    let server = Server::shared();
    // Of a thousand tokens of context, a mebibyte.
    let text = "x".repeat((1 << 20) + 1);
    let messages = json!([{"role": "user", "content": text}]);
    for (param, request) in [("prompt", json!({ "prompt": text })), ("messages", json!({ "messages": messages }))] {
        let error = server.post("/tokenize", &request).json()["error"].clone();
        assert_eq!((&error["param"], &error["code"]), (&json!(param), &json!("invalid_value")), "{error}");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("1048576") && !message.contains("context"), "{message}");
    }
}

#[test]
fn every_answer_has_its_requests_id() {
    let server = Server::shared();
    assert_eq!(
        server.request("GET", "/health", &[("X-Request-Id", "mine-1")], b"").header("x-request-id"),
        Some("mine-1")
    );
    let made = server.get("/nowhere");
    assert!(made.header("x-request-id").is_some_and(|id| id.starts_with("req-")));
}

#[test]
fn more_answers_than_the_engine_has_places_are_refused_for_good() {
    let server = Server::start(&[
        "--max-model-len",
        "256",
        "--kv-blocks",
        "64",
        "--max-num-seqs",
        "2",
        "--max-waiting-requests",
        "2",
    ]);
    check(&server, CHAT, 400, [("n", chat(json!({"n": 5})))]);
    check(
        &server,
        COMPLETIONS,
        400,
        [("n", completion(json!({"n": 5}))), ("n", completion(json!({"prompt": ["a", "b"], "n": 3})))],
    );
    check(&server, COMPLETIONS, 400, [("prompt", completion(json!({"prompt": ["a", "b", "c", "d", "e"]})))]);
    assert_eq!(server.post(COMPLETIONS, &completion(json!({"n": 4}))).status, 200);
}

#[test]
fn a_conversation_of_countless_messages_or_parts_is_refused_by_name() {
    let server = Server::shared();
    let many = |element: Value, count: usize| Value::from(vec![element; count]);
    let message = json!({"role": "user", "content": ""});
    let part = json!({"type": "text", "text": ""});
    let spread = many(json!({"role": "user", "content": many(part.clone(), 100)}), 200);
    let parts = json!([{"role": "user", "content": many(part, 8193)}]);
    check(&server, CHAT, 400, [("messages", chat(json!({"messages": many(message, 8193)})))]);
    check(&server, CHAT, 400, [("messages", chat(json!({"messages": spread})))]);
    check(&server, CHAT, 400, [("messages[0].content", chat(json!({"messages": parts})))]);
}
