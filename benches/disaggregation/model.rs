//! What is served: the demo model, and one made up that is so small that a core computes a long prompt in less than a
//! second; on a device, the shape of a large one.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use tempfile::TempDir;

/// A model and how to prompt it.
pub(crate) struct Model {
    /// What the report calls it.
    pub(crate) name: String,
    path: PathBuf,
    flags: &'static [&'static str],
    /// Token ids of prompts are below this.
    vocabulary: u32,
    /// Keeps the files of one that is made up.
    _files: Option<TempDir>,
}

/// Tokens of the made-up model.
const VOCABULARY: u32 = 4096;

impl Model {
    pub(crate) fn of_file(path: &Path) -> Result<Self> {
        let name = path.file_name().context("the model has no name")?.to_string_lossy().into_owned();
        Ok(Self { name, path: path.to_owned(), flags: &[], vocabulary: 20_000, _files: None })
    }

    /// Random weights of the shape that `folder` describes, with somebody's tokenizer: no text is looked at.
    pub(crate) fn of_shape(folder: &Path, tokenizer: &Path) -> Result<Self> {
        let files = tempfile::tempdir()?;
        let config = std::fs::read_to_string(folder.join("config.json")).context("--model names no shape")?;
        let vocabulary = serde_json::from_str::<serde_json::Value>(&config)?["vocab_size"].as_u64();
        std::fs::write(files.path().join("config.json"), config)?;
        for file in std::fs::read_dir(tokenizer).context("--tokenizer names no folder")? {
            let name = file?.file_name();
            if name.to_string_lossy().starts_with("tokenizer") && name.to_string_lossy().ends_with(".json") {
                std::fs::copy(tokenizer.join(&name), files.path().join(name))?;
            }
        }
        let name = folder.file_name().context("the shape has no name")?.to_string_lossy();
        Ok(Self {
            name: format!("the shape of {name}, random weights"),
            path: files.path().to_owned(),
            flags: &["--load-format", "dummy"],
            vocabulary: vocabulary.context("the shape has no vocabulary")? as u32,
            _files: Some(files),
        })
    }

    /// A Llama of 5 million random weights.
    pub(crate) fn made_up() -> Result<Self> {
        let files = tempfile::tempdir()?;
        let config = json!({
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
            "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 64, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0, "max_position_embeddings": 8192, "tie_word_embeddings": true,
            "vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1,
        });
        let vocabulary: serde_json::Map<_, _> = (0..VOCABULARY).map(|id| (format!("w{id}"), json!(id))).collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true},
            "model": { "type": "BPE", "vocab": vocabulary, "merges": [] },
        });
        std::fs::write(files.path().join("config.json"), config.to_string())?;
        std::fs::write(files.path().join("tokenizer.json"), tokenizer.to_string())?;
        Ok(Self {
            name: "a made-up Llama of 4 layers, 5 million random weights".into(),
            path: files.path().to_owned(),
            flags: &["--load-format", "dummy"],
            vocabulary: VOCABULARY,
            _files: Some(files),
        })
    }

    /// Flags of a worker that serves it.
    pub(crate) fn flags(&self) -> Vec<String> {
        let mut flags = vec!["--model".to_owned(), self.path.display().to_string()];
        flags.extend(self.flags.iter().map(ToString::to_string));
        flags
    }

    /// A prompt of so many token ids that no other seed has, so that nothing of it is in a cache.
    pub(crate) fn prompt(&self, tokens: usize, seed: u64) -> Vec<u32> {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            // The lowest ids may be special.
            let lowest = (self.vocabulary / 2).min(1000);
            lowest + (state >> 33) as u32 % (self.vocabulary - lowest)
        };
        (0..tokens).map(|_| next()).collect()
    }
}
