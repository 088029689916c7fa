/// Finds stop strings in text that arrives in pieces, and never lets out a byte that may turn out to begin one.
///
/// A match is the one that *ends* first, and among those that end together the longest: the result does not depend on
/// how the text was cut into pieces.
#[derive(Debug)]
pub(crate) struct StopMatcher {
    stops: Vec<String>,
    include: bool,
    longest: usize,
    /// Text that was not let out yet.
    held: String,
    /// Where in `held` the search goes on; bytes before it end no match.
    searched: usize,
    stopped: bool,
}

impl StopMatcher {
    /// A matcher of `stops`, none of them empty. With `include`, the stop string that was found is let out too.
    pub(crate) fn new(stops: Vec<String>, include: bool) -> Self {
        debug_assert!(stops.iter().all(|stop| !stop.is_empty()));
        let longest = stops.iter().map(String::len).max().unwrap_or(0);
        Self { stops, include, longest, held: String::new(), searched: 0, stopped: false }
    }

    /// Takes `text`, appends to `out` what is certainly before any stop string, and says whether one was found. After
    /// that nothing is let out any more.
    pub(crate) fn push(&mut self, text: &str, out: &mut String) -> bool {
        if self.stopped {
            return true;
        }
        if self.stops.is_empty() {
            out.push_str(text);
            return false;
        }
        self.held.push_str(text);
        if let Some((start, end)) = self.find() {
            out.push_str(&self.held[..if self.include { end } else { start }]);
            self.held.clear();
            self.stopped = true;
            return true;
        }
        let keep = self.possible_start();
        out.push_str(&self.held[..keep]);
        self.held.drain(..keep);
        self.searched = self.held.len();
        false
    }

    /// Takes `text` that may not stop the answer (below `min_tokens`) and lets it out with whatever was held.
    pub(crate) fn push_unchecked(&mut self, text: &str, out: &mut String) {
        if !self.stopped {
            self.flush(out);
            out.push_str(text);
        }
    }

    /// The text is complete: lets out what was held back.
    pub(crate) fn flush(&mut self, out: &mut String) {
        out.push_str(&self.held);
        self.held.clear();
        self.searched = 0;
    }

    fn find(&self) -> Option<(usize, usize)> {
        let held = self.held.as_bytes();
        (self.searched + 1..=held.len()).find_map(|end| {
            let text = &held[..end];
            let length = self.stops.iter().filter(|stop| text.ends_with(stop.as_bytes())).map(String::len).max()?;
            Some((end - length, end))
        })
    }

    /// Where the longest suffix of the held text starts that begins a stop string.
    fn possible_start(&self) -> usize {
        let held = &self.held;
        let first = (held.len() + 1).saturating_sub(self.longest);
        (first..held.len())
            .filter(|&start| held.is_char_boundary(start))
            .find(|&start| self.stops.iter().any(|stop| stop.as_bytes().starts_with(&held.as_bytes()[start..])))
            .unwrap_or(held.len())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The obvious search over the whole text: what may be let out, and whether a stop string was found.
    fn naive(text: &str, stops: &[String], include: bool) -> (String, bool) {
        for end in 1..=text.len() {
            let ends = |stop: &&String| text.as_bytes()[..end].ends_with(stop.as_bytes());
            if let Some(longest) = stops.iter().filter(ends).map(String::len).max() {
                return (text[..if include { end } else { end - longest }].to_owned(), true);
            }
        }
        (text.to_owned(), false)
    }

    fn streamed(pieces: &[String], stops: &[String], include: bool) -> (String, bool) {
        let mut matcher = StopMatcher::new(stops.to_vec(), include);
        let mut out = String::new();
        let stopped = pieces.iter().any(|piece| matcher.push(piece, &mut out));
        if !stopped {
            matcher.flush(&mut out);
        }
        (out, stopped)
    }

    fn pieces() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[abé€]{0,4}", 0..12)
    }

    fn stops() -> impl Strategy<Value = Vec<String>> {
        prop::collection::vec("[abé€]{1,5}", 0..4)
    }

    proptest! {
        #[test]
        fn any_split_gives_what_a_search_of_the_whole_text_gives(
            pieces in pieces(), stops in stops(), include: bool
        ) {
            prop_assert_eq!(streamed(&pieces, &stops, include), naive(&pieces.concat(), &stops, include));
        }

        #[test]
        fn nothing_is_let_out_early_and_no_more_is_held_than_needed(pieces in pieces(), stops in stops()) {
            let mut matcher = StopMatcher::new(stops.clone(), false);
            let (mut seen, mut out) = (String::new(), String::new());
            for piece in &pieces {
                seen.push_str(piece);
                if matcher.push(piece, &mut out) {
                    break;
                }
                let begins_none = |text: &str| !stops.iter().any(|stop| stop.starts_with(text));
                let held = &seen[out.len()..];
                prop_assert!(seen.starts_with(&out));
                prop_assert!(held.is_empty() || !begins_none(held), "{held:?} is held without need");
                for (at, _) in out.char_indices() {
                    prop_assert!(begins_none(&seen[at..]), "{:?} could still become a stop string", &seen[at..]);
                }
            }
        }
    }

    #[test]
    fn text_below_the_minimum_cannot_stop() {
        let mut matcher = StopMatcher::new(vec!["stop".into()], false);
        let mut out = String::new();
        matcher.push_unchecked("a stop ", &mut out);
        assert!(!matcher.push("b s", &mut out));
        assert_eq!(out, "a stop b ");
        assert!(matcher.push("top c", &mut out));
        assert!(matcher.push("later", &mut out));
        assert_eq!(out, "a stop b ");
    }
}
