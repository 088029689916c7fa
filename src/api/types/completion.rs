use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, SeqAccess, Visitor},
};

use super::{Refused, generating_request};

generating_request! {
    /// Body of `POST /v1/completions`.
    CompletionRequest {
        /// Texts or token ids to continue.
        prompt: Option<Prompts>,
        #[serde(deserialize_with = "super::whole")]
        max_tokens: Option<i64>,
        /// Whether the prompt precedes the answer.
        echo: Option<bool>,
        #[serde(deserialize_with = "super::whole")]
        logprobs: Option<i64>,
        /// vLLM's: whether the tokenizer adds its begin-of-sequence token to texts.
        add_special_tokens: Option<bool>,
        #[serde(deserialize_with = "super::whole")]
        best_of: Option<i64>,
        suffix: Option<Refused>,
        /// vLLM's, of which there is nothing here.
        prompt_embeds: Option<Refused>,
    }
}

/// One prompt of a completion.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Prompt {
    /// Text to encode.
    Text(String),
    /// Token ids.
    Tokens(Vec<u32>),
}

/// `prompt`: a string, a list of strings, a list of token ids, or a list of such lists.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Prompts(pub(crate) Vec<Prompt>);

/// An element of the list that `prompt` may be.
enum Element {
    Text(String),
    Token(u32),
    Tokens(Vec<u32>),
}

const EXPECTED: &str = "a string, a list of strings, a list of token ids or a list of lists of token ids";

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Element;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str("a string, a token id or a list of token ids")
            }
            fn visit_str<E>(self, value: &str) -> Result<Element, E> {
                Ok(Element::Text(value.to_owned()))
            }
            fn visit_u64<E: de::Error>(self, value: u64) -> Result<Element, E> {
                let token = value.try_into();
                token.map(Element::Token).map_err(|_| E::custom(format_args!("{value} is not a token id")))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<Element, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(Element::Tokens)
            }
        }
        deserializer.deserialize_any(Any)
    }
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyForm;
        impl<'de> Visitor<'de> for AnyForm {
            type Value = Vec<Prompt>;
            fn expecting(&self, formatter: &mut fmt::Formatter) -> fmt::Result {
                formatter.write_str(EXPECTED)
            }
            fn visit_str<E>(self, value: &str) -> Result<Vec<Prompt>, E> {
                Ok(vec![Prompt::Text(value.to_owned())])
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Vec<Prompt>, A::Error> {
                let (mut prompts, mut tokens) = (Vec::new(), Vec::new());
                let mixed = || de::Error::custom(format_args!("expected {EXPECTED}, not a mixture"));
                while let Some(element) = seq.next_element()? {
                    let prompt = match element {
                        Element::Token(token) if prompts.is_empty() => {
                            tokens.push(token);
                            continue;
                        }
                        Element::Text(text) => Prompt::Text(text),
                        Element::Tokens(list) => Prompt::Tokens(list),
                        Element::Token(_) => return Err(mixed()),
                    };
                    let same_kind = |other: &Prompt| std::mem::discriminant(other) == std::mem::discriminant(&prompt);
                    if !tokens.is_empty() || !prompts.last().is_none_or(same_kind) {
                        return Err(mixed());
                    }
                    prompts.push(prompt);
                }
                if !tokens.is_empty() {
                    prompts.push(Prompt::Tokens(tokens));
                }
                Ok(prompts)
            }
        }
        deserializer.deserialize_any(AnyForm).map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prompts(json: &str) -> Result<Vec<Prompt>, serde_json::Error> {
        serde_json::from_str::<Prompts>(json).map(|prompts| prompts.0)
    }

    #[test]
    fn a_prompt_has_four_forms() {
        assert_eq!(prompts(r#""a""#).unwrap(), [Prompt::Text("a".into())]);
        assert_eq!(prompts(r#"["a", "b"]"#).unwrap(), [Prompt::Text("a".into()), Prompt::Text("b".into())]);
        assert_eq!(prompts("[1, 2]").unwrap(), [Prompt::Tokens(vec![1, 2])]);
        assert_eq!(prompts("[[1], [2, 3]]").unwrap(), [Prompt::Tokens(vec![1]), Prompt::Tokens(vec![2, 3])]);
        assert_eq!(prompts("[]").unwrap(), []);
    }

    #[test]
    fn other_forms_are_refused() {
        for json in
            [r#"["a", 1]"#, r#"[1, "a"]"#, r#"[1, [2]]"#, "[[1], 2]", r#"["a", [1]]"#, "[-1]", "[1.5]", "7", "[{}]"]
        {
            assert!(prompts(json).is_err(), "{json}");
        }
    }
}
