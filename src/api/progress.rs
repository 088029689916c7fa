//! What lets another worker continue an answer: lines that a stream carries beside its events, for the frontend alone.
//!
//! A request with the header [`PROGRESS_HEADER`] gets, as the first lines of each server-sent event, comments of the
//! form `: {…}`: who the answer is (once), and for the event's choice the tokens it is made of since the choice's event
//! before, and how much text has been let out with it. A comment and its data are one event, so whoever has the one has
//! the other. The frontend takes the comments out, keeps them in order without looking into them, and, if the worker
//! dies, sends them all to another: the request's body again, preceded by the *journal*, the comments' JSON a line
//! each, whose length is said in [`RESUME_HEADER`]. That worker works through the tokens as if it had generated them
//! itself, lets out nothing that was let out before, and goes on, with comments of its own that continue the journal.
//!
//! Exactness rests on determinism: a token follows from the prompt, the parameters, the seed and the tokens before it.
//! That both workers understood the request alike (templates, defaults, limits) is not hoped for but compared, by a
//! digest of everything that goes into the answer.

use std::{collections::BTreeMap, fmt::Write};

use axum::http::{HeaderMap, HeaderName, StatusCode};
use bytes::BytesMut;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{answer::PreparedPrompt, output::Output, state::unix_seconds, validate::CHOICES_MAX};
use crate::{
    http::{ApiError, HttpToken},
    telemetry::TraceContext,
};

/// Header of a request whose stream shall carry progress.
pub const PROGRESS_HEADER: HeaderName = HeaderName::from_static("x-engine-progress");
/// Header of a request that continues an answer: how many bytes of its body are the journal.
pub const RESUME_HEADER: HeaderName = HeaderName::from_static("x-engine-resume");
/// How a line of progress begins. Other comments begin otherwise.
pub const PROGRESS_PREFIX: &[u8] = b": {";

/// Bytes of a journal at most: more than a million tokens' lines.
pub const JOURNAL_BYTES_MAX: usize = 64 << 20;

/// What a frontend asks of a worker besides the answer.
#[derive(Debug, Default)]
pub(crate) struct FrontendContext {
    /// The stream shall carry progress.
    pub(crate) progress: bool,
    /// The answer has been begun elsewhere.
    pub(crate) journal: Option<Journal>,
    /// The trace that the request is part of.
    pub(crate) trace: Option<TraceContext>,
}

impl FrontendContext {
    /// Reads the headers, which mean nothing without `token`, if there is one. Returns also how many bytes of the body
    /// are the journal.
    pub(crate) fn from_headers(
        headers: &HeaderMap,
        token: Option<&HttpToken>,
    ) -> Result<(bool, Option<usize>), ApiError> {
        let (progress, resume) = (headers.contains_key(PROGRESS_HEADER), headers.get(RESUME_HEADER));
        let trusted = token.is_none_or(|token| token.is_in(headers));
        if !trusted && resume.is_some() {
            let message = "Only this cluster's frontends can continue an answer";
            return Err(ApiError::new(StatusCode::FORBIDDEN, "not_in_cluster", message));
        }
        let bytes = resume.map(|bytes| bytes.to_str().ok().and_then(|bytes| bytes.parse().ok()).ok_or_else(malformed));
        Ok((progress && trusted, bytes.transpose()?))
    }

    /// When the answer began, in seconds since 1970; now, unless it began elsewhere.
    pub(crate) fn created(&self) -> u64 {
        self.journal.as_ref().map_or_else(unix_seconds, |journal| journal.head.created)
    }

    /// The seed of a request that names none: any, unless the answer began elsewhere.
    pub(crate) fn seed(&self) -> u64 {
        self.journal.as_ref().map_or_else(|| Uuid::new_v4().as_u64_pair().1, |journal| journal.head.seed)
    }
}

/// The first line: who the answer is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Head {
    pub(crate) id: String,
    pub(crate) created: u64,
    /// Of the first choice, where the request names none.
    pub(crate) seed: u64,
    /// See [`digest`].
    pub(crate) digest: String,
}

/// A further line.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Line {
    Choice(ChoiceLine),
    Usage {
        /// The token counts have been told.
        u: bool,
    },
}

