//! Functions that requests offer, and thoughts: of answers to conversations what is not content.

mod program;
mod support;

use std::sync::Arc;

use program::{Server, client};
use serde_json::{Value, json};
use support::with;

const CHAT: &str = "/v1/chat/completions";

/// The demo model has not been taught to call functions, nor to think; with this template it is treated as if it had.
const TEMPLATE: &str = "{% if tools %}<|im_start|>system\nAnswer with {{ '<tool_call>' }} of one of these: \
    {{ tools | tojson }}<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>{{ message.role }}\n\
    {{ message.content }}{% for call in message.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n\
    {% endfor %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% elif enable_thinking is defined %}<think>\n\
    \n</think>\n\n{% endif %}";

fn server() -> Arc<Server> {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), TEMPLATE).unwrap();
    Server::shared_with(&["--chat-template", file.path().to_str().unwrap(), "--max-model-len", "1024"])
}

fn tools() -> Value {
    let city = json!({"enum": ["Paris", "Rome", "Grüße an \"alle\""]});
    let days = json!({"type": "integer", "minimum": 1, "maximum": 9});
    let weather = json!({
        // What a schema refers to is found in it.
        "type": "object", "properties": {"city": {"$ref": "#/$defs/city"}, "days": days},
        "required": ["city", "days"], "additionalProperties": false, "$defs": {"city": city},
    });
    let time = json!({"type": "object", "properties": {}, "additionalProperties": false});
    json!([
        {"type": "function", "function": {"name": "weather", "description": "How it is.", "parameters": weather}},
        {"type": "function", "function": {"name": "time", "parameters": time}},
    ])
}

fn ask(fields: Value) -> Value {
    let request = json!({
        "messages": [{"role": "user", "content": "What is the weather in Rome?"}], "max_tokens": 150, "temperature": 1,
    });
    with(request, fields)
}

/// The same of an answer that is of a form from its beginning on.
fn formed(fields: Value) -> Value {
    let mut request = ask(fields);
    request["include_reasoning"] = false.into();
    request
}

fn answered(server: &Server, request: &Value) -> Value {
    server.answer(CHAT, request)["choices"].clone()
}

/// A streamed answer's message, as clients put it together, and how it ended.
fn streamed(server: &Server, request: &Value) -> (Value, Value) {
    let (mut thoughts, mut content, mut calls, mut finish) = (String::new(), String::new(), Vec::new(), Value::Null);
    for chunk in server.streamed(CHAT, request) {
        for choice in chunk["choices"].as_array().unwrap() {
            let delta = &choice["delta"];
            assert_eq!(delta["reasoning"], delta["reasoning_content"]);
            thoughts += delta["reasoning"].as_str().unwrap_or_default();
            content += delta["content"].as_str().unwrap_or_default();
            for call in delta["tool_calls"].as_array().into_iter().flatten() {
                assert_eq!(call["index"], calls.len());
                let mut call = call.clone();
                call.as_object_mut().unwrap().remove("index");
                calls.push(call);
            }
            if !choice["finish_reason"].is_null() {
                assert_eq!(finish, Value::Null);
                finish = choice["finish_reason"].clone();
            }
        }
    }
    (json!({"thoughts": thoughts, "content": content, "calls": calls}), finish)
}

/// The same of a whole answer.
fn whole(choice: &Value) -> (Value, Value) {
    let message = &choice["message"];
    let text = |field: &str| message[field].as_str().unwrap_or_default();
    let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
    assert_eq!(message["reasoning"], message["reasoning_content"]);
    let parts = json!({"thoughts": text("reasoning"), "content": text("content"), "calls": calls});
    (parts, choice["finish_reason"].clone())
}

/// Without the ids, which no two answers share.
fn without_ids((mut parts, finish): (Value, Value)) -> (Value, Value) {
    for call in parts["calls"].as_array_mut().unwrap() {
        let id = call.as_object_mut().unwrap().remove("id").unwrap();
        assert!(id.as_str().unwrap().starts_with("call_"));
    }
    (parts, finish)
}

