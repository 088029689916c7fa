//! Request bodies, read within bounds of size, time and memory.

use std::{sync::Arc, time::Duration};

use axum::{
    body::{Body, BodyDataStream},
    extract::Request,
    http::{HeaderMap, StatusCode, header},
};
use futures::StreamExt;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout, timeout_at},
};

use super::{ApiError, shown};

/// Longest pause between two pieces of a body.
const BODY_PAUSE_MAX: Duration = Duration::from_secs(30);
/// How long a body may take, however steadily it trickles: 16 MiB in this time are 56 KB/s.
const BODY_TIME_MAX: Duration = Duration::from_secs(300);
/// Bodies up to this size need no reservation to be kept in memory, and are parsed where they are read.
pub(crate) const SMALL_BODY_BYTES: usize = 64 << 10;
/// What the larger ones may occupy together.
const BODY_MEMORY_BYTES: usize = 256 << 20;
/// How much of a body that is too large is read and thrown away, so that the client gets to read the answer: one that
/// is still writing when the connection closes sees a reset instead.
const DISCARD_BYTES_MAX: u64 = 512 << 20;
/// How long that may take.
const DISCARD_TIME_MAX: Duration = Duration::from_secs(5);

/// Memory for bodies, or for what else is kept of requests. Small bodies are bounded by the number of connections.
/// Cheap to clone.
#[derive(Clone)]
pub(crate) struct MemoryBudget {
    free: Arc<Semaphore>,
    bytes: usize,
}

impl MemoryBudget {
    /// For bodies that are being read and parsed: room for a few of `body_bytes_max` at least.
    pub(crate) fn new(body_bytes_max: usize) -> Self {
        Self::of(BODY_MEMORY_BYTES.max(body_bytes_max.saturating_mul(4)))
    }

    /// So many bytes.
    pub(crate) fn of(bytes: usize) -> Self {
        let bytes = bytes.min(Semaphore::MAX_PERMITS);
        Self { free: Arc::new(Semaphore::new(bytes)), bytes }
    }

    /// Reserves so many bytes more, if they are free. Nobody waits for them: whoever has some already would wait for
    /// those who wait for it.
    pub(crate) fn reserve(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        self.free.clone().try_acquire_many_owned(u32::try_from(bytes).ok()?).ok()
    }

    /// Bytes that are kept at the moment.
    pub(crate) fn used(&self) -> usize {
        self.bytes - self.free.available_permits()
    }
}

/// A body in memory, and the reservation that lets it stay there.
pub(crate) struct Received {
    pub(crate) bytes: Vec<u8>,
    pub(crate) memory: Option<OwnedSemaphorePermit>,
}

/// What a body may take.
struct BodyLimits<'a> {
    bytes: usize,
    pause: Duration,
    time: Duration,
    memory: &'a MemoryBudget,
}

impl<'a> BodyLimits<'a> {
    fn new(bytes: usize, memory: &'a MemoryBudget) -> Self {
        Self { bytes, pause: BODY_PAUSE_MAX, time: BODY_TIME_MAX, memory }
    }
}

/// Reads a body of at most `limit` bytes into `memory`.
pub(crate) async fn read_body(
    headers: &HeaderMap,
    body: Body,
    limit: usize,
    memory: &MemoryBudget,
) -> Result<Received, ApiError> {
    receive(headers, body, &BodyLimits::new(limit, memory)).await
}

/// How the body is compressed, if it is: nothing here reads such a one.
fn encoding(headers: &HeaderMap) -> Option<&str> {
    let values = headers.get_all(header::CONTENT_ENCODING).iter();
    let mut values = values.map(|value| value.to_str().unwrap_or("?").trim());
    values.find(|value| !value.is_empty() && !value.eq_ignore_ascii_case("identity"))
}

async fn receive(headers: &HeaderMap, body: Body, limits: &BodyLimits<'_>) -> Result<Received, ApiError> {
    let limit = limits.bytes;
    if let Some(encoding) = encoding(headers) {
        discard(headers, body).await;
        let encoding = shown(encoding);
        let message = format!("Send the request body uncompressed, without the header 'Content-Encoding: {encoding}'");
        return Err(ApiError::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type", message));
    }
    let declared = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|bytes| bytes > limit as u64) {
        discard(headers, body).await;
        return Err(too_large(limit));
    }
    let mut pieces = body.into_data_stream();
    // What was declared has yet to come.
    let mut bytes = Vec::with_capacity((declared.unwrap_or(0) as usize).min(SMALL_BODY_BYTES));
    let mut memory: Option<OwnedSemaphorePermit> = None;
    let end = Instant::now() + limits.time;
    loop {
        match timeout_at(end.min(Instant::now() + limits.pause), pieces.next()).await {
            Err(_) => {
                let message = "The request body did not arrive in time";
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "body_timeout", message));
            }
            Ok(None) => return Ok(Received { bytes, memory }),
            Ok(Some(Err(error))) => {
                let message = format!("The request body could not be read: {error}");
                return Err(ApiError::new(StatusCode::BAD_REQUEST, "body_unreadable", message));
            }
            Ok(Some(Ok(piece))) if bytes.len() + piece.len() > limit => {
                discard_rest(&mut pieces).await;
                return Err(too_large(limit));
            }
            Ok(Some(Ok(piece))) => {
                let total = bytes.len() + piece.len();
                if total > SMALL_BODY_BYTES {
                    let missing = total - memory.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
                    let Some(more) = limits.memory.reserve(missing) else {
                        discard_rest(&mut pieces).await;
                        let message = "Too many large request bodies at a time; try again later";
                        return Err(ApiError::new(StatusCode::TOO_MANY_REQUESTS, "bodies_too_large", message));
                    };
                    match &mut memory {
                        Some(memory) => memory.merge(more),
                        None => memory = Some(more),
                    }
                }
                bytes.extend_from_slice(&piece);
            }
        }
    }
}

