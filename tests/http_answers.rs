//! Answers in every form: whole and streamed, with log-probabilities, stop strings, echo and several choices.

mod program;
mod support;

use program::Server;
use serde_json::{Value, json};

const CHAT: &str = "/v1/chat/completions";
const COMPLETIONS: &str = "/v1/completions";

/// The text of a choice, from the chunks of a stream.
fn joined(chunks: &[Value], index: u64) -> String {
    let choices = chunks.iter().flat_map(|chunk| chunk["choices"].as_array().unwrap());
    let mine = choices.filter(|choice| choice["index"] == index);
    mine.filter_map(|choice| choice["text"].as_str().or(choice["delta"]["content"].as_str())).collect()
}

#[test]
fn a_chat_is_answered_whole_and_streamed_alike() {
    let server = Server::shared();
    let request = json!({
        "model": "demo", "temperature": 0, "max_tokens": 24,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
    });
    let whole = server.answer(CHAT, &request);
    assert_eq!(whole["object"], "chat.completion");
    assert_eq!(whole["model"], "demo");
    let choice = &whole["choices"][0];
    assert_eq!(choice["message"]["role"], "assistant");
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(text.len() > 20, "{text}");
    let usage = &whole["usage"];
    assert_eq!(
        usage["total_tokens"],
        usage["prompt_tokens"].as_u64().unwrap() + usage["completion_tokens"].as_u64().unwrap()
    );

    let mut request = request;
    request["stream_options"] = json!({"include_usage": true});
    let chunks = server.streamed(CHAT, &request);
    assert_eq!(joined(&chunks, 0), text);
    assert_eq!(chunks[0]["choices"][0]["delta"], json!({"role": "assistant", "content": ""}));
    assert!(chunks.iter().all(|chunk| chunk["object"] == "chat.completion.chunk" && chunk["id"] == chunks[0]["id"]));
    let (last, before) = chunks.split_last().unwrap();
    assert_eq!(last["choices"], json!([]));
    assert_eq!(last["usage"]["completion_tokens"], usage["completion_tokens"]);
    assert!(before.iter().all(|chunk| chunk["usage"].is_null()));
    let finishes: Vec<_> = before.iter().map(|chunk| &chunk["choices"][0]["finish_reason"]).collect();
    assert_eq!(finishes.last(), Some(&&choice["finish_reason"]));
    assert!(finishes[..finishes.len() - 1].iter().all(|finish| finish.is_null()));
}

#[test]
fn every_chunk_tells_its_choices_token_counts_if_asked_to() {
    let server = Server::shared();
    let options = json!({"include_usage": true, "continuous_usage_stats": true});
    let chat = json!({"messages": [{"role": "user", "content": "Name three rivers."}]});
    let completion = json!({"prompt": ["One", "Two and"]});
    for (path, mut request) in [(CHAT, chat), (COMPLETIONS, completion)] {
        for (name, value) in [("n", json!(2)), ("max_tokens", json!(6)), ("ignore_eos", json!(true))] {
            request[name] = value;
        }
        request["stream_options"] = options.clone();
        let chunks = server.streamed(path, &request);
        let (total, chunks) = chunks.split_last().unwrap();
        let choices = if path == CHAT { 2 } else { 4 };
        assert_eq!(total["usage"]["completion_tokens"], 6 * choices);
        let mut prompts = 0;
        for index in 0..choices {
            let mine = chunks.iter().filter(|chunk| chunk["choices"][0]["index"] == index);
            let counts: Vec<[u64; 3]> = mine
                .map(|chunk| {
                    let field = |name: &str| chunk["usage"][name].as_u64().unwrap();
                    [field("prompt_tokens"), field("completion_tokens"), field("total_tokens")]
                })
                .collect();
            let prompt = counts[0][0];
            assert!(counts.iter().all(|&[tokens, answer, all]| tokens == prompt && all == prompt + answer));
            assert!(counts.is_sorted(), "{counts:?}");
            // A chat's first chunk tells who speaks, and nothing of what was said.
            assert_eq!((counts[0][1] == 0, counts.last().unwrap()[1]), (path == CHAT, 6), "{counts:?}");
            prompts += if index % 2 == 0 { prompt } else { 0 };
        }
        assert_eq!(total["usage"]["prompt_tokens"], prompts);
    }
}

