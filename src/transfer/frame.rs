//! What travels on a session's socket: frames of a 16-byte header and a body.
//!
//! ```text
//! kind u8 · 0 0 0 · slot u32 · epoch u32 · length u32       little endian; `length` counts the body
//! ```
//!
//! The body of a data frame lists the runs of pages it carries (12 bytes each: layer, first page, pages); their bytes
//! follow the body and are not counted in `length`.

use bytes::{BufMut, Bytes, BytesMut};

use crate::handoff::{Epoch, MailboxSlot, MailboxWord};

/// Bytes of a frame's header.
pub(super) const HEADER_BYTES: usize = 16;
/// Bytes of one run in a data frame's body.
const RUN_BYTES: usize = 12;
/// Runs a data frame may list.
pub(super) const RUNS_MAX: usize = 1024;

/// A loan as the wire names it.
pub(super) type Loan = (MailboxSlot, Epoch);

/// Pages of one layer that follow each other in the receiver's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Run {
    pub(super) layer: u32,
    pub(super) page: u32,
    pub(super) count: u32,
}

/// Everything that can be said once a session is open. Data frames and completions are tcp's alone: over shm and RDMA
/// the prefill worker, or its adapter, writes both into memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Frame {
    /// A sign of life.
    Ping,
    /// For whoever uses the session.
    Message(Bytes),
    /// Pages follow. Prefill to decode.
    Data(Loan, Vec<Run>),
    /// The last word under a loan. Prefill to decode.
    Complete(Loan, MailboxWord),
    /// The word is in the mailbox, or was not wanted any more. Decode to prefill.
    Completed(Loan, bool),
    /// Stop writing under this loan. Decode to prefill.
    Revoke(Loan),
    /// Nothing more comes under this loan. Prefill to decode.
    Stopped(Loan),
    /// The shared memory is unmapped; the last frame of a session. Prefill to decode.
    Unmapped,
}

/// A frame against the rules: the peer is broken, or no peer of ours. The session ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Violation {
    #[error("a frame of unknown kind {0}")]
    Kind(u8),
    #[error("a frame of {0} bytes, more than is allowed")]
    TooLong(usize),
    #[error("a malformed frame of kind {0}")]
    Malformed(u8),
    #[error("a frame this side does not take")]
    Direction,
    #[error("data under a loan that this session does not have")]
    NoSuchLoan,
    #[error("data for a page that was not lent to it")]
    NotLent,
    #[error("a completion word that does not belong to its loan")]
    WrongWord,
    #[error("a data frame of {0} bytes, more than is allowed")]
    FrameTooLong(usize),
}

/// A header as it was received, its length checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub(super) kind: u8,
    slot: u32,
    epoch: u32,
    pub(super) length: usize,
}

const PING: u8 = 1;
const MESSAGE: u8 = 2;
const DATA: u8 = 3;
const COMPLETE: u8 = 4;
const COMPLETED: u8 = 5;
const REVOKE: u8 = 6;
const STOPPED: u8 = 7;
const UNMAPPED: u8 = 8;

/// The header and, but for a data frame's pages, the body. `length` must fit 32 bits, which the limits on it ensure.
fn raw(kind: u8, slot: u32, epoch: u32, body: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(HEADER_BYTES + body.len());
    bytes.put_slice(&[kind, 0, 0, 0]);
    bytes.put_u32_le(slot);
    bytes.put_u32_le(epoch);
    bytes.put_u32_le(body.len() as u32);
    bytes.put_slice(body);
    bytes.freeze()
}

impl Frame {
    /// As sent.
    pub(super) fn encode(&self) -> Bytes {
        let of = |kind, (slot, epoch): Loan, body: &[u8]| raw(kind, slot.0, epoch.get(), body);
        match self {
            Self::Ping => raw(PING, 0, 0, &[]),
            Self::Message(message) => raw(MESSAGE, 0, 0, message),
            Self::Data(loan, runs) => {
                let mut body = Vec::with_capacity(runs.len() * RUN_BYTES);
                for run in runs {
                    for number in [run.layer, run.page, run.count] {
                        body.extend_from_slice(&number.to_le_bytes());
                    }
                }
                of(DATA, *loan, &body)
            }
            Self::Complete(loan, word) => of(COMPLETE, *loan, &word.raw().to_le_bytes()),
            Self::Completed(loan, accepted) => of(COMPLETED, *loan, &[u8::from(*accepted)]),
            Self::Revoke(loan) => of(REVOKE, *loan, &[]),
            Self::Stopped(loan) => of(STOPPED, *loan, &[]),
            Self::Unmapped => raw(UNMAPPED, 0, 0, &[]),
        }
    }

