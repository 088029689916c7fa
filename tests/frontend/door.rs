//! Workers that say what a test wants them to.

use std::{
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// What is said to whoever asks a worker whether it is there.
const HEALTHY: &str = "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 3\r\n\r\nok\n";
/// The beginning of a stream whose worker ends before it has computed anything.
pub(super) const ALIVE: &str = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\n\
                     Transfer-Encoding: chunked\r\n\r\n1\r\n\n\r\n";
pub(super) const FULL: &str = "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nConnection: close\r\n\
                    Content-Length: 2\r\n\r\n{}";
pub(super) const DRAINING: &str =
    "HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";
/// Of a worker whose engine failed over the request.
pub(super) const ABORTED: &str = "HTTP/1.1 503 Service Unavailable\r\nConnection: close\r\nContent-Length: 28\r\n\r\n\
                                  {\"error\":{\"code\":\"aborted\"}}";
pub(super) const OTHER_MODEL: &str =
    "HTTP/1.1 421 Misdirected Request\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";

/// Of a worker that is to continue an answer, and would have given another.
pub(super) const OTHER_ANSWER: &str = "HTTP/1.1 409 Conflict\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}";

/// A worker of which there is no more than the door: it is healthy, and says the same to every request. With that the
/// connection ends.
pub(super) struct Door {
    pub(super) address: SocketAddr,
    /// How many requests there have been.
    asked: Arc<AtomicUsize>,
}

impl Door {
    pub(super) fn start(says: impl Fn() -> &'static str + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (says, asked) = (Arc::new(says), Arc::new(AtomicUsize::new(0)));
        let count = asked.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (says, count) = (says.clone(), count.clone());
                thread::spawn(move || {
                    let mut stream = stream.unwrap();
                    let Ok(line) = read_request(&stream) else { return };
                    let answer = if line.starts_with("GET /health ") {
                        HEALTHY
                    } else {
                        count.fetch_add(1, Ordering::SeqCst);
                        says()
                    };
                    // Whoever asked may not have waited for it.
                    let _ = stream.write_all(answer.as_bytes());
                });
            }
        });
        Self { address, asked }
    }

    pub(super) fn asked(&self) -> usize {
        self.asked.load(Ordering::SeqCst)
    }
}

/// Takes a request whole, and returns its first line.
fn read_request(stream: &TcpStream) -> io::Result<String> {
    let mut reader = BufReader::new(stream);
    let (mut first, mut line, mut length) = (String::new(), String::new(), 0);
    reader.read_line(&mut first)?;
    while line != "\r\n" {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().unwrap();
        }
    }
    reader.read_exact(&mut vec![0; length])?;
    Ok(first)
}
