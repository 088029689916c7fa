//! Text to token ids and back.
//!
//! Encoding is Hugging Face's `tokenizers`, so that ids are those the model was trained on; a GGUF file's vocabulary is
//! first translated into the `tokenizer.json` it came from (`gguf`). Decoding is our own: one table of the bytes of
//! every token, which makes streaming ([`DecodeStream`]) and the bytes of log-probabilities cheap and exact.

mod bounded;
mod error;
mod gguf;
mod stream;
mod table;
#[cfg(test)]
mod tests;

use std::path::Path;
use std::sync::Arc;

use serde_json::Value;

use crate::bounded_file::{TOKENIZER_BYTES_MAX, read_bounded};
use crate::gguf::Gguf;
pub use error::{EncodeError, TokenizerError};
pub(crate) use gguf::ends_answers;
pub use stream::DecodeStream;
use table::TokenTable;

/// Name of a tokenizer in a Hugging Face directory.
pub(crate) const TOKENIZER_FILE: &str = "tokenizer.json";

/// A model's vocabulary: encodes text, decodes ids. Shared between threads behind an [`Arc`].
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    table: TokenTable,
    /// Whether text may change length before it is split ([`bounded`] has to know).
    normalizes: bool,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` of Hugging Face.
    pub fn from_file(path: &Path) -> Result<Self, TokenizerError> {
        let unreadable = |reason: String| TokenizerError::File { path: path.into(), reason };
        let bytes = read_bounded(path, TOKENIZER_BYTES_MAX).map_err(|error| unreadable(error.to_string()))?;
        let json: Value = serde_json::from_slice(&bytes).map_err(|error| unreadable(error.to_string()))?;
        let decoder = json["decoder"].clone();
        let normalizes = !json["normalizer"].is_null();
        drop(json);
        let inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(|error| unreadable(error.to_string()))?;
        Self::new(inner, &decoder, normalizes)
    }

    /// Takes the vocabulary out of a GGUF file's metadata.
    pub fn from_gguf(file: &Gguf) -> Result<Self, TokenizerError> {
        Self::from_json(gguf::tokenizer_json(file)?)
    }

    fn from_json(json: Value) -> Result<Self, TokenizerError> {
        let decoder = json["decoder"].clone();
        let normalizes = !json["normalizer"].is_null();
        let inner = serde_json::from_value(json).map_err(|error| TokenizerError::Vocabulary(error.to_string()))?;
        Self::new(inner, &decoder, normalizes)
    }

    fn new(mut inner: tokenizers::Tokenizer, decoder: &Value, normalizes: bool) -> Result<Self, TokenizerError> {
        // Some files carry the truncation and padding of their authors' last batch.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|error| TokenizerError::Vocabulary(error.to_string()))?;
        let table = TokenTable::new(&inner, decoder)?;
        Ok(Self { inner, table, normalizes })
    }

    /// Token ids of `text`. The texts of special tokens are recognised wherever they stand, user content included, as
    /// Hugging Face does; `add_special` adds what the model wants around a text (often a beginning-of-sequence token),
    /// which a chat template has written already.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EncodeError> {
        let encoding = self.inner.encode_fast(text, add_special).map_err(|e| EncodeError::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// As [`Tokenizer::encode`], for text that may be far too long: refuses more than `max_tokens` tokens, and does so
    /// without tokenizing much more than that.
    pub fn encode_bounded(&self, text: &str, add_special: bool, max_tokens: usize) -> Result<Vec<u32>, EncodeError> {
        bounded::encode(self, text, add_special, max_tokens)
    }

    /// Text of `ids`; bytes that are not UTF-8 become U+FFFD, ids outside the vocabulary nothing. `skip_special` leaves
    /// special tokens out.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut bytes = Vec::with_capacity(4 * ids.len());
        for &id in ids {
            if !(skip_special && self.is_special(id)) {
                bytes.extend_from_slice(self.token_bytes(id));
            }
        }
        let start = usize::from(self.table.strips_space() && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    }

    /// Decodes a text from its beginning, token by token: what it yields is what [`Tokenizer::decode`] gives for all.
    pub fn decode_stream(self: &Arc<Self>, skip_special: bool) -> DecodeStream {
        DecodeStream::new(Arc::clone(self), skip_special, self.table.strips_space())
    }

    /// Decodes the continuation of a text: as [`Tokenizer::decode_stream`], but a first token's leading space stays
    /// where SentencePiece would drop it at the beginning of a text.
    pub fn continue_stream(self: &Arc<Self>, skip_special: bool) -> DecodeStream {
        DecodeStream::new(Arc::clone(self), skip_special, false)
    }

    /// One more than the highest token id. Embeddings may be padded beyond it.
    pub fn vocab_size(&self) -> usize {
        self.table.len()
    }

    /// The bytes `id` adds to a text; none for an id outside the vocabulary.
    pub fn token_bytes(&self, id: u32) -> &[u8] {
        self.table.bytes(id)
    }

    /// The name of a token in the vocabulary, of which each has one of its own; none for an id outside it.
    pub fn token_name(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The id of a token by its name in the vocabulary (`<|im_end|>`, `Ġthe`).
    pub fn token_to_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// Whether `id` is a special token: one that steers the model and is not text.
    pub fn is_special(&self, id: u32) -> bool {
        self.table.is_special(id)
    }
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("vocab_size", &self.vocab_size()).finish_non_exhaustive()
    }
}
