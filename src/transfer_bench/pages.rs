//! Which pages are written, and what is in them.

use anyhow::{Result, ensure};

use crate::transfer::{PageCopy, RegionShape};

/// Most bytes that are lent to somebody who measures.
const BYTES_MAX: usize = 16 << 30;

/// So many pages of one layer of so many bytes, no two of them adjacent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    count: usize,
    bytes: usize,
}

impl Pages {
    /// Refuses what would take too much memory.
    pub fn new(count: usize, bytes: usize) -> Result<Self> {
        let total = count.checked_mul(2).and_then(|pages| pages.checked_mul(bytes));
        ensure!(count > 0 && bytes > 0, "there is nothing to measure without pages");
        ensure!(
            bytes.is_multiple_of(Self::WORD_BYTES) && total.is_some_and(|total| total <= BYTES_MAX),
            "{count} pages of {bytes} bytes: a page must be a multiple of 8 bytes, and twice as many pages at most {} \
             GiB",
            BYTES_MAX >> 30
        );
        Ok(Self { count, bytes })
    }

    /// Pages written in a round.
    pub fn count(self) -> usize {
        self.count
    }

    /// Bytes of a page.
    pub fn page_bytes(self) -> usize {
        self.bytes
    }

    /// Memory of either side: the pages at the receiver, and a gap after each; at the sender two pages for each, whose
    /// contents differ, so that what is left of the round before is seen.
    pub(super) fn shape(self) -> RegionShape {
        RegionShape { layers: 1, pages: 2 * self.count, page_bytes: self.bytes }
    }

    /// The receiver's page.
    pub(super) fn remote(self, index: usize) -> u32 {
        2 * index as u32
    }

    /// The sender's page for it in this round.
    fn local(self, index: usize, round: u32) -> u32 {
        2 * index as u32 + round % 2
    }

    /// What the first `count` pages are in this round.
    pub(super) fn copies(self, count: usize, round: u32) -> Vec<PageCopy> {
        let copy = |i| PageCopy { layer: 0, local: self.local(i, round), remote: self.remote(i) };
        (0..count.min(self.count)).map(copy).collect()
    }

    /// Bytes of which any two of a page differ.
    pub(super) const WORD_BYTES: usize = 8;

    /// Fills `page` as the sender's page of this number.
    pub(super) fn fill(number: u32, page: &mut [u8]) {
        for (index, word) in page.chunks_exact_mut(Self::WORD_BYTES).enumerate() {
            word.copy_from_slice(&word_at(number, index).to_le_bytes());
        }
    }

    /// Whether `bytes`, a page's from byte `from` on, are what the sender has for it in this round.
    pub(super) fn arrived(self, index: usize, round: u32, from: usize, bytes: &[u8]) -> bool {
        let number = self.local(index, round);
        let words = bytes.chunks_exact(Self::WORD_BYTES).zip(from / Self::WORD_BYTES..);
        words.into_iter().all(|(word, index)| *word == word_at(number, index).to_le_bytes())
    }
}

/// Any two words of any two pages differ: a product with an odd number takes no two to one.
fn word_at(page: u32, index: usize) -> u64 {
    ((u64::from(page) << 32 | index as u64) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_told_from_that_of_another_round_and_from_a_torn_one() {
        let pages = Pages::new(4, 64).unwrap();
        let mut page = vec![0; 64];
        Pages::fill(pages.local(3, 7), &mut page);
        assert!(pages.arrived(3, 7, 0, &page));
        assert!(pages.arrived(3, 7, 56, &page[56..]));
        assert!(!pages.arrived(3, 8, 0, &page), "the round before");
        assert!(!pages.arrived(3, 8, 56, &page[56..]), "the round before");
        assert!(!pages.arrived(2, 7, 0, &page), "another page");
        page[63] ^= 1;
        assert!(!pages.arrived(3, 7, 0, &page));
        assert!(!pages.arrived(3, 7, 0, &[0; 64]), "never written");
    }

    #[test]
    fn no_two_pages_of_a_round_are_adjacent() {
        let copies = Pages::new(3, 8).unwrap().copies(3, 1);
        assert_eq!(copies.iter().map(|copy| copy.remote).collect::<Vec<_>>(), [0, 2, 4]);
        assert_eq!(copies.iter().map(|copy| copy.local).collect::<Vec<_>>(), [1, 3, 5]);
    }

    #[test]
    fn what_takes_too_much_memory_is_refused() {
        assert!(Pages::new(0, 8).is_err());
        assert!(Pages::new(1, 12).is_err());
        assert!(Pages::new(65_536, 1 << 20).is_err());
        assert!(Pages::new(usize::MAX, 8).is_err());
    }
}
