use std::{fmt, time::Duration};

use serde::{Deserialize, Serialize};

/// When to prefill remotely: from flags at start, and live from etcd.
///
/// In etcd they are a JSON object; fields it lacks keep the flags' values. A field nobody knows, or a value out of
/// range, makes the whole object invalid, and whoever reads it keeps the limits it had.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// By which rule.
    pub policy: Policy,
    /// Prompts with at most this many uncached tokens are prefilled here.
    pub max_local_prefill_length: u32,
    /// Jobs on the queue, for each live prefill worker, from which on prompts are prefilled here.
    pub max_prefill_queue_size: u32,
    /// Milliseconds between two tokens of the requests that run, which what is prefilled here beside them is cut for.
    /// With [`Policy::Auto`] prompts that would exceed it all the same go elsewhere.
    pub itl_target_ms: f64,
}

/// How it is decided where a prompt is prefilled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Policy {
    /// Here.
    Never,
    /// Remotely, whenever there is a prefill worker and a queue.
    Always,
    /// Remotely, if the prompt is long and the queue is short.
    Threshold,
    /// Wherever measurements promise the earlier first token, and remotely what would hold up requests that run beyond
    /// [`Limits::itl_target_ms`].
    Auto,
}

/// Why limits were refused.
#[derive(Debug, thiserror::Error)]
pub enum LimitsError {
    /// Not JSON, not an object, an unknown field, or a value of the wrong type.
    #[error("{0}")]
    Unreadable(#[from] serde_json::Error),
    /// Not an object.
    #[error("expected an object with any of policy, max_local_prefill_length, max_prefill_queue_size, itl_target_ms")]
    NotAnObject,
    /// A value that makes no sense.
    #[error("{field} is {value}; it must be {expected}")]
    OutOfRange {
        /// Which.
        field: &'static str,
        /// As given.
        value: String,
        /// What would make sense.
        expected: &'static str,
    },
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            policy: Policy::Threshold,
            max_local_prefill_length: 512,
            max_prefill_queue_size: 2,
            // Five tokens a second at the slowest, as fast as most people read.
            itl_target_ms: 200.0,
        }
    }
}

/// As they would be put into etcd.
impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&serde_json::to_string(self).map_err(|_| fmt::Error)?)
    }
}

impl Limits {
    /// These limits with the fields that `json` has, if all of them make sense.
    pub fn overridden_by(&self, json: &[u8]) -> Result<Self, LimitsError> {
        let serde_json::Value::Object(fields) = serde_json::from_slice(json)? else {
            return Err(LimitsError::NotAnObject);
        };
        let mut merged = serde_json::to_value(self)?;
        for (field, value) in fields {
            merged[field] = value;
        }
        let limits: Self = serde_json::from_value(merged)?;
        limits.check()?;
        Ok(limits)
    }

    /// Whether every value makes sense.
    pub fn check(&self) -> Result<(), LimitsError> {
        if self.max_prefill_queue_size == 0 {
            let expected = "at least 1; set policy to \"never\" to prefill everything locally";
            return Err(LimitsError::OutOfRange { field: "max_prefill_queue_size", value: "0".into(), expected });
        }
        let target = self.itl_target_ms;
        if !(target > 0.0 && target <= 60_000.0) {
            let expected = "above 0 and at most 60000";
            return Err(LimitsError::OutOfRange { field: "itl_target_ms", value: target.to_string(), expected });
        }
        Ok(())
    }

    /// The target as a duration.
    pub fn itl_target(&self) -> Duration {
        Duration::try_from_secs_f64(self.itl_target_ms / 1_000.0).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_etcd_does_not_say_stays_as_the_flags_have_it() {
        let flags = Limits { max_local_prefill_length: 77, itl_target_ms: 40.0, ..Limits::default() };
        let live = flags.overridden_by(br#"{"policy": "auto", "max_prefill_queue_size": 5}"#).unwrap();
        assert_eq!(live, Limits { policy: Policy::Auto, max_prefill_queue_size: 5, ..flags });
        assert_eq!(flags.overridden_by(b"{}").unwrap(), flags);
        assert_eq!(flags.itl_target(), Duration::from_millis(40));
    }

    #[test]
    fn a_bad_value_is_refused_by_name() {
        for (json, complaint) in [
            ("", "EOF"),
            ("[]", "expected an object"),
            ("17", "expected an object"),
            (r#"{"polcy": "auto"}"#, "unknown field `polcy`"),
            (r#"{"policy": "sometimes"}"#, "unknown variant `sometimes`"),
            (r#"{"max_local_prefill_length": -1}"#, "-1"),
            (r#"{"max_local_prefill_length": "512"}"#, "invalid type: string"),
            (r#"{"max_prefill_queue_size": 0}"#, "max_prefill_queue_size is 0; it must be at least 1"),
            (r#"{"itl_target_ms": null}"#, "invalid type: null"),
            (r#"{"itl_target_ms": 0}"#, "itl_target_ms is 0; it must be above 0"),
            (r#"{"itl_target_ms": 1e9}"#, "itl_target_ms is 1000000000; it must be"),
        ] {
            let error = Limits::default().overridden_by(json.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(complaint), "{json}: {error}");
        }
    }
}
