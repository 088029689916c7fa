//! A streamed answer on its way to the client, wherever it comes from.

use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use futures::future::BoxFuture;
use hyper::body::{Body, Frame};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    Frontend, InFlight,
    dispatch::{Asked, Attempts, Failure, PULSE, Placed, workers_lost},
    events::Splitter,
    worker::LostError,
};
use crate::{
    cluster::ModelKey,
    http::{ApiError, WRITE_STALL_MAX},
};

/// An answer's body. When a worker is lost it finds another to go on; when it is dropped, as happens when the client
/// goes away, so is the connection to the worker, which cancels the request there.
pub(super) struct Relay {
    frontend: Arc<Frontend>,
    asked: Arc<Asked>,
    splitter: Splitter,
    source: Source,
    /// Continuations have to come from workers of the same model.
    key: ModelKey,
    attempts: Attempts,
    pace: Pace,
    /// When the worker is looked at next, at the deadline at the latest; the deadline itself is looked at by every
    /// poll.
    pulse: Pin<Box<Sleep>>,
    _in_flight: InFlight,
}

/// How fast the client takes its answer. A worker gives up whoever takes nothing for [`WRITE_STALL_MAX`], and what a
/// frontend takes is what its client does.
struct Pace {
    /// When the client last had everything that had come: at least every [`PULSE`], unless it is slow.
    caught_up: Instant,
    /// Since this worker began to answer, the client was so slow once that the worker may have given it up. That shows
    /// only when everything that had been sent before is taken.
    is_slow: bool,
}

impl Pace {
    fn new() -> Self {
        Self { caught_up: Instant::now(), is_slow: false }
    }

    /// The client has everything that there is at the moment.
    fn catch_up(&mut self, now: Instant) {
        self.is_slow = self.may_be_given_up(now);
        self.caught_up = now;
    }

    /// Whether the worker may have given up the client by now.
    fn may_be_given_up(&self, now: Instant) -> bool {
        // Half of what ours wait: the worker may be of a build that waits for less.
        self.is_slow || now - self.caught_up > WRITE_STALL_MAX / 2
    }
}

enum Source {
    /// A worker.
    Worker(Box<Placed>),
    /// Another worker is being looked for. Comes back with what has been tried.
    Search(BoxFuture<'static, (Result<Placed, Failure>, Attempts)>),
    /// Everything has been sent.
    Nobody,
}

impl Relay {
    /// Relays what `placed` answers, found after `attempts`.
    pub(super) fn new(
        frontend: Arc<Frontend>,
        asked: Arc<Asked>,
        placed: Placed,
        attempts: Attempts,
        in_flight: InFlight,
    ) -> Self {
        let pulse = Box::pin(sleep_until(asked.deadline.min(Instant::now() + PULSE)));
        Self {
            splitter: Splitter::new(frontend.journals.clone()),
            frontend,
            asked,
            key: placed.booking.worker.card.model_key,
            source: Source::Worker(Box::new(placed)),
            attempts,
            pace: Pace::new(),
            pulse,
            _in_flight: in_flight,
        }
    }

    /// Takes what a worker sent.
    fn take(&mut self, data: Bytes) -> Option<Bytes> {
        let (started, progress) = (self.splitter.started, self.splitter.progress());
        let out = match self.splitter.push(data) {
            Ok(out) => out,
            Err(_) => return Some(self.give_up(&workers_lost())),
        };
        if self.splitter.started && !started {
            self.frontend.metrics.first_data.observe(self.asked.arrived.elapsed().as_secs_f64());
        }
        if self.splitter.progress() != progress {
            // It got further: what was tried before counts no more. A sign of life is no progress: a prompt that kills
            // its workers may take them long enough for some.
            self.attempts = Attempts::default();
            // This worker has computed the prompt, be it the first or one after it.
            if let (Source::Worker(placed), Some(peek)) = (&mut self.source, &self.asked.peek) {
                placed.booking.reduce(peek.answer_tokens);
            }
        }
        (!out.is_empty()).then_some(out)
    }