fn assert_fits(call: &Value) {
    assert_eq!(call["type"], "function");
    let arguments: Value = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
    match call["function"]["name"].as_str().unwrap() {
        "weather" => {
            let cities = tools()[0]["function"]["parameters"]["$defs"]["city"]["enum"].clone();
            assert!(cities.as_array().unwrap().contains(&arguments["city"]), "{arguments}");
            assert!(
                (1..=9).contains(&arguments["days"].as_i64().unwrap()) && arguments.as_object().unwrap().len() == 2
            );
        }
        "time" => assert_eq!(arguments, json!({})),
        other => panic!("nobody offered {other}"),
    }
}

#[test]
fn a_call_that_has_to_be_made_fits_what_was_offered_whole_and_streamed() {
    let server = server();
    for seed in 0..3 {
        let request = formed(json!({
            "tools": tools(), "tool_choice": "required", "parallel_tool_calls": false, "seed": seed,
        }));
        let choices = answered(&server, &request);
        let message = &choices[0]["message"];
        assert_eq!((&message["content"], message.get("reasoning")), (&Value::Null, None));
        let (parts, finish) = whole(&choices[0]);
        assert_eq!((parts["calls"].as_array().unwrap().len(), &finish), (1, &json!("tool_calls")));
        assert_fits(&parts["calls"][0]);
        assert_eq!(without_ids(streamed(&server, &request)), without_ids((parts, finish)));
    }
    assert!(server.metric("engine_answers_total{outcome=\"tool_calls\"}") >= 6.0);
    server.wait_until_idle();
}

#[test]
fn one_function_may_be_asked_for_by_name_and_several_calls_be_made() {
    let server = server();
    let named = json!({"type": "function", "function": {"name": "time"}});
    let choices = answered(&server, &formed(json!({"tools": tools(), "tool_choice": named, "n": 3})));
    let mut ids = Vec::new();
    for choice in choices.as_array().unwrap() {
        let (parts, finish) = whole(choice);
        assert_eq!((parts["calls"][0]["function"]["name"].as_str(), finish), (Some("time"), json!("tool_calls")));
        assert_eq!(parts["calls"].as_array().unwrap().len(), 1);
        ids.push(parts["calls"][0]["id"].clone());
    }
    ids.sort_by_key(Value::to_string);
    ids.dedup();
    assert_eq!(ids.len(), 3);
    let several = (0..4).map(|seed| {
        whole(&answered(&server, &formed(json!({"tools": tools(), "tool_choice": "required", "seed": seed})))[0]).0
    });
    let several: Vec<Value> = several.collect();
    let calls = |parts: &Value| parts["calls"].as_array().unwrap().clone();
    several.iter().flat_map(calls).for_each(|call| assert_fits(&call));
    assert!(several.iter().any(|parts| calls(parts).len() > 1), "{several:?}");
}

#[test]
fn a_model_that_calls_nothing_answers_as_without_functions() {
    let server = server();
    for fields in [json!({"tools": tools()}), json!({"tools": tools(), "tool_choice": "none"}), json!({})] {
        let request = ask(briefly(fields));
        let (parts, finish) = whole(&answered(&server, &request)[0]);
        assert_eq!((&parts["calls"], finish), (&json!([]), json!("length")));
        assert!(!parts["content"].as_str().unwrap().is_empty());
        assert_eq!(streamed(&server, &request).0, parts);
    }
}

/// The beginning of an answer.
fn briefly(mut fields: Value) -> Value {
    fields["max_tokens"] = json!(12);
    fields["temperature"] = json!(0);
    fields["ignore_eos"] = true.into();
    fields
}

#[test]
fn functions_are_part_of_the_prompt_unless_none_may_be_called() {
    let server = server();
    let prompt_tokens = |fields: Value| {
        let response = server.post(CHAT, &ask(briefly(fields))).json();
        response["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let (with, without) = (prompt_tokens(json!({"tools": tools()})), prompt_tokens(json!({})));
    assert!(with > without + 50, "{with} {without}");
    assert_eq!(prompt_tokens(json!({"tools": tools(), "tool_choice": "none"})), without);
    let tokenized = |tools: Value| {
        let body = json!({"messages": ask(json!({}))["messages"], "tools": tools});
        server.post("/tokenize", &body).json()["count"].as_u64().unwrap()
    };
    assert_eq!((tokenized(tools()), tokenized(Value::Null)), (with, without));
}

#[test]
fn a_call_and_its_result_go_back_into_the_conversation() {
    let server = server();
    let required = json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false});
    let message = answered(&server, &formed(required))[0]["message"].clone();
    let result = json!({"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"});
    let question = ask(json!({}))["messages"][0].clone();
    let request = ask(briefly(json!({"tools": tools(), "messages": [question, message, result]})));
    assert!(!whole(&answered(&server, &request)[0]).0["content"].as_str().unwrap().is_empty());
}

