//! The little a frontend reads of a request's body.

use std::{borrow::Cow, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{self, DeserializeSeed, MapAccess, SeqAccess, Visitor},
};

/// Bytes of a prompt's beginning that name it at most: more than the system prompts that tell applications apart have
/// in common, less than what the turns of one conversation do.
const BEGINNING_BYTES_MAX: usize = 512;
/// Prompts with a shorter beginning have nothing worth finding.
const BEGINNING_BYTES_MIN: usize = 64;
/// Bytes of text a token stands for, about.
const BYTES_PER_TOKEN: u64 = 4;
/// Tokens an answer is taken to have unless the request allows fewer.
const ANSWER_TOKENS: u64 = 256;

/// What a request is about, as far as placing it goes.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Peek {
    pub(super) model: Option<String>,
    pub(super) stream: bool,
    /// Digest of the prompt's beginning, if it is long enough to be found somewhere.
    pub(super) affinity: Option<u64>,
    /// Tokens of the prompt, about.
    pub(super) prompt_tokens: u64,
    /// Tokens of the answer, by guess.
    pub(super) answer_tokens: u64,
}

impl Peek {
    /// Reads a body. One that is not what it should be yields nothing: the worker will say what is wrong with it.
    pub(super) fn read(body: &[u8]) -> Option<Self> {
        let fields: Fields = serde_json::from_slice(body).ok()?;
        let text = fields.prompt.unwrap_or(fields.messages);
        // Where prompts show them, they mostly come first.
        let tools = fields.tools.unwrap_or_default();
        // One below zero is none. Out of range is for the worker to say: here a cast cuts it.
        let limit = fields.max_completion_tokens.or(fields.max_tokens).filter(|&tokens| tokens >= 0.0);
        let wanted = limit.map_or(ANSWER_TOKENS, |tokens| tokens as u64);
        let choices = fields.n.map_or(1, |n| n as u64).clamp(1, 128);
        Some(Self {
            // As for the workers, an empty one is none.
            model: fields.model.filter(|model| !model.is_empty()),
            stream: fields.stream.unwrap_or(false),
            affinity: match (tools.affinity(), text.affinity()) {
                (Some(tools), Some(text)) => Some(tools.rotate_left(1) ^ text),
                (tools, text) => tools.or(text),
            },
            prompt_tokens: (text.bytes + tools.bytes) / BYTES_PER_TOKEN + text.numbers,
            answer_tokens: wanted.min(ANSWER_TOKENS) * choices,
        })
    }
}

#[derive(Deserialize)]
struct Fields {
    model: Option<String>,
    stream: Option<bool>,
    prompt: Option<Text>,
    #[serde(default, deserialize_with = "Text::of_messages")]
    messages: Text,
    tools: Option<Text>,
    /// Numbers of any kind: a request must not go to workers of another model for one that is none here.
    max_tokens: Option<f64>,
    max_completion_tokens: Option<f64>,
    n: Option<f64>,
}

/// The strings and numbers of a JSON value in order: their beginning, and how many there are.
#[derive(Debug, Default)]
struct Text {
    beginning: Vec<u8>,
    bytes: u64,
    numbers: u64,
}

impl Text {
    fn read<'de, D: Deserializer<'de>>(deserializer: D, place: Place) -> Result<Self, D::Error> {
        let mut text = Self { beginning: Vec::with_capacity(BEGINNING_BYTES_MAX), bytes: 0, numbers: 0 };
        Walk { text: &mut text, place }.deserialize(deserializer)?;
        Ok(text)
    }

    /// What prompts show of messages.
    fn of_messages<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(deserializer, Place::Message)
    }

    fn string(&mut self, text: &str) {
        let room = BEGINNING_BYTES_MAX - self.beginning.len();
        self.beginning.extend_from_slice(&text.as_bytes()[..room.min(text.len())]);
        self.bytes += text.len() as u64;
    }

    fn number(&mut self, number: u64) {
        if self.beginning.len() + 4 <= BEGINNING_BYTES_MAX {
            self.beginning.extend_from_slice(&(number as u32).to_le_bytes());
        }
        self.numbers += 1;
    }

    /// A conversation grows at its end, so its beginning is cut to a power of two: few of its turns see it change.
    fn affinity(&self) -> Option<u64> {
        let length = self.beginning.len();
        if length < BEGINNING_BYTES_MIN {
            return None;
        }
        let length = 1 << length.ilog2();
        let digest = blake3::hash(&self.beginning[..length]);
        digest.as_bytes().first_chunk().map(|bytes| u64::from_le_bytes(*bytes))
    }
}

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Self::read(deserializer, Place::Shown)
    }
}

/// Where a value is, which says what of it prompts show.
#[derive(Clone, Copy)]
enum Place {
    /// Where they show all of it.
    Shown,
    Message,
    /// In a message's content.
    Part,
    /// In a message's calls.
    Call,
    Function,
}

impl Place {
    /// Where a field of an object that is here is. What clients note beside the fields that prompts show may be another
    /// in each request, and nested to any depth.
    fn within(self, field: &str) -> Option<Self> {
        match (self, field) {
            (Self::Message, "content") => Some(Self::Part),
            (Self::Message, "tool_calls") => Some(Self::Call),
            (Self::Call, "function") => Some(Self::Function),
            (Self::Shown, _)
            | (Self::Message, "role" | "name" | "reasoning" | "reasoning_content" | "refusal" | "tool_call_id")
            | (Self::Part, "text")
            | (Self::Function, "name" | "arguments") => Some(Self::Shown),
            _ => None,
        }
    }
}

/// A field's name, where it stands if nothing in it is escaped.
#[derive(Deserialize)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