/// What an event did for a choice.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ChoiceLine {
    /// Index of the choice.
    i: usize,
    /// Tokens since the line before.
    #[serde(default)]
    t: Vec<u32>,
    /// Bytes of text let out so far.
    #[serde(default)]
    b: usize,
    /// Prompt tokens found in the cache, once known.
    c: Option<u32>,
    /// The event tells how the choice ended.
    #[serde(default)]
    f: bool,
}

/// How far a choice has come.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Past {
    pub(crate) tokens: Vec<u32>,
    /// Bytes of text let out.
    pub(crate) bytes: usize,
    pub(crate) cached_tokens: Option<u32>,
    /// Whether it was told how the choice ended.
    pub(crate) ended: bool,
}

/// An answer's progress, put together from its lines.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Journal {
    pub(crate) head: Head,
    pub(crate) usage_told: bool,
    choices: BTreeMap<usize, Past>,
}

impl Journal {
    /// Reads a journal: the head, then lines in the order of their events.
    pub(crate) fn parse(bytes: &[u8], vocab_size: usize) -> Result<Self, ApiError> {
        let mut lines = bytes.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
        let head = lines.next().and_then(|line| serde_json::from_slice(line).ok()).ok_or_else(malformed)?;
        let mut journal = Self { head, usage_told: false, choices: BTreeMap::new() };
        for line in lines {
            match serde_json::from_slice(line).map_err(|_| malformed())? {
                Line::Usage { u } => journal.usage_told |= u,
                Line::Choice(line) => {
                    let unknown = line.t.iter().any(|&token| token as usize >= vocab_size);
                    if unknown || line.i >= CHOICES_MAX {
                        return Err(malformed());
                    }
                    let past = journal.choices.entry(line.i).or_default();
                    past.tokens.extend(line.t);
                    past.bytes = line.b;
                    past.cached_tokens = past.cached_tokens.or(line.c);
                    past.ended |= line.f;
                }
            }
        }
        Ok(journal)
    }

    /// What is known of a choice; `None` if no event was about it.
    pub(crate) fn choice(&self, index: usize) -> Option<&Past> {
        self.choices.get(&index)
    }
}

/// 400: the journal is not one.
pub(crate) fn malformed() -> ApiError {
    ApiError::new(StatusCode::BAD_REQUEST, "invalid_journal", "The journal of the answer to continue is malformed")
}

/// 409: this worker would have answered otherwise.
pub(crate) fn incompatible() -> ApiError {
    let message = "This worker understands the request differently from the one that began the answer";
    ApiError::new(StatusCode::CONFLICT, "incompatible_worker", message)
}

/// Digest of everything an answer follows from: prompts, and by what `rest` says of them weights, parameters, limits
/// and names. An address may be another process's by the time that the answer is continued there.
pub(crate) fn digest(prompts: &[PreparedPrompt], rest: &impl std::fmt::Debug) -> String {
    let mut hasher = blake3::Hasher::new();
    for prompt in prompts {
        hasher.update(&(prompt.tokens.len() as u64).to_le_bytes());
        for token in &prompt.tokens {
            hasher.update(&token.to_le_bytes());
        }
    }
    hasher.update(format!("{rest:?}").as_bytes());
    hasher.finalize().to_hex()[..16].to_owned()
}

/// Writes an answer's progress.
pub(crate) struct ProgressWriter {
    /// Until it has been written.
    head: Option<Head>,
}

impl ProgressWriter {
    /// For an answer from its beginning.
    pub(crate) fn beginning(head: Head) -> Self {
        Self { head: Some(head) }
    }

    /// For an answer whose first event went out elsewhere.
    pub(crate) fn continuing() -> Self {
        Self { head: None }
    }

    fn head(&mut self, buffer: &mut BytesMut) {
        if let Some(head) = self.head.take() {
            // Strings and numbers always serialise.
            let json = serde_json::to_string(&head).unwrap_or_default();
            line(buffer, format_args!("{json}"));
        }
    }

    /// The lines of the event, written next, that opens choice `index`.
    pub(crate) fn opening(&mut self, buffer: &mut BytesMut, index: usize) {
        self.head(buffer);
        line(buffer, format_args!("{{\"i\":{index}}}"));
    }