#[test]
fn what_the_prompt_opens_as_thoughts_is_thoughts() {
    let server = server();
    let thinking = |fields: Value| {
        let mut fields = briefly(fields);
        fields["chat_template_kwargs"] = json!({"enable_thinking": true});
        ask(fields)
    };
    let (parts, finish) = whole(&answered(&server, &thinking(json!({})))[0]);
    assert!(!parts["thoughts"].as_str().unwrap().is_empty(), "{parts}");
    assert_eq!((&parts["content"], finish), (&json!(""), json!("length")));
    assert_eq!(streamed(&server, &thinking(json!({}))).0, parts);
    // Nobody wants to see them.
    let hidden = answered(&server, &thinking(json!({"include_reasoning": false})));
    assert_eq!((&hidden[0]["message"]["content"], hidden[0]["message"].get("reasoning")), (&json!(""), None));
    for field in ["logprobs", "return_token_ids"] {
        let spelled = thinking(json!({"include_reasoning": false, field: true}));
        let response = server.post(CHAT, &spelled);
        assert_eq!((response.status, &response.json()["error"]["param"]), (400, &json!(field)));
        let form = json!({"choice": ["yes", "no"]});
        answered(&server, &thinking(json!({"include_reasoning": false, field: true, "structured_outputs": form})));
    }
    // What has a form begins with it then, and where the request says that there is nothing to think.
    for mut of_a_form in [
        thinking(json!({"include_reasoning": false})),
        ask(json!({"chat_template_kwargs": {"enable_thinking": false}})),
    ] {
        of_a_form["structured_outputs"] = json!({"choice": ["yes", "no"]});
        let (parts, finish) = whole(&answered(&server, &of_a_form)[0]);
        assert!(parts["content"] == "yes" || parts["content"] == "no", "{parts}");
        assert_eq!((&parts["thoughts"], finish), (&json!(""), json!("stop")));
    }
    // Thoughts that the prompt has closed again.
    let closed = ask(briefly(json!({"chat_template_kwargs": {"enable_thinking": false}})));
    let (parts, _) = whole(&answered(&server, &closed)[0]);
    assert_eq!(parts["thoughts"], "");
    assert!(!parts["content"].as_str().unwrap().is_empty());
}

