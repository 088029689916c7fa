use std::path::PathBuf;

use crate::gguf::GgufError;

/// Why a tokenizer could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// A `tokenizer.json` that is missing or not one.
    #[error("cannot read the tokenizer {path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// GGUF metadata of the wrong type.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// A GGUF file that lacks part of its tokenizer.
    #[error("the file has no metadata key `{key}`: it carries no complete tokenizer")]
    MissingKey {
        /// The key.
        key: &'static str,
    },
    /// Metadata that contradicts itself.
    #[error("metadata key `{key}`: {problem}")]
    Metadata {
        /// The key.
        key: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// A kind of vocabulary other than byte-level BPE and SentencePiece BPE.
    #[error("tokenizer.ggml.model is `{model}`; `gpt2` (byte-level BPE) and `llama` (SentencePiece) are supported")]
    UnknownModel {
        /// Its name.
        model: String,
    },
    /// A way of splitting words this engine does not know; guessing would give wrong ids silently.
    #[error("tokenizer.ggml.pre is `{pre}`, which this engine does not know; it knows {known}")]
    UnknownPreTokenizer {
        /// Its name.
        pre: String,
        /// The names it knows.
        known: String,
    },
    /// A decoder that does not turn each token into bytes of its own.
    #[error(
        "the tokenizer decodes with `{decoder}`; ByteLevel, Metaspace and SentencePiece's byte fallback are supported"
    )]
    UnknownDecoder {
        /// Its name in `tokenizer.json`.
        decoder: String,
    },
    /// A vocabulary `tokenizers` refuses.
    #[error("the vocabulary cannot be used: {0}")]
    Vocabulary(String),
}

/// Why a text was not encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EncodeError {
    /// More tokens than allowed. They were not all counted.
    #[error("the text has at least {at_least} tokens and at most {limit} are allowed")]
    TooLong {
        /// Tokens it has at the least.
        at_least: usize,
        /// Tokens it may have.
        limit: usize,
    },
    /// The tokenizer failed; with the vocabularies this engine loads it does not.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
}
