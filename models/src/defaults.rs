//! What a model's authors recommend beside the weights: end tokens, sampling, and the chat template.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::ModelError;
use crate::bounded_file::{CONFIG_BYTES_MAX, TOKENIZER_BYTES_MAX, read_bounded};
use crate::config::json::Fields;
use crate::gguf::{Gguf, GgufError};
use crate::tokenizer::{TOKENIZER_FILE, ends_answers};

/// A chat template in a file of its own.
pub(crate) const CHAT_TEMPLATE_FILE: &str = "chat_template.jinja";
/// One for conversations in which functions are offered. transformers leaves any number of named ones beside it.
pub(crate) const TOOL_USE_TEMPLATE_FILE: &str = "additional_chat_templates/tool_use.jinja";

/// Recommended generation settings. `None` where nothing is recommended.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Tokens that end an answer. Empty if the model declares none.
    pub eos_token_ids: Vec<u32>,
    /// Sampling temperature.
    pub temperature: Option<f32>,
    /// Nucleus size.
    pub top_p: Option<f32>,
    /// Candidates kept.
    pub top_k: Option<u32>,
    /// Least probability relative to the likeliest.
    pub min_p: Option<f32>,
    /// Penalty on repeated tokens.
    pub repetition_penalty: Option<f32>,
}

/// A chat template (Jinja, in the dialect of Hugging Face) and the texts it refers to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChatTemplate {
    /// The template's text.
    pub source: String,
    /// Another for conversations in which functions are offered, if the model has one of that name: Hermes models do.
    pub tool_use: Option<String>,
    /// Text of the token that begins a sequence.
    pub bos_token: Option<String>,
    /// Text of the token that ends one.
    pub eos_token: Option<String>,
}

impl GenerationDefaults {
    /// From `generation_config.json` if there is one. Its end tokens, or those of `config` if it names none, and the
    /// tokenizer's, as in vLLM: many configurations name only what ends a text, where the tokenizer has what ends a
    /// turn.
    pub(crate) fn from_directory(directory: &Path, config: &Fields<'_>) -> Result<Self, ModelError> {
        let path = directory.join("generation_config.json");
        let value = read_json(&path)?.unwrap_or_else(|| Value::Object(serde_json::Map::new()));
        let fields = Fields::new(&path, &value)?;
        let mut eos_token_ids = match fields.token_ids("eos_token_id")? {
            Some(ids) => ids,
            None => config.token_ids("eos_token_id")?.unwrap_or_default(),
        };
        eos_token_ids.extend(tokenizer_eos(directory)?);
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        Ok(Self {
            eos_token_ids,
            temperature: fields.float("temperature")?,
            top_p: fields.float("top_p")?,
            top_k: fields.integer("top_k")?.map(top_k),
            min_p: fields.float("min_p")?,
            repetition_penalty: fields.float("repetition_penalty")?,
        })
    }

    /// From GGUF metadata.
    pub(crate) fn from_gguf(file: &Gguf) -> Result<Self, GgufError> {
        let mut eos_token_ids = Vec::new();
        for key in ["eos", "eot", "eom"] {
            eos_token_ids.extend(token_id(file, key)?);
        }
        let tokens = file.array("tokenizer.ggml.tokens")?.and_then(|array| array.strings());
        let kinds = file.array("tokenizer.ggml.token_type")?.and_then(|array| array.integers());
        if let Some((tokens, kinds)) = tokens.zip(kinds) {
            let ends = tokens.zip(kinds).zip(0u32..).filter(|&((text, kind), _)| ends_answers(text, kind));
            eos_token_ids.extend(ends.map(|(_, id)| id));
        }
        eos_token_ids.sort_unstable();
        eos_token_ids.dedup();
        let float = |key: &str| Ok::<_, GgufError>(file.float(&format!("general.sampling.{key}"))?.map(|x| x as f32));
        Ok(Self {
            eos_token_ids,
            temperature: float("temp")?,
            top_p: float("top_p")?,
            top_k: float("top_k")?.map(|k| top_k(k as i64)),
            min_p: float("min_p")?,
            repetition_penalty: float("penalty_repeat")?,
        })
    }