fn too_large(limit: usize) -> ApiError {
    let message = format!("The request body is larger than {limit} bytes, the limit of this server (--max-body-size)");
    ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "body_too_large", message)
}

/// Reads what a request that is refused unread still sends.
pub(crate) async fn discard_body(request: Request) {
    let (head, body) = request.into_parts();
    discard(&head.headers, body).await;
}

/// Reads a body that nobody wants, within limits, so that its sender gets to read the answer.
pub(crate) async fn discard(headers: &HeaderMap, body: Body) {
    // A client that waits for "100 Continue" has sent nothing: it is told at once.
    if !headers.contains_key(header::EXPECT) {
        discard_rest(&mut body.into_data_stream()).await;
    }
}

async fn discard_rest(pieces: &mut BodyDataStream) {
    let read_all = async {
        let mut discarded = 0;
        while let Some(Ok(piece)) = pieces.next().await {
            discarded += piece.len() as u64;
            if discarded > DISCARD_BYTES_MAX {
                break;
            }
        }
    };
    // Out of time or not: the answer goes out now.
    let _ = timeout(DISCARD_TIME_MAX, read_all).await;
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn limits(memory: &MemoryBudget) -> BodyLimits<'_> {
        BodyLimits::new(1 << 20, memory)
    }

    /// Pieces of a body, each after what it waits for.
    fn body<F: Future<Output = ()> + Send + 'static>(pieces: usize, size: usize, wait: fn() -> F) -> Body {
        Body::from_stream(futures::stream::iter(0..pieces).then(move |_| async move {
            wait().await;
            Ok::<_, std::io::Error>(vec![b' '; size])
        }))
    }

    async fn refused(body: Body, limits: BodyLimits<'_>) -> StatusCode {
        let refused = receive(&HeaderMap::new(), body, &limits).await.err().expect("refused");
        axum::response::IntoResponse::into_response(refused).status()
    }

    #[tokio::test]
    async fn a_body_that_pauses_or_trickles_is_given_up() {
        let memory = MemoryBudget::new(1 << 20);
        let pause = BodyLimits { pause: Duration::from_millis(1), ..limits(&memory) };
        assert_eq!(refused(body(9, 1, std::future::pending), pause).await, StatusCode::REQUEST_TIMEOUT);
        let trickle = || tokio::time::sleep(Duration::from_millis(1));
        let time = BodyLimits { time: Duration::from_millis(20), ..limits(&memory) };
        assert_eq!(refused(body(usize::MAX, 1, trickle), time).await, StatusCode::REQUEST_TIMEOUT);
    }

    #[tokio::test]
    async fn a_compressed_body_is_not_taken_for_json() {
        let memory = MemoryBudget::new(1 << 20);
        for (encoding, status) in
            [("gzip", 415), ("identity, br", 415), ("\u{fc}", 415), ("Identity", 200), ("", 200), (" identity ", 200)]
        {
            let encoding = HeaderValue::from_bytes(encoding.as_bytes()).unwrap();
            let headers = HeaderMap::from_iter([(header::CONTENT_ENCODING, encoding.clone())]);
            let received = receive(&headers, Body::from("{}"), &limits(&memory)).await;
            let refused = received.err().map(axum::response::IntoResponse::into_response);
            assert_eq!(refused.map_or(200, |refused| refused.status().as_u16()), status, "{encoding:?}");
        }
    }

    #[tokio::test]
    async fn large_bodies_share_a_bounded_memory_and_give_it_back() {
        let memory = MemoryBudget::of(200 << 10);
        let ready = || std::future::ready(());
        let large = || body(100, 1 << 10, ready);
        let first = receive(&HeaderMap::new(), large(), &limits(&memory)).await.expect("there is room");
        let second = receive(&HeaderMap::new(), large(), &limits(&memory)).await.expect("there is room");
        assert_eq!((first.bytes.len(), memory.used()), (100 << 10, 200 << 10));
        assert_eq!(refused(large(), limits(&memory)).await, StatusCode::TOO_MANY_REQUESTS);
        let small = receive(&HeaderMap::new(), body(64, 1 << 10, ready), &limits(&memory)).await;
        assert!(small.is_ok(), "small ones need no reservation");
        drop((first, second));
        assert_eq!(memory.used(), 0);
        assert_eq!(refused(body(1 << 20, 2, ready), limits(&memory)).await, StatusCode::TOO_MANY_REQUESTS);
        assert_eq!(memory.used(), 0);
    }
}
