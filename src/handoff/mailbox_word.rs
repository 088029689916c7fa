//! The one word by which a loan's holder says that it has finished.

use super::Epoch;

/// What the holder of a loan writes into the mailbox, once, after all data: `epoch << 32 | status`. 0 is an empty slot.
///
/// The decode worker never clears a word (that would race with a peer's write): words of earlier loans lie about in it
/// and are told apart by their epoch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct MailboxWord(u64);

/// How the holder of a loan finished. Either way it writes nothing more under that loan.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Every page holds what it should.
    Done,
    /// It gave up; the pages' content is undefined.
    Failed,
}

impl MailboxWord {
    /// Nothing was ever written.
    pub const EMPTY: Self = Self(0);

    /// The word that ends the loan of this epoch.
    pub const fn new(epoch: Epoch, status: Status) -> Self {
        let status = match status {
            Status::Done => 1,
            Status::Failed => 2,
        };
        Self((epoch.get() as u64) << 32 | status)
    }

    /// As it lies in memory.
    pub const fn from_raw(word: u64) -> Self {
        Self(word)
    }

    /// As it lies in memory.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The loan it speaks of; `None` if it is empty.
    pub const fn epoch(self) -> Option<Epoch> {
        Epoch::new((self.0 >> 32) as u32)
    }

    /// How the loan of `epoch` ended, if this word says so. Words of other loans, and words nobody writes, say nothing.
    pub const fn status_of(self, epoch: Epoch) -> Option<Status> {
        if (self.0 >> 32) as u32 != epoch.get() {
            return None;
        }
        match self.0 as u32 {
            1 => Some(Status::Done),
            2 => Some(Status::Failed),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_speaks_of_its_own_epoch_alone() {
        let epoch = Epoch::new(7).unwrap();
        for status in [Status::Done, Status::Failed] {
            let word = MailboxWord::new(epoch, status);
            assert_eq!(word.status_of(epoch), Some(status));
            assert_eq!(word.status_of(epoch.next()), None);
            assert_eq!(MailboxWord::from_raw(word.raw()), word);
        }
        assert_eq!(MailboxWord::EMPTY.status_of(Epoch::FIRST), None);
        assert_eq!(MailboxWord::from_raw(7 << 32 | 3).status_of(epoch), None);
    }
}
