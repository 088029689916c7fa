//! What is done while nobody comes.

use std::time::Instant;

use super::*;
use crate::engine::thread::QUIET;

#[test]
fn all_pages_are_looked_at_when_nobody_has_come_for_a_moment_and_never_before_the_next_is_heard() {
    let begun = Instant::now();
    let decode = decode(config(), 128);
    let requests = 20;
    for _ in 0..requests {
        block_on(collect(&mut decode.handle.submit(request(0..5, 1)).unwrap()));
    }
    let looks = || decode.wires.looks.load(Ordering::Relaxed);
    // One a request, after its step, and however slow all this was, so long a quiet before every other.
    let after_steps = if cfg!(debug_assertions) { requests } else { 0 };
    let others = looks().saturating_sub(after_steps);
    assert!(QUIET * others as u32 <= begun.elapsed(), "{others} of them");
    wait_until(|| looks() > after_steps);
}