    /// A frame from its header and the body that the header announced.
    pub(super) fn decode(header: Header, body: Bytes) -> Result<Self, Violation> {
        let kind = header.kind;
        let malformed = Violation::Malformed(kind);
        let empty = |frame: Self| if body.is_empty() { Ok(frame) } else { Err(malformed.clone()) };
        let loan = || Epoch::new(header.epoch).map(|epoch| (MailboxSlot(header.slot), epoch)).ok_or(malformed.clone());
        match kind {
            PING => empty(Self::Ping),
            MESSAGE => Ok(Self::Message(body)),
            DATA => Ok(Self::Data(loan()?, decode_runs(&body).ok_or(malformed.clone())?)),
            COMPLETE => {
                let word = <[u8; 8]>::try_from(&body[..]).map_err(|_| malformed.clone())?;
                Ok(Self::Complete(loan()?, MailboxWord::from_raw(u64::from_le_bytes(word))))
            }
            COMPLETED => match &body[..] {
                [accepted @ (0 | 1)] => Ok(Self::Completed(loan()?, *accepted == 1)),
                _ => Err(malformed),
            },
            REVOKE => empty(Self::Revoke(loan()?)),
            STOPPED => empty(Self::Stopped(loan()?)),
            UNMAPPED => empty(Self::Unmapped),
            _ => Err(Violation::Kind(kind)),
        }
    }
}

fn decode_runs(body: &[u8]) -> Option<Vec<Run>> {
    let (runs, rest) = body.as_chunks::<RUN_BYTES>();
    let number =
        |run: &[u8; RUN_BYTES], at: usize| u32::from_le_bytes([run[at], run[at + 1], run[at + 2], run[at + 3]]);
    let run = |run| Run { layer: number(run, 0), page: number(run, 4), count: number(run, 8) };
    (rest.is_empty() && !runs.is_empty()).then(|| runs.iter().map(run).collect())
}

impl Header {
    /// Reads a header and checks its length against what a frame of its kind may have.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES], message_bytes_max: usize) -> Result<Self, Violation> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let header = Self { kind: bytes[0], slot: number(4), epoch: number(8), length: number(12) as usize };
        let length_max = match header.kind {
            MESSAGE => message_bytes_max,
            DATA => RUNS_MAX * RUN_BYTES,
            PING | COMPLETE | COMPLETED | REVOKE | STOPPED | UNMAPPED => 8,
            kind => return Err(Violation::Kind(kind)),
        };
        if header.length > length_max {
            return Err(Violation::TooLong(header.length));
        }
        if bytes[1..4] != [0; 3] {
            return Err(Violation::Malformed(header.kind));
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::handoff::Status;

    fn decode(bytes: &[u8]) -> Result<Frame, Violation> {
        let header = Header::decode(bytes[..HEADER_BYTES].try_into().unwrap(), 100)?;
        Frame::decode(header, Bytes::copy_from_slice(&bytes[HEADER_BYTES..]))
    }

    #[test]
    fn frames_survive_the_wire() {
        let loan = (MailboxSlot(3), Epoch::new(9).unwrap());
        let runs = vec![Run { layer: 1, page: 2, count: 3 }, Run { layer: 4, page: 5, count: 6 }];
        for frame in [
            Frame::Ping,
            Frame::Message(Bytes::from_static(b"hello")),
            Frame::Data(loan, runs),
            Frame::Complete(loan, MailboxWord::new(loan.1, Status::Done)),
            Frame::Completed(loan, true),
            Frame::Revoke(loan),
            Frame::Stopped(loan),
            Frame::Unmapped,
        ] {
            assert_eq!(decode(&frame.encode()).as_ref(), Ok(&frame));
        }
    }

    #[test]
    fn frames_that_are_too_long_or_make_no_sense_are_violations() {
        assert_eq!(decode(&Frame::Message(vec![0; 101].into()).encode()), Err(Violation::TooLong(101)));
        assert_eq!(decode(&raw(99, 0, 0, &[])), Err(Violation::Kind(99)));
        assert_eq!(decode(&raw(PING, 0, 0, &[1])), Err(Violation::Malformed(PING)));
        assert_eq!(decode(&raw(DATA, 1, 1, &[])), Err(Violation::Malformed(DATA)));
        assert_eq!(decode(&raw(DATA, 1, 1, &[0; 13])), Err(Violation::Malformed(DATA)));
        assert_eq!(decode(&raw(REVOKE, 1, 0, &[])), Err(Violation::Malformed(REVOKE)), "epoch 0 is none");
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_frame_or_a_violation(bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES..200)) {
            if let Ok(frame) = decode(&bytes) {
                prop_assert_eq!(decode(&frame.encode()), Ok(frame));
            }
        }
    }
}
