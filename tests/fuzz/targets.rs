//! What is fuzzed, each through the function that production calls.

use std::path::PathBuf;

use engine::api::{ChatTemplate, RenderOptions};
use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{Backend, Batch, KvLayout};
use engine_models::gguf::{Gguf, Value};
use engine_models::{ForwardLimits, LoadFormat, ModelConfig, ModelError, ModelSource, OpenOptions};
use tempfile::TempDir;

use crate::driver::{Target, overwrite};

/// A GGUF file: the header, every metadata value and every tensor it tells of.
pub(crate) struct GgufHeader;

impl Target for GgufHeader {
    fn run(&mut self, input: &[u8]) -> String {
        let file = match Gguf::from_bytes(input.to_vec()) {
            Ok(file) => file,
            Err(error) => return error.to_string(),
        };
        let mut keys: Vec<&str> = file.keys().collect();
        keys.sort_unstable();
        let mut outcome = String::new();
        for key in keys {
            let Some(value) = file.get(key) else { continue };
            let read = match value {
                Value::Array(array) => {
                    let strings = array.strings().map_or(0, Iterator::count);
                    let integers = array.integers().map_or(0, Iterator::count);
                    strings + integers + array.floats().map_or(0, Iterator::count)
                }
                _ => 1,
            };
            assert!(read <= input.len(), "{key} has {read} values in a file of {} bytes", input.len());
            outcome += &value.to_string();
        }
        for (name, info) in file.tensors() {
            let bytes = file.data(name).map_or(0, <[u8]>::len);
            assert_eq!(bytes, info.bytes());
            outcome += &format!("{:?}", info.dtype());
        }
        outcome
    }
}

/// A model file or configuration beside files that are sound: opened, loaded and run for a token, as the server does.
pub(crate) struct ModelFile {
    directory: TempDir,
    /// The file that is replaced by the input.
    file: &'static str,
    /// What is opened: the file itself, or its directory.
    path: PathBuf,
    options: OpenOptions,
    /// Whether weights are taken over too. Those of [`LoadFormat::Dummy`] are as large as the configuration says.
    load: bool,
}

impl ModelFile {
    /// A GGUF file.
    pub(crate) fn gguf() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("model.gguf");
        Self { directory, file: "model.gguf", path, options: OpenOptions::default(), load: true }
    }

    /// The safetensors file of a directory whose `config.json` is that of the corpus' `llama` seed.
    pub(crate) fn safetensors() -> Self {
        let directory = TempDir::new().unwrap();
        std::fs::write(directory.path().join("config.json"), include_str!("../corpus/config/llama.json")).unwrap();
        let path = directory.path().to_owned();
        Self { directory, file: "model.safetensors", path, options: OpenOptions::default(), load: true }
    }

    /// The `config.json` of a directory without weights.
    pub(crate) fn config() -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().to_owned();
        let options = OpenOptions { load_format: LoadFormat::Dummy, ..OpenOptions::default() };
        Self { directory, file: "config.json", path, options, load: false }
    }

    fn open(&self) -> Result<ModelSource, ModelError> {
        ModelSource::open(self.path.to_str().unwrap(), &self.options)
    }
}

impl Target for ModelFile {
    fn run(&mut self, input: &[u8]) -> String {
        overwrite(&self.directory.path().join(self.file), input);
        let source = match self.open() {
            Ok(source) => source,
            Err(error) => return error.to_string(),
        };
        if !self.load {
            return format!("{:?}", source.config());
        }
        if let Err(outcome) = check_text(&source) {
            return outcome;
        }
        let mut backend = ReferenceBackend;
        let limits = ForwardLimits { max_tokens: 1, max_logit_rows: 1, max_positions: 1 };
        let mut loaded = match source.load(&mut backend, limits) {
            Ok(loaded) => loaded,
            Err(error) => return error.to_string(),
        };
        let ModelConfig { layers, kv_heads, head_dim, .. } = *source.config();
        let dtype = loaded.kv_dtype;
        let layout = KvLayout { layers, kv_heads, head_dim, block_size: 1, blocks: 1, dtype };
        let mut cache = backend.kv_cache(layout).unwrap();
        let mut batch = Batch::default();
        batch.push(&[0], 0, &[0], 0);
        loaded.model.forward(&mut backend, &mut cache, &batch, &mut |_| ());
        loaded.model.logits(&mut backend, &[0]);
        format!("ran {:?}", source.config())
    }
}

/// Uses the tokenizer and the chat template that came with a model.
fn check_text(source: &ModelSource) -> Result<(), String> {
    if source.path().is_dir() {
        return Ok(());
    }
    let tokenizer = source.tokenizer().map_err(|error| error.to_string())?;
    let ids = tokenizer.encode("a ab é <s>", true).map_err(|error| error.to_string())?;
    tokenizer.decode(&ids, false);
    if let Some(template) = source.chat_template() {
        let template = ChatTemplate::new(&template.source, "<s>", "</s>").map_err(|error| error.to_string())?;
        let messages = serde_json::json!([{"role": "user", "content": "a"}]);
        template.render(&messages, RenderOptions::default()).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// Messages and variables of a request, as JSON, rendered by real chat templates.
pub(crate) struct TemplateInput {
    templates: Vec<ChatTemplate>,
}

impl TemplateInput {
    /// Compiles the templates of `tests/reference`.
    pub(crate) fn new() -> Self {
        let goldens: serde_json::Value = serde_json::from_str(include_str!("../reference/templates.json")).unwrap();
        let sources = goldens["templates"].as_object().unwrap().values();
        Self { templates: sources.map(|s| ChatTemplate::new(s.as_str().unwrap(), "<s>", "</s>").unwrap()).collect() }
    }
}

impl Target for TemplateInput {
    fn run(&mut self, input: &[u8]) -> String {
        let request: serde_json::Value = match serde_json::from_slice(input) {
            Ok(request) => request,
            Err(error) => return error.to_string(),
        };
        let options = RenderOptions {
            add_generation_prompt: request["add_generation_prompt"] == true,
            tools: request["tools"].as_array().map_or(&[], Vec::as_slice),
            kwargs: request["chat_template_kwargs"].as_object(),
            now: None,
        };
        let mut outcome = String::new();
        for template in &self.templates {
            match template.render(&request["messages"], options) {
                Ok(prompt) => outcome += if prompt.is_empty() { "empty" } else { "rendered" },
                Err(error) => outcome += &error.to_string(),
            }
        }
        outcome
    }
}
