//! Grammars that were compiled before, the most recently used.

use std::{
    collections::VecDeque,
    io::{self, Write},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use blake3::{Hash, Hasher};

use super::{Grammar, Source};

/// Grammars that are kept at most.
const KEPT_MAX: usize = 64;
/// Bytes of a grammar's text, if it is kept: a request is not to pay for what hardly any other asks for.
const TEXT_BYTES_MAX: usize = 16 << 10;
/// Bytes of its lexer, about, if it is kept: of a usual schema it has some hundred thousand, and copying takes as long
/// as there are many.
const LEXER_BYTES_MAX: usize = 1 << 20;

/// The most recently used grammars: most requests ask for what another has asked for before.
///
/// What is kept is never followed, and whoever asks for it gets a copy with a lexer of its own. So a copy is as new as
/// what has just been compiled, and neither its tables nor its errors are those of others' answers.
#[derive(Default)]
pub(super) struct GrammarCache {
    /// The one that nobody has asked for for longest comes first.
    kept: Mutex<VecDeque<(Hash, Arc<Grammar>)>>,
}

impl GrammarCache {
    /// A copy of what was made of the same text, if that is kept.
    pub(super) fn find(&self, source: &Source) -> Option<Grammar> {
        let wanted = key(source)?;
        let mut kept = self.kept();
        let at = kept.iter().position(|(key, _)| *key == wanted)?;
        let found = kept.remove(at)?;
        let grammar = found.1.clone();
        kept.push_back(found);
        drop(kept);
        Some(grammar.copied())
    }

    /// Keeps a copy of a grammar whose lexer has so many bytes, and forgets others for it.
    pub(super) fn keep(&self, grammar: &Grammar, lexer_bytes: usize) {
        let Some(new) = key(grammar.source()).filter(|_| lexer_bytes <= LEXER_BYTES_MAX) else { return };
        let copy = Arc::new(grammar.copied());
        let mut kept = self.kept();
        // Two requests may have compiled the same at a time.
        if kept.iter().any(|(key, _)| *key == new) {
            return;
        }
        kept.push_back((new, copy));
        let forgotten = if kept.len() > KEPT_MAX { kept.pop_front() } else { None };
        // Others may have the list while it is taken apart.
        drop(kept);
        drop(forgotten);
    }

    fn kept(&self) -> MutexGuard<'_, VecDeque<(Hash, Arc<Grammar>)>> {
        // Whatever panics in between leaves whole entries.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What tells texts apart; `None` if this one is too long to be kept. Of two schemas that are equal as JSON the
/// properties may come in another order, which is the order that they have in an answer.
fn key(source: &Source) -> Option<Hash> {
    let mut text = Text { hasher: Hasher::new(), left: TEXT_BYTES_MAX };
    text.take(source)?;
    Some(text.hasher.finalize())
}

/// Takes a text in pieces, until it is too long: no more of it is looked at then.
struct Text {
    hasher: Hasher,
    left: usize,
}

impl Text {
    /// Takes a grammar's; `None` if it is too long.
    fn take(&mut self, source: &Source) -> Option<()> {
        match source {
            Source::JsonSchema(schema) => {
                self.hasher.update(b"schema");
                serde_json::to_writer(&mut *self, schema).ok()?;
            }
            Source::Regex(regex) => {
                self.hasher.update(b"regex ");
                self.write_all(regex.as_bytes()).ok()?;
            }
            Source::Lark(grammar) => {
                self.hasher.update(b"lark  ");
                self.write_all(grammar.as_bytes()).ok()?;
            }
            Source::Choice(choices) => {
                self.hasher.update(b"choice");
                for choice in choices {
                    self.write_all(&choice.len().to_le_bytes()).ok()?;
                    self.write_all(choice.as_bytes()).ok()?;
                }
            }
            Source::Framed { open, frames, between, close, or } => {
                self.hasher.update(b"framed");
                let parts = frames.iter().map(|frame| (&frame.before, &frame.schema, &frame.after, frame.strict));
                let frames: Vec<_> = parts.collect();
                serde_json::to_writer(&mut *self, &(open, between, close, or, frames)).ok()?;
            }
            Source::After { open, close, then } => {
                self.hasher.update(b"after ");
                serde_json::to_writer(&mut *self, &(open, close)).ok()?;
                self.take(then)?;
            }
        }
        Some(())
    }
}

impl Write for Text {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.left = self.left.checked_sub(bytes.len()).ok_or(io::ErrorKind::FileTooLarge)?;
        self.hasher.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use engine_kernels::TokenMask;
    use serde_json::json;

    use super::{
        super::{Frame, Vocabulary},
        *,
    };

    fn vocabulary() -> Vocabulary {
        Vocabulary::of_tokens((0..=u8::MAX).map(|byte| vec![byte]).collect(), &[]).unwrap()
    }

    fn regex(regex: &str) -> Source {
        Source::Regex(regex.to_owned())
    }

    /// What may come at each place of `text`, and whether that is all of an answer; to where it becomes too much.
    fn followed(grammar: &Grammar, text: &str) -> (Vec<TokenMask>, bool) {
        let mut matcher = grammar.matcher();
        let step = |byte| matcher.allowed().and_then(|mask| matcher.take(u32::from(byte)).map(|()| mask)).ok();
        let masks = text.bytes().map_while(step).collect();
        (masks, matcher.is_complete())
    }

    #[test]
    fn what_is_asked_for_again_is_the_same_again() {
        let schema = json!({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]});
        let of_rules = "start: word+\nword: \"a\" | \"b\" word \"c\"\n".to_owned();
        for (source, text) in [
            (Source::JsonSchema(schema), r#"{"a": 15}"#),
            (regex("a{3}b*"), "aaabb"),
            (Source::Choice(vec!["yes".into(), "no".into()]), "yes"),
            (Source::Lark(of_rules), "abbacca"),
        ] {
            let vocabulary = vocabulary();
            assert!(vocabulary.cached(&source).is_none());
            let first = vocabulary.compile(source.clone()).unwrap();
            let expected = followed(&first, text);
            assert_eq!(expected.0.len(), text.len());
            for _ in 0..2 {
                let again = vocabulary.cached(&source).expect("it is kept");
                assert_eq!(again, first);
                assert_eq!(followed(&again, text), expected);
            }
            assert_eq!(followed(&vocabulary.compile(source).unwrap(), text), expected);
        }
    }

    #[test]
    fn what_is_not_the_same_text_is_another_grammar() {
        let vocabulary = vocabulary();
        let object = |first: &str, second: &str| {
            let of_both = format!(r#"{{"{first}": {{"const": 1}}, "{second}": {{"const": 1}}}}"#);
            let properties: serde_json::Value = serde_json::from_str(&of_both).unwrap();
            Source::JsonSchema(json!({"type": "object", "properties": properties, "required": ["a", "b"]}))
        };
        let list = |open: &str, before: &str, after: &str, between: Option<&str>, close: &str, strict| Source::Framed {
            open: open.to_owned(),
            frames: vec![Frame { before: before.into(), schema: json!({"type": "null"}), after: after.into(), strict }],
            between: between.map(str::to_owned),
            close: close.to_owned(),
            or: None,
        };
        let framed =
            |before: &str, after: &str, between: Option<&str>, strict| list("", before, after, between, "", strict);
        let after = |open: Option<&str>, close: &str, then: &str| Source::After {
            open: open.map(str::to_owned),
            close: close.to_owned(),
            then: Box::new(regex(then)),
        };
        let sources = [
            object("a", "b"),
            object("b", "a"),
            regex("start: \"a\""),
            regex(r#"\{"type":"null"\}"#),
            Source::JsonSchema(json!({"type": "null"})),
            Source::Lark("start: \"a\"".to_owned()),
            Source::Choice(vec!["ab".into(), "c".into()]),
            Source::Choice(vec!["a".into(), "bc".into()]),
            framed("a", "b", None, true),
            framed("a", "b", None, false),
            framed("ab", "", None, true),
            framed("a", "b", Some("b"), true),
            list("a", "", "b", None, "", true),
            list("", "a", "", None, "b", true),
            after(None, "a", "b"),
            after(None, "ab", "b"),
            after(Some("a"), "a", "b"),
            after(None, "a", "ab"),
        ];
        for source in sources {
            assert!(vocabulary.cached(&source).is_none(), "{source:?}");
            vocabulary.compile(source).unwrap();
        }
        let (text, grammar) = (r#"{"b":1,"a":1}"#, vocabulary.cached(&object("b", "a")).unwrap());
        assert!(followed(&grammar, text).1);
    }

    #[test]
    fn an_answer_that_becomes_too_much_to_follow_is_no_other_s_business() {
        let vocabulary = vocabulary().with_lexer_states(60);
        let source = regex("[ab]*a[ab]{14}c");
        let text: String =
            (0..200u32).map(|i| if i.wrapping_mul(0x9e37_79b9) >> 31 == 0 { 'a' } else { 'b' }).collect();
        let first = followed(&vocabulary.compile(source.clone()).unwrap(), &text);
        assert!(!first.0.is_empty() && first.0.len() < text.len());
        for _ in 0..2 {
            assert_eq!(followed(&vocabulary.cached(&source).unwrap(), &text), first);
        }
    }

    #[test]
    fn those_asked_for_last_are_kept_and_neither_errors_nor_long_ones() {
        let vocabulary = vocabulary();
        let (used, unused) = (regex("used"), regex("unused"));
        vocabulary.compile(used.clone()).unwrap();
        vocabulary.compile(unused.clone()).unwrap();
        for other in 0..KEPT_MAX - 1 {
            assert!(vocabulary.cached(&used).is_some());
            vocabulary.compile(regex(&format!("other {other}"))).unwrap();
        }
        assert!(vocabulary.cached(&used).is_some());
        assert!(vocabulary.cached(&unused).is_none());
        assert!(vocabulary.cached(&regex("other 0")).is_some(), "one had to go");

        let wrong = regex("a(");
        assert!(vocabulary.compile(wrong.clone()).is_err());
        assert!(vocabulary.cached(&wrong).is_none());
        let border = r#"{"type":"null","description":""}"#.len();
        for (more, is_kept) in [(0, true), (1, false)] {
            let long = "a".repeat(TEXT_BYTES_MAX - border + more);
            let long = Source::JsonSchema(json!({"type": "null", "description": long}));
            vocabulary.compile(long.clone()).unwrap();
            assert_eq!(vocabulary.cached(&long).is_some(), is_kept);
        }
    }

    #[test]
    fn what_has_a_large_lexer_is_not_kept() {
        let (vocabulary, cache) = (vocabulary(), GrammarCache::default());
        let small = vocabulary.compile(regex("ab")).unwrap();
        for (bytes, is_kept) in [(LEXER_BYTES_MAX + 1, false), (LEXER_BYTES_MAX, true)] {
            cache.keep(&small, bytes);
            assert_eq!(cache.find(small.source()).is_some(), is_kept);
        }
        // Each of the last twelve characters may have been the one: a state for every set of them. They are such as the
        // compiler does not know all of at once.
        let large = regex(r"(?s:.*\x01.{11})");
        let tokens = (0..=u8::MAX).map(|byte| vec![byte]);
        let words = (0..1u32 << 12).map(|word| (0..12).map(|bit| 1 + (word >> bit & 1) as u8).collect());
        let vocabulary = Vocabulary::of_tokens(tokens.chain(words).collect(), &[]).unwrap();
        vocabulary.compile(large.clone()).unwrap();
        assert!(vocabulary.cached(&large).is_none());
    }
}
