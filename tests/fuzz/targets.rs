//! What is fuzzed, each through the function that production calls.

use engine::api::{ChatTemplate, RenderOptions};
use engine_models::gguf::{Gguf, Value};

use crate::driver::Target;

/// A GGUF file: the header, every metadata value and every tensor it tells of.
pub(crate) struct GgufHeader;

impl Target for GgufHeader {
    const NAME: &'static str = "gguf";

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
    const NAME: &'static str = "template";

    fn run(&mut self, input: &[u8]) -> String {
        let request: serde_json::Value = match serde_json::from_slice(input) {
            Ok(request) => request,
            Err(error) => return error.to_string(),
        };
        let options = RenderOptions {
            add_generation_prompt: request["add_generation_prompt"] == true,
            kwargs: request["chat_template_kwargs"].as_object(),
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
