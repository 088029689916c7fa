//! Log-probabilities in OpenAI's two forms.

use engine_models::Tokenizer;
use serde::{
    Serialize, Serializer,
    ser::{SerializeMap, SerializeStruct},
};

use super::output::ScoredToken;

/// Tells what bytes a token stands for.
pub(crate) trait TokenText {
    fn token_bytes(&self, token: u32) -> &[u8];
}

impl TokenText for Tokenizer {
    fn token_bytes(&self, token: u32) -> &[u8] {
        self.token_bytes(token)
    }
}

/// JSON has no infinities; this stands for a probability of zero, as in OpenAI's and vLLM's answers.
const LOGPROB_MIN: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    // A NaN becomes the minimum too.
    logprob.max(LOGPROB_MIN)
}

/// `choices[].logprobs` of a chat.
pub(crate) struct ChatLogprobs<'a, T>(pub(crate) &'a [ScoredToken], pub(crate) &'a T);

impl<T: TokenText> Serialize for ChatLogprobs<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(tokens, names) = *self;
        let mut fields = serializer.serialize_struct("logprobs", 2)?;
        fields.serialize_field("content", &list(tokens, |scored| ChatToken { scored, names }))?;
        fields.serialize_field("refusal", &None::<()>)?;
        fields.end()
    }
}

struct ChatToken<'a, T> {
    scored: &'a ScoredToken,
    names: &'a T,
}

impl<T: TokenText> Serialize for ChatToken<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let ScoredToken { token, logprob, ref top, .. } = *self.scored;
        let names = self.names;
        let bytes = names.token_bytes(token);
        let mut fields = serializer.serialize_struct("token", 4)?;
        fields.serialize_field("token", &String::from_utf8_lossy(bytes))?;
        fields.serialize_field("logprob", &logprob.map(finite))?;
        fields.serialize_field("bytes", bytes)?;
        let alternative = |&(token, logprob): &(u32, f32)| Alternative { bytes: names.token_bytes(token), logprob };
        fields.serialize_field("top_logprobs", &list(top, alternative))?;
        fields.end()
    }
}

struct Alternative<'a> {
    bytes: &'a [u8],
    logprob: f32,
}

impl Serialize for Alternative<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut fields = serializer.serialize_struct("alternative", 3)?;
        fields.serialize_field("token", &String::from_utf8_lossy(self.bytes))?;
        fields.serialize_field("logprob", &finite(self.logprob))?;
        fields.serialize_field("bytes", self.bytes)?;
        fields.end()
    }
}

/// `choices[].logprobs` of a completion: OpenAI's older form.
pub(crate) struct CompletionLogprobs<'a, T>(pub(crate) &'a [ScoredToken], pub(crate) &'a T);

impl<T: TokenText> Serialize for CompletionLogprobs<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self(tokens, names) = *self;
        let mut fields = serializer.serialize_struct("logprobs", 4)?;
        fields.serialize_field("tokens", &list(tokens, |scored| label(names.token_bytes(scored.token))))?;
        fields.serialize_field("token_logprobs", &list(tokens, |scored| scored.logprob.map(finite)))?;
        let top = list(tokens, |scored| scored.logprob.map(|logprob| TopLogprobs { scored, logprob, names }));
        fields.serialize_field("top_logprobs", &top)?;
        fields.serialize_field("text_offset", &list(tokens, |scored| scored.text_offset))?;
        fields.end()
    }
}

/// The alternatives of a token, itself always among them.
struct TopLogprobs<'a, T> {
    scored: &'a ScoredToken,
    logprob: f32,
    names: &'a T,
}

impl<T: TokenText> Serialize for TopLogprobs<'_, T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let ScoredToken { token, ref top, .. } = *self.scored;
        let mut map = serializer.serialize_map(None)?;
        // Several tokens may stand for the same text, but an object has each name once: that of the likeliest.
        let mut labels: Vec<String> = Vec::with_capacity(top.len() + 1);
        for &(token, logprob) in top.iter().chain([&(token, self.logprob)]) {
            let label = label(self.names.token_bytes(token));
            if !labels.contains(&label) {
                map.serialize_entry(&label, &finite(logprob))?;
                labels.push(label);
            }
        }
        map.end()
    }
}

/// A token as text; a part of a character, which is no text, as OpenAI's `bytes:\xe2\x82`.
fn label(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().fold(String::from("bytes:"), |label, byte| format!("{label}\\x{byte:02x}")),
    }
}

/// A list whose elements are made while they are written.
struct List<'a, E, F>(&'a [E], F);

fn list<'a, E, O: Serialize, F: Fn(&'a E) -> O>(elements: &'a [E], element: F) -> List<'a, E, F> {
    List(elements, element)
}

impl<'a, E, O: Serialize, F: Fn(&'a E) -> O> Serialize for List<'a, E, F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().map(&self.1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Names;

    impl TokenText for Names {
        fn token_bytes(&self, token: u32) -> &[u8] {
            match token {
                0 => "é".as_bytes(),
                1 => &[0xe2, 0x82],
                _ => b"a",
            }
        }
    }

    #[test]
    fn a_chat_tells_bytes_and_alternatives() {
        let tokens = [ScoredToken { token: 0, logprob: Some(-0.5), top: vec![(1, f32::NEG_INFINITY)], text_offset: 0 }];
        assert_eq!(
            serde_json::to_string(&ChatLogprobs(&tokens, &Names)).unwrap(),
            concat!(
                r#"{"content":[{"token":"é","logprob":-0.5,"bytes":[195,169],"#,
                r#""top_logprobs":[{"token":"�","logprob":-9999.0,"bytes":[226,130]}]}],"refusal":null}"#
            )
        );
    }

    #[test]
    fn tokens_of_the_same_text_have_one_entry() {
        // 2 and 3 are both "a".
        let tokens = [ScoredToken { token: 3, logprob: Some(-2.0), top: vec![(2, -0.5), (0, -1.0)], text_offset: 0 }];
        assert_eq!(
            serde_json::to_value(CompletionLogprobs(&tokens, &Names)).unwrap()["top_logprobs"],
            serde_json::json!([{"a": -0.5, "é": -1.0}])
        );
        let text = serde_json::to_string(&CompletionLogprobs(&tokens, &Names)).unwrap();
        assert_eq!(text.matches(r#""a":"#).count(), 1, "{text}");
    }

    #[test]
    fn a_completion_tells_offsets_and_the_drawn_token_itself() {
        let tokens = [
            ScoredToken { token: 2, logprob: None, top: vec![], text_offset: 0 },
            ScoredToken { token: 0, logprob: Some(-2.0), top: vec![(1, -1.0)], text_offset: 1 },
        ];
        assert_eq!(
            serde_json::to_string(&CompletionLogprobs(&tokens, &Names)).unwrap(),
            concat!(
                r#"{"tokens":["a","é"],"token_logprobs":[null,-2.0],"#,
                r#""top_logprobs":[null,{"bytes:\\xe2\\x82":-1.0,"é":-2.0}],"text_offset":[0,1]}"#
            )
        );
    }
}
