//! A request's grammar as the engine thread follows it: what may be drawn next, and when the answer has ended.

use std::sync::{Mutex, OnceLock, PoisonError};

use engine_kernels::TokenMask;

use super::FinishReason;
use crate::grammar::Matcher;

/// The grammar of a request, as far as its answer has come, and what it lets be drawn next.
pub(super) struct Constraint {
    /// Whoever samples the row works the mask out, a thread of the sampler or the engine thread: a lock, so that any
    /// may. No two want it at a time.
    matcher: Mutex<Matcher>,
    /// Tokens that the grammar ends with.
    ends: Vec<u32>,
    /// Those of them that the request does not end with: they are never drawn.
    ignored: Vec<u32>,
    /// Since the last token, if somebody has asked.
    next: OnceLock<Next>,
}

/// What may be drawn next.
enum Next {
    /// One of these.
    Among(TokenMask),
    /// No token, and the answer is complete without one.
    Nothing,
    /// The answer cannot go on: the matcher failed, or no token may be drawn although the grammar is not complete.
    Lost,
}

impl Constraint {
    /// `matcher` is where the answer is. `stop_token_ids` end it.
    pub(super) fn new(matcher: Matcher, stop_token_ids: &[u32]) -> Self {
        let ends = matcher.eos_token_ids();
        let ignored = ends.iter().copied().filter(|token| !stop_token_ids.contains(token)).collect();
        Self { matcher: Mutex::new(matcher), ends, ignored, next: OnceLock::new() }
    }

    /// The tokens that may be drawn, `suppressed` ones not; none if whatever is drawn will mean nothing. Worked out
    /// when it is first asked for: a device computes meanwhile.
    pub(super) fn mask(&self, suppressed: &[u32]) -> Option<&TokenMask> {
        match self.next.get_or_init(|| self.look(suppressed)) {
            Next::Among(mask) => Some(mask),
            Next::Nothing | Next::Lost => None,
        }
    }

    fn look(&self, suppressed: &[u32]) -> Next {
        // A matcher that panicked says so itself.
        let mut matcher = self.matcher.lock().unwrap_or_else(PoisonError::into_inner);
        let is_complete = matcher.is_complete();
        let mut mask = match matcher.allowed() {
            Ok(mask) => mask,
            Err(error) => {
                tracing::warn!(%error, "a grammar became too much to follow: its request is aborted");
                return Next::Lost;
            }
        };
        let may_end = is_complete || self.ends.iter().any(|&token| mask.allows(token));
        self.ignored.iter().chain(suppressed).for_each(|&token| mask.forbid(token));
        if mask.is_empty() {
            if !may_end {
                tracing::warn!("nothing that may be drawn goes on in a request's grammar: it is aborted");
                return Next::Lost;
            }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::{Source, Vocabulary};

    /// Letters, and a token that ends answers.
    const END: u32 = 128;

    fn constraint(grammar: &str, stop_token_ids: &[u32]) -> Constraint {
        let bytes = (0..END).map(|id| vec![id as u8]).chain([Vec::new()]).collect();
        let vocabulary = Vocabulary::of_tokens(bytes, &[END]).unwrap();
        Constraint::new(vocabulary.compile(Source::Regex(grammar.to_owned())).unwrap().matcher(), stop_token_ids)
    }

    #[test]
    fn where_nothing_may_be_drawn_an_answer_ends_well_only_if_it_fits() {
        let [a, b] = [u32::from(b'a'), u32::from(b'b')];
        // It may end, or go on with what the request suppresses.
        let mut fits = constraint("ab*", &[END]);
        assert_eq!(fits.take(a), None);
        assert!(fits.mask(&[b, END]).is_none());
        assert_eq!(fits.end(), Some(FinishReason::Stop));
        // It has to go on, and cannot.
        let mut stuck = constraint("ab", &[END]);
        assert_eq!(stuck.take(a), None);
        assert!(stuck.mask(&[b]).is_none());
        assert_eq!(stuck.end(), Some(FinishReason::LostTrack));
    }

    /// Those of `a`, `b` and the token that ends answers that may be drawn.
    fn drawable(constraint: &Constraint, suppressed: &[u32]) -> String {
        let mask = constraint.mask(suppressed).unwrap();
        [('a', u32::from(b'a')), ('b', u32::from(b'b')), ('.', END)]
            .into_iter()
            .filter_map(|(name, token)| mask.allows(token).then_some(name))
            .collect()
    }

    #[test]
    fn an_end_is_drawn_only_where_the_request_ends_with_it() {
        let [a, b] = [u32::from(b'a'), u32::from(b'b')];
        let after_a = |stop_token_ids: &[u32]| {
            let mut constraint = constraint("ab*", stop_token_ids);
            assert_eq!(drawable(&constraint, &[]), "a");
            assert_eq!(constraint.take(a), None);
            constraint
        };
        assert_eq!(drawable(&after_a(&[END]), &[]), "b.");
        assert_eq!(drawable(&after_a(&[]), &[]), "b");
        let mut suppressing = after_a(&[END]);
        assert_eq!(drawable(&suppressing, &[END]), "b");
        // What may be drawn is worked out anew for each token.
        assert_eq!(suppressing.take(b), None);
        assert_eq!(drawable(&suppressing, &[]), "b.");
        assert_eq!(suppressing.end(), None);
        assert_eq!(suppressing.take(END), Some(FinishReason::Stop));
    }

    #[test]
    fn the_last_token_ends_an_answer_and_one_that_does_not_fit_breaks_it_off() {
        let [a, b] = [u32::from(b'a'), u32::from(b'b')];
        assert_eq!(constraint("a", &[END]).take(a), Some(FinishReason::Stop));
        assert_eq!(constraint("a", &[END]).take(b), Some(FinishReason::LostTrack));
        // Where the whole is there already, nothing is drawn.
        let mut whole = constraint("a", &[END]).matcher.into_inner().unwrap();
        whole.take(a).unwrap();
        for nothing_left in [constraint("", &[]), Constraint::new(whole, &[END])] {
            assert!(nothing_left.mask(&[]).is_none());
            assert_eq!(nothing_left.end(), Some(FinishReason::Stop));
        }
    }
}
