use std::{collections::BTreeMap, fmt, sync::Mutex, time::Duration};

use crate::clock::Clock;

/// What was done to whom, and when.
pub(crate) struct Story {
    clock: Clock,
    started: Duration,
    events: Mutex<Vec<(Duration, String)>>,
}

impl Story {
    pub(crate) fn new(clock: Clock) -> Self {
        Self { started: clock.now(), clock, events: Mutex::default() }
    }

    pub(crate) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(crate) fn tell(&self, event: String) {
        self.events.lock().unwrap().push((self.clock.now() - self.started, event));
    }
}

impl fmt::Display for Story {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let events = self.events.lock().unwrap();
        let mut counts = BTreeMap::<&str, usize>::new();
        for (at, event) in events.iter() {
            writeln!(f, "{:8.3} {event}", at.as_secs_f64())?;
            // The last word is what was done.
            *counts.entry(event.rsplit(' ').next().unwrap_or_default()).or_default() += 1;
        }
        let counts: Vec<_> = counts.iter().map(|(what, count)| format!("{count} × {what}")).collect();
        write!(f, "{} events: {}", events.len(), counts.join(", "))
    }
}
