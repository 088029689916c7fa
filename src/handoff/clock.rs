use std::time::Duration;

/// Time as the state machines count it: what they were told, without the leaps.
///
/// `now` is handed to every call as a [`Duration`] since any fixed moment. Backwards it never moves, and forwards by at
/// most `leap_max` at a time: when a process was stopped for an hour, or its clock was set, an hour has passed for
/// nobody it waits for, and the timeouts, which all sleep behind messages that are waiting to be read, must not go off
/// at once. So timeouts run late for a process that looks at the clock less often than `leap_max`, which is safe, and
/// never early.
#[derive(Debug, Clone)]
pub(super) struct SteadyClock {
    leap_max: Duration,
    seen: Option<Duration>,
    steady: Duration,
}

impl SteadyClock {
    pub(super) fn new(leap_max: Duration) -> Self {
        Self { leap_max, seen: None, steady: Duration::ZERO }
    }

    /// The steady time at `now`.
    pub(super) fn advance(&mut self, now: Duration) -> Duration {
        let passed = self.seen.map_or(Duration::ZERO, |seen| now.saturating_sub(seen));
        self.seen = Some(now);
        self.steady += passed.min(self.leap_max);
        self.steady
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn leaps_in_either_direction_are_not_believed() {
        let mut clock = SteadyClock::new(Duration::from_secs(1));
        let second = Duration::from_secs;
        assert_eq!(clock.advance(second(1_000)), second(0));
        assert_eq!(clock.advance(second(1_001)), second(1));
        assert_eq!(clock.advance(second(5_000)), second(2));
        assert_eq!(clock.advance(second(10)), second(2));
        assert_eq!(clock.advance(Duration::from_millis(10_500)), Duration::from_millis(2_500));
    }
}
