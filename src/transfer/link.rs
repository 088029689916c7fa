//! Reading frames from a session's socket, and noticing when none come.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::time::{Interval, MissedTickBehavior};

use super::Limits;
use super::frame::{Frame, HEADER_BYTES, Header, Violation};
use super::socket::Socket;

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("the connection ended: {0}")]
    Io(#[from] io::Error),
    #[error("the peer broke the protocol: {0}")]
    Violation(#[from] Violation),
    #[error("the peer gave no sign of life")]
    Stalled,
    #[error("messages wait and are not taken")]
    Backlog,
    #[error("a message of {0} bytes, more than is allowed")]
    MessageTooLong(usize),
    #[error("it was closed on this side")]
    Closed,
}

/// Reads frames, but not the pages that follow a data frame.
pub(super) struct FrameReader {
    header: [u8; HEADER_BYTES],
    header_filled: usize,
    body: Option<(Header, BytesMut, usize)>,
    message_bytes_max: usize,
}

impl FrameReader {
    pub(super) fn new(message_bytes_max: usize) -> Self {
        Self { header: [0; HEADER_BYTES], header_filled: 0, body: None, message_bytes_max }
    }

    /// Makes one read, and returns a frame if that made one whole. Cancel safe.
    pub(super) async fn step(&mut self, socket: &Socket) -> Result<Option<Frame>, LinkError> {
        if self.body.is_none() {
            self.header_filled += socket.read(&mut self.header[self.header_filled..]).await?;
            if self.header_filled < HEADER_BYTES {
                return Ok(None);
            }
            let header = Header::decode(&self.header, self.message_bytes_max)?;
            self.body = Some((header, BytesMut::zeroed(header.length), 0));
        } else if let Some((_, bytes, filled)) = &mut self.body {
            *filled += socket.read(&mut bytes[*filled..]).await?;
        }
        match self.body.take_if(|(_, bytes, filled)| *filled == bytes.len()) {
            Some((header, bytes, _)) => {
                self.header_filled = 0;
                Ok(Some(Frame::decode(header, Bytes::from(bytes))?))
            }
            None => Ok(None),
        }
    }
}

/// When to give a sign of life, and how long ago the peer gave one.
///
/// Heartbeats are counted instead of timed: whoever was stopped itself for a while (or its machine suspended) finds one
/// beat missing when it goes on, not many, and hears its peers before the next.
pub(super) struct Heart {
    interval: Interval,
    missed: u32,
    missed_max: u32,
}

impl Heart {
    pub(super) fn new(limits: &Limits) -> Self {
        let mut interval = tokio::time::interval(limits.heartbeat);
        interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { interval, missed: 0, missed_max: limits.missed_heartbeats }
    }

    /// The peer lives.
    pub(super) fn heard(&mut self) {
        self.missed = 0;
    }

    /// Waits until a sign of life is due; an error if the peer has not given one for too long. Cancel safe.
    pub(super) async fn beat(&mut self) -> Result<(), LinkError> {
        self.interval.tick().await;
        self.missed += 1;
        if self.missed > self.missed_max { Err(LinkError::Stalled) } else { Ok(()) }
    }
}