/// Goes through a value of any shape.
struct Walk<'a> {
    text: &'a mut Text,
    place: Place,
}

impl Walk<'_> {
    fn at(&mut self, place: Place) -> Walk<'_> {
        Walk { text: self.text, place }
    }
}

impl<'de> DeserializeSeed<'de> for Walk<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Walk<'_> {
    type Value = ();

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("anything")
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.text.string(text);
        Ok(())
    }

    fn visit_u64<E>(self, number: u64) -> Result<(), E> {
        self.text.number(number);
        Ok(())
    }

    fn visit_i64<E>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut seq: A) -> Result<(), A::Error> {
        while seq.next_element_seed(self.at(self.place))?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<(), A::Error> {
        while let Some(Key(field)) = map.next_key()? {
            match self.place.within(&field) {
                Some(place) => map.next_value_seed(self.at(place))?,
                None => drop(map.next_value::<de::IgnoredAny>()?),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peek(json: &str) -> Peek {
        Peek::read(json.as_bytes()).unwrap()
    }

    #[test]
    fn what_is_needed_is_read_and_the_rest_passed_over() {
        let read = peek(
            r#"{"model": "m\u0041", "tools": [{"x": [1.5]}], "stream": true,
                "prompt": "12345678", "n": 2, "max_tokens": 7}"#,
        );
        let expected =
            Peek { model: Some("mA".into()), stream: true, affinity: None, prompt_tokens: 2, answer_tokens: 14 };
        assert_eq!(read, expected);
        assert_eq!(peek(r#"{"prompt": [1, 2, 3]}"#).prompt_tokens, 3);
        assert_eq!(peek(r#"{"model": ""}"#).model, None);
        assert_eq!(peek("{}").answer_tokens, ANSWER_TOKENS);
        for wrong in ["", "[]", "{\"stream\": 1}", "{\"model\": {}}", "{\"prompt\": [1,", "nul"] {
            assert_eq!(Peek::read(wrong.as_bytes()), None, "{wrong}");
        }
    }

    #[test]
    fn a_number_that_makes_no_sense_does_not_hide_the_model() {
        for (numbers, answer_tokens) in [
            (r#""max_tokens": -1"#, ANSWER_TOKENS),
            (r#""max_tokens": 100.0, "n": 2.0"#, 200),
            (r#""max_completion_tokens": 1e300, "n": 1e300"#, ANSWER_TOKENS * 128),
            (r#""n": -3, "max_tokens": 1.5"#, 1),
        ] {
            let read = peek(&format!(r#"{{"model": "m", "stream": true, {numbers}}}"#));
            assert_eq!((read.model.as_deref(), read.stream, read.answer_tokens), (Some("m"), true, answer_tokens));
        }
    }

    #[test]
    fn functions_are_part_of_the_prompt() {
        let asked = |tools: &str, text: &str| {
            peek(&format!(r#"{{"messages": [{{"content": "{text}"}}], "tools": [{{"name": "{tools}"}}]}}"#))
        };
        let (tools, text) = ("t".repeat(400), "m".repeat(400));
        let both = asked(&tools, &text);
        assert_eq!(both.prompt_tokens, 200);
        assert_eq!(asked(&tools, &text).affinity, both.affinity);
        let others = [asked(&tools, "hello").affinity, asked("f", &text).affinity, asked("f", "hello").affinity];
        assert!(others.iter().all(|other| *other != both.affinity) && others[2].is_none());
        assert!(others[0].is_some() && others[1].is_some());
    }

    #[test]
    fn turns_of_a_conversation_begin_alike() {
        let turn = |user: &str, more: &str| {
            peek(&format!(
                r#"{{"messages": [{{"role": "system", "content": "{}"}},
                    {{"role": "user", "content": "{user}"}}{more}]}}"#,
                "You are kind and brief. ".repeat(20)
            ))
        };
        let first = turn("One question about rivers, please.", "");
        let later = turn(
            "One question about rivers, please.",
            r#", {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Which is longest?"}"#,
        );
        assert!(first.affinity.is_some());
        assert_eq!(first.affinity, later.affinity);
        let text = |length: usize| peek(&format!(r#"{{"prompt": "{}"}}"#, "abcdefgh".repeat(length / 8))).affinity;
        assert_eq!(text(64), text(120));
        assert_ne!(text(64), text(128));
        assert_eq!(text(512), text(4096));
        assert_eq!(text(56), None);
    }

    #[test]
    fn notes_in_messages_change_nothing() {
        let text = "You are kind and brief. ".repeat(20);
        let with = |note: &str| {
            let call = r#"{"function": {"name": "f", "arguments": {"city": "Rome"}}}"#;
            peek(&format!(
                r#"{{"messages": [{{{note} "role": "system", "content": [{{{note} "type": "text", "text": "{text}"}}]}},
                    {{"role": "assistant", "content": null, "tool_calls": [{call}]}}]}}"#
            ))
        };
        let without = with("");
        assert!(without.affinity.is_some());
        assert_eq!(without.prompt_tokens, ("systemassistantfRome".len() + text.len()) as u64 / BYTES_PER_TOKEN);
        let deep = format!(r#""trace": {}{},"#, "[".repeat(100_000), "]".repeat(100_000));
        assert_eq!(with(r#""id": "msg-7301", "at": [1, {"content": "x"}], "function": {"name": "x"},"#), without);
        assert_eq!(with(&deep), without);
    }

    #[test]
    fn deep_nesting_is_passed_on_for_the_worker_to_refuse() {
        let body = format!(r#"{{"messages": {}"#, "[".repeat(100_000));
        assert_eq!(Peek::read(body.as_bytes()), None);
    }
}
