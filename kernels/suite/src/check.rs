use std::fmt;
use std::panic::{self, PanicHookInfo};
use std::sync::{Mutex, PoisonError};

use crate::watched;

/// Something that has to hold.
#[derive(Debug, Clone, Copy)]
pub struct Check {
    /// What it is about: `attention`.
    pub topic: &'static str,
    /// Its name, a sentence: `ragged_batches_match_the_reference`.
    pub name: &'static str,
    demand: fn(),
}

/// What did not hold.
#[derive(Debug, Clone)]
pub struct Failure {
    /// What differs, and where.
    pub said: String,
    /// What the driver failed with, if that is why.
    pub driver: Option<String>,
    /// Kernels that were launched since results were last compared and found good: it is one of these.
    pub kernels: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(driver) = &self.driver {
            write!(f, "{driver}. Then: ")?;
        }
        write!(f, "{}", self.said)?;
        if !self.kernels.is_empty() {
            write!(f, ". Kernels since the last results that were good: {}", self.kernels.join(", "))?;
        }
        Ok(())
    }
}

impl Check {
    pub(crate) fn new(topic: &'static str, name: &'static str, demand: fn()) -> Self {
        Self { topic, name, demand }
    }

    /// Panics if it does not hold.
    #[track_caller]
    pub fn demand(&self) {
        (self.demand)();
    }

    /// Whether it holds. Panics of other threads are not heard of meanwhile.
    pub fn run(&self) -> Result<(), Failure> {
        static SAID: Mutex<String> = Mutex::new(String::new());
        let said = || SAID.lock().unwrap_or_else(PoisonError::into_inner);
        watched::forget();
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info: &PanicHookInfo<'_>| {
            let place = info.location().map(|place| format!(" ({}:{})", place.file(), place.line()));
            let words = info.payload_as_str().unwrap_or("panicked").split_whitespace().collect::<Vec<_>>().join(" ");
            *said() = words + &place.unwrap_or_default();
        }));
        let held = panic::catch_unwind(self.demand);
        panic::set_hook(before);
        held.map_err(|_| Failure { said: said().clone(), driver: watched::failure(), kernels: watched::suspects() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_hold_is_said_and_not_thrown() {
        assert!(Check::new("topic", "name", || ()).run().is_ok());
        let failure = Check::new("topic", "name", || panic!("1 is\nnot   {}", 2)).run().unwrap_err();
        assert!(failure.said.starts_with("1 is not 2 (") && failure.said.contains("check.rs:"), "{failure}");
        assert!(failure.driver.is_none() && failure.kernels.is_empty());
    }

    #[test]
    fn a_failure_names_the_driver_s_error_first_and_the_kernels_last() {
        let failure = Failure {
            said: "element 3 is off".into(),
            driver: Some("CUDA: launching it failed".into()),
            kernels: vec!["a".into(), "b".into()],
        };
        let expected =
            "CUDA: launching it failed. Then: element 3 is off. Kernels since the last results that were good: a, b";
        assert_eq!(failure.to_string(), expected);
    }
}