    /// Without end tokens beyond the vocabulary, which could never be drawn.
    pub(crate) fn checked(mut self, vocab_size: usize) -> Self {
        self.eos_token_ids.retain(|&id| {
            let known = (id as usize) < vocab_size;
            if !known {
                tracing::warn!(id, vocab_size, "the model's files name an end token outside its vocabulary; ignored");
            }
            known
        });
        self
    }
}

/// Files write "all" as 0 or -1.
fn top_k(k: i64) -> u32 {
    k.clamp(0, u32::MAX.into()) as u32
}

/// The id of the token that `tokenizer_config.json` names as the end, if that file or `tokenizer.json` tells it.
fn tokenizer_eos(directory: &Path) -> Result<Option<u32>, ModelError> {
    let config = read_json(&directory.join("tokenizer_config.json"))?.unwrap_or(Value::Null);
    let Some(name) = token_text(&config, "eos_token") else { return Ok(None) };
    let added = config["added_tokens_decoder"].as_object().into_iter().flatten();
    if let Some((id, _)) = added.into_iter().find(|(_, token)| token["content"] == *name) {
        return Ok(id.parse().ok());
    }
    #[derive(Deserialize)]
    struct Tokenizer {
        #[serde(default)]
        added_tokens: Vec<Added>,
    }
    #[derive(Deserialize)]
    struct Added {
        id: u32,
        content: String,
    }
    let path = directory.join(TOKENIZER_FILE);
    let Ok(bytes) = read_bounded(&path, TOKENIZER_BYTES_MAX) else {
        // Reading the tokenizer is where its absence is an error.
        return Ok(None);
    };
    let tokenizer: Tokenizer = serde_json::from_slice(&bytes).map_err(|source| ModelError::Json { path, source })?;
    Ok(tokenizer.added_tokens.into_iter().find(|token| token.content == name).map(|token| token.id))
}

/// The text of a special token in `tokenizer_config.json`, where it is its text or an object that describes it.
fn token_text(config: &Value, name: &str) -> Option<String> {
    let token = &config[name];
    token.as_str().or_else(|| token["content"].as_str()).map(str::to_owned)
}

impl ChatTemplate {
    /// From `chat_template.jinja`, and for functions `additional_chat_templates/tool_use.jinja`; else from
    /// `tokenizer_config.json`, where it is a string or a list of named ones.
    pub(crate) fn from_directory(directory: &Path) -> Result<Option<Self>, ModelError> {
        let path = directory.join("tokenizer_config.json");
        let tokenizer = read_json(&path)?.unwrap_or(Value::Null);
        let named = |name: &str| {
            let entry = tokenizer["chat_template"].as_array()?.iter().find(|entry| entry["name"] == name)?;
            entry["template"].as_str().map(str::to_owned)
        };
        let source = match read_text(&directory.join(CHAT_TEMPLATE_FILE))? {
            Some(source) => Some(source),
            None => match &tokenizer["chat_template"] {
                Value::String(source) => Some(source.clone()),
                Value::Array(_) => named("default"),
                _ => None,
            },
        };
        let tool_use = match read_text(&directory.join(TOOL_USE_TEMPLATE_FILE))? {
            Some(source) => Some(source),
            None => named("tool_use"),
        };
        let text = |name: &str| token_text(&tokenizer, name);
        let (bos_token, eos_token) = (text("bos_token"), text("eos_token"));
        Ok(source.map(|source| Self { source, tool_use, bos_token, eos_token }))
    }

