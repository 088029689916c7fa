use std::sync::atomic::{AtomicBool, Ordering};

use tokio::{sync::watch, time::Instant};

use super::ApiError;

/// Lets requests in until the server goes away, and knows when the last of them has ended.
pub(crate) struct Drain {
    has_begun: AtomicBool,
    in_flight: watch::Sender<()>,
}

/// Held while a request is answered; a drain waits for all of them.
pub(crate) struct InFlight {
    _receiver: watch::Receiver<()>,
    /// When it was counted in.
    pub(crate) since: Instant,
}

impl Drain {
    pub(crate) fn new() -> Self {
        Self { has_begun: AtomicBool::new(false), in_flight: watch::Sender::new(()) }
    }

    /// Counts a request in, unless the server is going away.
    pub(crate) fn enter(&self) -> Result<InFlight, ApiError> {
        // Counted before the flag is looked at: whoever sets the flag and then waits for the count misses nobody.
        let in_flight = InFlight { _receiver: self.in_flight.subscribe(), since: Instant::now() };
        if self.has_begun() { Err(ApiError::draining()) } else { Ok(in_flight) }
    }

    pub(crate) fn has_begun(&self) -> bool {
        self.has_begun.load(Ordering::SeqCst)
    }

    /// Refuses new requests from now on and returns when the last answer has been handed to its connection.
    pub(crate) async fn run(&self) {
        self.has_begun.store(true, Ordering::SeqCst);
        self.in_flight.closed().await;
    }
}
