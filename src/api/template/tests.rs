use serde_json::{Value, json};

use super::{ChatTemplate, RenderOptions, TemplateError};

/// Rendered by transformers: tests/reference/make_template_goldens.py.
fn goldens() -> Value {
    serde_json::from_str(include_str!("../../../tests/reference/templates.json")).unwrap()
}

fn render(source: &str, messages: &Value) -> Result<String, TemplateError> {
    let options = RenderOptions { add_generation_prompt: true, ..RenderOptions::default() };
    ChatTemplate::new(source, "<s>", "</s>")?.render(messages, options)
}

fn hello() -> Value {
    json!([{"role": "user", "content": "hello"}])
}

#[test]
fn templates_render_as_transformers_renders_them() {
    let goldens = goldens();
    let mut wrong = Vec::new();
    for case in goldens["cases"].as_array().unwrap() {
        let source = goldens["templates"][case["template"].as_str().unwrap()].as_str().unwrap();
        let template = ChatTemplate::new(source, "<s>", "</s>").unwrap();
        let options = RenderOptions {
            add_generation_prompt: case["add_generation_prompt"].as_bool().unwrap(),
            tools: case["tools"].as_array().map_or(&[], Vec::as_slice),
            kwargs: case["kwargs"].as_object(),
            now: None,
        };
        let rendered = template.render(&case["messages"], options);
        if rendered.as_deref() != Ok(case["expected"].as_str().unwrap()) {
            wrong
                .push(format!("{} / {}: {rendered:?} instead of {}", case["template"], case["name"], case["expected"]));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn what_a_template_raises_is_told_from_other_errors() {
    for case in goldens()["refusals"].as_array().unwrap() {
        let result = render(case["template"].as_str().unwrap(), &hello());
        assert_eq!(result, Err(TemplateError::Raised(case["message"].as_str().unwrap().into())), "{}", case["name"]);
    }
    let result = render("{{ messages[0].content + messages[0].missing.deeper }}", &hello());
    assert!(matches!(result, Err(TemplateError::Render(_))), "{result:?}");
}

#[test]
fn a_broken_template_is_found_when_it_is_compiled() {
    let error = ChatTemplate::new("{% for m in messages %}{{ m }", "", "").unwrap_err();
    assert!(matches!(error, TemplateError::Compile(_)), "{error:?}");
}

#[test]
fn an_endless_template_runs_out_of_steps() {
    let nested = "{% for a in range(10000) %}".repeat(4) + "{% set x = a %}" + &"{% endfor %}".repeat(4);
    assert_eq!(render(&nested, &hello()), Err(TemplateError::Limit("steps")));
}

#[test]
fn no_number_of_values_buys_endless_steps() {
    // Would be let take five billion.
    let messages: Value = (0..1_000_000).map(|_| json!(1)).collect();
    let source = "{% for m in messages %}{% for n in range(1000) %}{% set x = n %}{% endfor %}{% endfor %}";
    assert_eq!(render(source, &messages), Err(TemplateError::Limit("steps")));
}

#[test]
fn a_template_cannot_write_without_end() {
    let flood = "{% set x = 'y' * 1000000 %}{% for a in range(10000) %}{{ x }}{% endfor %}";
    assert_eq!(render(flood, &hello()), Err(TemplateError::Limit("output")));
}

#[test]
fn a_long_conversation_stays_within_the_limits() {
    let goldens = goldens();
    let source = goldens["templates"]["qwen3"].as_str().unwrap();
    let turn =
        |i: usize| json!({"role": if i.is_multiple_of(2) { "user" } else { "assistant" }, "content": "x".repeat(1000)});
    let messages: Value = (0..5000).map(turn).collect();
    assert!(render(source, &messages).unwrap().len() > 5_000_000);
}

#[test]
fn request_variables_do_not_replace_the_messages() {
    let kwargs = json!({"messages": [], "add_generation_prompt": false, "extra": 1});
    let options = RenderOptions { add_generation_prompt: true, kwargs: kwargs.as_object(), ..RenderOptions::default() };
    let template =
        ChatTemplate::new("{{ messages | length }} {{ add_generation_prompt }} {{ extra }}", "", "").unwrap();
    assert_eq!(template.render(&hello(), options).unwrap(), "1 True 1");
}

#[test]
fn templates_that_read_an_effort_are_recognised() {
    let reads = |source: &str| ChatTemplate::new(source, "", "").unwrap().reads_effort();
    let goldens = goldens();
    let named = |name: &str| reads(goldens["templates"][name].as_str().unwrap());
    assert!(reads("{{ reasoning_effort }}") && named("qwen3"), "by the one name or the other");
    assert!(!named("smollm2"));
}

#[test]
fn templates_that_read_parts_are_recognised() {
    let parts = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}\
        {% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}";
    assert!(ChatTemplate::new(parts, "", "").unwrap().takes_content_parts());
    let goldens = goldens();
    for name in ["qwen3", "smollm2"] {
        let source = goldens["templates"][name].as_str().unwrap();
        assert!(!ChatTemplate::new(source, "", "").unwrap().takes_content_parts(), "{name}");
    }
    assert!(!ChatTemplate::new("{{ messages[0].content | trim }}", "", "").unwrap().takes_content_parts());
}

#[test]
fn the_date_is_written_in_the_format_asked_for() {
    let date = render("{{ strftime_now('%d %b %Y|%B %-d') }}", &hello()).unwrap();
    let day = date.split('|').next().unwrap();
    assert!(day.len() == 11 && day[7..].parse::<u32>().unwrap() >= 2024, "{date}");
    assert!(matches!(render("{{ strftime_now('%!') }}", &hello()), Err(TemplateError::Render(_))));
}

#[test]
fn a_panic_of_the_template_engine_is_an_error() {
    let result = render("{% for m in [][::-1] %}{% endfor %}", &hello());
    assert!(matches!(result, Err(TemplateError::Render(_))), "{result:?}");
}

#[test]
fn a_conversation_with_functions_may_have_a_template_of_its_own() {
    let template = ChatTemplate::new("{{ messages | length }}", "<s>", "").unwrap();
    assert!(!template.reads_tools());
    let template = template.with_tool_use("{{ bos_token }}{{ tools[0].name }}").unwrap();
    let tools = [json!({"name": "f"})];
    let render = |tools| template.render(&hello(), RenderOptions { tools, ..RenderOptions::default() }).unwrap();
    assert!(template.reads_tools());
    assert_eq!((render(&[]), render(&tools)), ("1".into(), "<s>f".into()));
    assert!(matches!(template.with_tool_use("{% if"), Err(TemplateError::Compile(_))));
}
