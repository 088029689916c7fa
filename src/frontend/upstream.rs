use std::{
    convert::Infallible,
    future::{Future, poll_fn},
    io, mem,
    pin::{Pin, pin},
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use hyper::{
    Request, Response,
    body::{Body, Frame, Incoming, SizeHint},
    client::conn::http1,
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};

/// How long a worker may take to accept a connection.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(3);

/// A request's body: the journal of an answer to continue, if there is one, and what the client sent. Neither is
/// copied.
#[derive(Debug, Clone, Default)]
pub(super) struct Payload([Bytes; 2]);

impl Payload {
    pub(super) fn new(journal: Bytes, body: Bytes) -> Self {
        Self([journal, body])
    }
}

impl Body for Payload {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let next = self.0.iter_mut().find(|piece| !piece.is_empty()).map(mem::take);
        Poll::Ready(next.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.iter().all(Bytes::is_empty)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0.iter().map(|piece| piece.len() as u64).sum())
    }
}

/// A connection to a worker. Nobody but its holder works on it: the task that wants an answer's bytes is the one that
/// reads them off the socket, so that a token goes through without waking another task, and dropping it closes it.
pub(super) struct Connection {
    sender: http1::SendRequest<Payload>,
    /// None once it has ended. It is dropped then, since that is what fails requests which nobody will send any more:
    /// one that has ended and is still there takes them, and they wait for ever.
    driver: Option<http1::Connection<TokioIo<TcpStream>, Payload>>,
}

impl Connection {
    /// Connects to `address`, as `host:port`.
    pub(super) async fn open(address: &str) -> io::Result<Self> {
        let connect = timeout(CONNECT_TIME_MAX, TcpStream::connect(address));
        let stream = connect.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        stream.set_nodelay(true)?;
        let handshake = http1::Builder::new().handshake(TokioIo::new(stream));
        let (sender, driver) = handshake.await.map_err(io::Error::other)?;
        Ok(Self { sender, driver: Some(driver) })
    }

    /// Whether it has ended while nobody used it.
    pub(super) fn is_closed(&mut self) -> bool {
        // Whoever uses it next waits for it with a waker of its own.
        drive(&mut self.driver, &mut Context::from_waker(Waker::noop()));
        self.driver.is_none()
    }

    /// Sends a request and waits for the head of its answer.
    pub(super) async fn send(mut self, request: Request<Payload>) -> Result<Exchange, hyper::Error> {
        poll_fn(|context| {
            drive(&mut self.driver, context);
            self.sender.poll_ready(context)
        })
        .await?;
        let response = {
            let mut response = pin!(self.sender.send_request(request));
            let driver = &mut self.driver;
            poll_fn(|context| {
                drive(driver, context);
                response.as_mut().poll(context)
            })
            .await?
        };
        Ok(Exchange { connection: self, response })
    }
}

/// Works on a connection, if it has not ended. How it ended is told to whoever waits for the answer.
fn drive<C: Future + Unpin>(driver: &mut Option<C>, context: &mut Context<'_>) {
    if driver.as_mut().is_some_and(|driver| Pin::new(driver).poll(context).is_ready()) {
        *driver = None;
    }
}

/// An answer whose head has come.
pub(super) struct Exchange {
    connection: Connection,
    pub(super) response: Response<Incoming>,
}

impl Exchange {
    /// The next bytes of the answer; `None` at its end.
    pub(super) fn poll_data(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, hyper::Error>>> {
        if let Poll::Ready(data) = self.poll_body(context) {
            return Poll::Ready(data);
        }
        drive(&mut self.connection.driver, context);
        // What that has read, or why the connection ended.
        self.poll_body(context)
    }

    fn poll_body(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Bytes, hyper::Error>>> {
        loop {
            match ready!(Pin::new(self.response.body_mut()).poll_frame(context)) {
                None => return Poll::Ready(None),
                Some(Err(error)) => return Poll::Ready(Some(Err(error))),
                // Trailers mean nothing here.
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        return Poll::Ready(Some(Ok(data)));
                    }
                }
            }
        }
    }

    /// The whole body.
    pub(super) async fn collect(&mut self) -> Result<Bytes, hyper::Error> {
        let mut all: Vec<u8> = Vec::new();
        let mut first: Option<Bytes> = None;
        while let Some(data) = poll_fn(|context| self.poll_data(context)).await {
            let data = data?;
            match first.take() {
                None if all.is_empty() => first = Some(data),
                None => all.extend_from_slice(&data),
                Some(piece) => {
                    all.extend_from_slice(&piece);
                    all.extend_from_slice(&data);
                }
            }
        }
        Ok(first.unwrap_or_else(|| all.into()))
    }

    /// The connection, for another request. The body has to be at its end.
    pub(super) fn into_connection(self) -> Option<Connection> {
        self.connection.driver.is_some().then_some(self.connection)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::frontend::fake::{bound, is_asked, request, say_ok};

    const TIME_MAX: Duration = Duration::from_secs(10);

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
        assert!(again.is_err());
    }
}
