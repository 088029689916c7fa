//! Names of handoffs, workers, sessions, and of loans in a mailbox.

use std::{fmt, num::NonZeroU32, str::FromStr};

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// One remote prefill, from the decision to its resolution. Random, so an id from another run means nothing here. A
/// request that is handed off again gets a new one. Written as 32 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HandoffId(pub u128);

/// A worker's incarnation: the id of the etcd lease that its registration hangs on. A worker that restarts, or loses
/// its lease, comes back as another one, and nothing learned about the old one is applied to the new. Written as 16
/// hexadecimal digits, in etcd's keys too.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WorkerId(pub u64);

/// A connection between a prefill and a decode worker, numbered by each side for itself and never reused by it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct SessionId(pub u64);

/// Index of a word in the decode worker's mailbox. A loan holds its slot until it is resolved, like its pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct MailboxSlot(pub u32);

/// Which loan of a slot: raised at each one, and never 0, so that an empty mailbox word matches none.
///
/// After 2^32 - 1 loans of one slot it starts again from 1. That is harmless: a slot is not lent again while the holder
/// of an earlier loan may still write, so no word of that age is under way.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
pub struct Epoch(NonZeroU32);

impl WorkerId {
    /// What a worker without a lease says of itself where it opens a session: etcd gives no lease this id.
    pub const UNREGISTERED: Self = Self(0);
}

impl Epoch {
    /// The first loan's.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// `None` for 0.
    pub const fn new(epoch: u32) -> Option<Self> {
        match NonZeroU32::new(epoch) {
            Some(epoch) => Some(Self(epoch)),
            None => None,
        }
    }

    /// Whether it is a later loan's than `other` of the same slot. Numbers begin again after the last, so this holds
    /// for two that are less than half of all numbers apart.
    pub const fn is_later_than(self, other: Self) -> bool {
        self.get().wrapping_sub(other.get()).cast_signed() > 0
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0.get()
    }

    /// The next loan's.
    pub const fn next(self) -> Self {
        Self(match self.0.checked_add(1) {
            Some(next) => next,
            None => NonZeroU32::MIN,
        })
    }
}

impl fmt::Display for HandoffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for HandoffId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HandoffId({self})")
    }
}

impl fmt::Debug for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "WorkerId({self})")
    }
}

impl FromStr for HandoffId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        hex_digits(text, 32).map(Self)
    }
}

impl FromStr for WorkerId {
    type Err = BadId;

    fn from_str(text: &str) -> Result<Self, BadId> {
        hex_digits(text, 16).map(|id| Self(id as u64))
    }
}

/// A text that is no id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("expected {digits} hexadecimal digits")]
pub struct BadId {
    digits: usize,
}

/// Exactly `digits` of them, and no sign, which `from_str_radix` would take.
fn hex_digits(text: &str, digits: usize) -> Result<u128, BadId> {
    let all_hex = text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let value = if all_hex { u128::from_str_radix(text, 16).ok() } else { None };
    value.ok_or(BadId { digits })
}

// In JSON ids are their hexadecimal digits, since many readers lose the low bits of large numbers; on a session,
// numbers.

impl Serialize for HandoffId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl Serialize for WorkerId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { self.0.serialize(serializer) }
    }
}

impl<'de> Deserialize<'de> for HandoffId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return u128::deserialize(deserializer).map(Self);
        }
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for WorkerId {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if !deserializer.is_human_readable() {
            return u64::deserialize(deserializer).map(Self);
        }
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_epoch_is_never_zero() {
        assert_eq!(Epoch::new(0), None);
        assert_eq!(Epoch::new(u32::MAX).unwrap().next(), Epoch::FIRST);
        assert_eq!(Epoch::FIRST.next().get(), 2);
    }

    #[test]
    fn ids_are_hexadecimal_digits_in_text_and_numbers_on_a_session() {
        let (handoff, worker) = (HandoffId(0xabc), WorkerId(0x7587_a1b2_c3d4_e5f6));
        assert_eq!(worker.to_string(), "7587a1b2c3d4e5f6");
        assert_eq!(worker.to_string().parse(), Ok(worker));
        let text = serde_json::to_string(&worker).unwrap();
        assert_eq!(text, r#""7587a1b2c3d4e5f6""#);
        assert_eq!(serde_json::from_str::<WorkerId>(&text).unwrap(), worker);
        let text = serde_json::to_string(&handoff).unwrap();
        assert_eq!(text, r#""00000000000000000000000000000abc""#);
        assert_eq!(serde_json::from_str::<HandoffId>(&text).unwrap(), handoff);
        let bytes = postcard::to_stdvec(&(handoff, worker)).unwrap();
        assert_eq!(postcard::from_bytes::<(HandoffId, WorkerId)>(&bytes).unwrap(), (handoff, worker));
        for bad in ["", "abc", "+0000000000000000000000000000abc", "0000000000000000000000000000000g"] {
            assert!(bad.parse::<HandoffId>().is_err(), "{bad}");
        }
    }
}
