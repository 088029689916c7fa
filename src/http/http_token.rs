use std::fmt;

use axum::http::{HeaderMap, HeaderName, HeaderValue};
use subtle::ConstantTimeEq;

/// Header in which members of a cluster show an [`HttpToken`] to each other.
pub const CLUSTER_TOKEN_HEADER: HeaderName = HeaderName::from_static("x-engine-cluster-token");

/// What stands for the cluster's token in HTTP requests between its members, which nothing may be encrypting. The token
/// itself opens sessions, over which KV pages are written; this, which whoever listens may learn, is derived from it
/// and does not.
#[derive(Clone, PartialEq, Eq)]
pub struct HttpToken(blake3::Hash);

impl HttpToken {
    /// From the text given to all members.
    pub fn of(secret: &str) -> Self {
        Self(blake3::derive_key("engine http 2026 cluster token", secret.as_bytes()).into())
    }

    /// As it is sent.
    pub fn header(&self) -> HeaderValue {
        // Hexadecimal digits are always a header's value.
        HeaderValue::from_str(&self.to_string()).unwrap_or_else(|_| HeaderValue::from_static(""))
    }

    /// Whether a request shows it, in a time that does not depend on how much of it is right.
    pub(crate) fn is_in(&self, headers: &HeaderMap) -> bool {
        let given = headers.get(CLUSTER_TOKEN_HEADER).map_or(&b""[..], |given| given.as_bytes());
        self.0.to_hex().as_bytes().ct_eq(given).into()
    }
}

/// As it is sent.
impl fmt::Display for HttpToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl fmt::Debug for HttpToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("HttpToken(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_neither_the_secret_nor_good_for_another() {
        let token = HttpToken::of("tea");
        let shows = |value: HeaderValue| token.is_in(&HeaderMap::from_iter([(CLUSTER_TOKEN_HEADER, value)]));
        assert!(shows(token.header()));
        assert!(!shows(HttpToken::of("coffee").header()) && !shows(HeaderValue::from_static("tea")));
        assert!(!token.is_in(&HeaderMap::new()));
        assert!(!token.header().to_str().unwrap().contains("tea") && !format!("{token:?}").contains("tea"));
    }
}
