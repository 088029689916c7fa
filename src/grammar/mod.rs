//! What an answer may be made of, where its request says so: JSON of some schema, a regular expression, one of several
//! choices, or a grammar.
//!
//! Which tokens may come next is what the crate [`llguidance`](https://github.com/guidance-ai/llguidance) works out, by
//! Microsoft and others: it has a lexer of derivatives of regular expressions below an Earley parser, and goes through
//! the vocabulary as a trie. Here is what stands around it: [`Vocabulary`] makes that trie of a model's tokenizer and
//! compiles a [`Source`] into a [`Grammar`], within limits; a [`Matcher`] goes through one answer, token by token.
//! Requests compile on threads that may take their time; the engine thread has a matcher for each sequence and asks it
//! for a mask before each draw.

mod cache;
#[cfg(test)]
mod costs;
mod matcher;
mod schema;
mod source;
#[cfg(test)]
mod tests;
mod vocabulary;

pub use matcher::{LostTrack, Matcher};
pub use source::{Frame, Source};
pub use vocabulary::{Grammar, GrammarError, Vocabulary};
