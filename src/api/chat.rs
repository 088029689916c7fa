use std::sync::Arc;

use axum::{
    body::Body,
    extract::State,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde_json::Value;

use super::{
    ApiError, Serving,
    answer::{Answer, Endpoint, PreparedPrompt},
    extract::read_relayed,
    prompt::ChatOptions,
    stream::stream,
    types::ChatRequest,
    validate::{Plan, chat_logprobs, max_tokens, refuse},
};

/// `POST /v1/chat/completions`.
pub(crate) async fn chat_completions(
    State(serving): State<Arc<Serving>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (mut request, relay): (ChatRequest, _) = read_relayed(&headers, body, &serving).await?;
    let in_flight = serving.enter()?;
    serving.check_model(request.model.as_deref())?;
    refuse_unsupported(&request)?;
    let (mut plan, max_field) = plan(&mut request, &serving, relay.seed())?;
    let messages = request.messages.ok_or_else(|| missing("messages"))?.0;
    let options = ChatOptions {
        add_generation_prompt: request.add_generation_prompt,
        continue_final_message: request.continue_final_message.unwrap_or(false),
        add_special_tokens: request.add_special_tokens.unwrap_or(false),
        kwargs: request.chat_template_kwargs,
        now: Some(relay.created()),
    };
    let tokens = serving.encode_chat(messages, options).await?;
    // Last: it is the dearest.
    plan.grammar = serving.compile(request.response_format, request.structured_outputs).await?;
    let prompts = vec![PreparedPrompt { tokens, echo: None }];
    let fields = ("messages", max_field);
    let answer = Answer::start(serving, in_flight, relay, Endpoint::Chat, &plan, prompts, fields)?;
    respond(answer, plan.stream).await
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

/// 400: `field` is needed.
pub(crate) fn missing(field: &'static str) -> ApiError {
    ApiError::invalid(field, format!("Missing required parameter: '{field}'"))
}

fn plan(request: &mut ChatRequest, serving: &Serving, seed: u64) -> Result<(Plan, &'static str), ApiError> {
    let mut plan = Plan::new(request.take_sampling(), serving.bounds(), seed)?;
    plan.logprobs = chat_logprobs(request.logprobs, request.top_logprobs)?;
    let older = max_tokens("max_tokens", request.max_tokens, 1)?;
    let newer = max_tokens("max_completion_tokens", request.max_completion_tokens, 1)?;
    plan.max_tokens = newer.or(older);
    Ok((plan, if newer.is_some() { "max_completion_tokens" } else { "max_tokens" }))
}

fn refuse_unsupported(request: &ChatRequest) -> Result<(), ApiError> {
    for (field, value) in [
        ("tools", request.tools),
        ("functions", request.functions),
        ("audio", request.audio),
        ("prediction", request.prediction),
        ("reasoning_effort", request.reasoning_effort),
        ("verbosity", request.verbosity),
        ("web_search_options", request.web_search_options),
    ] {
        refuse(field, value)?;
    }
    // Without tools, these two change nothing.
    for (field, value) in [("tool_choice", &request.tool_choice), ("function_call", &request.function_call)] {
        if value.as_ref().is_some_and(|value| !matches!(value.as_str(), Some("none" | "auto")) && *value != Value::Null)
        {
            return Err(ApiError::unsupported(field, "there are no tools to choose"));
        }
    }
    if request.modalities.iter().flatten().any(|modality| modality != "text") {
        return Err(ApiError::unsupported("modalities", "only [\"text\"] is"));
    }
    Ok(())
}
