//! From a request's fields to a plan: ranges, defaults, and what is not supported.

use std::ops::RangeInclusive;

use engine_kernels::{MAX_TOP_LOGPROBS, SamplingParams};

use super::{
    Defaults,
    defaults::{MIN_P, REPETITION_PENALTY, TEMPERATURE, TOP_P},
    parser::Wanted,
    types::{Refused, SamplingFields, Strings},
};
use crate::{cache::Salt, engine::Request, grammar::Grammar, http::ApiError};

/// Answers of one HTTP request at most: prompts times `n`.
pub(crate) const CHOICES_MAX: usize = 128;
/// Stop strings of a request at most.
const STOPS_MAX: usize = 64;
/// Bytes of a stop string at most: its beginning is searched for at every token.
const STOP_BYTES_MAX: usize = 512;
/// Stop token ids of a request at most.
const STOP_TOKENS_MAX: usize = 256;
/// Single tokens with a bias at most (OpenAI's limit is 300 too).
const BIASES_MAX: usize = 300;
/// A seed that stands for none, as in vLLM and llama.cpp.
const NO_SEED: i64 = -1;
/// A token limit that stands for none, as in llama.cpp.
const NO_LIMIT: i64 = -1;

/// What does not depend on the request: the model's own defaults and bounds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds<'a> {
    pub(crate) defaults: &'a Defaults,
    pub(crate) eos_token_ids: &'a [u32],
    pub(crate) vocab_size: usize,
}

/// How to answer, checked. The same for every prompt and choice of a request.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Plan {
    pub(crate) sampling: SamplingParams,
    /// Whether the seed is the request's own: then each prompt's choices count from it. Else all choices of all prompts
    /// are drawn independently, those of equal prompts too.
    pub(crate) seeded: bool,
    pub(crate) n: usize,
    /// `None`: what the context leaves, which is never exceeded.
    pub(crate) max_tokens: Option<u32>,
    pub(crate) min_tokens: u32,
    pub(crate) stop_token_ids: Vec<u32>,
    pub(crate) stops: Vec<String>,
    pub(crate) include_stop: bool,
    /// What answers may be made of. Set when it is compiled.
    pub(crate) grammar: Option<Grammar>,
    /// What chats' answers are looked through for. Set when the prompt is there.
    pub(crate) wanted: Wanted,
    pub(crate) skip_special_tokens: bool,
    /// Whether clients get the ids of tokens too.
    pub(crate) token_ids: bool,
    pub(crate) logprobs: Option<u32>,
    pub(crate) prompt_logprobs: Option<u32>,
    pub(crate) salt: Option<Salt>,
    pub(crate) stream: bool,
    pub(crate) include_usage: bool,
    /// Whether every chunk tells token counts.
    pub(crate) continuous_usage: bool,
}

