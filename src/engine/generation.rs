//! The way of an answer from the engine thread to its reader, over rings that are allocated beforehand.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use engine_kernels::{MAX_TOP_LOGPROBS, Sampled};
use futures::{Stream, task::AtomicWaker};
use rtrb::{Consumer, Producer, RingBuffer};

use super::{Event, FinishReason, TokenOutput};

/// A token on its way from the engine thread. Its alternatives, if any, are the next `top_len` entries of the second
/// ring, so that the common token without them stays small.
#[derive(Debug, Clone, Copy)]
struct Scored {
    token: u32,
    logprob: Option<f32>,
    top_len: u8,
}

/// [`Event`] without its heap memory.
#[derive(Debug, Clone, Copy)]
enum Record {
    Prompt(Scored),
    Token(Scored),
    Finished { reason: FinishReason, cached_tokens: u32 },
}

/// How many events of each kind a request can have at most.
#[derive(Debug, Clone, Copy)]
pub(super) struct EventBounds {
    /// Prompt tokens that are reported.
    pub(super) prompt_tokens: usize,
    /// Alternatives with each.
    pub(super) prompt_top: usize,
    /// Tokens generated at most.
    pub(super) tokens: usize,
    /// Alternatives with each.
    pub(super) top: usize,
}

/// The way of a request's events from the engine thread to its reader. All memory is allocated here, on the
/// submitter's thread, with room for every event of the request: the engine thread never waits and never allocates.
pub(super) fn channel(bounds: EventBounds, cancellations: Arc<AtomicUsize>) -> (Outlet, Generation) {
    let (events_in, events_out) = RingBuffer::new(bounds.prompt_tokens + bounds.tokens + 1);
    let (tops_in, tops_out) = RingBuffer::new(bounds.prompt_tokens * bounds.prompt_top + bounds.tokens * bounds.top);
    let reader = Arc::new(Reader::default());
    (
        Outlet { events: events_in, tops: tops_in, reader: reader.clone(), cached_tokens: 0, finished: false },
        Generation {
            reader,
            tops: tops_out,
            events: events_out,
            farewell: Farewell { cancellations, has_heard_all: false },
        },
    )
}

/// What both ends see.
#[derive(Debug, Default)]
struct Reader {
    waker: AtomicWaker,
    /// As [`Event::Finished`] will tell, for a reader that does not wait for it.
    cached_tokens: AtomicU32,
}

/// The engine thread's end. However it goes away, its reader gets exactly one [`Event::Finished`].
#[derive(Debug)]
pub(super) struct Outlet {
    events: Producer<Record>,
    tops: Producer<(u32, f32)>,
    reader: Arc<Reader>,
    cached_tokens: u32,
    finished: bool,
}

impl Outlet {
    /// Notes how much of the prompt was found in the cache; reported at the end.
    pub(super) fn set_cached_tokens(&mut self, tokens: usize) {
        self.cached_tokens = tokens as u32;
        self.reader.cached_tokens.store(self.cached_tokens, Ordering::Relaxed);
    }

    /// Reports a token of the prompt; `None` for the first, which nothing predicts.
    pub(super) fn prompt(&mut self, token: u32, scored: Option<&Sampled>) {
        let scored = self.scored(token, scored);
        self.push(Record::Prompt(scored));
    }

    /// Reports a generated token, with log-probabilities if `with_logprob`.
    pub(super) fn token(&mut self, sampled: &Sampled, with_logprob: bool) {
        let scored = self.scored(sampled.token, with_logprob.then_some(sampled));
        self.push(Record::Token(scored));
    }

    /// Ends the answer.
    pub(super) fn finish(mut self, reason: FinishReason) {
        self.end(reason);
    }

    /// Whether the reader has gone.
    pub(super) fn is_abandoned(&self) -> bool {
        self.events.is_abandoned()
    }

    /// Wakes the reader, if it sleeps.
    pub(super) fn wake(&self) {
        self.reader.waker.wake();
    }

    fn scored(&mut self, token: u32, sampled: Option<&Sampled>) -> Scored {
        let Some(sampled) = sampled else { return Scored { token, logprob: None, top_len: 0 } };
        let top = &sampled.top[..sampled.top_len as usize];
        let mut top_len = 0;
        for &entry in top {
            // Full only if the runner reports more alternatives than were asked for; the surplus is dropped.
            top_len += u8::from(self.tops.push(entry).is_ok());
        }
        Scored { token, logprob: Some(sampled.logprob), top_len }
    }

    fn push(&mut self, record: Record) {
        let pushed = self.events.push(record);
        debug_assert!(pushed.is_ok(), "the ring has room for every event of its request");
    }

    fn end(&mut self, reason: FinishReason) {
        if !self.finished {
            self.finished = true;
            self.push(Record::Finished { reason, cached_tokens: self.cached_tokens });
            self.wake();
        }
    }
}

impl Drop for Outlet {
    fn drop(&mut self) {
        self.end(FinishReason::Aborted);
    }
}

