use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::{Region, RegionShape};
use crate::handoff::{MailboxSlot, MailboxWord};

/// Bytes a slot takes: a cache line, so that a peer that writes one word does not take others from the poller's cache.
pub(super) const SLOT_BYTES: usize = 64;

/// The decode worker's mailbox: a word a slot, in memory that prefill workers, or their adapters, write themselves.
/// Clones are the same mailbox.
#[derive(Debug, Clone)]
pub struct Mailbox {
    memory: Region,
}

impl Mailbox {
    /// An empty mailbox, in memory that can be shared.
    pub fn new(slots: u32) -> io::Result<Self> {
        Ok(Self { memory: Region::shared(shape(slots))? })
    }

    /// Another process' mailbox.
    pub(super) fn open(file: File, slots: u32) -> io::Result<Self> {
        Ok(Self { memory: Region::open(file, shape(slots))? })
    }

    /// Words it has.
    pub fn slots(&self) -> u32 {
        self.memory.shape().pages as u32
    }

    /// What lies in a slot. If it is the word of a loan, everything written under that loan can be read afterwards by
    /// this thread: the load acquires what the writer's store released. Panics beyond the last slot.
    #[inline]
    pub fn load(&self, slot: MailboxSlot) -> MailboxWord {
        MailboxWord::from_raw(self.word(slot).load(Ordering::Acquire))
    }

    /// Posts a loan's last word. Everything that the calling thread did before, whatever instructions it did it with,
    /// is visible to whoever loads the word.
    pub(super) fn post(&self, slot: MailboxSlot, word: MailboxWord) {
        // Pages are copied with non-temporal stores, which on x86 are not ordered by the plain store that a release is
        // there. The copy ends with a fence of its own; this one is here so that the mailbox does not rely on how pages
        // were written. Once a handoff, it costs nothing.
        std::sync::atomic::fence(Ordering::SeqCst);
        self.word(slot).store(word.raw(), Ordering::Release);
    }

    /// The memory to hand to peers.
    pub(super) fn file(&self) -> Option<&File> {
        self.memory.file()
    }

    /// The memory to register with adapters: `slots` slots, the word first in each.
    pub(super) fn region(&self) -> &Region {
        &self.memory
    }

    fn word(&self, slot: MailboxSlot) -> &AtomicU64 {
        let word = self.memory.pages(0, slot.0 as usize, 1).cast::<u64>();
        // SAFETY: in the mapping, which lives as long as `self`, and aligned, since slots are and the mapping is. The
        // memory is only ever accessed as this atomic, by all processes that map it.
        unsafe { AtomicU64::from_ptr(word) }
    }
}

fn shape(slots: u32) -> RegionShape {
    RegionShape { layers: 1, pages: slots as usize, page_bytes: SLOT_BYTES }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::{Epoch, Status};

    #[test]
    fn a_word_posted_through_another_mapping_is_loaded() {
        let ours = Mailbox::new(3).unwrap();
        let theirs = Mailbox::open(ours.file().unwrap().try_clone().unwrap(), 3).unwrap();
        assert_eq!(ours.load(MailboxSlot(2)), MailboxWord::EMPTY);
        let word = MailboxWord::new(Epoch::FIRST, Status::Done);
        theirs.post(MailboxSlot(2), word);
        assert_eq!(ours.load(MailboxSlot(2)), word);
        assert_eq!(ours.load(MailboxSlot(1)), MailboxWord::EMPTY);
    }
}