    /// The worker is gone, or has nothing more to say. Returns last words if that is the end.
    fn ended(&mut self, error: Option<LostError>) -> Option<Bytes> {
        let Source::Worker(placed) = std::mem::replace(&mut self.source, Source::Nobody) else {
            return None;
        };
        let Placed { exchange, booking } = *placed;
        if self.splitter.done {
            if error.is_none() {
                booking.worker.keep(exchange);
            }
            return None;
        }
        self.splitter.cut();
        let error = match error {
            Some(LostError::Broken(error)) if self.pace.may_be_given_up(Instant::now()) => LostError::SlowClient(error),
            Some(error) => error,
            None => LostError::Silent("it ended its answer without saying so"),
        };
        if let Err(error) = self.attempts.lost(&booking.worker, &error) {
            return Some(self.give_up(&error));
        }
        let Some(journal) = self.splitter.journal() else {
            return Some(self.give_up(&workers_lost()));
        };
        let (frontend, asked, key) = (self.frontend.clone(), self.asked.clone(), self.key);
        let mut attempts = std::mem::take(&mut self.attempts);
        drop((exchange, booking));
        self.source = Source::Search(Box::pin(async move {
            let placed = frontend.place(&asked, &journal, Some(key), &mut attempts).await;
            (placed, attempts)
        }));
        None
    }

    fn fail(&mut self, failure: Failure) -> Bytes {
        match failure {
            Failure::Error(error) => self.give_up(&error),
            Failure::Refused(status, _, body) => {
                tracing::warn!(%status, body = %String::from_utf8_lossy(&body), "no worker would continue an answer");
                self.give_up(&workers_lost())
            }
        }
    }

    /// Tells the client, who has had its 200 already, that the answer breaks off.
    fn give_up(&mut self, error: &ApiError) -> Bytes {
        self.frontend.metrics.broken.inc();
        self.source = Source::Nobody;
        let mut out = BytesMut::new();
        for part in ["data: ", &error.to_json(), "\n\ndata: [DONE]\n\n"] {
            out.extend_from_slice(part.as_bytes());
        }
        out.freeze()
    }

    /// The answer has taken as long as it may. Returns last words, unless the client had the worker's.
    fn time_is_up(&mut self) -> Option<Bytes> {
        if self.splitter.done {
            self.source = Source::Nobody;
            return None;
        }
        Some(self.give_up(&ApiError::timeout()))
    }

