use std::sync::{Mutex, OnceLock, PoisonError};

use super::FinishReason;
use crate::grammar::Matcher;

/// The grammar of a request, as far as its answer has come, and what it lets be drawn next.
pub(super) struct Constraint {
    /// Whoever samples the row works the mask out, a thread of the sampler or the engine thread: a lock, so that any
    /// may. No two want it at a time.
    matcher: Mutex<Matcher>,
    /// Tokens that the grammar would end with, and the request does not: they are never drawn.
    ignored: Vec<u32>,
    /// Since the last token, if somebody has asked.
    next: OnceLock<Next>,
}

/// What may be drawn next.
enum Next {
    /// One of these: a bit a token.
    Among(Vec<u32>),
    /// No token.
    Nothing,
    /// Nobody can tell.
    Lost,
}

impl Constraint {
    /// `matcher` is where the answer is. `stop_token_ids` end it.
    pub(super) fn new(matcher: Matcher, stop_token_ids: &[u32]) -> Self {
        let mut ignored = matcher.eos_token_ids();
        ignored.retain(|token| !stop_token_ids.contains(token));
        Self { matcher: Mutex::new(matcher), ignored, next: OnceLock::new() }
    }

    /// The tokens that may be drawn, `suppressed` ones not; none if whatever is drawn will mean nothing. Worked out
    /// when it is first asked for: a device computes meanwhile.
    pub(super) fn mask(&self, suppressed: &[u32]) -> Option<&[u32]> {
        match self.next.get_or_init(|| self.look(suppressed)) {
            Next::Among(mask) => Some(mask),
            Next::Nothing | Next::Lost => None,
        }
    }

    fn look(&self, suppressed: &[u32]) -> Next {
        // A matcher that panicked says so itself.
        let allowed = self.matcher.lock().unwrap_or_else(PoisonError::into_inner).allowed();
        let mut mask = match allowed {
            Ok(mask) => mask,
            Err(error) => {
                tracing::warn!(%error, "a grammar became too much to follow: its request is aborted");
                return Next::Lost;
            }
        };
        for &token in self.ignored.iter().chain(suppressed) {
            if let Some(word) = mask.get_mut(token as usize / 32) {
                *word &= !(1 << (token % 32));
            }
        }
        if mask.iter().all(|&word| word == 0) {
            tracing::info!("nothing that may be drawn fits a request's grammar any more: its answer ends");
            return Next::Nothing;
        }
        Next::Among(mask)
    }

    /// How the answer has ended, if nothing could be drawn.
    pub(super) fn end(&self) -> Option<FinishReason> {
        match self.next.get()? {
            Next::Among(_) => None,
            Next::Nothing => Some(FinishReason::Stop),
            Next::Lost => Some(FinishReason::LostTrack),
        }
    }

    /// Takes the token that was drawn. How the answer ends with it, if it does.
    pub(super) fn take(&mut self, token: u32) -> Option<FinishReason> {
        self.next.take();
        let matcher = self.matcher.get_mut().unwrap_or_else(PoisonError::into_inner);
        match matcher.take(token) {
            Ok(()) => matcher.is_complete().then_some(FinishReason::Stop),
            Err(error) => {
                tracing::warn!(%error, token, "a grammar became too much to follow: its request is aborted");
                Some(FinishReason::LostTrack)
            }
        }
    }
}
