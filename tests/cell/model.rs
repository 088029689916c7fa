use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use crate::{program::Server, support::demo_model};

/// What the workers of a cell serve, under the name `demo`.
pub(crate) struct Model {
    path: PathBuf,
    made_up: bool,
    /// Tokens of a prompt and its answer.
    pub(super) context: usize,
    /// Pages of a worker's cache, unless a test wants otherwise.
    pub(super) pages: usize,
    /// Where it was written to.
    folder: Option<TempDir>,
}

impl Model {
    /// The demo model.
    pub(crate) fn demo() -> Self {
        Self { path: demo_model(), made_up: false, context: 1024, pages: 256, folder: None }
    }

    /// A model of this shape with made-up weights and a vocabulary of 256 tokens, that takes next to no time. Its
    /// answers make no sense, but their log-probabilities depend on every token before.
    pub(crate) fn made_up(layers: usize, heads: usize, context: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let config = json!({
            "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "float32",
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers, "num_attention_heads": heads,
            "num_key_value_heads": heads, "head_dim": 32, "max_position_embeddings": context, "vocab_size": 256,
            "rms_norm_eps": 1e-6, "tie_word_embeddings": true, "eos_token_id": 2,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        });
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/reference/models/qwen3");
        for file in ["tokenizer.json", "tokenizer_config.json"] {
            std::fs::copy(source.join(file), folder.path().join(file)).unwrap();
        }
        let pages = 2 * context.div_ceil(16);
        Self { path: folder.path().to_owned(), made_up: true, context, pages, folder: Some(folder) }
    }

    /// Flags that name it.
    pub(crate) fn flags(&self) -> Vec<&str> {
        let format: &[_] = if self.made_up { &["--load-format", "dummy"] } else { &[] };
        [&["--model", self.path.to_str().unwrap()], format].concat()
    }

    /// A server in one process.
    pub(crate) fn alone(&self) -> Server {
        self.alone_with(&[])
    }

    /// A server in one process with further flags.
    pub(crate) fn alone_with(&self, flags: &[&str]) -> Server {
        let (context, pages) = (self.context.to_string(), self.pages.to_string());
        let limits = ["--max-model-len", &context, "--kv-blocks", &pages];
        let name = ["--served-model-name", "demo", "--standalone"];
        Server::start_as(&[&self.flags()[..], &limits, &name, flags].concat())
    }

    /// A prompt of so many tokens. No two of different numbers begin alike.
    pub(crate) fn prompt(&self, number: usize, length: usize) -> Vec<u32> {
        let (first, tokens) = if self.made_up { (3, 250) } else { (100, 40_000) };
        let mut state = number as u64;
        let mut next = || {
            // An odd factor and a shift: enough to have nothing repeat itself.
            state = state.wrapping_mul(0xd129_0d36_7a5c_1cc1).wrapping_add(0x9e37_79b9_7f4a_7c15);
            first + (state >> 33) as u32 % tokens
        };
        (0..length).map(|_| next()).collect()
    }
}