/// The answer to one request, as it is generated. Dropping it cancels the request: its KV pages are free again within
/// one step.
#[derive(Debug)]
pub struct Generation {
    reader: Arc<Reader>,
    tops: Consumer<(u32, f32)>,
    events: Consumer<Record>,
    /// Declared after `events`, hence dropped after it: when the engine sees the count rise, it also sees who left.
    farewell: Farewell,
}

impl Generation {
    /// Prompt tokens found in the cache: certain once the first token has come, for a reader that leaves before
    /// [`Event::Finished`] tells.
    pub fn cached_tokens(&self) -> u32 {
        self.reader.cached_tokens.load(Ordering::Relaxed)
    }

    /// The next event; `None` once [`Event::Finished`] has been returned. Safe to cancel and to call again.
    pub async fn next(&mut self) -> Option<Event> {
        std::future::poll_fn(|context| self.poll_event(context)).await
    }

    /// The next event if there is one already.
    fn try_next(&mut self) -> Option<Event> {
        let event = match self.events.pop().ok()? {
            Record::Prompt(scored) => Event::Prompt(self.output(scored)),
            Record::Token(scored) => Event::Token(self.output(scored)),
            Record::Finished { reason, cached_tokens } => {
                self.farewell.has_heard_all = true;
                Event::Finished { reason, cached_tokens }
            }
        };
        Some(event)
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Event>> {
        if self.farewell.has_heard_all {
            return Poll::Ready(None);
        }
        if let Some(event) = self.try_next() {
            return Poll::Ready(Some(event));
        }
        self.reader.waker.register(context.waker());
        // Again, in case the event came just before the engine could have seen the waker.
        self.try_next().map_or(Poll::Pending, |event| Poll::Ready(Some(event)))
    }

    fn output(&mut self, scored: Scored) -> TokenOutput {
        let mut top = Vec::with_capacity(usize::from(scored.top_len).min(MAX_TOP_LOGPROBS));
        top.extend((0..scored.top_len).map_while(|_| self.tops.pop().ok()));
        TokenOutput { token: scored.token, logprob: scored.logprob, top }
    }
}

impl Stream for Generation {
    type Item = Event;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Event>> {
        self.get_mut().poll_event(context)
    }
}

/// Tells the engine that some reader left before the end.
#[derive(Debug)]
struct Farewell {
    cancellations: Arc<AtomicUsize>,
    has_heard_all: bool,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        if self.has_heard_all {
            return;
        }
        // Pairs with the engine's acquiring load: the abandoned ring is visible to whoever sees this.
        self.cancellations.fetch_add(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(bounds: EventBounds) -> (Outlet, Generation) {
        channel(bounds, Arc::default())
    }

    #[test]
    fn an_outlet_that_is_dropped_ends_the_answer_once() {
        let (outlet, mut generation) = pair(EventBounds { prompt_tokens: 0, prompt_top: 0, tokens: 3, top: 0 });
        drop(outlet);
        assert!(matches!(generation.try_next(), Some(Event::Finished { reason: FinishReason::Aborted, .. })));
        assert_eq!(generation.try_next(), None);
        assert_eq!(futures::executor::block_on(generation.next()), None);
    }

    #[test]
    fn alternatives_arrive_with_their_token() {
        let bounds = EventBounds { prompt_tokens: 2, prompt_top: 1, tokens: 1, top: 2 };
        let (mut outlet, mut generation) = pair(bounds);
        let mut scored = Sampled { token: 8, logprob: -1.0, top_len: 1, ..Sampled::default() };
        scored.top[0] = (9, -0.5);
        outlet.prompt(7, None);
        outlet.prompt(8, Some(&scored));
        scored.top_len = 2;
        scored.top[1] = (8, -1.0);
        outlet.token(&scored, true);
        outlet.set_cached_tokens(5);
        outlet.finish(FinishReason::Stop);
        let events: Vec<_> = futures::executor::block_on_stream(&mut generation).collect();
        let output = |token, logprob, top: &[_]| TokenOutput { token, logprob, top: top.to_vec() };
        assert_eq!(
            events,
            [
                Event::Prompt(output(7, None, &[])),
                Event::Prompt(output(8, Some(-1.0), &[(9, -0.5)])),
                Event::Token(output(8, Some(-1.0), &[(9, -0.5), (8, -1.0)])),
                Event::Finished { reason: FinishReason::Stop, cached_tokens: 5 },
            ]
        );
    }

    #[test]
    fn a_reader_that_leaves_is_seen() {
        let cancellations = Arc::new(AtomicUsize::new(0));
        let bounds = EventBounds { prompt_tokens: 0, prompt_top: 0, tokens: 1, top: 0 };
        let (outlet, generation) = channel(bounds, cancellations.clone());
        assert!(!outlet.is_abandoned());
        drop(generation);
        assert!(outlet.is_abandoned());
        assert_eq!(cancellations.load(Ordering::Acquire), 1);
    }
}
