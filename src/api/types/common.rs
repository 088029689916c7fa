//! Fields that both generating endpoints have, and those that are refused by name.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use crate::http::shown;

/// A field of OpenAI's API, or vLLM's, that this server does not have. It is read only to tell whether it asks for
/// anything: null, `false`, an empty string, list or object do not.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Refused {
    pub(crate) asks: bool,
}

impl<'de> Deserialize<'de> for Refused {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = bool;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("anything")
            }
            fn visit_bool<E>(self, value: bool) -> Result<bool, E> {
                Ok(value)
            }
            fn visit_i64<E>(self, _: i64) -> Result<bool, E> {
                Ok(true)
            }
            fn visit_u64<E>(self, _: u64) -> Result<bool, E> {
                Ok(true)
            }
            fn visit_f64<E>(self, _: f64) -> Result<bool, E> {
                Ok(true)
            }
            fn visit_str<E>(self, value: &str) -> Result<bool, E> {
                Ok(!value.is_empty())
            }
            fn visit_unit<E>(self) -> Result<bool, E> {
                Ok(false)
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<bool, A::Error> {
                let mut asks = false;
                while seq.next_element::<IgnoredAny>()?.is_some() {
                    asks = true;
                }
                Ok(asks)
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<bool, A::Error> {
                let mut asks = false;
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    asks = true;
                }
                Ok(asks)
            }
        }
        deserializer.deserialize_any(Any).map(|asks| Self { asks })
    }
}

/// One string or several.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Strings(pub(crate) Vec<String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;
        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Vec<String>;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a string or a list of strings")
            }
            fn visit_str<E>(self, value: &str) -> Result<Vec<String>, E> {
                Ok(vec![value.to_owned()])
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Vec<String>, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq))
            }
        }
        deserializer.deserialize_any(OneOrMany).map(Self)
    }
}

/// `logit_bias`: token ids, as JSON object keys hence strings, and what is added to their logits.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct LogitBias(pub(crate) Vec<(u32, f64)>);

impl<'de> Deserialize<'de> for LogitBias {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Biases;
        impl<'de> Visitor<'de> for Biases {
            type Value = Vec<(u32, f64)>;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("an object from token ids to numbers")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut biases = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    let token = key
                        .parse()
                        .map_err(|_| de::Error::custom(format_args!("{:?} is not a token id", shown(&key))))?;
                    biases.push((token, map.next_value()?));
                }
                Ok(biases)
            }
        }
        deserializer.deserialize_map(Biases).map(Self)
    }
}

/// `stream_options`.
#[derive(Debug, Clone, Copy, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields)]
pub(crate) struct StreamOptions {
    /// Whether a last chunk tells the token counts.
    #[serde(default)]
    pub(crate) include_usage: Option<bool>,
    /// vLLM's: whether, with that, every chunk tells them so far.
    #[serde(default)]
    pub(crate) continuous_usage_stats: Option<bool>,
    /// Padding against traffic analysis: not done here.
    #[serde(default)]
    pub(crate) include_obfuscation: Option<Refused>,
}

/// `nvext`, in which Dynamo's benchmarks ask for answers of full length.
#[derive(Debug, Clone, Copy, Default, Deserialize, PartialEq)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Nvext {
    pub(crate) ignore_eos: Option<bool>,
    /// Which events of Dynamo's own a stream is to have.
    pub(crate) annotations: Option<Refused>,
}

/// How text is drawn and where it stops: the fields that both generating endpoints share, unchecked.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct SamplingFields {
    pub(crate) temperature: Option<f64>,
    pub(crate) top_p: Option<f64>,
    pub(crate) top_k: Option<i64>,
    pub(crate) min_p: Option<f64>,
    pub(crate) repetition_penalty: Option<f64>,
    pub(crate) presence_penalty: Option<f64>,
    pub(crate) frequency_penalty: Option<f64>,
    pub(crate) logit_bias: Option<LogitBias>,
    pub(crate) seed: Option<i64>,
    pub(crate) n: Option<i64>,
    pub(crate) min_tokens: Option<i64>,
    pub(crate) stop: Option<Strings>,
    pub(crate) stop_token_ids: Option<Vec<i64>>,
    pub(crate) ignore_eos: Option<bool>,
    pub(crate) include_stop_str_in_output: Option<bool>,
    pub(crate) skip_special_tokens: Option<bool>,
    pub(crate) return_token_ids: Option<bool>,
    pub(crate) stream: Option<bool>,
    pub(crate) stream_options: Option<StreamOptions>,
    /// Keeps what is cached apart.
    pub(crate) cache_salt: Option<String>,
    /// A parameter that asks for something of vLLM's that is not here.
    pub(crate) foreign: Option<&'static str>,
}