    /// The lines of the event, written next, with what is pending of choice `index`, or with how it ended.
    pub(crate) fn choice(&mut self, buffer: &mut BytesMut, index: usize, output: &mut Output, last: bool) {
        self.head(buffer);
        let bytes = output.bytes_shown();
        let cached = output.cached_tokens_unreported();
        let tokens = output.take_unreported();
        let tokens = Joined(&tokens);
        let (cached, last) = (Optional(cached), if last { ",\"f\":true" } else { "" });
        line(buffer, format_args!("{{\"i\":{index},\"t\":[{tokens}],\"b\":{bytes}{cached}{last}}}"));
    }

    /// The line of the event with the token counts.
    pub(crate) fn usage(&mut self, buffer: &mut BytesMut) {
        line(buffer, format_args!("{{\"u\":true}}"));
    }
}

fn line(buffer: &mut BytesMut, json: std::fmt::Arguments<'_>) {
    // A buffer grows as it needs to.
    let _ = writeln!(buffer, ": {json}");
}

struct Joined<'a>(&'a [u32]);

impl std::fmt::Display for Joined<'_> {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (at, token) in self.0.iter().enumerate() {
            if at > 0 {
                formatter.write_char(',')?;
            }
            token.fmt(formatter)?;
        }
        Ok(())
    }
}

struct Optional(Option<u32>);

impl std::fmt::Display for Optional {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.map_or(Ok(()), |cached| write!(formatter, ",\"c\":{cached}"))
    }
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;
    use crate::http::CLUSTER_TOKEN_HEADER;

    const HEAD: &str = r#"{"id":"a","created":5,"seed":18446744073709551615,"digest":"d"}"#;

    #[test]
    fn lines_add_up_to_where_each_choice_is() {
        let lines = format!(
            "{HEAD}\n{{\"i\":0}}\n{{\"i\":1,\"t\":[4],\"b\":2,\"c\":16}}\n\
             {{\"i\":1,\"t\":[5,6],\"b\":9,\"f\":true}}\n{{\"u\":true}}\n"
        );
        let journal = Journal::parse(lines.as_bytes(), 7).unwrap();
        assert_eq!((journal.head.seed, journal.head.created), (u64::MAX, 5));
        assert!(journal.usage_told);
        assert_eq!(journal.choice(0), Some(&Past::default()));
        let past = Past { tokens: vec![4, 5, 6], bytes: 9, cached_tokens: Some(16), ended: true };
        assert_eq!(journal.choice(1), Some(&past));
        assert_eq!(journal.choice(2), None);
    }

    #[test]
    fn what_is_no_journal_is_refused() {
        for lines in ["", "{}", HEAD.trim_end_matches('}'), "{\"i\":0}"] {
            assert!(Journal::parse(lines.as_bytes(), 7).is_err(), "{lines}");
        }
        for line in ["{\"i\":0,\"t\":[7]}", "{\"i\":128}", "{\"i\":0,\"x\":1}", "[]", "{\"t\":[1]}", "{\"i\":-1}"] {
            assert!(Journal::parse(format!("{HEAD}\n{line}\n").as_bytes(), 7).is_err(), "{line}");
        }
    }

    #[test]
    fn where_there_is_a_token_the_headers_mean_nothing_without_it() {
        let value = HeaderValue::from_static;
        let read = |pairs: &[(HeaderName, HeaderValue)], token: Option<&HttpToken>| {
            FrontendContext::from_headers(&pairs.iter().cloned().collect(), token).ok()
        };
        let (progress, resume) = ((PROGRESS_HEADER, value("1")), (RESUME_HEADER, value("12")));
        assert_eq!(read(&[], None), Some((false, None)));
        assert_eq!(read(&[progress.clone(), resume.clone()], None), Some((true, Some(12))));
        assert_eq!(read(&[(RESUME_HEADER, value("many"))], None), None);
        let [token, other] = ["s", "t"].map(HttpToken::of);
        let (own, others) = ((CLUSTER_TOKEN_HEADER, token.header()), (CLUSTER_TOKEN_HEADER, other.header()));
        assert_eq!(read(std::slice::from_ref(&progress), Some(&token)), Some((false, None)));
        assert_eq!(read(&[resume.clone(), others], Some(&token)), None);
        assert_eq!(read(&[progress, resume, own], Some(&token)), Some((true, Some(12))));
    }
}
