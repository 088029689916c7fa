use std::sync::Arc;

use axum::{body::Body, extract::State, http::HeaderMap};
use serde::Serialize;

use super::{
    Serving,
    extract::read_json,
    prompt::{ChatOptions, Purpose},
    tools::Tools,
    types::{DetokenizeRequest, Messages, TokenizeRequest},
    validate::refuse,
};
use crate::http::{ApiError, Json};

/// Answer of `POST /tokenize`.
#[derive(Serialize)]
pub(crate) struct Tokenized {
    count: usize,
    max_model_len: usize,
    tokens: Vec<u32>,
    /// Their names in the vocabulary.
    token_strs: Option<Vec<Option<String>>>,
}

/// Answer of `POST /detokenize`.
#[derive(Serialize)]
pub(crate) struct Detokenized {
    prompt: String,
}

/// `POST /tokenize`. Texts may be longer than the context: who asks may want to know by how much.
pub(crate) async fn tokenize(
    State(serving): State<Arc<Serving>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Tokenized>, ApiError> {
    let request: TokenizeRequest = read_json(&headers, body, &serving).await?;
    serving.check_model(request.model.as_deref())?;
    for (field, value) in [
        ("chat_template", request.chat_template),
        ("media_io_kwargs", request.media_io_kwargs),
        ("mm_processor_kwargs", request.mm_processor_kwargs),
    ] {
        refuse(field, value)?;
    }
    let tokens = match (request.prompt, request.messages) {
        (Some(_), Some(_)) => {
            return Err(ApiError::invalid("messages", "'prompt' and 'messages' exclude each other"));
        }
        (None, None) => return Err(ApiError::missing("prompt")),
        (Some(prompt), None) => {
            let add_special_tokens = request.add_special_tokens.unwrap_or(true);
            serving.encode_text(prompt, add_special_tokens, Purpose::Count, "prompt").await?.0
        }
        (None, Some(Messages(messages))) => {
            let (template, parsers) = (serving.config.template.as_ref(), serving.config.parsers);
            let tools = Tools::read(request.tools, None, None, template, parsers)?;
            let options = ChatOptions {
                add_generation_prompt: request.add_generation_prompt,
                continue_final_message: request.continue_final_message.unwrap_or(false),
                add_special_tokens: request.add_special_tokens.unwrap_or(false),
                kwargs: serving.template_kwargs(request.chat_template_kwargs),
                tools: tools.map(|tools| tools.offered).unwrap_or_default(),
                without_thoughts: false,
                ahead: None,
                now: None,
            };
            serving.encode_chat(messages, options, Purpose::Count).await?.0
        }
    };
    let token_strs = request
        .return_token_strs
        .unwrap_or(false)
        .then(|| tokens.iter().map(|&token| serving.config.tokenizer.token_name(token)).collect());
    Ok(Json(Tokenized { count: tokens.len(), max_model_len: serving.max_model_len(), tokens, token_strs }))
}

/// `POST /detokenize`.
pub(crate) async fn detokenize(
    State(serving): State<Arc<Serving>>,
    headers: HeaderMap,
    body: Body,
) -> Result<Json<Detokenized>, ApiError> {
    let request: DetokenizeRequest = read_json(&headers, body, &serving).await?;
    serving.check_model(request.model.as_deref())?;
    serving.check_tokens(&request.tokens, "tokens")?;
    Ok(Json(Detokenized { prompt: serving.config.tokenizer.decode(&request.tokens, false) }))
}

impl Serving {
    /// Refuses token ids that the model does not have.
    pub(crate) fn check_tokens(&self, tokens: &[u32], field: &'static str) -> Result<(), ApiError> {
        let vocab_size = self.engine.config().vocab_size;
        match tokens.iter().find(|&&token| token as usize >= vocab_size) {
            Some(token) => {
                let message = format!("'{field}' has token {token}, but the vocabulary has {vocab_size} tokens");
                Err(ApiError::invalid(field, message))
            }
            None => Ok(()),
        }
    }
}