/// Declares a request's struct: the given fields, those of [`SamplingFields`], and the fields every endpoint accepts
/// and needs not look at. A macro, because serde's `flatten` would forgo both the refusal of unknown fields and the
/// field's name in errors.
macro_rules! generating_request {
    ($(#[$attribute:meta])* $name:ident { $($(#[$about:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$attribute])*
        #[derive(Debug, Default, serde::Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(crate) struct $name {
            $($(#[$about])* pub(crate) $field: $type,)*
            pub(crate) model: Option<String>,
            temperature: Option<f64>,
            top_p: Option<f64>,
            #[serde(deserialize_with = "crate::api::types::whole")]
            top_k: Option<i64>,
            min_p: Option<f64>,
            repetition_penalty: Option<f64>,
            presence_penalty: Option<f64>,
            frequency_penalty: Option<f64>,
            logit_bias: Option<crate::api::types::LogitBias>,
            #[serde(deserialize_with = "crate::api::types::whole")]
            seed: Option<i64>,
            #[serde(deserialize_with = "crate::api::types::whole")]
            n: Option<i64>,
            #[serde(deserialize_with = "crate::api::types::whole")]
            min_tokens: Option<i64>,
            stop: Option<crate::api::types::Strings>,
            #[serde(deserialize_with = "crate::api::types::wholes")]
            stop_token_ids: Option<Vec<i64>>,
            ignore_eos: Option<bool>,
            include_stop_str_in_output: Option<bool>,
            skip_special_tokens: Option<bool>,
            return_token_ids: Option<bool>,
            stream: Option<bool>,
            stream_options: Option<crate::api::types::StreamOptions>,
            /// What form answers have; the second is vLLM's.
            pub(crate) response_format: Option<crate::api::types::ResponseFormat>,
            pub(crate) structured_outputs: Option<crate::api::types::StructuredOutputs>,
            /// vLLM's: requests find in the cache what those with the same words left there.
            cache_salt: Option<String>,
            /// vLLM's, of which nothing is here: clients that know vLLM send them with values that ask for nothing.
            use_beam_search: Option<crate::api::types::Refused>,
            length_penalty: Option<f64>,
            spaces_between_special_tokens: Option<bool>,
            bad_words: Option<crate::api::types::Refused>,
            allowed_token_ids: Option<crate::api::types::Refused>,
            truncate_prompt_tokens: Option<crate::api::types::Refused>,
            truncation_side: Option<crate::api::types::Refused>,
            prompt_logprobs: Option<crate::api::types::Refused>,
            logprob_token_ids: Option<crate::api::types::Refused>,
            return_tokens_as_token_ids: Option<crate::api::types::Refused>,
            logits_processors: Option<crate::api::types::Refused>,
            priority: Option<f64>,
            kv_transfer_params: Option<crate::api::types::Refused>,
            ec_transfer_params: Option<crate::api::types::Refused>,
            vllm_xargs: Option<crate::api::types::Refused>,
            routed_experts_prompt_start: Option<f64>,
            repetition_detection: Option<crate::api::types::Refused>,
            watermarking: Option<crate::api::types::Refused>,
            early_stopping: Option<crate::api::types::Refused>,
            thinking_token_budget: Option<f64>,
            nvext: Option<crate::api::types::Nvext>,
            /// Older names of what is in `structured_outputs`.
            guided_json: Option<crate::api::types::Refused>,
            guided_regex: Option<crate::api::types::Refused>,
            guided_choice: Option<crate::api::types::Refused>,
            guided_grammar: Option<crate::api::types::Refused>,
            guided_decoding_backend: Option<crate::api::types::Refused>,
            guided_whitespace_pattern: Option<crate::api::types::Refused>,
            /// Whose request this is: nothing here depends on it.
            #[serde(rename = "user")]
            _user: Option<serde::de::IgnoredAny>,
            /// For OpenAI's dashboards.
            #[serde(rename = "metadata")]
            _metadata: Option<serde::de::IgnoredAny>,
            /// How OpenAI keeps prompts.
            #[serde(rename = "prompt_cache_options")]
            _prompt_cache_options: Option<serde::de::IgnoredAny>,
            /// vLLM's names of a request, and how many tokens it is to collect for a chunk at least.
            #[serde(rename = "request_id")]
            _request_id: Option<serde::de::IgnoredAny>,
            #[serde(rename = "session_id")]
            _session_id: Option<serde::de::IgnoredAny>,
            #[serde(rename = "stream_interval")]
            _stream_interval: Option<serde::de::IgnoredAny>,
            /// These are about endpoints of vLLM's that render prompts; those that generate ignore them there too.
            #[serde(rename = "return_token_offsets")]
            _return_token_offsets: Option<serde::de::IgnoredAny>,
            #[serde(rename = "return_mm_kwargs")]
            _return_mm_kwargs: Option<serde::de::IgnoredAny>,
            /// A newer name of the same.
            #[serde(rename = "mm_payload")]
            _mm_payload: Option<serde::de::IgnoredAny>,
        }

        impl $name {
            /// The shared fields, moved out.
            pub(crate) fn take_sampling(&mut self) -> crate::api::types::SamplingFields {
                crate::api::types::SamplingFields {
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    repetition_penalty: self.repetition_penalty,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    logit_bias: self.logit_bias.take(),
                    seed: self.seed,
                    n: self.n,
                    min_tokens: self.min_tokens,
                    stop: self.stop.take(),
                    stop_token_ids: self.stop_token_ids.take(),
                    ignore_eos: self.ignore_eos.or(self.nvext.and_then(|nvext| nvext.ignore_eos)),
                    include_stop_str_in_output: self.include_stop_str_in_output,
                    skip_special_tokens: self.skip_special_tokens,
                    return_token_ids: self.return_token_ids,
                    stream: self.stream,
                    stream_options: self.stream_options,
                    cache_salt: self.cache_salt.take(),
                    foreign: self.foreign(),
                }
            }

            /// The first of vLLM's parameters that asks for something.
            fn foreign(&self) -> Option<&'static str> {
                let asks = |field: Option<crate::api::types::Refused>| field.is_some_and(|field| field.asks);
                let fields = [
                    ("use_beam_search", asks(self.use_beam_search)),
                    ("length_penalty", self.length_penalty.is_some_and(|penalty| penalty != 1.0)),
                    ("spaces_between_special_tokens", self.spaces_between_special_tokens == Some(false)),
                    ("bad_words", asks(self.bad_words)),
                    ("allowed_token_ids", asks(self.allowed_token_ids)),
                    ("truncate_prompt_tokens", asks(self.truncate_prompt_tokens)),
                    ("truncation_side", asks(self.truncation_side)),
                    ("prompt_logprobs", asks(self.prompt_logprobs)),
                    ("logprob_token_ids", asks(self.logprob_token_ids)),
                    ("return_tokens_as_token_ids", asks(self.return_tokens_as_token_ids)),
                    ("logits_processors", asks(self.logits_processors)),
                    ("priority", self.priority.is_some_and(|priority| priority != 0.0)),
                    ("kv_transfer_params", asks(self.kv_transfer_params)),
                    ("ec_transfer_params", asks(self.ec_transfer_params)),
                    ("vllm_xargs", asks(self.vllm_xargs)),
                    ("routed_experts_prompt_start", self.routed_experts_prompt_start.is_some_and(|start| start != 0.0)),
                    ("repetition_detection", asks(self.repetition_detection)),
                    ("watermarking", asks(self.watermarking)),
                    ("early_stopping", asks(self.early_stopping)),
                    ("thinking_token_budget", self.thinking_token_budget.is_some_and(|budget| budget != -1.0)),
                    ("nvext.annotations", asks(self.nvext.and_then(|nvext| nvext.annotations))),
                    ("guided_json", asks(self.guided_json)),
                    ("guided_regex", asks(self.guided_regex)),
                    ("guided_choice", asks(self.guided_choice)),
                    ("guided_grammar", asks(self.guided_grammar)),
                    ("guided_decoding_backend", asks(self.guided_decoding_backend)),
                    ("guided_whitespace_pattern", asks(self.guided_whitespace_pattern)),
                ];
                fields.into_iter().find_map(|(name, asks)| asks.then_some(name))
            }
        }
    };
}
pub(crate) use generating_request;

#[cfg(test)]
mod tests {
    use crate::api::{extract::parse_json, types::CompletionRequest};

    #[test]
    fn dynamo_asks_for_answers_of_full_length_in_a_place_of_its_own() {
        for (body, ignore_eos) in [
            (r#"{"nvext": {"ignore_eos": true}}"#, Some(true)),
            (r#"{"nvext": {"ignore_eos": true, "annotations": []}, "ignore_eos": false}"#, Some(false)),
            (r#"{"nvext": {}}"#, None),
            (r#"{"nvext": null}"#, None),
        ] {
            let mut request: CompletionRequest = parse_json(body.as_bytes()).unwrap();
            assert_eq!(request.take_sampling().ignore_eos, ignore_eos, "{body}");
        }
    }
}