#[test]
fn a_server_may_say_what_the_template_is_told_where_a_request_does_not() {
    let goldens: Value = serde_json::from_str(include_str!("reference/templates.json")).unwrap();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), goldens["templates"]["qwen3"].as_str().unwrap()).unwrap();
    let template = ["--chat-template", file.path().to_str().unwrap(), "--max-model-len", "1024"];
    let server = |defaults: &[&str]| Server::start(&[&template[..], defaults].concat());
    let kwargs = |thinking: Value| json!({"chat_template_kwargs": {"enable_thinking": thinking}});
    // The end of the prompt of what is asked so.
    let prompt = |server: &Server, fields: &Value| {
        let body = with(json!({"messages": [{"role": "user", "content": "Hi"}]}), fields.clone());
        let tokens = server.post("/tokenize", &body).json()["tokens"].clone();
        let text = server.post("/detokenize", &json!({ "tokens": tokens })).json()["prompt"].clone();
        text.as_str().unwrap().rsplit_once("assistant\n").unwrap().1.to_owned()
    };
    let prompt_tokens = |server: &Server, fields: Value| {
        server.answer(CHAT, &ask(briefly(fields)))["usage"]["prompt_tokens"].as_u64().unwrap()
    };
    let closed = "<think>\n\n</think>\n\n";
    let (plain, quiet) = (server(&[]), server(&["--default-chat-template-kwargs", "{\"enable_thinking\": false}"]));
    assert_eq!((prompt(&plain, &json!({})), prompt(&quiet, &json!({}))), (String::new(), closed.to_owned()));
    assert_eq!(
        (prompt(&plain, &kwargs(json!(false))), prompt(&quiet, &kwargs(json!(true)))),
        (closed.into(), "".into())
    );
    let (thinks, does_not) = (prompt_tokens(&plain, json!({})), prompt_tokens(&quiet, json!({})));
    assert!(does_not > thinks, "{does_not} {thinks}");
    // What a request says itself holds, in either of the words for it.
    for (fields, expected) in [
        (kwargs(json!(true)), thinks),
        (json!({"reasoning_effort": "high"}), thinks),
        (json!({"reasoning_effort": "none"}), does_not),
        (json!({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": false}}), does_not),
        // Nothing is said by null, and another variable changes nothing about this one.
        (kwargs(Value::Null), does_not),
        (json!({"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": null}}), thinks),
        (json!({"chat_template_kwargs": {"other": 1}}), does_not),
        (json!({"chat_template_kwargs": null}), does_not),
    ] {
        assert_eq!(prompt_tokens(&quiet, fields.clone()), expected, "{fields}");
    }
}

/// A conversation in which an assistant has thought the same before each of its answers.
fn thought_before(fields: Value) -> Value {
    let mut messages = Vec::new();
    for question in ["Is ice cold?", "Is snow white?", "Is fire hot?", "Is the sea deep?", "Is grass green?"] {
        messages.push(json!({"role": "user", "content": question}));
        messages.push(json!({"role": "assistant", "content": "<think>\nThat is so.\n</think>\n\nyes"}));
    }
    messages.push(json!({"role": "user", "content": "Is the sun bright?"}));
    let mut request = ask(fields);
    (request["messages"], request["temperature"]) = (messages.into(), json!(0));
    request["chat_template_kwargs"] = json!({"enable_thinking": true});
    request
}

#[test]
fn a_model_thinks_before_an_answer_of_a_given_form() {
    let server = server();
    let request = thought_before(json!({"structured_outputs": {"choice": ["yes", "no"]}}));
    let (parts, finish) = whole(&answered(&server, &request)[0]);
    assert!(parts["content"] == "yes" || parts["content"] == "no", "{parts}");
    let thoughts = parts["thoughts"].clone();
    assert!(!thoughts.as_str().unwrap().is_empty() && finish == "stop", "{parts}");
    assert_eq!(streamed(&server, &request), (parts, finish));
    // And before a call that has to be made.
    let call = json!({"tools": tools(), "tool_choice": "required", "parallel_tool_calls": false});
    let request = thought_before(call);
    let (parts, finish) = whole(&answered(&server, &request)[0]);
    assert_fits(&parts["calls"][0]);
    assert!(!parts["thoughts"].as_str().unwrap().is_empty(), "{parts}");
    assert_eq!((&parts["content"], &finish), (&json!(""), &json!("tool_calls")));
    assert_eq!(without_ids(streamed(&server, &request)), without_ids((parts, finish)));
    // One that has no room for more than its thoughts ends amid them.
    let mut brief = thought_before(json!({"structured_outputs": {"choice": ["yes", "no"]}}));
    brief["max_tokens"] = json!(2);
    let (parts, finish) = whole(&answered(&server, &brief)[0]);
    assert!(!parts["thoughts"].as_str().unwrap().is_empty(), "{parts}");
    assert_eq!((&parts["content"], finish), (&json!(""), json!("length")));
    // And so does one that says amid them where it is to stop.
    let mut stopped = thought_before(json!({"structured_outputs": {"choice": ["yes", "no"]}}));
    stopped["stop"] = json!([thoughts]);
    let (parts, finish) = whole(&answered(&server, &stopped)[0]);
    assert_eq!((&parts["content"], finish), (&json!(""), json!("stop")));
}

#[test]
fn an_answer_that_is_thought_about_goes_on_where_it_was_cut() {
    let server = server();
    let mut request = thought_before(json!({"structured_outputs": {"choice": ["yes", "no"]}}));
    request["stream"] = true.into();
    // As a frontend asks: what each event has brought is in comments before it.
    let relayed = |journal: &str| -> Vec<(String, String)> {
        let length = journal.len().to_string();
        let mut headers = vec![("Content-Type", "application/json"), ("X-Engine-Progress", "1")];
        if !journal.is_empty() {
            headers.push(("X-Engine-Resume", &length));
        }
        let body = format!("{journal}{request}");
        let response = client::request(server.address, "POST", CHAT, &headers, body.as_bytes());
        assert_eq!(response.status, 200, "{}", response.text());
        let text = response.text();
        let event = |event: &str| {
            let comments = event.lines().filter_map(|line| line.strip_prefix(": "));
            let progress: String = comments.map(|json| format!("{json}\n")).collect();
            let data = event.lines().find_map(|line| line.strip_prefix("data: "));
            (progress, data.unwrap().to_owned())
        };
        text.trim_end().split("\n\n").map(event).collect()
    };
    // Thoughts, content, and how it ended.
    let told = |events: &[(String, String)]| {
        let mut all = [String::new(), String::new(), String::new()];
        for (_, data) in events.iter().filter(|(_, data)| data != "[DONE]") {
            let chunk: Value = serde_json::from_str(data).unwrap();
            let choice = &chunk["choices"][0];
            let delta = &choice["delta"];
            let told = [&delta["reasoning_content"], &delta["content"], &choice["finish_reason"]];
            all.iter_mut().zip(told).for_each(|(all, told)| *all += told.as_str().unwrap_or_default());
        }
        all
    };
    let events = relayed("");
    let expected = told(&events);
    assert!(!expected[0].is_empty() && ["yes", "no"].contains(&&*expected[1]) && expected[2] == "stop", "{expected:?}");
    for cut in 1..events.len() {
        let journal: String = events[..cut].iter().map(|(progress, _)| progress.as_str()).collect();
        let all = [&events[..cut], &relayed(&journal)[..]].concat();
        assert_eq!(told(&all), expected, "cut after {cut}");
    }
}

#[test]
fn an_answer_may_be_a_call_or_of_a_form() {
    let server = server();
    let schema = json!({"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"],
        "additionalProperties": false});
    let format = json!({"type": "json_schema", "json_schema": {"name": "s", "schema": schema}});
    let asked = |choice: &str, seed: u64| {
        let fields = json!({"response_format": format, "tools": tools(), "tool_choice": choice, "seed": seed});
        let (parts, finish) = whole(&answered(&server, &formed(fields))[0]);
        let calls = parts["calls"].as_array().unwrap().clone();
        match parts["content"].as_str().unwrap() {
            "" => calls.iter().for_each(assert_fits),
            content => {
                assert!(serde_json::from_str::<Value>(content).unwrap()["sunny"].is_boolean(), "{content}");
                assert_eq!((calls.len(), finish), (0, json!("stop")));
            }
        }
        !calls.is_empty()
    };
    assert!((0..6).any(|seed| !asked("auto", seed)), "the model is not one for calls");
    assert!(asked("required", 0));
    let choice = json!({"structured_outputs": {"choice": ["yes", "no"]}, "tools": tools()});
    let (status, param, message) = server.post(CHAT, &ask(choice)).error();
    assert_eq!((status, param.as_deref()), (400, Some("structured_outputs.choice")), "{message}");
}

