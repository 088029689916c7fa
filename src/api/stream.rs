use std::{
    future::Future,
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    body::Body,
    http::{HeaderValue, header},
    response::Response,
};
use bytes::{Bytes, BytesMut};
use futures::Stream;
use tokio::time::{Instant, Sleep};

use super::{ApiError, answer::Answer};

/// After this long without an event a comment is sent, so that proxies keep the connection.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Room for the chunks of a step.
const BUFFER_BYTES: usize = 4096;

/// An answer as server-sent events. Everything that is there when the connection has room for more goes out in one
/// piece. Dropping it, as happens when the client goes away, cancels what still runs.
struct EventStream {
    /// `None` once everything has been sent.
    answer: Option<Answer>,
    buffer: BytesMut,
    /// When silence is looked for next: [`SILENCE_MAX`] after what was the last event when it was looked for. Moving a
    /// timer at each token would cost more than the token's JSON; noting the time does not.
    pulse: Pin<Box<Sleep>>,
    spoken: Instant,
    deadline: Pin<Box<Sleep>>,
}

/// The response that streams `answer`.
pub(crate) fn stream(answer: Answer) -> Response {
    let deadline = Box::pin(tokio::time::sleep_until(answer.deadline));
    let spoken = Instant::now();
    let pulse = Box::pin(tokio::time::sleep_until(spoken + SILENCE_MAX));
    let buffer = BytesMut::with_capacity(BUFFER_BYTES);
    let events = EventStream { answer: Some(answer), buffer, pulse, spoken, deadline };
    let mut response = Response::new(Body::from_stream(events));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream; charset=utf-8"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // nginx would collect events otherwise.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

impl Stream for EventStream {
    type Item = io::Result<Bytes>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            let Some(answer) = &mut this.answer else { return Poll::Ready(None) };
            match answer.poll_events(context) {
                Poll::Ready(ended) => {
                    if answer.can_move() {
                        // A body that breaks off is what makes a frontend go elsewhere.
                        this.answer = None;
                        return Poll::Ready(Some(Err(io::Error::other("the engine stopped"))));
                    }
                    if let Err(error) = write_news(answer, ended, &mut this.buffer) {
                        this.fail(&error);
                    } else if ended {
                        this.end();
                    }
                }
                Poll::Pending if this.deadline.as_mut().poll(context).is_ready() => this.fail(&ApiError::timeout()),
                Poll::Pending => {
                    if this.pulse.as_mut().poll(context).is_pending() {
                        return Poll::Pending;
                    }
                    let now = Instant::now();
                    if now >= this.spoken + SILENCE_MAX {
                        this.buffer.extend_from_slice(b": keep-alive\n\n");
                        this.spoken = now;
                    }
                    this.pulse.as_mut().reset(this.spoken + SILENCE_MAX);
                }
            }
            if !this.buffer.is_empty() {
                this.spoken = Instant::now();
                return Poll::Ready(Some(Ok(this.buffer.split().freeze())));
            }
        }
    }
}

fn write_news(answer: &mut Answer, ended: bool, buffer: &mut BytesMut) -> Result<(), ApiError> {
    if let Some(error) = answer.failure() {
        return Err(error);
    }
    answer.write_chunks(buffer)?;
    if ended && answer.include_usage {
        answer.write_usage(buffer)?;
    }
    Ok(())
}

impl EventStream {
    /// Tells the client, who has had its 200 already, that the answer breaks off.
    fn fail(&mut self, error: &ApiError) {
        self.buffer.extend_from_slice(b"data: ");
        self.buffer.extend_from_slice(error.to_json().as_bytes());
        self.buffer.extend_from_slice(b"\n\n");
        self.end();
    }

    fn end(&mut self) {
        self.buffer.extend_from_slice(b"data: [DONE]\n\n");
        self.answer = None;
    }
}
