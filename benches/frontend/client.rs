//! A load of clients that stream completions, cheap enough to leave the machine to what is measured: one thread, one
//! connection a client, used again and again, and of what arrives only the ends of answers looked for.

use std::{
    net::SocketAddr,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use rustix::net::sockopt::set_tcp_quickack;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::{OUTPUT_TOKENS, PROMPT_BYTES};

/// The longest silence before the measurement is given up.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// What is asked, of whom, and for how long.
pub(crate) struct Load<'a> {
    pub(crate) address: SocketAddr,
    pub(crate) model: &'a str,
    pub(crate) clients: usize,
    pub(crate) time: Duration,
    /// From one request of a client to its next; zero: as soon as it has its answer.
    pub(crate) every: Duration,
}

/// What the clients saw.
#[derive(Default)]
pub(crate) struct Seen {
    /// Answers, each whole.
    pub(crate) requests: usize,
    /// From the first request to the last answer.
    pub(crate) seconds: f64,
    /// From sending a request to the first token, in seconds.
    pub(crate) first: Vec<f64>,
}

impl Load<'_> {
    /// Each client sends one request after the other until the time is over, and waits for its last answer. They begin
    /// one after the other if they are to pause.
    pub(crate) fn run(&self) -> Result<Seen> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let start = Instant::now();
            let begin = |client| start + self.every.mul_f64(client as f64 / self.clients as f64);
            let clients = (0..self.clients).map(|client| self.client(begin(client), start + self.time));
            let seen = futures::future::try_join_all(clients).await?;
            let first: Vec<f64> = seen.into_iter().flatten().collect();
            Ok(Seen { requests: first.len(), seconds: start.elapsed().as_secs_f64(), first })
        })
    }

    /// One client: its times to the first token.
    async fn client(&self, mut next: Instant, end: Instant) -> Result<Vec<f64>> {
        let mut stream = TcpStream::connect(self.address).await.context("connecting")?;
        stream.set_nodelay(true)?;
        let mut first = Vec::new();
        let mut buffer = vec![0; 64 << 10];
        loop {
            tokio::time::sleep_until(next.into()).await;
            if Instant::now() >= end {
                return Ok(first);
            }
            next += self.every;
            let request = self.request();
            let sent = Instant::now();
            stream.write_all(request.as_bytes()).await?;
            let answer = answer(&mut stream, &mut buffer, sent);
            first.push(tokio::time::timeout(SILENCE_MAX, answer).await.context("no answer")??);
        }
    }

    /// A request with a prompt that no other has.
    fn request(&self) -> String {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        let mut state = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let letter = |_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            char::from(b'a' + ((state >> 33) % 26) as u8)
        };
        let prompt: String = (0..PROMPT_BYTES).map(letter).collect();
        let how = r#""temperature":0,"ignore_eos":true,"stream":true,"stream_options":{"include_usage":true}"#;
        let body = format!(r#"{{"model":"{}","prompt":"{prompt}","max_tokens":{OUTPUT_TOKENS},{how}}}"#, self.model);
        format!(
            "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            self.address,
            body.len()
        )
    }
}

/// Reads one answer to its end, and returns how long its first token took.
async fn answer(stream: &mut TcpStream, buffer: &mut [u8], sent: Instant) -> Result<f64> {
    // What one piece may hold of an ending whose beginning the piece before had.
    const TAIL: usize = 1024;
    let mut first = None;
    let mut kept = 0;
    let mut begun = false;
    loop {
        let read = stream.read(&mut buffer[kept..]).await?;
        ensure!(read > 0, "the connection broke off");
        // Some servers wait for the acknowledgement of what they sent before they send more.
        set_tcp_quickack(&*stream, true)?;
        let now = Instant::now();
        let filled = kept + read;
        let text = &buffer[..filled];
        if !begun {
            if !text.starts_with(b"HTTP/1.1 200") {
                bail!("refused: {}", String::from_utf8_lossy(text));
            }
            begun = true;
        }
        if first.is_none() && memchr::memmem::find(text, b"data: {").is_some() {
            first = Some((now - sent).as_secs_f64());
        }
        if text.ends_with(b"\r\n0\r\n\r\n") {
            let told = format!("\"completion_tokens\":{OUTPUT_TOKENS}");
            ensure!(
                memchr::memmem::find(text, told.as_bytes()).is_some(),
                "another number of tokens than was asked for"
            );
            return first.context("an answer without a token");
        }
        let from = filled.saturating_sub(TAIL);
        buffer.copy_within(from..filled, 0);
        kept = filled - from;
    }
}