impl Plan {
    /// Checks the fields both endpoints share. `seed` is used where the request has none.
    pub(crate) fn new(fields: SamplingFields, bounds: Bounds<'_>, seed: u64) -> Result<Self, ApiError> {
        let Bounds { defaults, vocab_size, .. } = bounds;
        let stream = fields.stream.unwrap_or(false);
        if fields.stream_options.is_some() && !stream {
            return Err(ApiError::invalid("stream_options", "'stream_options' is only allowed when 'stream' is true"));
        }
        let options = fields.stream_options.unwrap_or_default();
        refuse("stream_options.include_obfuscation", options.include_obfuscation)?;
        if let Some(field) = fields.foreign {
            let instead = if field.starts_with("guided_") { "use 'structured_outputs'" } else { "leave it out" };
            return Err(ApiError::unsupported(field, instead));
        }
        let own_seed = fields.seed.filter(|&seed| seed != NO_SEED);
        let mut stop_token_ids = tokens("stop_token_ids", fields.stop_token_ids.unwrap_or_default(), vocab_size)?;
        if !fields.ignore_eos.unwrap_or(false) {
            stop_token_ids.extend(bounds.eos_token_ids);
        }
        stop_token_ids.sort_unstable();
        stop_token_ids.dedup();
        Ok(Self {
            seeded: own_seed.is_some(),
            sampling: SamplingParams {
                temperature: float("temperature", fields.temperature, TEMPERATURE, defaults.temperature)?,
                top_k: integer("top_k", fields.top_k, -1..=i64::from(u32::MAX), i64::from(defaults.top_k))?.max(0)
                    as u32,
                top_p: top_p(fields.top_p, defaults.top_p)?,
                min_p: float("min_p", fields.min_p, MIN_P, defaults.min_p)?,
                repetition_penalty: float(
                    "repetition_penalty",
                    fields.repetition_penalty,
                    REPETITION_PENALTY,
                    defaults.repetition_penalty,
                )?,
                presence_penalty: float("presence_penalty", fields.presence_penalty, -2.0..=2.0, 0.0)?,
                frequency_penalty: float("frequency_penalty", fields.frequency_penalty, -2.0..=2.0, 0.0)?,
                logit_bias: logit_bias(fields.logit_bias.unwrap_or_default().0, vocab_size)?,
                seed: own_seed.map_or(seed, |seed| seed as u64),
            },
            n: integer("n", fields.n, 1..=CHOICES_MAX as i64, 1)? as usize,
            max_tokens: None,
            min_tokens: integer("min_tokens", fields.min_tokens, 0..=i64::from(u32::MAX), 0)? as u32,
            stop_token_ids,
            stops: stops(fields.stop)?,
            grammar: None,
            wanted: Wanted::default(),
            include_stop: fields.include_stop_str_in_output.unwrap_or(false),
            skip_special_tokens: fields.skip_special_tokens.unwrap_or(true),
            token_ids: fields.return_token_ids.unwrap_or(false),
            logprobs: None,
            prompt_logprobs: None,
            salt: salt(fields.cache_salt)?,
            stream,
            include_usage: options.include_usage == Some(true),
            // As vLLM has it, only with the other.
            continuous_usage: options.include_usage == Some(true) && options.continuous_usage_stats == Some(true),
        })
    }

    /// The engine's request for one choice: the `choice`-th of its prompt, and the `index`-th of all. `prompt_field` is
    /// how the client calls the prompt.
    pub(crate) fn request(
        &self,
        prompt: Vec<u32>,
        (choice, index): (usize, usize),
        max_model_len: usize,
        prompt_field: &'static str,
    ) -> Result<Request, ApiError> {
        let room = max_model_len.saturating_sub(prompt.len());
        // Agents set limits that the context never leaves, and mean: as long as it takes.
        let max_tokens = self.max_tokens.map_or(room, |tokens| room.min(tokens as usize));
        if prompt.is_empty() {
            return Err(ApiError::invalid(prompt_field, format!("'{prompt_field}' has no tokens")));
        }
        if room == 0 && self.max_tokens != Some(0) || prompt.len() > max_model_len {
            return Err(too_long(prompt_field, &prompt.len().to_string(), max_model_len));
        }
        if self.min_tokens as usize > max_tokens {
            let message = format!("'min_tokens' is {}, more than the {max_tokens} tokens at most", self.min_tokens);
            return Err(ApiError::invalid("min_tokens", message));
        }
        let offset = if self.seeded { choice } else { index };
        Ok(Request {
            prompt,
            output: Vec::new(),
            sampling: SamplingParams { seed: self.sampling.seed.wrapping_add(offset as u64), ..self.sampling.clone() },
            max_tokens: max_tokens as u32,
            min_tokens: self.min_tokens,
            stop_token_ids: self.stop_token_ids.clone(),
            grammar: self.grammar.as_ref().map(Grammar::matcher),
            logprobs: self.logprobs,
            prompt_logprobs: self.prompt_logprobs,
            salt: self.salt,
            trace: None,
        })
    }
}