    /// From GGUF metadata.
    pub(crate) fn from_gguf(file: &Gguf) -> Result<Option<Self>, GgufError> {
        let Some(source) = file.string("tokenizer.chat_template")? else { return Ok(None) };
        let text = |key: &str| {
            let tokens = file.array("tokenizer.ggml.tokens")?.and_then(|array| array.strings());
            let id = token_id(file, key)?;
            Ok::<_, GgufError>(tokens.zip(id).and_then(|(mut tokens, id)| tokens.nth(id as usize)).map(str::to_owned))
        };
        let tool_use = file.string("tokenizer.chat_template.tool_use")?.map(Into::into);
        Ok(Some(Self { source: source.into(), tool_use, bos_token: text("bos")?, eos_token: text("eos")? }))
    }
}

fn token_id(file: &Gguf, name: &str) -> Result<Option<u32>, GgufError> {
    let key = format!("tokenizer.ggml.{name}_token_id");
    // 2^32-1 and -1 are how some converters write "none".
    Ok(file.unsigned(&key).unwrap_or(None).and_then(|id| u32::try_from(id).ok()).filter(|&id| id != u32::MAX))
}

/// A text file; `None` if there is no such file.
fn read_text(path: &Path) -> Result<Option<String>, ModelError> {
    match read_bounded(path, CONFIG_BYTES_MAX) {
        Ok(bytes) => String::from_utf8(bytes).map(Some).map_err(|error| {
            ModelError::io(path)(std::io::Error::new(std::io::ErrorKind::InvalidData, error.utf8_error()))
        }),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ModelError::io(path)(error)),
    }
}

