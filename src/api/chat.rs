//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde_json::{Map, Value};

use super::{
    ChatTemplate, Parsers, Serving,
    answer::{Answer, Endpoint, PreparedPrompt},
    extract::read_in_context,
    form::{Asked, asked},
    parser::{Thoughts, Wanted},
    prompt::{ChatOptions, Purpose},
    stream::stream,
    tools::Tools,
    types::ChatRequest,
    validate::{Plan, chat_logprobs, max_tokens, refuse},
};
use crate::{
    grammar::Source,
    http::{ApiError, shown},
};

/// What `reasoning_effort` may be: OpenAI's words, and vLLM's last.
const EFFORTS: [&str; 7] = ["none", "minimal", "low", "medium", "high", "xhigh", "max"];

/// `POST /v1/chat/completions`.
pub(crate) async fn chat_completions(
    State(serving): State<Arc<Serving>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (mut request, context): (ChatRequest, _) = read_in_context(&headers, body, &serving).await?;
    let in_flight = serving.enter()?;
    serving.check_model(request.model.as_deref())?;
    refuse_unsupported(&request, serving.config.parsers)?;
    let mut plan = plan(&mut request, &serving, context.seed())?;
    let messages = request.messages.ok_or_else(|| ApiError::missing("messages"))?.0;
    let mut kwargs = request.chat_template_kwargs;
    if let Some(effort) = request.reasoning_effort.as_ref().filter(|effort| !effort.is_empty()) {
        set_effort(effort, kwargs.get_or_insert_default(), serving.config.template.as_ref())?;
    }
    // Last, so that an effort is not what a default says of thinking.
    let kwargs = serving.template_kwargs(kwargs);
    let (template, parsers) = (serving.config.template.as_ref(), serving.config.parsers);
    let mut tools = Tools::read(request.tools, request.tool_choice, request.parallel_tool_calls, template, parsers)?;
    let form = form(asked(request.response_format, request.structured_outputs)?, tools.as_ref())?;
    let hidden = request.include_reasoning == Some(false);
    if hidden && form.is_none() {
        refuse_to_spell_thoughts(&plan)?;
    }
    let enable_thinking = kwargs.as_ref().and_then(|kwargs| kwargs.get("enable_thinking"));
    let unwanted = hidden || enable_thinking == Some(&Value::Bool(false));
    let ahead = tools.as_ref().and_then(Tools::ahead);
    // Before a form, there is a way not to wait for thoughts that nobody sees; special tokens are in no grammar; and
    // where the prompt has opened calls, it is too late for thoughts.
    let cannot_think = unwanted || serving.marks_are_special || ahead.is_some();
    let without_thoughts = form.is_some() && parsers.thoughts && cannot_think;
    let options = ChatOptions {
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message.unwrap_or(false),
        add_special_tokens: request.add_special_tokens.unwrap_or(false),
        kwargs,
        tools: tools.as_mut().map(|tools| std::mem::take(&mut tools.offered)).unwrap_or_default(),
        without_thoughts,
        ahead,
        now: Some(context.created()),
    };
    let (tokens, thoughts) = serving.encode_chat(messages, options, Purpose::Answer).await?;
    plan.wanted = Wanted {
        thoughts: if parsers.thoughts && !without_thoughts { thoughts } else { Thoughts::No },
        show_thoughts: !hidden,
        calls: tools.as_ref().map(|tools| tools.format),
        calls_opened: ahead.is_some(),
        calls_max: tools.as_ref().map_or(0, Tools::calls_max),
    };
    plan.skip_special_tokens &= !(plan.wanted.is_any() && serving.marks_are_special);
    let form = form.map(|(source, field)| (plan.wanted.thoughts.before(source), field));
    // Last: it is the dearest.
    plan.grammar = serving.compile(form).await?;
    let prompts = vec![PreparedPrompt { tokens, echo: None }];
    let answer = Answer::start(serving, in_flight, context, Endpoint::Chat, &plan, prompts, "messages")?;
    respond(answer, plan.stream).await
}

/// The form of an answer, where it has to have one: what is asked for, or calls of `tools`, or either.
fn form(asked: Option<Asked>, tools: Option<&Tools>) -> Result<Option<Asked>, ApiError> {
    let Some(tools) = tools else { return Ok(asked) };
    let (schema, field) = match asked {
        None => (None, "tools"),
        Some((Source::JsonSchema(schema), field)) => (Some(schema), field),
        Some((_, field)) => {
            let message =
                format!("'{field}' does not go with 'tools', unless 'tool_choice' is 'none'; a JSON schema does");
            return Err(ApiError::invalid(field, message));
        }
    };
    Ok(tools.form(schema)?.map(|form| (form, field)))
}

/// Streams `answer` or waits for it.
pub(crate) async fn respond(answer: Answer, as_stream: bool) -> Result<Response, ApiError> {
    if as_stream {
        return Ok(stream(answer));
    }
    let body = answer.collect().await?;
    let json = HeaderValue::from_static("application/json");
    Ok(([(header::CONTENT_TYPE, json)], body).into_response())
}