/// 400: the prompt alone fills the context. `tokens` may be a lower bound in words.
pub(crate) fn too_long(prompt_field: &'static str, tokens: &str, max_model_len: usize) -> ApiError {
    let message = format!(
        "This model's maximum context length is {max_model_len} tokens. However, '{prompt_field}' has {tokens} tokens, \
         which leaves none for the answer. Shorten it."
    );
    ApiError::context_length(prompt_field, message)
}

/// Refuses `field` by name if the request asks for it.
pub(crate) fn refuse(field: &'static str, value: Option<Refused>) -> Result<(), ApiError> {
    match value {
        Some(Refused { asks: true }) => Err(ApiError::unsupported(field, "leave it out")),
        _ => Ok(()),
    }
}

/// The token limit of a request. `echo`: whether the prompt is shown, where a request can ask for that; only then it is
/// an answer by itself.
pub(crate) fn max_tokens(field: &'static str, value: Option<i64>, echo: Option<bool>) -> Result<Option<u32>, ApiError> {
    let Some(value) = value.filter(|&value| value != NO_LIMIT) else { return Ok(None) };
    let (min, max) = (i64::from(echo != Some(true)), i64::from(u32::MAX));
    if (min..=max).contains(&value) {
        return Ok(Some(value as u32));
    }
    let zero = if echo == Some(false) { " (with 'echo' from 0)" } else { "" };
    let message =
        format!("'{field}' is {value}, but has to be between {min} and {max}{zero}, or {NO_LIMIT} for no limit");
    Err(ApiError::invalid(field, message))
}

/// `logprobs` of a completion.
pub(crate) fn completion_logprobs(value: Option<i64>) -> Result<Option<u32>, ApiError> {
    value.map(|value| Ok(integer("logprobs", Some(value), 0..=MAX_TOP_LOGPROBS as i64, 0)? as u32)).transpose()
}

/// `logprobs` and `top_logprobs` of a chat.
pub(crate) fn chat_logprobs(wanted: Option<bool>, top: Option<i64>) -> Result<Option<u32>, ApiError> {
    let alternatives = integer("top_logprobs", top, 0..=MAX_TOP_LOGPROBS as i64, 0)? as u32;
    match wanted.unwrap_or(false) {
        true => Ok(Some(alternatives)),
        false if alternatives > 0 => {
            Err(ApiError::invalid("top_logprobs", "'top_logprobs' is only allowed when 'logprobs' is true"))
        }
        false => Ok(None),
    }
}

fn float(name: &'static str, value: Option<f64>, range: RangeInclusive<f64>, default: f32) -> Result<f32, ApiError> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(&value) => Ok(value as f32),
        Some(value) => {
            let (low, high) = range.into_inner();
            Err(ApiError::invalid(name, format!("'{name}' is {value}, but has to be between {low} and {high}")))
        }
    }
}

fn top_p(value: Option<f64>, default: f32) -> Result<f32, ApiError> {
    let value = float("top_p", value, TOP_P, default)?;
    if value > 0.0 {
        return Ok(value);
    }
    Err(ApiError::invalid("top_p", "'top_p' has to be above 0; for the likeliest token alone set 'temperature' to 0"))
}

fn integer(name: &'static str, value: Option<i64>, range: RangeInclusive<i64>, default: i64) -> Result<i64, ApiError> {
    match value {
        None => Ok(default),
        Some(value) if range.contains(&value) => Ok(value),
        Some(value) => {
            let (low, high) = range.into_inner();
            Err(ApiError::invalid(name, format!("'{name}' is {value}, but has to be between {low} and {high}")))
        }
    }
}

fn tokens(name: &'static str, ids: Vec<i64>, vocab_size: usize) -> Result<Vec<u32>, ApiError> {
    if ids.len() > STOP_TOKENS_MAX {
        return Err(ApiError::invalid(name, format!("'{name}' has {} entries; at most {STOP_TOKENS_MAX}", ids.len())));
    }
    ids.into_iter().map(|id| Ok(integer(name, Some(id), 0..=vocab_size as i64 - 1, 0)? as u32)).collect()
}