/// A JSON file's value; `None` if there is no such file.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, ModelError> {
    match read_bounded(path, CONFIG_BYTES_MAX) {
        Ok(text) => {
            serde_json::from_slice(&text).map(Some).map_err(|source| ModelError::Json { path: path.into(), source })
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(ModelError::io(path)(error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::testing::GgufWriter;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        directory
    }

    #[test]
    fn generation_config_counts_before_config() {
        let config = serde_json::json!({"eos_token_id": 2});
        let fields = Fields::new(Path::new("config.json"), &config).unwrap();
        let empty = directory(&[]);
        assert_eq!(GenerationDefaults::from_directory(empty.path(), &fields).unwrap().eos_token_ids, [2]);
        let text =
            r#"{"eos_token_id": [151645, 151643], "temperature": 0.6, "top_k": 20, "top_p": 0.95, "do_sample": true}"#;
        let qwen = directory(&[("generation_config.json", text)]);
        let defaults = GenerationDefaults::from_directory(qwen.path(), &fields).unwrap();
        assert_eq!(defaults.eos_token_ids, [151643, 151645]);
        assert_eq!((defaults.temperature, defaults.top_k, defaults.min_p), (Some(0.6), Some(20), None));
        assert_eq!(defaults.checked(151_644).eos_token_ids, [151643], "beyond the vocabulary");
    }

    #[test]
    fn what_ends_a_turn_is_taken_from_the_tokenizer() {
        let config = serde_json::json!({"eos_token_id": 0});
        let fields = Fields::new(Path::new("config.json"), &config).unwrap();
        let ids = |files: &[(&str, &str)]| {
            GenerationDefaults::from_directory(directory(files).path(), &fields).unwrap().eos_token_ids
        };
        let named = ("tokenizer_config.json", r#"{"eos_token": "<|im_end|>"}"#);
        let described = r#"{"eos_token": {"content": "<|im_end|>"},
            "added_tokens_decoder": {"0": {"content": "<|endoftext|>"}, "2": {"content": "<|im_end|>"}}}"#;
        let tokenizer = r#"{"model": {"vocab": {"a": 1}}, "added_tokens": [{"id": 3, "content": "<|im_end|>"}]}"#;
        assert_eq!(ids(&[named]), [0]);
        assert_eq!(ids(&[("tokenizer_config.json", described)]), [0, 2]);
        assert_eq!(ids(&[named, ("tokenizer.json", tokenizer)]), [0, 3]);
    }

    #[test]
    fn a_top_k_of_minus_one_is_none() {
        let config = serde_json::json!({});
        let fields = Fields::new(Path::new("config.json"), &config).unwrap();
        let files = directory(&[("generation_config.json", r#"{"top_k": -1}"#)]);
        assert_eq!(GenerationDefaults::from_directory(files.path(), &fields).unwrap().top_k, Some(0));
        let mut writer = GgufWriter::default();
        writer.raw("general.sampling.top_k", 5, &(-1i32).to_le_bytes());
        let file = Gguf::from_bytes(writer.build()).unwrap();
        assert_eq!(GenerationDefaults::from_gguf(&file).unwrap().top_k, Some(0));
    }

    #[test]
    fn the_template_is_found_wherever_it_may_be() {
        let string = r#"{"chat_template": "inline", "bos_token": "<s>", "eos_token": {"content": "</s>"}}"#;
        let list =
            r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
        let found = |files: &[(&str, &str)]| {
            let template = ChatTemplate::from_directory(directory(files).path()).unwrap();
            template.map(|template| template.source)
        };
        assert_eq!(found(&[]), None);
        assert_eq!(found(&[("tokenizer_config.json", string)]).as_deref(), Some("inline"));
        assert_eq!(found(&[("tokenizer_config.json", list)]).as_deref(), Some("d"));
        let tool_use =
            |files: &[(&str, &str)]| ChatTemplate::from_directory(directory(files).path()).unwrap().unwrap().tool_use;
        assert_eq!(tool_use(&[("tokenizer_config.json", list)]).as_deref(), Some("t"));
        let (own, tools) = (("chat_template.jinja", "own"), ("additional_chat_templates/tool_use.jinja", "tools"));
        assert_eq!(tool_use(&[own]), None);
        assert_eq!(tool_use(&[own, tools]).as_deref(), Some("tools"));
        assert_eq!(tool_use(&[("tokenizer_config.json", list), tools]).as_deref(), Some("tools"));
        let both = [("tokenizer_config.json", string), ("chat_template.jinja", "own file")];
        assert_eq!(found(&both).as_deref(), Some("own file"));
        let template = ChatTemplate::from_directory(directory(&[("tokenizer_config.json", string)]).path()).unwrap();
        let template = template.unwrap();
        assert_eq!((template.bos_token.as_deref(), template.eos_token.as_deref()), (Some("<s>"), Some("</s>")));
    }

    #[test]
    fn gguf_ends_may_be_called_user_defined() {
        let mut writer = GgufWriter::default();
        writer
            .strings("tokenizer.ggml.tokens", &["<|im_end|>", "<tool_call>", "<｜end▁of▁sentence｜>", "[EOT]", "</s>"])
            .i32s("tokenizer.ggml.token_type", &[4, 4, 4, 3, 1]);
        let file = Gguf::from_bytes(writer.build()).unwrap();
        assert_eq!(GenerationDefaults::from_gguf(&file).unwrap().eos_token_ids, [0, 2, 3]);
    }

    #[test]
    fn gguf_ends_are_the_declared_ones_and_the_known_texts() {
        let mut writer = GgufWriter::default();
        writer
            .strings("tokenizer.ggml.tokens", &["<|endoftext|>", "<s>", "<|im_end|>", "a", "</s>"])
            .i32s("tokenizer.ggml.token_type", &[3, 3, 3, 1, 1])
            .u32("tokenizer.ggml.bos_token_id", 1)
            .u32("tokenizer.ggml.eos_token_id", 2)
            .u32("tokenizer.ggml.eot_token_id", u32::MAX)
            .string("tokenizer.chat_template", "hello")
            .string("tokenizer.chat_template.tool_use", "tools");
        let file = Gguf::from_bytes(writer.build()).unwrap();
        assert_eq!(GenerationDefaults::from_gguf(&file).unwrap().eos_token_ids, [0, 2]);
        let template = ChatTemplate::from_gguf(&file).unwrap().unwrap();
        assert_eq!((template.bos_token.as_deref(), template.eos_token.as_deref()), (Some("<s>"), Some("<|im_end|>")));
        assert_eq!(template.tool_use.as_deref(), Some("tools"));
    }
}