/// The marks of Mistral's templates, and what these demand of ids.
const MISTRAL: &str = "{% if tools %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
    {% for message in messages %}{% if message.tool_calls is defined %}[TOOL_CALLS] [\
    {% for call in message.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception('Nine letters!') }}{% endif %}\
    {{ call.function | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]\
    {% elif message.role == 'tool' %}[TOOL_RESULTS] {{ message.content }}[/TOOL_RESULTS]\
    {% elif message.role == 'user' %}[INST] {{ message.content }}[/INST]{% else %} {{ message.content }}{% endif %}\
    {% endfor %}";

#[test]
fn calls_in_a_list_behind_a_mark_are_calls_and_their_ids_are_such_as_the_template_takes() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), MISTRAL).unwrap();
    let server = Server::start(&["--chat-template", file.path().to_str().unwrap(), "--max-model-len", "1024"]);
    let of_one = |choice: Value, seed: u64| {
        json!({
            "tools": tools(), "tool_choice": choice, "parallel_tool_calls": false, "seed": seed,
        })
    };
    let with_ids_taken = |(mut parts, finish): (Value, Value)| {
        let calls = parts["calls"].as_array_mut().unwrap().iter_mut();
        let ids: Vec<Value> = calls.map(|call| call.as_object_mut().unwrap().remove("id").unwrap()).collect();
        for id in ids.iter().map(|id| id.as_str().unwrap()) {
            assert!(id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
        }
        (parts, finish)
    };
    let time = json!({"type": "function", "function": {"name": "time"}});
    for (choice, seed) in [(json!("required"), 0), (json!("required"), 1), (time.clone(), 2)] {
        let request = ask(of_one(choice.clone(), seed));
        let choices = answered(&server, &request);
        assert_eq!(choices[0]["message"]["content"], Value::Null);
        let (parts, finish) = with_ids_taken(whole(&choices[0]));
        assert_eq!((parts["calls"].as_array().unwrap().len(), &finish), (1, &json!("tool_calls")));
        assert_fits(&parts["calls"][0]);
        assert!(choice == "required" || parts["calls"][0]["function"]["name"] == "time");
        assert_eq!(with_ids_taken(streamed(&server, &request)), (parts, finish));
    }
    // Several, as far as there is room for them.
    let several = ask(json!({"tools": tools(), "tool_choice": "required", "max_tokens": 300, "n": 4}));
    for choice in answered(&server, &several).as_array().unwrap() {
        let (parts, _) = with_ids_taken(whole(choice));
        let calls = parts["calls"].as_array().unwrap();
        assert!(!calls.is_empty(), "{choice}");
        calls.iter().for_each(assert_fits);
    }

    // One that has to be made is opened by the prompt; one that may be is the model's to open.
    let prompt_tokens = |fields: Value| server.answer(CHAT, &ask(fields))["usage"]["prompt_tokens"].as_u64().unwrap();
    let may = briefly(json!({"tools": tools()}));
    assert!(prompt_tokens(of_one(time, 0)) > prompt_tokens(may.clone()));
    let (parts, finish) = whole(&answered(&server, &ask(may))[0]);
    assert_eq!((&parts["calls"], finish), (&json!([]), json!("length")));

    let message = answered(&server, &ask(of_one(json!("required"), 3)))[0]["message"].clone();
    let back = |message: &Value| {
        let result = json!({"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "sunny"});
        let question = ask(json!({}))["messages"][0].clone();
        server.post(CHAT, &ask(briefly(json!({"tools": tools(), "messages": [question, message, result]}))))
    };
    assert_eq!(back(&message).status, 200);
    let mut foreign = message;
    foreign["tool_calls"][0]["id"] = json!("call_1");
    let (status, param, words) = back(&foreign).error();
    assert_eq!((status, param.as_deref()), (400, Some("messages")));
    assert!(words.contains("Nine letters!"), "{words}");
    server.wait_until_idle();
}

#[test]
fn a_function_whose_schema_is_none_is_refused() {
    let server = server();
    let broken = json!({"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}});
    let (status, param, _) = server.post(CHAT, &ask(json!({"tools": [broken], "tool_choice": "required"}))).error();
    assert_eq!((status, param.as_deref()), (400, Some("tools")));
}

#[test]
fn what_a_schema_says_that_cannot_be_followed_is_refused_where_the_function_is_strict() {
    let server = server();
    let parameters = json!({
        "type": "object",
        "properties": {
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3, "uniqueItems": true},
            "path": {"type": "string", "format": "path", "maxLength": 9},
            "price": {"type": "string", "pattern": "^(?!^[-+.]*$)[+-]?[0-9]*$", "maxLength": 9},
        },
        "required": ["tags", "path", "price"], "additionalProperties": false,
    });
    let asked = |strict: Value| {
        let function = json!({"name": "f", "parameters": parameters, "strict": strict});
        let tools = json!([{"type": "function", "function": function}]);
        let fields = json!({"tools": tools, "tool_choice": "required", "parallel_tool_calls": false, "seed": 1});
        server.post(CHAT, &formed(fields))
    };
    for strict in [Value::Null, json!(false)] {
        let response = asked(strict);
        assert_eq!(response.status, 200, "{}", response.text());
        let call = &response.json()["choices"][0]["message"]["tool_calls"][0]["function"];
        let arguments: Value = serde_json::from_str(call["arguments"].as_str().unwrap()).unwrap();
        let tags = arguments["tags"].as_array().unwrap();
        assert!(tags.len() <= 3 && tags.iter().all(|tag| tag == "a" || tag == "b"), "{arguments}");
        assert!(arguments["path"].is_string() && arguments["price"].is_string(), "{arguments}");
    }
    let (status, param, message) = asked(json!(true)).error();
    assert_eq!((status, param.as_deref()), (400, Some("tools")), "{message}");
}