fn stops(field: Option<Strings>) -> Result<Vec<String>, ApiError> {
    let stops = field.unwrap_or_default().0;
    if stops.len() > STOPS_MAX {
        return Err(ApiError::invalid("stop", format!("'stop' has {} strings; at most {STOPS_MAX}", stops.len())));
    }
    for stop in &stops {
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            let message =
                format!("each string of 'stop' has to have 1 to {STOP_BYTES_MAX} bytes, one has {}", stop.len());
            return Err(ApiError::invalid("stop", message));
        }
    }
    Ok(stops)
}

/// What a request's pages are kept apart by. An empty one would put together all whose names were left empty by mistake.
fn salt(words: Option<String>) -> Result<Option<Salt>, ApiError> {
    match words {
        Some(words) if words.is_empty() => Err(ApiError::invalid(
            "cache_salt",
            "'cache_salt' has to be a string that is not empty; leave it out to share what is cached",
        )),
        words => Ok(words.as_deref().map(Salt::of)),
    }
}

fn logit_bias(biases: Vec<(u32, f64)>, vocab_size: usize) -> Result<Vec<(u32, f32)>, ApiError> {
    if biases.len() > BIASES_MAX {
        let message = format!("'logit_bias' has {} entries; at most {BIASES_MAX}", biases.len());
        return Err(ApiError::invalid("logit_bias", message));
    }
    let checked = |(token, bias): (u32, f64)| {
        if token as usize >= vocab_size {
            let message = format!("'logit_bias' names token {token}, but the vocabulary has {vocab_size} tokens");
            return Err(ApiError::invalid("logit_bias", message));
        }
        Ok((token, float("logit_bias", Some(bias), -100.0..=100.0, 0.0)?))
    };
    biases.into_iter().map(checked).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::api::{
        progress::digest,
        types::{LogitBias, StreamOptions},
    };

    fn plan(fields: SamplingFields) -> Result<Plan, ApiError> {
        let defaults = Defaults { temperature: 0.6, top_k: 20, ..Defaults::default() };
        let bounds = Bounds { defaults: &defaults, eos_token_ids: &[2], vocab_size: 100 };
        Plan::new(fields, bounds, 7)
    }

    fn named(fields: SamplingFields) -> String {
        plan(fields).unwrap_err().param().unwrap().to_owned()
    }

    #[test]
    fn the_models_defaults_hold_where_the_request_says_nothing() {
        let plan = plan(SamplingFields::default()).unwrap();
        assert_eq!((plan.sampling.temperature, plan.sampling.top_k, plan.sampling.seed), (0.6, 20, 7));
        assert_eq!(plan.stop_token_ids, [2]);
    }

    #[test]
    fn every_value_out_of_range_is_refused_by_name() {
        let fields = SamplingFields::default;
        assert_eq!(named(SamplingFields { temperature: Some(-1.0), ..fields() }), "temperature");
        assert_eq!(named(SamplingFields { top_p: Some(1.5), ..fields() }), "top_p");
        assert_eq!(named(SamplingFields { top_p: Some(0.0), ..fields() }), "top_p");
        assert_eq!(named(SamplingFields { top_p: Some(f64::NAN), ..fields() }), "top_p");
        assert_eq!(named(SamplingFields { top_k: Some(-2), ..fields() }), "top_k");
        assert_eq!(named(SamplingFields { min_p: Some(1.01), ..fields() }), "min_p");
        assert_eq!(named(SamplingFields { repetition_penalty: Some(0.0), ..fields() }), "repetition_penalty");
        assert_eq!(named(SamplingFields { presence_penalty: Some(2.5), ..fields() }), "presence_penalty");
        assert_eq!(named(SamplingFields { frequency_penalty: Some(-2.5), ..fields() }), "frequency_penalty");
        assert_eq!(named(SamplingFields { n: Some(0), ..fields() }), "n");
        assert_eq!(named(SamplingFields { n: Some(129), ..fields() }), "n");
        assert_eq!(named(SamplingFields { min_tokens: Some(-1), ..fields() }), "min_tokens");
        assert_eq!(named(SamplingFields { stop: Some(Strings(vec![String::new()])), ..fields() }), "stop");
        assert_eq!(named(SamplingFields { stop: Some(Strings(vec!["a".into(); STOPS_MAX + 1])), ..fields() }), "stop");
        assert_eq!(named(SamplingFields { stop_token_ids: Some(vec![100]), ..fields() }), "stop_token_ids");
        assert_eq!(named(SamplingFields { stop_token_ids: Some(vec![-1]), ..fields() }), "stop_token_ids");
        assert_eq!(named(SamplingFields { logit_bias: Some(LogitBias(vec![(100, 1.0)])), ..fields() }), "logit_bias");
        assert_eq!(named(SamplingFields { logit_bias: Some(LogitBias(vec![(1, 101.0)])), ..fields() }), "logit_bias");
        assert_eq!(named(SamplingFields { cache_salt: Some(String::new()), ..fields() }), "cache_salt");
        let options = Some(StreamOptions::default());
        assert_eq!(named(SamplingFields { stream_options: options, ..fields() }), "stream_options");
        assert_eq!(chat_logprobs(None, Some(3)).unwrap_err().param(), Some("top_logprobs"));
        assert_eq!(chat_logprobs(Some(true), Some(21)).unwrap_err().param(), Some("top_logprobs"));
        assert_eq!(completion_logprobs(Some(21)).unwrap_err().param(), Some("logprobs"));
        assert_eq!(max_tokens("max_tokens", Some(0), None).unwrap_err().param(), Some("max_tokens"));
    }

    #[test]
    fn a_prompt_has_to_fit_the_context_and_an_answer_gets_what_is_left() {
        let mut plan = plan(SamplingFields::default()).unwrap();
        let param = |plan: &Plan, length: usize| match plan.request(vec![1; length], (0, 0), 50, "prompt") {
            Ok(request) => Ok(request.max_tokens),
            Err(error) => Err(error.param().unwrap().to_owned()),
        };
        assert_eq!(param(&plan, 20), Ok(30));
        assert_eq!(param(&plan, 0), Err("prompt".into()));
        assert_eq!(param(&plan, 50), Err("prompt".into()));
        plan.max_tokens = Some(64_000);
        assert_eq!(param(&plan, 20), Ok(30), "what is left");
        assert_eq!(param(&plan, 50), Err("prompt".into()));
        plan.max_tokens = Some(29);
        assert_eq!(param(&plan, 20), Ok(29));
        plan.max_tokens = Some(64_000);
        plan.min_tokens = 31;
        assert_eq!(param(&plan, 20), Err("min_tokens".into()));
        (plan.min_tokens, plan.max_tokens) = (0, Some(0));
        assert_eq!(param(&plan, 50), Ok(0));
    }

    #[test]
    fn each_choice_has_a_seed_of_its_own() {
        let plan = plan(SamplingFields { seed: Some(-2), ..SamplingFields::default() }).unwrap();
        let seed = |choice, index| plan.request(vec![1], (choice, index), 50, "prompt").unwrap().sampling.seed;
        // A prompt's choices are the same whatever prompts stand before it.
        assert_eq!((seed(0, 0), seed(1, 1), seed(2, 2), seed(0, 3)), (u64::MAX - 1, u64::MAX, 0, u64::MAX - 1));
    }

    #[test]
    fn a_seed_of_minus_one_is_none() {
        let without = plan(SamplingFields::default()).unwrap();
        assert_eq!(plan(SamplingFields { seed: Some(-1), ..SamplingFields::default() }).unwrap(), without);
        assert!(!without.seeded);
    }

    #[test]
    fn a_salt_goes_to_the_engine_as_a_digest_and_is_part_of_what_workers_compare() {
        let salted = |cache_salt: Option<&str>| {
            plan(SamplingFields { cache_salt: cache_salt.map(Into::into), ..SamplingFields::default() }).unwrap()
        };
        let request = |plan: &Plan| plan.request(vec![1], (0, 0), 50, "prompt").unwrap();
        assert_eq!(request(&salted(None)).salt, None);
        let [tea, coffee] = ["tea", "coffee"].map(|words| salted(Some(words)));
        assert_eq!(request(&tea).salt, Some(Salt::of("tea")));
        assert!(!format!("{tea:?}{:?}", request(&tea)).contains("\"tea\""));
        // Of an answer that goes on elsewhere.
        let digests = [&tea, &coffee, &salted(None)].map(|plan| digest(&[], plan));
        assert_ne!(digests[0], digests[1]);
        assert_ne!(digests[0], digests[2]);
        assert_eq!(digests[0], digest(&[], &salted(Some("tea"))));
    }

    #[test]
    fn a_token_limit_of_minus_one_is_none() {
        let limit = |value: i64| max_tokens("max_tokens", Some(value), None).map_err(|error| error.param().is_some());
        assert_eq!([limit(7), limit(-1), limit(-2)], [Ok(Some(7)), Ok(None), Err(true)]);
    }

    #[test]
    fn who_gives_a_wrong_token_limit_hears_of_every_right_one() {
        let limit = |value: i64, echo: Option<bool>| max_tokens("max_tokens", Some(value), echo);
        assert_eq!(limit(0, Some(true)), Ok(Some(0)));
        for (value, echo, range) in [
            (0, None, "between 1 and 4294967295, or -1"),
            (0, Some(false), "between 1 and 4294967295 (with 'echo' from 0), or -1"),
            (-2, Some(true), "between 0 and 4294967295, or -1"),
        ] {
            let refused = limit(value, echo).unwrap_err();
            assert!(refused.to_json().contains(range), "{refused:?}");
        }
    }

    #[test]
    fn chunks_tell_token_counts_only_where_the_last_one_does() {
        for (include_usage, continuous_usage_stats, told) in [
            (Some(true), Some(true), (true, true)),
            (Some(true), None, (true, false)),
            (None, Some(true), (false, false)),
        ] {
            let stream_options =
                Some(StreamOptions { include_usage, continuous_usage_stats, ..StreamOptions::default() });
            let plan =
                plan(SamplingFields { stream: Some(true), stream_options, ..SamplingFields::default() }).unwrap();
            assert_eq!((plan.include_usage, plan.continuous_usage), told);
        }
    }

    #[test]
    fn without_a_seed_no_two_choices_are_drawn_alike() {
        let plan = plan(SamplingFields::default()).unwrap();
        let seed = |choice, index| plan.request(vec![1], (choice, index), 50, "prompt").unwrap().sampling.seed;
        assert_ne!(seed(0, 0), seed(1, 1));
        assert_ne!(seed(0, 0), seed(0, 2), "the first choices of two prompts, which may be equal");
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_in_range(
            temperature in proptest::option::of(any::<f64>()), top_p in proptest::option::of(any::<f64>()),
            min_p in proptest::option::of(any::<f64>()), top_k in proptest::option::of(any::<i64>()),
            repetition_penalty in proptest::option::of(any::<f64>()), n in proptest::option::of(-3i64..200),
        ) {
            let fields = SamplingFields {
                temperature, top_p, min_p, top_k, repetition_penalty, n, ..SamplingFields::default()
            };
            if let Ok(plan) = plan(fields) {
                prop_assert!((0.0..=2.0).contains(&plan.sampling.temperature));
                prop_assert!(plan.sampling.top_p > 0.0 && plan.sampling.top_p <= 1.0);
                prop_assert!((0.0..=1.0).contains(&plan.sampling.min_p));
                prop_assert!(plan.sampling.repetition_penalty > 0.0 && plan.sampling.repetition_penalty.is_finite());
                prop_assert!((1..=CHOICES_MAX).contains(&plan.n));
            }
        }
    }
}
