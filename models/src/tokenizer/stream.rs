use std::sync::Arc;

use super::Tokenizer;

/// Decodes tokens as they come. Each [`push`](Self::push) yields text that is whole: a character whose bytes are spread
/// over several tokens appears with the last of them. All that is yielded, in order, is what [`Tokenizer::decode`]
/// gives for the same ids. Work and memory for a token depend on its own length alone.
#[derive(Debug)]
pub struct DecodeStream {
    tokenizer: Arc<Tokenizer>,
    skip_special: bool,
    /// The next bytes are the first of the text, and a leading space of theirs is dropped.
    strip_next: bool,
    /// The beginning of a character, at most three bytes.
    pending: Vec<u8>,
    text: String,
}

impl DecodeStream {
    pub(super) fn new(tokenizer: Arc<Tokenizer>, skip_special: bool, strip_first_space: bool) -> Self {
        let (pending, text) = (Vec::new(), String::new());
        Self { tokenizer, skip_special, strip_next: strip_first_space, pending, text }
    }

    /// The text `id` completes; empty if it only begins a character, or is skipped.
    pub fn push(&mut self, id: u32) -> &str {
        self.text.clear();
        let mut bytes = self.tokenizer.token_bytes(id);
        if bytes.is_empty() || (self.skip_special && self.tokenizer.is_special(id)) {
            return "";
        }
        if std::mem::take(&mut self.strip_next) {
            bytes = bytes.strip_prefix(b" ").unwrap_or(bytes);
        }
        self.pending.extend_from_slice(bytes);
        let mut complete = self.pending.len();
        let mut chunks = self.pending.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if chunks.peek().is_none() && begins_character(invalid) {
                complete -= invalid.len();
            } else if !invalid.is_empty() {
                self.text.push(char::REPLACEMENT_CHARACTER);
            }
        }
        self.pending.drain(..complete);
        &self.text
    }

    /// The end of the text: U+FFFD if a character was left incomplete.
    pub fn finish(&mut self) -> &str {
        self.text.clear();
        if !self.pending.is_empty() {
            self.text.push(char::REPLACEMENT_CHARACTER);
            self.pending.clear();
        }
        &self.text
    }
}

/// Whether more bytes could make `invalid` a character, rather than never.
fn begins_character(invalid: &[u8]) -> bool {
    std::str::from_utf8(invalid).is_err_and(|error| error.error_len().is_none())
}
