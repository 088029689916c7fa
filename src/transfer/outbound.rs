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

    /// Queues a frame that lets go of nothing before all pages that are not begun, and behind whatever else waits
    /// before these. Pages and the words behind them keep their order.
    pub(super) fn push_ahead(&mut self, frame: &Frame) {
        let head = frame.encode();
        self.bytes += head.len();
        let begun = usize::from(self.sent > 0).min(self.queue.len());
        let waiting = self.queue.iter().skip(begun).position(|queued| queued.payload.is_some());
        let place = waiting.map_or(self.queue.len(), |waiting| begun + waiting);
        self.queue.insert(place, Queued { head, payload: None });
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

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::super::frame::Run;
    use super::super::link::FrameReader;
    use super::*;
    use crate::handoff::{Epoch, MailboxSlot, MailboxWord, Status};

    /// More than a socket takes at once.
    const PAGES_BYTES: usize = 4 << 20;
    const LOAN: Loan = (MailboxSlot(3), Epoch::FIRST);

    struct Pages([(*const u8, usize); 1]);

    // SAFETY: the memory is never freed.
    unsafe impl Send for Pages {}

    // SAFETY: the memory is never freed nor written to.
    unsafe impl Payload for Pages {
        fn parts(&self) -> &[(*const u8, usize)] {
            &self.0
        }
    }

    fn pages() -> Pages {
        static BYTES: [u8; PAGES_BYTES] = [7; PAGES_BYTES];
        Pages([(BYTES.as_ptr(), PAGES_BYTES)])
    }

    fn socket(stream: UnixStream) -> Socket {
        stream.set_nonblocking(true).unwrap();
        Socket::new(stream).unwrap()
    }

    /// All frames that are sent, in order; the bytes of data frames are read past.
    async fn received(socket: &Socket, frames: usize) -> Vec<Frame> {
        let mut reader = FrameReader::new(100);
        let mut received = Vec::new();
        while received.len() < frames {
            let Some(frame) = reader.step(socket).await.unwrap() else { continue };
            if let Frame::Data(..) = frame {
                let mut bytes = vec![0; PAGES_BYTES];
                socket.read_exact(&mut bytes).await.unwrap();
                assert!(bytes.iter().all(|&byte| byte == 7), "something was sent amid pages");
            }
            received.push(frame);
        }
        received
    }

    #[tokio::test]
    async fn what_lets_go_of_nothing_goes_before_pages_that_are_not_begun_and_the_word_stays_behind_them() {
        let (here, there) = UnixStream::pair().unwrap();
        let (here, there) = (socket(here), socket(there));
        let message = |text: &'static str| Frame::Message(Bytes::from_static(text.as_bytes()));
        let word = Frame::Complete(LOAN, MailboxWord::new(LOAN.1, Status::Done));
        let data = |page| Frame::Data(LOAN, vec![Run { layer: 0, page, count: 1 }]);
        let mut outbound = Outbound::new();
        outbound.push(&message("first"));
        for page in [1, 2] {
            outbound.push_data(LOAN, vec![Run { layer: 0, page, count: 1 }], pages());
        }
        outbound.push(&word);
        outbound.push(&message("released"));
        outbound.push_ahead(&message("claim"));
        // So much that the first pages are begun.
        assert!(outbound.write_some(&here).await.unwrap().is_empty());
        assert_eq!(outbound.queue.len(), 4, "the messages before them are sent");
        outbound.push_ahead(&message("alive"));
        outbound.push_ahead(&message("alive still"));
        let frames = [
            message("first"),
            message("claim"),
            data(1),
            message("alive"),
            message("alive still"),
            data(2),
            word,
            message("released"),
        ];
        let sending = async {
            let mut sent = 0;
            while !outbound.is_empty() {
                sent += outbound.write_some(&here).await.unwrap().len();
            }
            sent
        };
        let (sent, received) = tokio::join!(sending, received(&there, frames.len()));
        assert_eq!(received, frames);
        assert_eq!((sent, outbound.bytes()), (2, 0));
    }
}
