use std::sync::Arc;

use axum::{body::Body, extract::State, http::HeaderMap, response::Response};

use super::{
    Serving,
    answer::{Answer, Endpoint, PreparedPrompt},
    chat::respond,
    extract::read_in_context,
    form::asked,
    prompt::Purpose,
    types::{CompletionRequest, Prompt},
    validate::{CHOICES_MAX, Plan, completion_logprobs, max_tokens, refuse},
};
use crate::http::ApiError;

/// Tokens of a completion that names no limit: OpenAI's default.
const MAX_TOKENS_DEFAULT: i64 = 16;

/// `POST /v1/completions`.
pub(crate) async fn completions(
    State(serving): State<Arc<Serving>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, ApiError> {
    let (mut request, context): (CompletionRequest, _) = read_in_context(&headers, body, &serving).await?;
    let in_flight = serving.enter()?;
    serving.check_model(request.model.as_deref())?;
    refuse("suffix", request.suffix)?;
    refuse("prompt_embeds", request.prompt_embeds)?;
    let mut plan = plan(&mut request, &serving, context.seed())?;
    let prompts = request.prompt.take().ok_or_else(|| ApiError::missing("prompt"))?.0;
    if prompts.is_empty() {
        return Err(ApiError::invalid("prompt", "'prompt' is an empty list"));
    }
    if prompts.len() * plan.n > CHOICES_MAX {
        let message =
            format!("'prompt' has {} prompts with 'n' {} each; together at most {CHOICES_MAX}", prompts.len(), plan.n);
        return Err(ApiError::invalid("prompt", message));
    }
    let echo = request.echo.unwrap_or(false);
    let mut prepared = Vec::with_capacity(prompts.len());
    for prompt in prompts {
        prepared.push(prepare(&serving, prompt, request.add_special_tokens.unwrap_or(true), echo, &plan).await?);
    }
    // Last: it is the dearest.
    plan.grammar = serving.compile(asked(request.response_format, request.structured_outputs)?).await?;
    let answer = Answer::start(serving, in_flight, context, Endpoint::Completion, &plan, prepared, "prompt")?;
    respond(answer, plan.stream).await
}

fn plan(request: &mut CompletionRequest, serving: &Serving, seed: u64) -> Result<Plan, ApiError> {
    let echo = request.echo.unwrap_or(false);
    let mut plan = Plan::new(request.take_sampling(), serving.bounds(), seed)?;
    plan.logprobs = completion_logprobs(request.logprobs)?;
    let wanted = request.max_tokens.unwrap_or(MAX_TOKENS_DEFAULT);
    plan.max_tokens = max_tokens("max_tokens", Some(wanted), Some(echo))?;
    if echo && (plan.logprobs.is_some() || wanted == 0) {
        plan.prompt_logprobs = Some(plan.logprobs.unwrap_or(0));
    }
    if let Some(best_of) = request.best_of
        && best_of != plan.n as i64
    {
        return Err(ApiError::unsupported("best_of", "it has to be the same as 'n'"));
    }
    Ok(plan)
}

async fn prepare(
    serving: &Arc<Serving>,
    prompt: Prompt,
    add_special_tokens: bool,
    echo: bool,
    plan: &Plan,
) -> Result<PreparedPrompt, ApiError> {
    match prompt {
        Prompt::Text(text) => {
            let (tokens, text) = serving.encode_text(text, add_special_tokens, Purpose::Answer, "prompt").await?;
            Ok(PreparedPrompt { tokens, echo: echo.then_some(text) })
        }
        Prompt::Tokens(tokens) => {
            serving.check_tokens(&tokens, "prompt")?;
            let text = echo.then(|| serving.config.tokenizer.decode(&tokens, plan.skip_special_tokens));
            Ok(PreparedPrompt { tokens, echo: text })
        }
    }
}