#[test]
fn an_answer_is_understood_as_clients_send_it_back() {
    let server = Server::shared();
    let tokens = |answer: Value| {
        let messages = json!([{"role": "user", "content": "Hi"}, answer, {"role": "user", "content": "And?"}]);
        server.answer("/tokenize", &json!({ "messages": messages }))["tokens"].clone()
    };
    let plain = tokens(json!({"role": "assistant", "content": "Hello."}));
    // As LiteLLM makes it of an answer of this server, and as OpenAI's library for JavaScript does.
    let litellm = json!({
        "content": "Hello.", "role": "assistant", "tool_calls": null, "function_call": null,
        "provider_specific_fields": {"refusal": null},
    });
    assert_eq!(tokens(litellm), plain);
    assert_eq!(tokens(json!({"role": "assistant", "content": "Hello.", "refusal": null, "parsed": null})), plain);
    let nothing = tokens(json!({"role": "assistant", "content": null, "reasoning": null}));
    assert_eq!(nothing, tokens(json!({"role": "assistant", "content": ""})));
}

#[test]
fn content_parts_and_all_roles_are_read() {
    let server = Server::shared();
    let plain = json!([{"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "Hi"}]);
    let parts = json!([
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]);
    let tokens = |messages: Value| server.answer("/tokenize", &json!({"messages": messages}))["tokens"].clone();
    assert_eq!(tokens(plain), tokens(parts));
    let history = json!([
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": null, "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": "weather", "arguments": "{\"place\": \"here\"}"}}]},
        {"role": "tool", "tool_call_id": "c", "content": "Sunny"},
    ]);
    assert!(
        server.answer(CHAT, &json!({"messages": history, "max_tokens": 2}))["usage"]["prompt_tokens"].as_u64()
            > Some(5)
    );
}

#[test]
fn the_last_message_can_be_continued() {
    let server = Server::shared();
    let mut request = json!({
        "messages": [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "1, 2, 3,"}],
        "continue_final_message": true, "add_generation_prompt": false,
    });
    let tokens = server.answer("/tokenize", &request)["tokens"].clone();
    let text = server.answer("/detokenize", &json!({"tokens": tokens}))["prompt"].as_str().unwrap().to_owned();
    assert!(text.ends_with("assistant\n1, 2, 3,"), "{text:?}");
    // Neither is the text taken for the same in what closes the message, nor does it lose its end.
    for last in ["<", "end", "return ", ""] {
        request["messages"][1]["content"] = last.into();
        let tokens = server.answer("/tokenize", &request)["tokens"].clone();
        let text = server.answer("/detokenize", &json!({"tokens": tokens}))["prompt"].as_str().unwrap().to_owned();
        assert!(text.ends_with(&format!("assistant\n{last}")), "{text:?}");
    }
}

#[test]
fn a_stop_string_ends_the_answer_and_is_not_leaked() {
    let server = Server::shared();
    let request = json!({"prompt": "The first ten numbers are 1, 2, 3, 4,", "temperature": 0, "max_tokens": 24});
    let free = server.answer(COMPLETIONS, &request)["choices"][0]["text"].as_str().unwrap().to_owned();
    // Every cut of the free text that first occurs there, in the middle of tokens and across them.
    let chars: Vec<usize> = free.char_indices().map(|(at, _)| at).chain([free.len()]).collect();
    for window in chars.windows(4).step_by(3) {
        let stop = &free[window[0]..window[3]];
        let expected = &free[..free.find(stop).unwrap()];
        let mut request = request.clone();
        request["stop"] = json!([stop, "never to be seen"]);
        let choice = server.answer(COMPLETIONS, &request)["choices"][0].clone();
        assert_eq!((choice["text"].as_str(), choice["finish_reason"].as_str()), (Some(expected), Some("stop")));
        assert_eq!(joined(&server.streamed(COMPLETIONS, &request), 0), expected, "stop {stop:?}");
        request["include_stop_str_in_output"] = true.into();
        let text = server.answer(COMPLETIONS, &request)["choices"][0]["text"].as_str().unwrap().to_owned();
        assert_eq!(text, format!("{expected}{stop}"));
    }
    server.wait_until_idle();
}

