//! What the two workers of a handoff say to each other.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::{Epoch, HandoffId, MailboxSlot};
use crate::cache::Salt;

/// What a prefill worker says over its session to a decode worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToDecode {
    /// "I have the job; may I?"
    Claim {
        /// Named by the job.
        handoff: HandoffId,
    },
    /// "I am alive." Sent now and then, also when nothing moved.
    Progress {
        /// Which.
        handoff: HandoffId,
        /// The grant's.
        epoch: Epoch,
        /// Another number than the last if anything moved since that the handoff may have waited for, be it of another
        /// prompt. (Earlier builds count the grant's tokens that are computed, which does as well.)
        moved: u32,
    },
    /// "I shall write nothing more under this grant." Sent after the last write has ended.
    Released {
        /// Which.
        handoff: HandoffId,
        /// The grant's.
        epoch: Epoch,
    },
    /// The same, for a reason of the prefill worker's own.
    Failed {
        /// Which.
        handoff: HandoffId,
        /// The grant's.
        epoch: Epoch,
        /// For the log.
        reason: String,
    },
    /// "Lend me pages that nobody wants, to measure how fast they can be written." The end of such a loan is its
    /// mailbox word.
    Measure {
        /// How many.
        pages: u32,
    },
}

/// What a decode worker says over a session to a prefill worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ToPrefill {
    /// The answer to a claim: yes.
    Grant(Grant),
    /// The answer to a claim: no, and never again.
    Gone {
        /// Which.
        handoff: HandoffId,
        /// For the log.
        why: Gone,
    },
    /// "Please stop, and tell me when you have."
    Release {
        /// Which.
        handoff: HandoffId,
        /// The grant's.
        epoch: Epoch,
    },
    /// The answer to a wish to measure.
    Scratch {
        /// Where in the mailbox the end is announced.
        slot: MailboxSlot,
        /// Goes with every write and with the mailbox word.
        epoch: Epoch,
        /// The decode worker's pages; perhaps fewer than were wished for.
        pages: Vec<u32>,
    },
    /// The same: it has no pages to spare, or somebody measures already.
    NoScratch,
}

/// Permission to write a handoff's pages, given once in its life.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// What was claimed.
    pub handoff: HandoffId,
    /// Where in the mailbox the end is announced.
    pub slot: MailboxSlot,
    /// Goes with every write and with the mailbox word.
    pub epoch: Epoch,
    /// The prompt without its last token, which the decode worker computes itself: it needs that token's logits.
    pub tokens: Vec<u32>,
    /// Whoever keeps pages keeps these apart by it.
    pub salt: Option<Salt>,
    /// Position of the first token whose keys and values are wanted, at the start of a page. Those before it the decode
    /// worker has.
    pub first: u32,
    /// The decode worker's pages for `first..tokens.len()`, in order.
    pub pages: Vec<u32>,
}

/// Why a claim was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gone {
    /// Somebody has, or had, the grant.
    Claimed,
    /// Not on offer: withdrawn, timed out, finished, or of another life of this worker.
    Unknown,
}

/// Bytes on a session that are no message: the peer is of another version, or broken. The session should be closed.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Not what a message looks like.
    #[error("a message that cannot be read: {0}")]
    Malformed(#[from] postcard::Error),
    /// A message, and then something.
    #[error("{0} bytes after the end of a message")]
    Trailing(usize),
    /// A grant whose numbers do not fit together.
    #[error("a grant of {pages} pages for tokens {first}..{tokens}, with pages of {block_size} tokens")]
    Inconsistent {
        /// Pages granted.
        pages: usize,
        /// First wanted token.
        first: u32,
        /// End of the tokens.
        tokens: usize,
        /// Tokens a page holds.
        block_size: u32,
    },
}

impl Grant {
    /// Whether the numbers fit together. Checked by the prefill worker before it computes anything; that each page lies
    /// within the region is checked by `transfer` when it writes.
    pub fn check(&self, block_size: u32) -> Result<(), MessageError> {
        let (first, block) = (self.first as usize, block_size as usize);
        let fits = block != 0
            && first.is_multiple_of(block)
            && first < self.tokens.len()
            && self.pages.len() == (self.tokens.len() - first).div_ceil(block);
        if fits {
            return Ok(());
        }
        let (pages, tokens) = (self.pages.len(), self.tokens.len());
        Err(MessageError::Inconsistent { pages, first: self.first, tokens, block_size })
    }
}

impl ToDecode {
    /// Whether the decode worker may use pages again upon this: then it must not overtake any write. Other messages
    /// may, and should, as somebody waits for them while what is written takes as long as it takes.
    pub fn lets_go(&self) -> bool {
        match self {
            Self::Released { .. } | Self::Failed { .. } => true,
            Self::Claim { .. } | Self::Progress { .. } | Self::Measure { .. } => false,
        }
    }

    /// postcard.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// The whole of `bytes` as one message.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode(bytes)
    }
}

impl ToPrefill {
    /// postcard.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// The whole of `bytes` as one message.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode(bytes)
    }
}

fn encode(message: &impl Serialize) -> Vec<u8> {
    // postcard fails when its buffer is full, which a `Vec` never is, or for sequences of unknown length: there are
    // none.
    postcard::to_stdvec(message).unwrap_or_default()
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MessageError> {
    let (message, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() { Ok(message) } else { Err(MessageError::Trailing(rest.len())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant() -> Grant {
        let (handoff, slot, epoch) = (HandoffId(9), MailboxSlot(3), Epoch::FIRST);
        let salt = Some(Salt::of("tea"));
        Grant { handoff, slot, epoch, tokens: (0..41).collect(), salt, first: 16, pages: vec![7, 4] }
    }

    #[test]
    fn messages_survive_the_session() {
        let message = ToPrefill::Grant(grant());
        assert_eq!(ToPrefill::decode(&message.encode()).unwrap(), message);
        assert!(!message.encode().windows(3).any(|bytes| bytes == b"tea"), "a salt itself is nobody else's business");
        let message = ToPrefill::Grant(Grant { salt: None, ..grant() });
        assert_eq!(ToPrefill::decode(&message.encode()).unwrap(), message);
        let message = ToDecode::Failed { handoff: HandoffId(9), epoch: Epoch::FIRST, reason: "too long".into() };
        assert_eq!(ToDecode::decode(&message.encode()).unwrap(), message);
    }

    #[test]
    fn cut_and_stretched_messages_are_refused() {
        let bytes = ToPrefill::Grant(grant()).encode();
        for length in 0..bytes.len() {
            assert!(ToPrefill::decode(&bytes[..length]).is_err());
        }
        assert!(matches!(ToPrefill::decode(&[&bytes[..], &[0]].concat()), Err(MessageError::Trailing(1))));
    }

    #[test]
    fn a_grant_covers_exactly_what_is_wanted() {
        assert!(grant().check(16).is_ok());
        assert!(Grant { first: 8, ..grant() }.check(16).is_err(), "not at the start of a page");
        assert!(Grant { pages: vec![7], ..grant() }.check(16).is_err(), "a page is missing");
        assert!(Grant { first: 48, pages: vec![], ..grant() }.check(16).is_err(), "nothing is wanted");
        assert!(grant().check(0).is_err());
    }
}
