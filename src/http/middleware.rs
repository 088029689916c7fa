use std::sync::Arc;

use axum::{
    extract::{Request, State},
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use subtle::ConstantTimeEq;
use uuid::Uuid;

use super::{ApiError, body::discard_body};

/// Header with a request's id, in requests and in answers.
pub(crate) static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest request id that is taken over from a client.
const REQUEST_ID_BYTES_MAX: usize = 128;

/// The client's own id, if it is sensible, or a new one.
pub(crate) fn request_id(request: &Request) -> HeaderValue {
    let sensible = |id: &&HeaderValue| {
        let bytes = id.as_bytes();
        !bytes.is_empty() && bytes.len() <= REQUEST_ID_BYTES_MAX && bytes.iter().all(u8::is_ascii_graphic)
    };
    let fresh = || HeaderValue::from_str(&format!("req-{}", Uuid::new_v4().simple())).ok();
    let given = request.headers().get(&REQUEST_ID).filter(sensible).cloned();
    given.or_else(fresh).unwrap_or(HeaderValue::from_static("req"))
}

/// Lets requests with one of the keys pass; all, if there are none.
pub(crate) async fn require_key(State(keys): State<Arc<[String]>>, request: Request, next: Next) -> Response {
    // A browser asks for permission without the key.
    if keys.is_empty() || request.method() == Method::OPTIONS {
        return next.run(request).await;
    }
    let bearer = request.headers().get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.as_bytes().split_at_checked(7)?;
        scheme.eq_ignore_ascii_case(b"bearer ").then_some(key)
    });
    let message = match bearer {
        Some(key) if is_one_of(key, &keys) => return next.run(request).await,
        Some(_) => "Incorrect API key provided",
        None => "You didn't provide an API key; send it as 'Authorization: Bearer KEY'",
    };
    discard_body(request).await;
    ApiError::new(StatusCode::UNAUTHORIZED, "invalid_api_key", message).into_response()
}

/// Compares in a time that depends neither on where the key differs nor on how long it is: digests of all are compared.
fn is_one_of(key: &[u8], keys: &[String]) -> bool {
    let digest = blake3::hash(key);
    let equal = keys.iter().map(|known| blake3::hash(known.as_bytes()).as_bytes().ct_eq(digest.as_bytes()));
    equal.fold(subtle::Choice::from(0), |any, one| any | one).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_of_the_keys_opens_and_nothing_else_does() {
        let keys = ["one".to_owned(), "two".to_owned()];
        assert!(is_one_of(b"one", &keys));
        assert!(is_one_of(b"two", &keys));
        assert!(!is_one_of(b"", &keys));
        assert!(!is_one_of(b"on", &keys));
    }
}