#[test]
fn several_prompts_and_choices_have_their_own_index_and_seed() {
    let server = Server::shared();
    let request = json!({"prompt": ["Once upon", "The sea"], "n": 3, "seed": 11, "temperature": 1, "max_tokens": 12});
    let whole = server.answer(COMPLETIONS, &request);
    let choices = whole["choices"].as_array().unwrap();
    assert_eq!(choices.len(), 6);
    assert_ne!(choices[0]["text"], choices[1]["text"]);
    let chunks = server.streamed(COMPLETIONS, &request);
    for (index, choice) in choices.iter().enumerate() {
        assert_eq!(choice["index"], index);
        assert_eq!(joined(&chunks, index as u64), choice["text"].as_str().unwrap());
    }
    // The second choice is what its seed alone gives.
    let alone = json!({"prompt": "Once upon", "seed": 12, "temperature": 1, "max_tokens": 12});
    assert_eq!(server.answer(COMPLETIONS, &alone)["choices"][0]["text"], choices[1]["text"]);
}

#[test]
fn log_probabilities_have_both_of_openais_forms() {
    let server = Server::shared();
    let request = json!({"prompt": "The capital of France is", "temperature": 0, "max_tokens": 6, "logprobs": 2});
    let whole = server.answer(COMPLETIONS, &request)["choices"][0].clone();
    let logprobs = &whole["logprobs"];
    let tokens: Vec<&str> =
        logprobs["tokens"].as_array().unwrap().iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(tokens.concat(), whole["text"].as_str().unwrap());
    let mut offset = 0;
    for (i, token) in tokens.iter().enumerate() {
        assert_eq!(logprobs["text_offset"][i], offset);
        offset += token.chars().count();
        let top = logprobs["top_logprobs"][i].as_object().unwrap();
        assert_eq!(top.len(), 2);
        assert_eq!(top[*token], logprobs["token_logprobs"][i], "greedy draws the likeliest");
        assert!(logprobs["token_logprobs"][i].as_f64().unwrap() <= 0.0);
    }
    let pieces: Vec<Value> = server
        .streamed(COMPLETIONS, &request)
        .iter()
        .flat_map(|chunk| chunk["choices"][0]["logprobs"]["token_logprobs"].as_array().cloned().unwrap_or_default())
        .collect();
    assert_eq!(Value::from(pieces), logprobs["token_logprobs"]);

    let request = json!({
        "messages": [{"role": "user", "content": "Write an emoji: 🙂"}],
        "temperature": 0, "max_tokens": 12, "logprobs": true, "top_logprobs": 3,
    });
    let choice = server.answer(CHAT, &request)["choices"][0].clone();
    let content = choice["logprobs"]["content"].as_array().unwrap();
    let bytes: Vec<u8> = content
        .iter()
        .flat_map(|token| token["bytes"].as_array().unwrap())
        .map(|byte| byte.as_u64().unwrap() as u8)
        .collect();
    let text = choice["message"]["content"].as_str().unwrap();
    assert!(bytes.starts_with(text.trim_end_matches('\u{fffd}').as_bytes()), "{text:?}");
    assert!(content.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 3));
}

