use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::{Mutex, PoisonError};

use tokio::sync::oneshot;

/// Connections whose handshake is under way, which have not proved who they are, of all doors. There is room for so
/// many; who comes when there is none takes the place of the one that is there for longest. Whoever knows the token
/// needs a moment, so strangers that fill the room keep nobody out.
pub(super) struct PendingHandshakes {
    room: usize,
    /// In the order in which they came.
    waiting: Mutex<VecDeque<oneshot::Sender<Infallible>>>,
}

/// A place there, given up by dropping it. An error once somebody else has it.
pub(super) type Place = oneshot::Receiver<Infallible>;

impl PendingHandshakes {
    pub(super) fn new(room: usize) -> Self {
        Self { room, waiting: Mutex::default() }
    }

    /// A place for whoever has just come.
    pub(super) fn begin(&self) -> Place {
        let (sender, place) = oneshot::channel();
        // Nothing is left half done in it by a panic.
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.retain(|waiting| !waiting.is_closed());
        if waiting.len() >= self.room {
            waiting.pop_front();
        }
        waiting.push_back(sender);
        place
    }
}
