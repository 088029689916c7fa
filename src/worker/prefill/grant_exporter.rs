//! From the engine thread to the writer of a session.

use tokio::sync::mpsc;

use super::borrowing::{Note, SharedBorrowing, lock};
use crate::{
    engine::Exporter,
    handoff::{Epoch, HandoffId, MailboxSlot},
    transfer::{PageCopy, Writer},
};

/// Takes a prompt's pages from the engine thread to the writer of its session.
pub(super) struct GrantExporter {
    pub(super) borrowing: SharedBorrowing,
    pub(super) notes: mpsc::UnboundedSender<Note>,
    pub(super) writer: Writer,
    pub(super) handoff: HandoffId,
    pub(super) slot: MailboxSlot,
    pub(super) epoch: Epoch,
    /// The first page that is wanted.
    pub(super) first_page: usize,
    /// Where the decode worker wants them, from that one on.
    pub(super) pages: Vec<u32>,
    /// Of the prompt.
    pub(super) tokens: usize,
    pub(super) layers: usize,
}

impl GrantExporter {
    fn write(&self, layer: usize, first: usize, pages: &[u32]) {
        let remote = &self.pages[first - self.first_page..];
        let copy = |(&local, &remote): (&u32, &u32)| PageCopy { layer: layer as u32, local, remote };
        let copies = pages.iter().zip(remote).map(copy).collect();
        let handoff = self.handoff;
        let mut borrowing = lock(&self.borrowing);
        if !borrowing.begin_write(handoff) {
            return;
        }
        let notes = self.notes.clone();
        // The lock is not taken from within: the call back may come before the call returns.
        let done = move |result| drop(notes.send(Note::Wrote { handoff, result }));
        self.writer.write(self.slot, self.epoch, copies, done);
    }
}

impl Exporter for GrantExporter {
    fn layer(&mut self, layer: usize, first: usize, pages: &[u32]) {
        self.write(layer, first, pages);
    }

    fn found(&mut self, first: usize, pages: &[u32]) {
        // A write for each layer: each that ends lets the next sign of life say that something moved.
        (0..self.layers).for_each(|layer| self.write(layer, first, pages));
    }

    fn computed(&mut self, tokens: usize) {
        lock(&self.borrowing).computed(self.handoff, tokens, self.tokens);
    }
}

impl Drop for GrantExporter {
    fn drop(&mut self) {
        // Not under the lock, which whoever drops it may hold.
        let _ = self.notes.send(Note::Ended { handoff: self.handoff });
    }
}
