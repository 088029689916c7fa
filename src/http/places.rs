//! A server's connections: how many, and which idle one leaves for a new one.

use std::{
    collections::BTreeMap,
    mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Between two looks for an idle connection while all are busy and another waits.
const LOOK_PERIOD: Duration = Duration::from_millis(100);
/// Bytes of an answer that are copied to be sent, at a time.
const PIECE_BYTES_MAX: usize = 64 << 10;

/// The places that a server has for connections. Clients keep connections that they do not use; when all places are
/// taken, whoever comes gets the place of the connection that has been idle for longest.
pub(super) struct Places {
    free: Arc<Semaphore>,
    idle: Mutex<Idle>,
}

#[derive(Default)]
struct Idle {
    /// In the order in which they became idle.
    connections: BTreeMap<u64, Arc<Notify>>,
    next: u64,
}

impl Places {
    pub(super) fn new(number: usize) -> Arc<Self> {
        let number = number.min(Semaphore::MAX_PERMITS);
        Arc::new(Self { free: Arc::new(Semaphore::new(number)), idle: Mutex::default() })
    }

    /// Waits for a place, and has an idle connection leave for it where none is free.
    pub(super) async fn take(self: &Arc<Self>) -> Place {
        loop {
            let permit = match self.free.clone().try_acquire_owned() {
                Ok(permit) => Some(permit),
                Err(_) => {
                    self.ask_one_to_leave();
                    // The semaphore is never closed: what runs out is time.
                    timeout(LOOK_PERIOD, self.free.clone().acquire_owned()).await.ok().and_then(Result::ok)
                }
            };
            if let Some(permit) = permit {
                return Place {
                    places: self.clone(),
                    asked: Arc::default(),
                    usage: Mutex::new(Use::New),
                    _permit: permit,
                };
            }
        }
    }

    fn idle(&self) -> MutexGuard<'_, Idle> {
        // Nothing panics with the lock held; the list would be whole anyway.
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ask_one_to_leave(&self) {
        if let Some((_, connection)) = self.idle().connections.pop_first() {
            connection.notify_one();
        }
    }
}

/// What a connection is used for.
enum Use {
    /// Its first request is on the way.
    New,
    /// Nothing: its number among the idle ones.
    Idle(u64),
    /// A request.
    Working,
}

/// A connection's place, free again when it is dropped.
pub(super) struct Place {
    places: Arc<Places>,
    /// Rings when it is to leave.
    asked: Arc<Notify>,
    usage: Mutex<Use>,
    _permit: OwnedSemaphorePermit,
}

impl Place {
    /// Resolves when another connection needs the place and this one is not in use.
    pub(super) async fn asked_to_leave(&self) {
        self.asked.notified().await;
    }

    /// A request has come: until what this returns is dropped, the connection is not idle.
    pub(super) fn work(self: &Arc<Self>) -> Working {
        self.change(Use::Working);
        Working(self.clone())
    }

    /// It has had time to say something: if it has not, it is idle.
    pub(super) fn has_had_time(&self) {
        let is_new = matches!(*self.usage(), Use::New);
        if is_new {
            self.rest();
        }
    }

    fn rest(&self) {
        let mut idle = self.places.idle();
        let ticket = idle.next;
        idle.next += 1;
        idle.connections.insert(ticket, self.asked.clone());
        drop(idle);
        self.change(Use::Idle(ticket));
    }

    fn change(&self, to: Use) {
        let was = mem::replace(&mut *self.usage(), to);
        if let Use::Idle(ticket) = was {
            self.places.idle().connections.remove(&ticket);
        }
    }

    fn usage(&self) -> MutexGuard<'_, Use> {
        self.usage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.change(Use::Working);
    }
}

/// Held while a connection is in use.
pub(super) struct Working(Arc<Place>);

impl Drop for Working {
    fn drop(&mut self) {
        self.0.rest();
    }
}

/// An answer's body, during which the connection is in use. It comes in pieces of [`PIECE_BYTES_MAX`] at most.
pub(super) struct Answering<B> {
    body: B,
    /// What is there of it and has not gone on.
    rest: Bytes,
    _working: Working,
}

impl<B> Answering<B> {
    pub(super) fn new(body: B, working: Working) -> Self {
        Self { body, rest: Bytes::new(), _working: working }
    }
}

impl<B: Body<Data = Bytes> + Unpin> Body for Answering<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let this = self.get_mut();
        if this.rest.is_empty() {
            match ready!(Pin::new(&mut this.body).poll_frame(context)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.rest = data,
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
                },
                ended => return Poll::Ready(ended),
            }
        }
        let piece = this.rest.split_to(this.rest.len().min(PIECE_BYTES_MAX));
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn whoever_comes_gets_the_place_that_has_been_idle_for_longest() {
        let places = Places::new(3);
        let [first, second, third] = [places.take().await, places.take().await, places.take().await].map(Arc::new);
        // The first is busy, the second has been until now: the third has been idle for longest.
        third.has_had_time();
        let busy = first.work();
        drop(second.work());
        let newcomer = tokio::spawn({
            let places = places.clone();
            async move { drop(places.take().await) }
        });
        third.asked_to_leave().await;
        assert!(first.asked_to_leave().now_or_never().is_none());
        drop(third);
        newcomer.await.unwrap();
        drop((busy, second, first));
        assert_eq!((places.free.available_permits(), places.idle().connections.len()), (3, 0));
    }

    #[tokio::test]
    async fn one_that_has_just_come_may_stay_until_it_has_had_time() {
        let places = Places::new(1);
        let first = places.take().await;
        places.ask_one_to_leave();
        assert!(first.asked_to_leave().now_or_never().is_none());
        first.has_had_time();
        places.ask_one_to_leave();
        assert!(first.asked_to_leave().now_or_never().is_some());
    }

    #[tokio::test]
    async fn with_all_busy_one_waits_for_the_first_to_end_its_work() {
        let places = Places::new(1);
        let only = Arc::new(places.take().await);
        let busy = only.work();
        let newcomer = tokio::spawn({
            let places = places.clone();
            async move { drop(places.take().await) }
        });
        tokio::task::yield_now().await;
        drop(busy);
        only.asked_to_leave().await;
        drop(only);
        newcomer.await.unwrap();
    }
}
