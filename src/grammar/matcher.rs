use std::{fmt, sync::Arc};

use engine_kernels::TokenMask;
use llguidance::api::StopReason;

use super::vocabulary::brief;

/// How far an answer has come in its grammar.
#[derive(Clone)]
pub struct Matcher {
    inner: llguidance::Matcher,
    /// Tokens that are text, or end an answer. Grammars can name others by their ids.
    known: Arc<TokenMask>,
}

/// A grammar became too much to follow, or was not followed: the answer cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct LostTrack(String);

impl Matcher {
    /// At the beginning of what `parser` reads.
    pub(super) fn new(parser: anyhow::Result<llguidance::TokenParser>, known: Arc<TokenMask>) -> Result<Self, String> {
        let inner = llguidance::Matcher::new(parser);
        match inner.get_error() {
            None => Ok(Self { inner, known }),
            Some(error) => Err(error),
        }
    }

    /// Where this one is, with a lexer of its own.
    pub(super) fn copied(&self) -> Self {
        Self { inner: self.inner.deep_clone(), known: self.known.clone() }
    }

    /// Takes the next token of the answer.
    pub fn take(&mut self, token: u32) -> Result<(), LostTrack> {
        self.inner.consume_token(token).map_err(|error| LostTrack(brief(&error.to_string())))
    }

    /// Whether nothing can follow any more.
    pub fn is_complete(&self) -> bool {
        self.inner.is_stopped() && self.inner.stop_reason().is_ok()
    }

    /// The tokens that may come next, those that end an answer among them where it may end. None if nothing may come.
    pub fn allowed(&mut self) -> Result<TokenMask, LostTrack> {
        if self.is_complete() {
            return Ok(TokenMask::default());
        }
        match self.inner.compute_mask() {
            Ok(mask) => {
                let mut mask = TokenMask::from_words(mask.into());
                mask.intersect(&self.known);
                Ok(mask)
            }
            Err(error) => match brief(&error.to_string()) {
                // What was left had no token to be said with.
                dead_end if dead_end == StopReason::NoExtensionBias.to_string() => Ok(TokenMask::default()),
                error => Err(LostTrack(error)),
            },
        }
    }

    /// The tokens that end an answer, as this grammar's vocabulary has them.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        let tokens = self.inner.tok_env();
        tokens.map_or_else(|_| Vec::new(), |tokens| tokens.tok_trie().eos_tokens().to_vec())
    }
}

impl fmt::Debug for Matcher {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Matcher").field("is_complete", &self.is_complete()).finish_non_exhaustive()
    }
}
