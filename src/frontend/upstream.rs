//! A connection to a worker: HTTP/1.1 without a task of its own.

use std::{
    future::poll_fn,
    io::{self, IoSlice},
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use hyper::{
    Request, Response,
    http::{request::Parts, uri::PathAndQuery},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::timeout,
};
use ureq_proto::{
    BodyMode, Error as ProtocolError,
    client::{
        Call, RecvBodyResult, RecvResponseResult, SendRequestResult,
        state::{RecvBody, RecvResponse},
    },
};

/// How long a worker may take to accept a connection.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);
/// Bytes read at a time: many tokens' events, for when a client was slow.
const READ_BYTES: usize = 16 << 10;
/// Bytes of a request's head, at first: it grows with what a client sends.
const REQUEST_HEAD_BYTES: usize = 1 << 10;
/// Bytes of an answer's head; far above what a worker says.
const RESPONSE_HEAD_BYTES_MAX: usize = 64 << 10;
/// Bytes of a chunk's frame, or of a line after the last chunk.
const FRAME_BYTES_MAX: usize = 16 << 10;

/// A request's body: the journal of an answer to continue, if there is one, and what the client sent. Neither is
/// copied.
#[derive(Debug, Clone, Default)]
pub(super) struct Payload([Bytes; 2]);

impl Payload {
    pub(super) fn new(journal: Bytes, body: Bytes) -> Self {
        Self([journal, body])
    }

    fn len(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }
}

/// Why a connection is of no use any more.
#[derive(Debug, thiserror::Error)]
pub(super) enum BrokenError {
    /// Its end was known before anything of the request was sent.
    #[error("it had been closed before the request was sent")]
    Unsent,
    /// It ended, or the system says so.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// What came is no answer.
    #[error("what came is not HTTP: {0}")]
    Protocol(#[from] ProtocolError),
}

impl BrokenError {
    fn cut() -> Self {
        Self::Io(io::Error::new(io::ErrorKind::UnexpectedEof, "it was closed before its answer had ended"))
    }
}

/// A connection to a worker, over HTTP/1.1 as `ureq-proto` has it, which does no input and output itself. Nobody but
/// its holder works on it: the task that wants an answer's bytes is the one that reads them off the socket, so that a
/// token goes through without waking another task, and dropping it closes it.
///
/// Not hyper's client: in between its connection and its body stands a channel, and it takes the frame of a chunk apart
/// byte by byte, which for a token's event together came to half of all instructions of a frontend.
pub(super) struct Connection(TcpStream);

impl Connection {
    /// Connects to `address`, as `host:port`.
    pub(super) async fn open(address: &str) -> io::Result<Self> {
        let connect = timeout(CONNECT_TIME_MAX, TcpStream::connect(address));
        let stream = connect.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    /// Whether it has ended while nobody used it, or says what nobody asked for.
    pub(super) fn is_closed(&self) -> bool {
        !matches!(self.0.try_read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Sends a request and waits for the head of its answer, which may come before all of the request is sent.
    pub(super) async fn send(self, request: Request<Payload>) -> Result<Exchange, BrokenError> {
        if self.is_closed() {
            return Err(BrokenError::Unsent);
        }
        let (parts, payload) = request.into_parts();
        let (head, mut call) = (head(&parts, payload.len()), expected()?);
        let [journal, body] = payload.0;
        let mut unsent = Bytes::from(head).chain(journal).chain(body);
        let (mut stream, mut received) = (self.0, Vec::new());
        let mut refused = None;
        let response = poll_fn(|context| {
            while unsent.has_remaining() && refused.is_none() {
                match write(&mut stream, &mut unsent, context) {
                    Poll::Ready(Ok(())) => {}
                    // There may be an answer all the same.
                    Poll::Ready(Err(error)) => refused = Some(error),
                    Poll::Pending => break,
                }
            }
            loop {
                match ready!(read(&mut stream, &mut received, context)) {
                    Ok(0) => {
                        return Poll::Ready(Err(refused.take().map_or_else(BrokenError::cut, BrokenError::Io)));
                    }
                    Ok(_) => {}
                    Err(error) => return Poll::Ready(Err(error.into())),
                }
                if let Some(response) = answered(&mut call, &mut received)? {
                    return Poll::Ready(Ok(response));
                }
            }
        })
        .await?;
        let (body, may_go_on) = match call.proceed() {
            Some(RecvResponseResult::RecvBody(call)) => (Some(call), false),
            Some(RecvResponseResult::Cleanup(call)) => (None, !call.must_close_connection()),
            Some(RecvResponseResult::Redirect(_)) | None => (None, false),
        };
        Ok(Exchange { stream, is_sent: !unsent.has_remaining(), received, body, may_go_on, response })
    }
}

/// A request's head as it is sent. Written here, since `ureq-proto` refuses keys beyond ASCII.
fn head(parts: &Parts, body_bytes: usize) -> Vec<u8> {
    let mut head = Vec::with_capacity(REQUEST_HEAD_BYTES);
    let target = parts.uri.path_and_query().map_or("/", PathAndQuery::as_str);
    for piece in [parts.method.as_str(), " ", target, " HTTP/1.1\r\n"] {
        head.extend_from_slice(piece.as_bytes());
    }
    for (name, value) in &parts.headers {
        for piece in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            head.extend_from_slice(piece);
        }
    }
    head.extend_from_slice(format!("content-length: {body_bytes}\r\n\r\n").as_bytes());
    head
}

/// What an answer is understood with. Of its request it matters only that it is neither HEAD nor CONNECT.
fn expected() -> Result<Call<RecvResponse>, BrokenError> {
    let mut call = Call::new(Request::new(()))?.proceed();
    // `GET / HTTP/1.1` and a line's end, which nobody gets.
    call.write(&mut [0; 32])?;
    match call.proceed()? {
        Some(SendRequestResult::RecvResponse(call)) => Ok(call),
        _ => Err(io::Error::other("a request without a body has one").into()),
    }
}

/// Sends some of what there is.
fn write(stream: &mut TcpStream, data: &mut impl Buf, context: &mut Context<'_>) -> Poll<io::Result<()>> {
    let mut slices = [IoSlice::new(&[]); 3];
    let filled = data.chunks_vectored(&mut slices);
    let written = ready!(Pin::new(stream).poll_write_vectored(context, &slices[..filled]))?;
    if written == 0 {
        return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
    }
    data.advance(written);
    Poll::Ready(Ok(()))
}

/// Appends what comes, and returns how much that is: nothing at the end.
fn read(stream: &mut TcpStream, received: &mut Vec<u8>, context: &mut Context<'_>) -> Poll<io::Result<usize>> {
    let mut piece = [MaybeUninit::uninit(); READ_BYTES];
    let mut piece = ReadBuf::uninit(&mut piece);
    ready!(Pin::new(stream).poll_read(context, &mut piece))?;
    received.extend_from_slice(piece.filled());
    Poll::Ready(Ok(piece.filled().len()))
}

/// Takes an answer's head, if all of it is there, off what has come.
fn answered(call: &mut Call<RecvResponse>, received: &mut Vec<u8>) -> Result<Option<Response<()>>, BrokenError> {
    loop {
        let (used, response) = call.try_response(received, false)?;
        received.drain(..used);
        if response.is_some() {
            return Ok(response);
        }
        if used == 0 {
            return match received.len() {
                ..=RESPONSE_HEAD_BYTES_MAX => Ok(None),
                _ => Err(io::Error::other("the head of its answer has no end").into()),
            };
        }
        // That was an interim one.
    }
}

/// An answer whose head has come.
pub(super) struct Exchange {
    stream: TcpStream,
    /// The request has gone out whole.
    is_sent: bool,
    /// What has come and is not understood yet: mostly nothing, else the beginning of a chunk's frame.
    received: Vec<u8>,
    /// `None` once the body has ended.
    body: Option<Call<RecvBody>>,
    /// The body has ended, and nothing says that the connection is to be closed then.
    may_go_on: bool,
    pub(super) response: Response<()>,
}

impl Exchange {
    /// The next bytes of the answer; `None` at its end.
    pub(super) fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, BrokenError>>> {
        Poll::Ready(ready!(self.poll_body(context)).transpose())
    }

    fn poll_body(&mut self, context: &mut Context<'_>) -> Poll<Result<Option<Bytes>, BrokenError>> {
        loop {
            let Some(body) = &mut self.body else { return Poll::Ready(Ok(None)) };
            if !self.received.is_empty() {
                let data = unframed(body, &mut self.received)?;
                if !data.is_empty() {
                    return Poll::Ready(Ok(Some(data)));
                }
                // A frame's beginning, which is waited for the end of.
                if self.received.len() > FRAME_BYTES_MAX {
                    return Poll::Ready(Err(io::Error::other("a chunk's frame has no end").into()));
                }
            }
            let until_closed = body.body_mode() == BodyMode::CloseDelimited;
            if body.can_proceed() && !until_closed {
                self.end();
            } else if ready!(read(&mut self.stream, &mut self.received, context))? == 0 {
                if !until_closed {
                    return Poll::Ready(Err(BrokenError::cut()));
                }
                self.end();
            }
        }
    }

    /// All of the body has come.
    fn end(&mut self) {
        if let Some(RecvBodyResult::Cleanup(call)) = self.body.take().and_then(Call::<RecvBody>::proceed) {
            self.may_go_on = !call.must_close_connection();
        }
    }

    /// The whole body.
    pub(super) async fn collect(&mut self) -> Result<Bytes, BrokenError> {
        let mut all = Vec::new();
        while let Some(data) = poll_fn(|context| self.poll_data(context)).await {
            all.extend_from_slice(&data?);
        }
        Ok(all.into())
    }

    /// The connection, for another request. The body has to be at its end.
    pub(super) fn into_connection(self) -> Option<Connection> {
        (self.is_sent && self.may_go_on && self.received.is_empty()).then_some(Connection(self.stream))
    }
}

/// Takes what there is of a body off what has come.
fn unframed(body: &mut Call<RecvBody>, received: &mut Vec<u8>) -> Result<Bytes, ProtocolError> {
    let mut data = vec![0; received.len()];
    let (used, filled) = body.read(received, &mut data)?;
    received.drain(..used);
    data.truncate(filled);
    Ok(data.into())
}

#[cfg(test)]
mod tests {
    use hyper::header;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::frontend::fake::{bound, is_asked, request, say_ok};

    const TIME_MAX: Duration = Duration::from_secs(10);

    /// Sends a request to a worker that answers it in these pieces and closes the connection. Returns the answer's
    /// body, and whether another request might follow.
    async fn answered_with(pieces: &[&str]) -> Result<(String, bool), BrokenError> {
        let (listener, worker) = bound().await;
        let answering = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.set_nodelay(true).unwrap();
            assert!(is_asked(&mut stream).await);
            for piece in pieces {
                stream.write_all(piece.as_bytes()).await.unwrap();
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let asking = async {
            let mut exchange = Connection::open(&worker.card.address).await.unwrap().send(request()).await?;
            let body = exchange.collect().await?;
            Ok((String::from_utf8(body.to_vec()).unwrap(), exchange.into_connection().is_some()))
        };
        timeout(TIME_MAX, async { tokio::join!(asking, answering).0 }).await.expect("an end")
    }

    #[tokio::test]
    async fn a_body_ends_as_its_head_says() {
        for (answer, body, goes_on) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", "hello", true),
            ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n", "", true),
            ("HTTP/1.1 204 No Content\r\n\r\n", "", true),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n", "hello", true),
            ("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx-sum: 1\r\n\r\n", "", true),
            ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx", "x", true),
            ("HTTP/1.1 503 No\r\nconnection: close\r\ncontent-length: 1\r\n\r\nx", "x", false),
            ("HTTP/1.0 200 OK\r\ncontent-length: 1\r\n\r\nx", "x", false),
            ("HTTP/1.1 200 OK\r\n\r\nuntil it closes", "until it closes", false),
            ("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\nx, and more", "x", false),
        ] {
            assert_eq!(answered_with(&[answer]).await.unwrap(), (body.into(), goes_on), "{answer}");
            for cut in 1..answer.len() {
                let (body_now, _) = answered_with(&[&answer[..cut], &answer[cut..]]).await.unwrap();
                assert_eq!(body_now, body, "{answer}, {cut}");
            }
        }
    }

    #[tokio::test]
    async fn what_is_cut_off_or_is_no_answer_is_an_error() {
        for answer in [
            "",
            "HTTP/1.1 200",
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhell",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
            "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nhello\r\n",
            "SSH-2.0-OpenSSH_9.2\r\n\r\n",
        ] {
            assert!(answered_with(&[answer]).await.is_err(), "{answer}");
        }
        let error = answered_with(&[""]).await.unwrap_err();
        assert_eq!(error.to_string(), "it was closed before its answer had ended");
        let endless = format!("HTTP/1.1 200 OK\r\nx-filler: {}", "x".repeat(2 * RESPONSE_HEAD_BYTES_MAX));
        assert!(answered_with(&[&endless]).await.is_err());
    }

    #[tokio::test]
    async fn a_frame_without_an_end_is_not_waited_for() {
        let (listener, worker) = bound().await;
        let answering = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(is_asked(&mut stream).await);
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
            // It may have had enough of it by the end.
            let _ = stream.write_all(&[b'1'; 4 * FRAME_BYTES_MAX]).await;
            stream
        };
        let connection = Connection::open(&worker.card.address).await.unwrap();
        let (exchange, _stream) = tokio::join!(connection.send(request()), answering);
        let mut exchange = exchange.unwrap();
        assert!(timeout(TIME_MAX, exchange.collect()).await.expect("an end").is_err());
    }

    #[tokio::test]
    async fn a_request_goes_out_whole_however_long_and_an_answer_may_come_before() {
        let long = "x".repeat(3 * REQUEST_HEAD_BYTES);
        let (journal, body) = (Bytes::from(vec![b'j'; 1 << 20]), Bytes::from(vec![b'b'; 8 << 20]));
        let request = || {
            let payload = Payload::new(journal.clone(), body.clone());
            let request = Request::post("/a?b").header(header::HOST, "a").header("x-long", &long);
            request.header(header::AUTHORIZATION, "Bearer schlüssel".as_bytes()).body(payload).unwrap()
        };
        for reads_it in [true, false] {
            let (listener, worker) = bound().await;
            let answering = async {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut asked = vec![0; 64 << 10];
                let mut read = Vec::new();
                if reads_it {
                    while !read.ends_with(&body) {
                        let filled = stream.read(&mut asked).await.unwrap();
                        read.extend_from_slice(&asked[..filled]);
                    }
                }
                say_ok(&mut stream).await;
                (read, stream)
            };
            let connection = Connection::open(&worker.card.address).await.unwrap();
            let (exchange, (read, _stream)) = tokio::join!(connection.send(request()), answering);
            let mut exchange = exchange.unwrap();
            assert_eq!(exchange.collect().await.unwrap(), "ok");
            assert_eq!(exchange.into_connection().is_some(), reads_it);
            if reads_it {
                let length = journal.len() + body.len();
                let head = format!(
                    "POST /a?b HTTP/1.1\r\nhost: a\r\nx-long: {long}\r\nauthorization: Bearer schlüssel\r\n\
                     content-length: {length}\r\n\r\n"
                );
                assert!(read.starts_with(head.as_bytes()));
                assert!(read[head.len()..] == [&journal[..], &body[..]].concat());
            }
        }
    }

    #[tokio::test]
    async fn a_kept_connection_that_its_worker_has_closed_fails_at_once() {
        let (listener, worker) = bound().await;
        let connecting = tokio::spawn(async move { Connection::open(&worker.card.address).await.unwrap() });
        let (mut stream, _) = listener.accept().await.unwrap();
        let answering = tokio::spawn(async move {
            assert!(is_asked(&mut stream).await);
            say_ok(&mut stream).await;
            stream
        });
        let mut exchange = connecting.await.unwrap().send(request()).await.unwrap();
        assert_eq!(exchange.collect().await.unwrap(), "ok");
        let kept = exchange.into_connection().unwrap();
        // It leaves, in good order, while nobody uses the connection.
        let mut stream = answering.await.unwrap();
        stream.shutdown().await.unwrap();
        drop(stream);
        tokio::time::sleep(Duration::from_millis(50)).await;
        let again = timeout(TIME_MAX, kept.send(request())).await.expect("an answer of some kind");
        assert!(matches!(again, Err(BrokenError::Unsent)));
    }
}
