//! The HTTP server under every API here: it listens, serves connections, and drains them at the end.

use std::{convert::Infallible, future::Future, io, mem, net::SocketAddr, sync::Arc, time::Duration};

use axum::{Router, body::Body, extract::Request, response::Response};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::yield_now,
    time::{sleep, timeout},
};
use tower::ServiceExt;

use super::{
    patient::Patient,
    places::{Answering, Place, Places},
    threads::ConnectionThreads,
};

/// How long a client may take to send a request's headers, or leave a connection idle.
const HEADERS_TIME_MAX: Duration = Duration::from_secs(75);
/// How long a client may take none of an answer that is ready for it.
pub(crate) const WRITE_STALL_MAX: Duration = Duration::from_secs(60);
/// Bytes of an answer that wait for its client beyond what the system takes: whoever reads slowly gets the steps after
/// these in one piece. A request's head has as much room.
const BUFFER_BYTES_MAX: usize = 64 << 10;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 1024;
/// How long connections may take to end once everything has been answered.
const CLOSE_TIME_MAX: Duration = Duration::from_secs(5);
/// Pause after the system refused a connection for lack of something.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection counts as used before its first request: whoever has just come is not sent away for the next.
const FIRST_REQUEST_TIME: Duration = Duration::from_secs(1);

/// Connections that a server has beyond the requests it takes, unless a flag says: for those that are refused, and for
/// probes. The flags' help repeats the number.
pub(crate) const CONNECTIONS_BESIDE_REQUESTS: usize = 512;

/// A server's limits and threads.
#[derive(Debug)]
pub struct ServerConfig {
    /// Connections at a time; a further one gets the place of one that is idle, or waits to be accepted.
    pub connections_max: usize,
    /// How long running answers may take to end once the server is told to leave.
    pub drain_timeout: Duration,
    /// Threads that serve connections; without any, the runtime that accepts them does.
    pub threads: ConnectionThreads,
}

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Host and port name no address.
    #[error("cannot resolve --host {host}: {source}")]
    Resolve {
        /// As given.
        host: String,
        /// What the resolver said.
        source: io::Error,
    },
    /// Another program listens there.
    #[error("{address} is in use by another program; choose another port with --port, or stop that program")]
    InUse {
        /// The address.
        address: SocketAddr,
    },
    /// The system refused the address.
    #[error("cannot listen on {address}: {source}; choose another --host or --port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// An address that is taken but not listened on: connections are refused until the model is loaded, while an address
/// that cannot be had is found out before.
pub struct Bound {
    socket: Socket,
    address: SocketAddr,
}

/// Takes an address; port 0 takes any free one.
pub async fn bind(host: &str, port: u16) -> Result<Bound, ServerError> {
    let resolve = |source| ServerError::Resolve { host: host.to_owned(), source };
    let address = tokio::net::lookup_host((host, port)).await.map_err(resolve)?.next();
    let address = address.ok_or_else(|| resolve(io::Error::other("no such host")))?;
    let socket = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        // A server that was just stopped leaves connections behind that would block its address for a minute.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        Ok(socket)
    };
    Ok(Bound { socket: socket().map_err(|source| ServerError::listen(address, source))?, address })
}

impl Bound {
    /// Starts to listen.
    pub fn listen(self) -> Result<TcpListener, ServerError> {
        let listen = self.socket.listen(BACKLOG).and_then(|()| TcpListener::from_std(self.socket.into()));
        listen.map_err(|source| ServerError::listen(self.address, source))
    }
}

impl ServerError {
    fn listen(address: SocketAddr, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::AddrInUse => Self::InUse { address },
            _ => Self::Listen { address, source },
        }
    }
}

/// Serves `router` until `shutdown` resolves; then `drain` is to refuse new requests, and to resolve when the running
/// ones have ended.
pub(crate) async fn serve_router(
    listener: TcpListener,
    router: Router,
    config: ServerConfig,
    shutdown: impl Future<Output = ()>,
    drain: impl Future<Output = ()>,
) {
    let close = watch::Sender::new(());
    let accepting = accept(&listener, router, &config, &close);
    let draining = async {
        shutdown.await;
        tracing::info!("draining: no new requests are taken; a second signal leaves at once");
        if timeout(config.drain_timeout, drain).await.is_err() {
            tracing::warn!("some answers did not end within --shutdown-timeout and are broken off");
        }
    };
    tokio::select! {
        () = accepting => {}
        () = draining => {}
    }
    drop(listener);
    // Each connection ends when its current answer is out; those that take no more of it are cut.
    close.send_replace(());
    let _ = timeout(CLOSE_TIME_MAX, close.closed()).await;
}

