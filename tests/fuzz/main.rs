//! Mutational fuzzing of everything that reads bytes from strangers: request bodies, the inputs of chat templates,
//! `config.json` and model files of both kinds. None of them may panic, hang or allocate without bound.
//!
//! `make test` replays the corpus in `tests/corpus` and fuzzes each target for a few seconds; `make fuzz` does it for
//! ten minutes each. An input that fails is saved as `tests/corpus/*/crash-*`, to be committed with its fix. There is no
//! coverage feedback (that needs a nightly compiler): an input whose outcome is new is mutated further instead.

mod driver;
mod memory;
mod mutate;
#[path = "../support/random.rs"]
mod random;
mod requests;
mod targets;

#[test]
fn gguf_headers_are_read_or_refused() {
    driver::fuzz("gguf header", "gguf", targets::GgufHeader);
}

#[test]
fn gguf_models_load_or_are_refused() {
    driver::fuzz("gguf model", "gguf", targets::ModelFile::gguf());
}

#[test]
fn safetensors_models_load_or_are_refused() {
    driver::fuzz("safetensors model", "safetensors", targets::ModelFile::safetensors());
}

#[test]
fn configurations_are_read_or_refused() {
    driver::fuzz("configuration", "config", targets::ModelFile::config());
}

#[test]
fn messages_render_or_are_refused() {
    driver::fuzz("template input", "template", targets::TemplateInput::new());
}

#[test]
fn request_bodies_are_answered_or_refused() {
    driver::fuzz("request body", "json", requests::RequestBody::new());
}
