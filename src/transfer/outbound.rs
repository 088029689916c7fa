//! What waits to be written to a session's socket, in order.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::Bytes;

use super::frame::{Frame, Loan};
use super::socket::{Socket, VECTOR_MAX};

/// Pages on their way to the peer, straight from this worker's KV memory.
///
/// # Safety
///
/// The parts must be the same at each call, and stay readable and unchanged as long as the value lives.
pub(super) unsafe trait Payload: Send {
    /// Its parts, in order.
    fn parts(&self) -> &[(*const u8, usize)];
}

/// No pages: what a decode worker sends.
pub(super) struct NoPayload;

// SAFETY: there are no parts.
unsafe impl Payload for NoPayload {
    fn parts(&self) -> &[(*const u8, usize)] {
        &[]
    }
}

/// Frames in the order in which they are sent.
pub(super) struct Outbound<P> {
    queue: VecDeque<Queued<P>>,
    /// Of the first frame, how many bytes are written.
    sent: usize,
    /// Bytes of frames' heads and bodies in the queue, payloads not counted.
    bytes: usize,
}

struct Queued<P> {
    head: Bytes,
    payload: Option<(Loan, P)>,
}

impl<P: Payload> Queued<P> {
    /// The frame's bytes from `skip` on, in parts.
    fn parts(&self, mut skip: usize) -> impl Iterator<Item = (*const u8, usize)> {
        let payload = self.payload.as_ref().map_or(&[][..], |(_, payload)| payload.parts());
        std::iter::once((self.head.as_ptr(), self.head.len())).chain(payload.iter().copied()).filter_map(
            move |(start, length)| {
                let skipped = skip.min(length);
                skip -= skipped;
                // SAFETY: at most to the end of the part.
                (skipped < length).then(|| (unsafe { start.add(skipped) }, length - skipped))
            },
        )
    }

    fn length(&self) -> usize {
        self.parts(0).map(|(_, length)| length).sum()
    }
}

impl<P: Payload> Outbound<P> {
    pub(super) fn new() -> Self {
        Self { queue: VecDeque::new(), sent: 0, bytes: 0 }
    }

    /// Queues a frame.
    pub(super) fn push(&mut self, frame: &Frame) {
        self.push_encoded(frame.encode(), None);
    }

    /// Queues a data frame with its pages.
    pub(super) fn push_data(&mut self, loan: Loan, runs: Vec<super::frame::Run>, payload: P) {
        self.push_encoded(Frame::Data(loan, runs).encode(), Some((loan, payload)));
    }

    fn push_encoded(&mut self, head: Bytes, payload: Option<(Loan, P)>) {
        self.bytes += head.len();
        self.queue.push_back(Queued { head, payload });
    }

    /// Drops the data frames of a loan that are not begun, and hands them out. One that is begun has to be finished, or
    /// the peer could not tell where the next frame starts.
    pub(super) fn withdraw(&mut self, loan: Loan) -> Vec<P> {
        let begun = usize::from(self.sent > 0).min(self.queue.len());
        let rest = self.queue.split_off(begun);
        let mut withdrawn = Vec::new();
        for mut frame in rest {
            match frame.payload.take_if(|(of, _)| *of == loan) {
                Some((_, payload)) => {
                    self.bytes -= frame.head.len();
                    withdrawn.push(payload);
                }
                None => self.queue.push_back(frame),
            }
        }
        withdrawn
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Bytes of frames in the queue, pages not counted.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Writes some of it, and hands out the payloads of frames that are now written. Cancel safe.
    pub(super) async fn write_some(&mut self, socket: &Socket) -> io::Result<Vec<P>> {
        let mut skip = self.sent;
        let mut parts = Vec::with_capacity(VECTOR_MAX);
        for frame in &self.queue {
            let room = VECTOR_MAX - parts.len();
            parts.extend(frame.parts(skip).take(room).map(|(start, length)| {
                // SAFETY: the head is owned by the queue, and a payload's parts stay readable and unchanged while it is
                // in the queue, as `Payload` demands. The slices are gone before this function can change the queue.
                IoSlice::new(unsafe { std::slice::from_raw_parts(start, length) })
            }));
            skip = 0;
            if parts.len() == VECTOR_MAX {
                break;
            }
        }
        let mut written = socket.write_vectored(&parts).await? + self.sent;
        drop(parts);
        let mut done = Vec::new();
        while let Some(frame) = self.queue.front() {
            let length = frame.length();
            if written < length {
                break;
            }
            written -= length;
            if let Some(frame) = self.queue.pop_front() {
                self.bytes -= frame.head.len();
                done.extend(frame.payload.map(|(_, payload)| payload));
            }
        }
        self.sent = written;
        Ok(done)
    }
}