    /// Looks at the worker, once a second. Returns last words if it was the last one.
    fn poll_pulse(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        std::task::ready!(self.pulse.as_mut().poll(context));
        self.pulse.as_mut().reset(self.asked.deadline.min(Instant::now() + PULSE));
        Poll::Ready(match &self.source {
            Source::Worker(placed) if placed.booking.worker.is_silent() => {
                self.ended(Some(LostError::Silent("it does not answer")))
            }
            _ => None,
        })
    }
}

impl Body for Relay {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = self.get_mut();
        loop {
            let now = Instant::now();
            let polled = match &mut this.source {
                Source::Nobody => return Poll::Ready(None),
                // Whatever is there: for a slow client there is always something.
                _ if now >= this.asked.deadline => Poll::Ready(this.time_is_up()),
                Source::Worker(placed) => placed.exchange.poll_data(context).map(|data| match data {
                    Some(Ok(data)) => this.take(data),
                    Some(Err(error)) => this.ended(Some(error.into())),
                    None => this.ended(None),
                }),
                Source::Search(search) => search.as_mut().poll(context).map(|(placed, attempts)| {
                    this.attempts = attempts;
                    match placed {
                        Ok(placed) => {
                            this.frontend.metrics.migrations.inc();
                            tracing::info!(worker = %placed.booking.worker.lease, "continues an answer");
                            this.source = Source::Worker(Box::new(placed));
                            this.pace = Pace::new();
                            None
                        }
                        Err(failure) => Some(this.fail(failure)),
                    }
                }),
            };
            match polled {
                Poll::Ready(Some(out)) => return Poll::Ready(Some(Ok(Frame::data(out)))),
                Poll::Ready(None) => {}
                Poll::Pending => {
                    this.pace.catch_up(now);
                    match this.poll_pulse(context) {
                        Poll::Ready(Some(out)) => return Poll::Ready(Some(Ok(Frame::data(out)))),
                        Poll::Ready(None) => {}
                        Poll::Pending => return Poll::Pending,
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        future::{poll_fn, ready},
        time::Duration,
    };

    use hyper::{HeaderMap, http::uri::PathAndQuery};
    use tokio::{
        io::AsyncWriteExt,
        time::{advance, pause, resume},
    };

    use super::*;
    use crate::{
        cluster::Cluster,
        frontend::{
            FrontendConfig, FrontendMetrics,
            fake::{bound, is_asked, request},
        },
        http::Received,
    };

    const TIME_MAX: Duration = Duration::from_secs(3600);
    /// The event that an answer begins with, and breaks off after.
    const EVENT: &str = ": {\"i\":0,\"t\":[1]}\ndata: {}\n\n";
    /// Tokens that a request is taken to have.
    const BOOKED: u64 = 10_000;

    /// A worker whose answer has broken off after [`EVENT`], all of which has come.
    async fn broken() -> Placed {
        let (listener, worker) = bound().await;
        let answering = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(is_asked(&mut stream).await);
            let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked";
            let answer = format!("{head}\r\n\r\n{:x}\r\n{EVENT}\r\n", EVENT.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
        };
        let (exchange, ()) = tokio::join!(worker.send(&request), answering);
        Placed { exchange: exchange.unwrap(), booking: worker.book(BOOKED) }
    }

    /// The relay of a worker's answer. Nobody else is there.
    async fn relay(placed: Placed) -> Relay {
        let config = FrontendConfig {
            api_keys: Vec::new(),
            requests_max: 1,
            body_bytes_max: 0,
            body_memory_max: 1 << 20,
            request_timeout: TIME_MAX,
            patience: Duration::ZERO,
            cluster_token: None,
            allowed_origins: Vec::new(),
        };
        let frontend = Frontend::new(&Cluster::local(), config, FrontendMetrics::new());
        let received = Received { bytes: br#"{"stream": true}"#.to_vec(), memory: None };
        let asked = Asked::new(PathAndQuery::from_static("/"), &HeaderMap::new(), received, TIME_MAX).await;
        let in_flight = frontend.enter(frontend.admit().unwrap()).unwrap();
        Relay::new(frontend, Arc::new(asked), placed, Attempts::default(), in_flight)
    }

    /// What the client gets next.
    async fn next(relay: &mut Relay) -> String {
        let frame = poll_fn(|context| Pin::new(&mut *relay).poll_frame(context)).await.unwrap().unwrap();
        String::from_utf8(frame.into_data().unwrap().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn a_worker_is_not_to_blame_for_giving_up_a_slow_client() {
        for slow in [false, true] {
            let placed = broken().await;
            let worker = placed.booking.worker.clone();
            let mut relay = relay(placed).await;
            pause();
            if slow {
                advance(WRITE_STALL_MAX).await;
            }
            assert_eq!(next(&mut relay).await, "data: {}\n\n");
            // There is nobody to go on.
            assert!(next(&mut relay).await.contains("workers_lost"));
            assert_eq!(worker.is_avoided(), !slow);
            resume();
        }
    }

    #[tokio::test]
    async fn who_kept_one_worker_waiting_has_not_kept_the_next() {
        let (mut relay, placed) = (relay(broken().await).await, broken().await);
        let worker = placed.booking.worker.clone();
        pause();
        relay.source = Source::Search(Box::pin(ready((Ok(placed), Attempts::default()))));
        advance(WRITE_STALL_MAX).await;
        assert_eq!(next(&mut relay).await, "data: {}\n\n");
        assert!(next(&mut relay).await.contains("workers_lost"));
        assert!(worker.is_avoided());
    }

    #[tokio::test]
    async fn once_a_worker_has_computed_the_prompt_the_answer_alone_is_its_load_also_after_a_move() {
        let (mut relay, second) = (relay(broken().await).await, broken().await);
        let answer_tokens = relay.asked.peek.as_ref().unwrap().answer_tokens;
        assert_eq!(next(&mut relay).await, "data: {}\n\n");
        let worker = second.booking.worker.clone();
        relay.source = Source::Search(Box::pin(ready((Ok(second), Attempts::default()))));
        assert_eq!(worker.load(), BOOKED);
        assert_eq!(next(&mut relay).await, "data: {}\n\n");
        assert_eq!(worker.load(), answer_tokens);
    }

    #[tokio::test]
    async fn time_is_up_whatever_is_there() {
        let mut relay = relay(broken().await).await;
        pause();
        advance(TIME_MAX).await;
        assert!(next(&mut relay).await.contains("timeout"));
        assert!(poll_fn(|context| Pin::new(&mut relay).poll_frame(context)).await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn who_was_slow_once_may_have_been_given_up_however_much_it_has_taken_since() {
        let mut pace = Pace::new();
        for _ in 0..100 {
            advance(PULSE).await;
            pace.catch_up(Instant::now());
        }
        assert!(!pace.may_be_given_up(Instant::now()), "it keeps up");
        advance(WRITE_STALL_MAX).await;
        assert!(pace.may_be_given_up(Instant::now()));
        // It shows only once everything is taken that was sent before.
        pace.catch_up(Instant::now());
        advance(PULSE).await;
        pace.catch_up(Instant::now());
        assert!(pace.may_be_given_up(Instant::now()));
    }
}
