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
    workers::LostError,
};
use crate::{api::ApiError, cluster::ModelKey};

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
    /// When the worker and the deadline are looked at next.
    pulse: Pin<Box<Sleep>>,
    _in_flight: InFlight,
}

enum Source {
    /// A worker.
    Worker(Box<Placed>),
    /// Somebody, soon. Comes back with what has been tried.
    Search(BoxFuture<'static, (Result<Placed, Failure>, Attempts)>),
    /// Everything has been sent.
    Nobody,
}

impl Relay {
    pub(super) fn new(frontend: Arc<Frontend>, asked: Arc<Asked>, placed: Placed, in_flight: InFlight) -> Self {
        let pulse = Box::pin(sleep_until(asked.deadline.min(Instant::now() + PULSE)));
        Self {
            frontend,
            asked,
            splitter: Splitter::default(),
            key: placed.booking.worker.card.model_key,
            source: Source::Worker(Box::new(placed)),
            attempts: Attempts::default(),
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
            if let (Source::Worker(placed), Some(peek)) = (&mut self.source, &self.asked.peek) {
                placed.booking.reduce(peek.answer_tokens);
            }
        }
        if self.splitter.progress() != progress {
            // It got further: what was tried before counts no more. A sign of life is no progress: a prompt that kills
            // its workers may take them long enough for some.
            self.attempts = Attempts::default();
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
        let error = error.unwrap_or(LostError::Silent("it ended its answer without saying so"));
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

    /// Looks at the clock and the worker, once a second. Returns last words if time is up.
    fn poll_pulse(&mut self, context: &mut Context<'_>) -> Poll<Option<Bytes>> {
        std::task::ready!(self.pulse.as_mut().poll(context));
        let now = Instant::now();
        if now >= self.asked.deadline {
            return Poll::Ready(Some(self.give_up(&ApiError::timeout())));
        }
        self.pulse.as_mut().reset(self.asked.deadline.min(now + PULSE));
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
            let polled = match &mut this.source {
                Source::Nobody => return Poll::Ready(None),
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
                            None
                        }
                        Err(failure) => Some(this.fail(failure)),
                    }
                }),
            };
            match polled {
                Poll::Ready(Some(out)) => return Poll::Ready(Some(Ok(Frame::data(out)))),
                Poll::Ready(None) => {}
                Poll::Pending => match this.poll_pulse(context) {
                    Poll::Ready(Some(out)) => return Poll::Ready(Some(Ok(Frame::data(out)))),
                    Poll::Ready(None) => {}
                    Poll::Pending => return Poll::Pending,
                },
            }
        }
    }
}