fn plan(request: &mut ChatRequest, serving: &Serving, seed: u64) -> Result<Plan, ApiError> {
    let mut plan = Plan::new(request.take_sampling(), serving.bounds(), seed)?;
    plan.logprobs = chat_logprobs(request.logprobs, request.top_logprobs)?;
    let older = max_tokens("max_tokens", request.max_tokens, None)?;
    let newer = max_tokens("max_completion_tokens", request.max_completion_tokens, None)?;
    // The newer holds, also where it says that there is none.
    plan.max_tokens = if request.max_completion_tokens.is_some() { newer } else { older };
    Ok(plan)
}

/// Tells the template how long the model is to think, in its own words and in those of templates that know but whether:
/// as vLLM has it, unless the request says that itself.
fn set_effort(effort: &str, kwargs: &mut Map<String, Value>, template: Option<&ChatTemplate>) -> Result<(), ApiError> {
    const FIELD: &str = "reasoning_effort";
    if !EFFORTS.contains(&effort) {
        let message = format!("'{FIELD}' is '{}', but has to be one of '{}'", shown(effort), EFFORTS.join("', '"));
        return Err(ApiError::invalid(FIELD, message));
    }
    if !template.is_some_and(ChatTemplate::reads_effort) {
        return Err(ApiError::unsupported(FIELD, "this model's chat template does not read it; leave it out"));
    }
    kwargs.insert(FIELD.into(), effort.into());
    let thinking = kwargs.entry("enable_thinking").or_insert(Value::Null);
    if thinking.is_null() {
        *thinking = (effort != "none").into();
    }
    Ok(())
}

fn refuse_unsupported(request: &ChatRequest, parsers: Parsers) -> Result<(), ApiError> {
    for (field, value) in [
        ("functions", request.functions),
        ("audio", request.audio),
        ("prediction", request.prediction),
        ("verbosity", request.verbosity),
        ("web_search_options", request.web_search_options),
        ("moderation", request.moderation),
        ("echo", request.echo),
        ("documents", request.documents),
        ("chat_template", request.chat_template),
        ("media_io_kwargs", request.media_io_kwargs),
        ("mm_processor_kwargs", request.mm_processor_kwargs),
        ("return_prompt_text", request.return_prompt_text),
    ] {
        refuse(field, value)?;
    }
    if request.include_reasoning == Some(false) && !parsers.thoughts {
        let detail = "thoughts are not told from the content here (--reasoning-parser); leave it out";
        return Err(ApiError::unsupported("include_reasoning", detail));
    }
    // The older name of `tool_choice`.
    if request
        .function_call
        .as_ref()
        .is_some_and(|call| !matches!(call.as_str(), Some("none" | "auto")) && !call.is_null())
    {
        return Err(ApiError::unsupported("function_call", "use 'tool_choice'"));
    }
    if request.modalities.iter().flatten().any(|modality| modality != "text") {
        return Err(ApiError::unsupported("modalities", "only [\"text\"] is"));
    }
    Ok(())
}

/// What tells of each token tells of those that thoughts are made of too.
fn refuse_to_spell_thoughts(plan: &Plan) -> Result<(), ApiError> {
    for (field, asked) in [("logprobs", plan.logprobs.is_some()), ("return_token_ids", plan.token_ids)] {
        if asked {
            return Err(ApiError::unsupported(field, "with 'include_reasoning': false it would spell the thoughts"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The template's variables for an effort and what else the request says.
    fn told(effort: &str, source: &str, kwargs: Value) -> Result<Value, ApiError> {
        let template = ChatTemplate::new(source, "", "").unwrap();
        let mut kwargs = kwargs.as_object().unwrap().clone();
        set_effort(effort, &mut kwargs, Some(&template))?;
        Ok(kwargs.into())
    }

    #[test]
    fn an_effort_reaches_templates_in_both_of_their_words() {
        let both = |effort: &str, thinking: bool| json!({"reasoning_effort": effort, "enable_thinking": thinking});
        for source in ["{{ reasoning_effort }}", "{% if enable_thinking %}<think>{% endif %}"] {
            assert_eq!(told("high", source, json!({})), Ok(both("high", true)));
            assert_eq!(told("none", source, json!({})), Ok(both("none", false)));
            assert_eq!(told("low", source, json!({"enable_thinking": false})), Ok(both("low", false)));
            assert_eq!(told("none", source, json!({"enable_thinking": null})), Ok(both("none", false)));
        }
    }

    #[test]
    fn an_effort_that_changes_nothing_is_refused_by_name() {
        let refused = told("high", "{{ messages }}", json!({})).unwrap_err();
        assert!(refused.param() == Some("reasoning_effort") && refused.to_json().contains("template"), "{refused:?}");
        let refused = told("utmost", "{{ reasoning_effort }}", json!({})).unwrap_err();
        assert!(refused.param() == Some("reasoning_effort") && refused.to_json().contains("xhigh"), "{refused:?}");
        assert!(set_effort("none", &mut Map::new(), None).is_err(), "there is no template");
    }
}
