//! How an engine is started, and which limits go together.

use std::time::Duration;

/// The engine's limits and sizes, all fixed at start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Sequences in one step at most (`--max-num-seqs`).
    pub max_num_seqs: usize,
    /// Tokens in one step at most (`--max-num-batched-tokens`); at least `max_num_seqs`, so that decodes never crowd
    /// out a prefill entirely.
    pub max_num_batched_tokens: usize,
    /// How long a step should take at most while answers are being generated (`--itl-target`): prompts computed beside
    /// them are cut into chunks for it. [`Post::itl_target`](super::Post::itl_target) changes it.
    pub itl_target: Duration,
    /// Requests that may wait beyond those that run (`--max-waiting-requests`).
    pub max_waiting_requests: usize,
    /// Tokens of prompt and answer together at most (`--max-model-len`).
    pub max_model_len: usize,
    /// Token ids are below this.
    pub vocab_size: usize,
    /// Tokens a KV page holds (`--block-size`).
    pub block_size: usize,
    /// KV pages; enough for one sequence of `max_model_len`.
    pub blocks: usize,
    /// Whether pages are kept for further requests (without `--no-prefix-caching`).
    pub prefix_caching: bool,
    /// Digest of everything that keys and values depend on besides tokens: weights, dtype, layout.
    pub model_key: Vec<u8>,
}

/// Why an [`EngineConfig`] does not work.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A limit is zero.
    #[error("{name} must be at least 1")]
    Zero {
        /// Flag.
        name: &'static str,
    },
    /// Decodes alone could fill a step.
    #[error("--max-num-batched-tokens ({tokens}) must be at least --max-num-seqs ({seqs})")]
    Budget {
        /// `max_num_batched_tokens`.
        tokens: usize,
        /// `max_num_seqs`.
        seqs: usize,
    },
    /// The longest sequence would never fit.
    #[error(
        "{blocks} KV pages of {block_size} tokens cannot hold one sequence of --max-model-len {max_model_len}; \
         raise --kv-blocks or --kv-cache-memory, or lower --max-model-len"
    )]
    Pages {
        /// Pages.
        blocks: usize,
        /// Tokens a page holds.
        block_size: usize,
        /// Tokens of the longest sequence.
        max_model_len: usize,
    },
    /// The system gave no thread.
    #[error("cannot start the engine thread: {reason}")]
    Thread {
        /// What the system said.
        reason: String,
    },
}

impl EngineConfig {
    /// Checks the limits against each other.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let Self { max_num_seqs, max_num_batched_tokens, max_model_len, block_size, blocks, .. } = *self;
        for (name, value) in [
            ("--max-num-seqs", max_num_seqs),
            ("--max-model-len", max_model_len),
            ("--block-size", block_size),
            ("the vocabulary", self.vocab_size),
        ] {
            if value == 0 {
                return Err(ConfigError::Zero { name });
            }
        }
        if max_num_batched_tokens < max_num_seqs {
            return Err(ConfigError::Budget { tokens: max_num_batched_tokens, seqs: max_num_seqs });
        }
        if blocks < max_model_len.div_ceil(block_size) {
            return Err(ConfigError::Pages { blocks, block_size, max_model_len });
        }
        Ok(())
    }

    /// Requests in the engine at most, running and waiting.
    pub(crate) fn max_requests(&self) -> usize {
        self.max_num_seqs + self.max_waiting_requests
    }
}