/// Accepts connections for ever.
async fn accept(listener: &TcpListener, router: Router, config: &ServerConfig, close: &watch::Sender<()>) {
    let places = Places::new(config.connections_max);
    let mut refusals = Refusals::default();
    loop {
        // Accepted first: an idle connection need not leave before there is somebody to come.
        let accepted = listener.accept().await;
        let is_news = refusals.is_news(accepted.is_err());
        match accepted {
            Ok((stream, _)) => {
                let place = places.take().await;
                let (router, closing) = (router.clone(), close.subscribe());
                let serve = |stream| connection(stream, place, router, closing);
                if let Err(error) = config.threads.serve(stream, serve) {
                    tracing::warn!(%error, "cannot serve a connection");
                }
            }
            Err(error) => {
                // A connection that broke before it was accepted, or no file descriptors left: the latter passes only
                // when others close.
                if is_news {
                    tracing::warn!(%error, "cannot accept connections; trying again until it works");
                }
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// The system's refusals to accept connections. They come ten times a second while it lacks something, and are told
/// once, until it accepts again.
#[derive(Debug, Default)]
struct Refusals {
    last: bool,
}

impl Refusals {
    /// Takes what became of a connection, and returns whether it is a refusal to tell of.
    fn is_news(&mut self, refused: bool) -> bool {
        !mem::replace(&mut self.last, refused) && refused
    }
}

async fn connection(stream: TcpStream, place: Place, router: Router, mut closing: watch::Receiver<()>) {
    // A token's event goes out when it is written: it must not wait for the previous one to be acknowledged.
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "cannot set TCP_NODELAY");
    }
    // What the poller has not told of yet is heard first.
    let leaving = async move {
        // Nobody takes it back: it changes, or whoever would change it is gone.
        let _ = closing.changed().await;
        yield_now().await;
    };
    tokio::pin!(leaving);
    let place = Arc::new(place);
    let working = place.clone();
    let service = service_fn(move |request: Request<Incoming>| {
        let (working, answer) = (working.work(), router.clone().oneshot(request.map(Body::new)));
        async move {
            let response: Response = answer.await?;
            Ok::<_, Infallible>(response.map(|body| Answering::new(body, working)))
        }
    });
    let mut builder = http1::Builder::new();
    // A token's event and its frame are little: together in one buffer they are written for less than as a list of
    // three.
    builder.timer(TokioTimer::new()).header_read_timeout(HEADERS_TIME_MAX);
    builder.writev(false).max_buf_size(BUFFER_BYTES_MAX);
    let stream = Patient::new(stream, WRITE_STALL_MAX);
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let first_request = sleep(FIRST_REQUEST_TIME);
    tokio::pin!(first_request);
    let (mut told, mut settled) = (false, false);
    loop {
        tokio::select! {
            // What has come is read, and then answered, before anybody is told to leave.
            biased;
            ended = &mut connection => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "connection ended");
                }
                return;
            }
            () = &mut leaving, if !told => {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
            () = &mut first_request, if !settled => {
                settled = true;
                place.has_had_time();
            }
            () = place.asked_to_leave(), if !told => {
                told = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    async fn asks(stream: &mut TcpStream) {
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        while !answer.ends_with(b"hello") {
            assert!(stream.read_buf(&mut answer).await.unwrap() > 0, "the connection ended");
        }
    }

    /// A server that says hello to so many connections at a time.
    async fn with_places(connections_max: usize) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { "hello" }));
        let config =
            ServerConfig { connections_max, drain_timeout: Duration::ZERO, threads: ConnectionThreads::default() };
        tokio::spawn(serve_router(listener, router, config, std::future::pending(), std::future::ready(())));
        address
    }

    #[test]
    fn refusals_are_told_once_until_a_connection_is_accepted() {
        let mut refusals = Refusals::default();
        let told = [true, true, true, false, false, true, true].map(|refused| refusals.is_news(refused));
        assert_eq!(told, [true, false, false, false, false, true, false]);
    }

    #[tokio::test]
    async fn a_connection_that_is_not_used_gives_way_to_a_new_one() {
        let address = with_places(2).await;
        let mut first = TcpStream::connect(address).await.unwrap();
        asks(&mut first).await;
        let _second = TcpStream::connect(address).await.unwrap();
        let mut third = TcpStream::connect(address).await.unwrap();
        asks(&mut third).await;
        assert_eq!(first.read(&mut [0; 8]).await.unwrap(), 0, "the first is the only one that has been used");
        // The second is not idle before it has had time to ask; from then on it is as idle as those that were answered.
        for _ in 0..3 {
            asks(&mut TcpStream::connect(address).await.unwrap()).await;
        }
    }

    #[tokio::test]
    async fn what_has_come_before_the_server_leaves_is_answered() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let far = listener.accept().await.unwrap().0.into_std().unwrap();
        near.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let (close, place) = (watch::Sender::new(()), Places::new(1).take().await);
        let closing = close.subscribe();
        close.send_replace(());
        let router = Router::new().route("/", get(|| async { "hello" }));
        // The poller has not said that there is something to read.
        connection(TcpStream::from_std(far).unwrap(), place, router, closing).await;
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await.unwrap();
        assert!(answer.ends_with(b"hello"));
    }

    #[tokio::test]
    async fn of_an_answer_that_is_not_taken_little_is_made() {
        const PIECE: usize = 1 << 10;
        let listener = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP)).unwrap();
        // Its connections' too.
        listener.set_send_buffer_size(PIECE).unwrap();
        listener.set_recv_buffer_size(PIECE).unwrap();
        listener.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        listener.listen(1).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener.into()).unwrap();
        let near = tokio::net::TcpSocket::new_v4().unwrap();
        near.set_recv_buffer_size(PIECE as u32).unwrap();
        let (near, far) = tokio::join!(near.connect(listener.local_addr().unwrap()), listener.accept());
        let (mut near, far) = (near.unwrap(), far.unwrap().0);
        near.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let made = Arc::new(AtomicUsize::new(0));
        let making = made.clone();
        let piece = move || {
            making.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Infallible>(vec![b'x'; PIECE])
        };
        let endless = move || {
            let piece = piece.clone();
            async { Body::from_stream(futures::stream::repeat_with(piece)) }
        };
        let router = Router::new().route("/", get(endless));
        let (close, place) = (watch::Sender::new(()), Places::new(1).take().await);
        let serving = tokio::spawn(connection(far, place, router, close.subscribe()));
        let mut before = 0;
        loop {
            sleep(Duration::from_millis(50)).await;
            let now = made.load(Ordering::Relaxed);
            if now > 0 && now == before {
                break;
            }
            before = now;
        }
        assert!(before * PIECE < 3 * BUFFER_BYTES_MAX, "{before}");
        serving.abort();
    }

    #[tokio::test]
    async fn a_long_answer_arrives_whole() {
        let long: Vec<u8> = (0..1_000_003_u32).map(|byte| byte as u8).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut near = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let far = listener.accept().await.unwrap().0;
        let (close, place) = (watch::Sender::new(()), Places::new(1).take().await);
        let answer = long.clone();
        let router = Router::new().route("/", get(move || async move { answer }));
        tokio::spawn(connection(far, place, router, close.subscribe()));
        near.write_all(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").await.unwrap();
        let mut answer = Vec::new();
        near.read_to_end(&mut answer).await.unwrap();
        assert!(answer.ends_with(&long));
        let head = String::from_utf8_lossy(&answer[..answer.len() - long.len()]).to_lowercase();
        assert!(head.contains("content-length: 1000003"), "{head}");
    }

    #[tokio::test]
    async fn whose_head_is_too_long_is_told_so() {
        let mut stream = TcpStream::connect(with_places(1).await).await.unwrap();
        let mut head = b"GET / HTTP/1.1\r\nHost: a\r\nCookie: ".to_vec();
        // All of it is read: what is not would have the system reset the connection.
        head.resize(BUFFER_BYTES_MAX, b'x');
        stream.write_all(&head).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.unwrap();
        assert!(answer.starts_with(b"HTTP/1.1 431 "), "{}", String::from_utf8_lossy(&answer));
    }

    #[tokio::test]
    async fn a_connection_that_never_says_anything_gives_way() {
        let address = with_places(1).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        asks(&mut TcpStream::connect(address).await.unwrap()).await;
        assert_eq!(silent.read(&mut [0; 8]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn those_who_come_at_once_are_answered_one_after_the_other_where_there_is_one_place() {
        let address = with_places(1).await;
        let mut streams = Vec::new();
        for _ in 0..3 {
            streams.push(TcpStream::connect(address).await.unwrap());
        }
        for stream in &mut streams {
            asks(stream).await;
        }
    }
}
