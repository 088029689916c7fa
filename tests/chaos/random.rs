use std::time::Duration;

use crate::support::SplitMix64;

/// A seed decides everything that is drawn.
pub(crate) struct Random(SplitMix64);

impl Random {
    /// The numbers of one of several that draw for themselves.
    pub(crate) fn of(seed: u64, lane: u64) -> Self {
        let mut random = Self(SplitMix64::new(seed ^ lane.wrapping_mul(0xD6E8_FEB8_6659_FD93)));
        random.below(2);
        random
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.0.below(bound)
    }

    pub(crate) fn within(&mut self, from_ms: u64, to_ms: u64) -> Duration {
        Duration::from_millis(from_ms + self.below(to_ms - from_ms))
    }

    /// Mostly moments, now and then longer than heartbeats and leases last.
    pub(crate) fn pause(&mut self) -> Duration {
        match self.below(10) {
            0..=5 => self.within(20, 500),
            6..=8 => self.within(500, 4_000),
            _ => self.within(4_000, 14_000),
        }
    }
}
