//! Waiting for what an engine does. A test that hangs fails instead.

use std::{
    pin::pin,
    sync::Arc,
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

/// How long anything may take before a test gives up. Not a measurement: the machine may be very busy.
pub(super) const MINUTE: Duration = Duration::from_secs(60);

/// A thread in [`block_on`].
struct Sleeper(std::thread::Thread);

impl Wake for Sleeper {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// What `future` yields.
#[track_caller]
pub(super) fn block_on<F: Future>(future: F) -> F::Output {
    let begun = Instant::now();
    let waker = Waker::from(Arc::new(Sleeper(std::thread::current())));
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker)) {
            return output;
        }
        let left = MINUTE.saturating_sub(begun.elapsed());
        assert!(!left.is_zero(), "still waiting");
        std::thread::park_timeout(left);
    }
}

/// Asks until `holds`.
#[track_caller]
pub(super) fn wait_until(mut holds: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !holds() {
        assert!(begun.elapsed() < MINUTE, "still waiting");
        std::thread::yield_now();
    }
}