#[test]
fn echo_scores_the_prompt() {
    let server = Server::shared();
    let request = json!({"prompt": "The capital of France is", "max_tokens": 0, "echo": true, "logprobs": 1});
    let scored = server.answer(COMPLETIONS, &request)["choices"][0].clone();
    assert_eq!(scored["text"], "The capital of France is");
    assert_eq!(scored["finish_reason"], "length");
    let logprobs = scored["logprobs"]["token_logprobs"].as_array().unwrap();
    assert!(logprobs[0].is_null() && logprobs[1..].iter().all(Value::is_number));

    let request =
        json!({"prompt": "The capital of France is", "max_tokens": 4, "echo": true, "logprobs": 0, "temperature": 0});
    let whole = server.answer(COMPLETIONS, &request)["choices"][0].clone();
    let tokens = whole["logprobs"]["tokens"].as_array().unwrap();
    let text: String = tokens.iter().map(|token| token.as_str().unwrap()).collect();
    assert_eq!(whole["text"], text.as_str());
    assert_eq!(tokens.len(), logprobs.len() + 4);
    assert_eq!(joined(&server.streamed(COMPLETIONS, &request), 0), text);
}

#[test]
fn an_answer_never_splits_a_character() {
    let server = Server::shared();
    // Nothing but the parts of this character can be drawn, and the prompt shows in what order.
    let parts = server.answer("/tokenize", &json!({"prompt": "🙂"}))["tokens"].as_array().unwrap().clone();
    assert!(parts.len() > 1, "the vocabulary has a token for it: choose another character");
    let bias: serde_json::Map<_, _> = parts.iter().map(|part| (part.to_string(), 100.into())).collect();
    let request = json!({"prompt": "🙂".repeat(40), "logit_bias": bias, "temperature": 0, "max_tokens": 61});
    let whole = server.answer(COMPLETIONS, &request)["choices"][0]["text"].as_str().unwrap().to_owned();
    // The last one may be cut off by the limit.
    let complete = whole.trim_end_matches('\u{fffd}');
    assert!(complete.chars().count() > 8 && complete.chars().all(|c| c == '🙂'), "{whole:?}");
    let chunks = server.streamed(COMPLETIONS, &request);
    assert_eq!(joined(&chunks, 0), whole);
    let pieces = chunks.iter().map(|chunk| chunk["choices"][0]["text"].as_str().unwrap());
    let pieces: Vec<&str> = pieces.filter(|piece| !piece.is_empty()).collect();
    assert!(pieces.len() > 4, "the answer came in one piece: {pieces:?}");
    for piece in &pieces[..pieces.len() - 1] {
        assert!(piece.chars().all(|c| c == '🙂'), "{piece:?} of {pieces:?}");
    }
}

#[test]
fn tokens_and_text_are_each_others_inverse() {
    let server = Server::shared();
    let text = "Grüße, 世界! <|im_end|>";
    let tokenized = server.answer("/tokenize", &json!({"prompt": text, "return_token_strs": true}));
    assert_eq!(tokenized["count"], tokenized["tokens"].as_array().unwrap().len());
    assert_eq!(tokenized["token_strs"].as_array().unwrap().len(), tokenized["count"].as_u64().unwrap() as usize);
    assert_eq!(server.answer("/detokenize", &json!({"tokens": tokenized["tokens"]}))["prompt"], text);
    let by_text = json!({"prompt": text, "temperature": 0, "max_tokens": 8});
    let by_tokens = json!({"prompt": tokenized["tokens"], "temperature": 0, "max_tokens": 8});
    assert_eq!(server.answer(COMPLETIONS, &by_text)["choices"], server.answer(COMPLETIONS, &by_tokens)["choices"]);
}

#[test]
fn tokens_are_called_what_the_vocabulary_calls_them() {
    let server = Server::shared();
    // None of them is text by itself.
    let tokenized = server.answer("/tokenize", &json!({"prompt": "🙂", "return_token_strs": true}));
    let names = tokenized["token_strs"].as_array().unwrap();
    assert!(names.len() > 1 && names.iter().all(|name| name.as_str().is_some_and(|name| !name.contains('\u{fffd}'))));
}

#[test]
fn texts_beyond_the_context_are_counted() {
    let server = Server::shared();
    let text = "All happy families are alike. ".repeat(500);
    let messages = json!([{"role": "user", "content": text}]);
    for request in [json!({ "prompt": text }), json!({ "messages": messages })] {
        let tokenized = server.answer("/tokenize", &request);
        let count = tokenized["count"].as_u64().unwrap();
        assert!(count > 2 * tokenized["max_model_len"].as_u64().unwrap(), "{count}");
        assert_eq!(tokenized["tokens"].as_array().unwrap().len() as u64, count);
    }
}

