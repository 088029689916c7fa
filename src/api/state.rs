//! What the API's handlers share.

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use engine_models::Tokenizer;
use tokio::sync::Semaphore;

use super::{ChatTemplate, Defaults, Parsers, validate::Bounds};
use crate::{
    engine::{EngineHandle, EngineStatus},
    grammar::{GrammarError, Vocabulary},
    http::{ApiError, Drain, HttpToken, InFlight, MemoryBudget},
    telemetry::Metrics,
};

/// Up to this much text is encoded where the request is handled: moving it to another thread would cost more.
const INLINE_BYTES_MAX: usize = 2048;

/// What the API serves, and its limits.
pub struct ApiConfig {
    /// Names clients may use for the model, the first in answers; at least one.
    pub model_names: Vec<String>,
    /// Where the model came from, for `/v1/models`.
    pub model_root: String,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// How a conversation becomes a prompt; without one, chats are refused.
    pub template: Option<ChatTemplate>,
    /// Variables for the template where a request does not set them; none of [`super::RESERVED_NAMES`].
    pub default_template_kwargs: serde_json::Map<String, serde_json::Value>,
    /// What is looked for in answers to conversations.
    pub parsers: Parsers,
    /// Sampling parameters where a request has none.
    pub defaults: Defaults,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Clients have to know one of these; none: anyone may ask.
    pub api_keys: Vec<String>,
    /// Bytes of a request's body at most.
    pub body_bytes_max: usize,
    /// How long an answer may take from its request.
    pub request_timeout: Duration,
    /// What frontends have to send before the worker lets them continue answers; none: anyone may.
    pub cluster_token: Option<HttpToken>,
    /// Browsers' pages from these origins may ask; `*` allows all.
    pub allowed_origins: Vec<String>,
}

/// Everything a handler needs.
pub(crate) struct Serving {
    pub(crate) config: ApiConfig,
    pub(crate) engine: EngineHandle,
    pub(crate) metrics: Metrics,
    /// Start of the server, seconds since 1970: the model's `created`.
    pub(crate) started: u64,
    /// What bodies may occupy.
    pub(crate) bodies: MemoryBudget,
    /// What requests with grammars go through, once one has come.
    pub(super) vocabulary: OnceLock<Result<Vocabulary, GrammarError>>,
    /// Whether some of what conversations' answers are looked through for are special tokens of this model, which would
    /// be left out of the text before anybody looks.
    pub(crate) marks_are_special: bool,
    /// Threads that may tokenise or compile at a time: the engine needs the cores more.
    encoders: Arc<Semaphore>,
    /// The same for grammars, which may take longer: prompts do not wait for them.
    pub(super) compilers: Arc<Semaphore>,
    pub(super) drain: Drain,
}

impl Serving {
    pub(crate) fn new(config: ApiConfig, engine: EngineHandle, metrics: Metrics) -> Arc<Self> {
        debug_assert!(!config.model_names.is_empty());
        let threads = std::thread::available_parallelism().map_or(1, |threads| threads.get() / 2).max(1);
        let marks_are_special = marks_are_special(config.parsers, &config.tokenizer);
        Arc::new(Self {
            bodies: MemoryBudget::new(config.body_bytes_max),
            config,
            engine,
            metrics,
            started: unix_seconds(),
            vocabulary: OnceLock::new(),
            marks_are_special,
            encoders: Arc::new(Semaphore::new(threads)),
            compilers: Arc::new(Semaphore::new(threads)),
            drain: Drain::new(),
        })
    }

    /// Admits a request that generates, unless the server is going away or full: before it is prepared, which may take
    /// long.
    pub(crate) fn enter(&self) -> Result<InFlight, ApiError> {
        let in_flight = self.drain.enter()?;
        match self.engine.status() {
            EngineStatus::Running => {
                self.engine.check_place().map_err(|error| ApiError::not_taken(error, "prompt"))?;
                Ok(in_flight)
            }
            EngineStatus::Draining | EngineStatus::Stopped => Err(ApiError::draining()),
            EngineStatus::Failed { .. } => Err(ApiError::engine_failed()),
        }
    }

    /// Checks a request's `model`. One that names none, or an empty one, gets the only one there is.
    pub(crate) fn check_model(&self, model: Option<&str>) -> Result<(), ApiError> {
        match model.filter(|model| !model.is_empty()) {
            Some(model) if !self.config.model_names.iter().any(|name| name == model) => {
                Err(ApiError::unknown_model(model, &self.config.model_names))
            }
            _ => Ok(()),
        }
    }

    /// The name the model has in answers.
    pub(crate) fn model_name(&self) -> &str {
        &self.config.model_names[0]
    }

    pub(crate) fn max_model_len(&self) -> usize {
        self.engine.config().max_model_len
    }

    pub(crate) fn bounds(&self) -> Bounds<'_> {
        Bounds {
            defaults: &self.config.defaults,
            eos_token_ids: &self.config.eos_token_ids,
            vocab_size: self.engine.config().vocab_size,
        }
    }

    /// Runs `work` on `bytes` of text: long ones on a thread of their own, a few at a time, so that neither other
    /// requests nor the engine wait for them.
    pub(crate) async fn encode<T: Send + 'static>(
        self: &Arc<Self>,
        bytes: usize,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        if bytes <= INLINE_BYTES_MAX {
            return Ok(work(self));
        }
        self.aside(work).await
    }

    /// Runs `work` on a thread of its own, a few at a time.
    pub(crate) async fn aside<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> T + Send + 'static,
    ) -> Result<T, ApiError> {
        // The semaphore is never closed.
        let permit = self.encoders.clone().acquire_owned().await.map_err(|_| ApiError::draining())?;
        let serving = self.clone();
        let task = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            work(&serving)
        });
        task.await.map_err(|_| ApiError::internal("The request could not be prepared"))
    }
}

/// Whether any of what answers are looked through for is a special token.
fn marks_are_special(parsers: Parsers, tokenizer: &Tokenizer) -> bool {
    parsers.marks().any(|mark| tokenizer.token_to_id(mark).is_some_and(|id| tokenizer.is_special(id)))
}

/// Seconds since 1970.
pub(crate) fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::api::CallFormat;

    #[test]
    fn marks_that_would_be_left_out_of_texts_are_known() {
        let added = |id: u32, content: &str, special: bool| {
            json!({"id": id, "content": content, "special": special, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false})
        };
        let tokenizer = json!({
            "version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "added_tokens": [added(1, "<tool_call>", true), added(2, "<think>", false), added(3, "<|end|>", true),
                added(4, "[TOOL_CALLS]", true)],
        });
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), tokenizer.to_string()).unwrap();
        let tokenizer = Tokenizer::from_file(file.path()).unwrap();
        let with = |thoughts, calls| marks_are_special(Parsers { thoughts, calls }, &tokenizer);
        assert!(with(false, Some(CallFormat::Hermes)) && with(true, Some(CallFormat::Hermes)));
        assert!(with(false, Some(CallFormat::Mistral)));
        assert!(!with(true, None) && !with(true, Some(CallFormat::Llama3Json)));
    }
}