fn cached_tokens(answer: &Value) -> u64 {
    answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
}

#[test]
fn a_repeated_prompt_is_found_by_requests_with_the_same_salt_and_by_no_others() {
    let server = Server::shared();
    let text = "For instance, on the planet Earth, man had always assumed that he was more intelligent. ".repeat(3);
    let completion = json!({"prompt": text, "temperature": 0, "max_tokens": 8});
    let chat = json!({"messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 8});
    for (path, request) in [(COMPLETIONS, completion), (CHAT, chat)] {
        let ask = |salt: Value| {
            let mut request = request.clone();
            request["cache_salt"] = salt;
            server.answer(path, &request)
        };
        let salts = [json!("of one tenant"), json!("of another"), Value::Null];
        let [first, second] = [(); 2].map(|()| salts.clone().map(ask));
        assert!(first[..2].iter().all(|answer| cached_tokens(answer) == 0), "{first:?}");
        // Without a salt a conversation finds how all of them begin.
        let more = |(first, second): (&Value, &Value)| cached_tokens(second) >= cached_tokens(first) + 32;
        assert!(first.iter().zip(&second).all(more), "{second:?}");
        let is_the_same = |answer: &Value| answer["choices"] == first[0]["choices"];
        assert!(first.iter().chain(&second).all(is_the_same), "{first:?}\n{second:?}");
    }
}

#[test]
fn without_prefix_caching_a_repeated_prompt_is_computed_again() {
    let server = Server::start(&["--max-model-len", "1024", "--kv-blocks", "256", "--no-prefix-caching"]);
    let prompt = "This planet has, or rather had, a problem, which was this. ".repeat(3);
    let request = json!({"prompt": prompt, "temperature": 0, "max_tokens": 8, "n": 2});
    let answers = [(); 2].map(|()| server.answer(COMPLETIONS, &request));
    assert_eq!(answers[0]["choices"], answers[1]["choices"]);
    assert!(answers.iter().all(|answer| cached_tokens(answer) == 0), "{answers:?}");
    server.wait_until("no page is kept", |server| server.metric("engine_kv_pages{state=\"free\"}") == 256.0);
    assert_eq!(server.metric("engine_prefix_hit_tokens_total"), 0.0);
}

#[test]
fn a_repeated_prompt_is_found_in_the_cache() {
    let server = Server::shared();
    let prompt = "In the beginning the universe was created. This has made a lot of people very angry. ".repeat(3);
    let request = json!({"prompt": prompt, "temperature": 0, "max_tokens": 8});
    let first = server.answer(COMPLETIONS, &request);
    let second = server.answer(COMPLETIONS, &request);
    assert_eq!(first["choices"], second["choices"]);
    assert!(cached_tokens(&second) >= 32);
    assert!(cached_tokens(&second) < second["usage"]["prompt_tokens"].as_u64().unwrap());
    // An answer that a stop string ends knows it too.
    let first_char: String = second["choices"][0]["text"].as_str().unwrap().chars().take(1).collect();
    let stopped =
        server.answer(COMPLETIONS, &json!({"prompt": prompt, "temperature": 0, "max_tokens": 8, "stop": first_char}));
    assert_eq!(cached_tokens(&stopped), cached_tokens(&second));
}

#[test]
fn below_min_tokens_nothing_ends_the_answer() {
    let server = Server::shared();
    let request = json!({
        "messages": [{"role": "user", "content": "Say only: yes"}],
        "temperature": 0, "max_tokens": 40, "min_tokens": 30, "stop": ["e", "a", "o"],
    });
    let tokens = server.answer(CHAT, &request)["usage"]["completion_tokens"].as_u64().unwrap();
    assert!((30..=40).contains(&tokens), "{tokens}");
}
