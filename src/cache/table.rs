use std::collections::VecDeque;

use super::{KvPool, Page, PageHash, SharedPage};

/// The pages of one sequence, in order: first the full ones, shared and immutable, then those it is still filling. Where
/// nothing is to be found again, full ones stay among the latter.
#[derive(Debug)]
pub struct BlockTable {
    shared: Vec<SharedPage>,
    owned: VecDeque<Page>,
    /// The same pages' numbers, as attention wants them.
    numbers: Vec<u32>,
}

impl BlockTable {
    /// An empty table with room for `pages`.
    pub fn with_capacity(pages: usize) -> Self {
        Self {
            shared: Vec::with_capacity(pages),
            owned: VecDeque::with_capacity(pages),
            numbers: Vec::with_capacity(pages),
        }
    }

    /// Page numbers, in order.
    pub fn numbers(&self) -> &[u32] {
        &self.numbers
    }

    /// Pages held.
    pub fn len(&self) -> usize {
        self.numbers.len()
    }

    /// Whether no page is held.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Pages published so far: the first ones of the table.
    pub fn published(&self) -> usize {
        self.shared.len()
    }

    /// Appends a page to fill.
    pub fn push(&mut self, page: Page) {
        self.numbers.push(page.number());
        self.owned.push_back(page);
    }

    /// Puts the pages from the one at `first` on in ascending order. None of them may have been written to, let alone
    /// published.
    pub fn sort_from(&mut self, first: usize) {
        if self.len() - first < 2 {
            return;
        }
        self.numbers[first..].sort_unstable();
        let owned = first - self.shared.len();
        self.owned.make_contiguous()[owned..].sort_unstable_by_key(Page::number);
    }

    /// Appends a prefix hit. The pages before it must be published.
    pub fn push_shared(&mut self, page: SharedPage) {
        assert!(self.owned.is_empty(), "a prefix hit cannot follow a page that is being filled");
        self.numbers.push(page.number());
        self.shared.push(page);
    }

    /// Publishes the first page that is not yet, which has been filled.
    pub fn publish_next(&mut self, hash: PageHash, pool: &mut KvPool) {
        let Some(page) = self.owned.pop_front() else { return };
        let shared = pool.publish(page, hash);
        self.numbers[self.shared.len()] = shared.number();
        self.shared.push(shared);
    }

    /// Gives every page back.
    pub fn release(&mut self, pool: &mut KvPool) {
        self.numbers.clear();
        self.owned.drain(..).for_each(|page| pool.free(page));
        self.shared.drain(..).rev().for_each(|page| pool.release(page));
    }

    pub(super) fn owned(&self) -> impl Iterator<Item = &Page> {
        self.owned.iter()
    }

    pub(super) fn shared(&self) -> impl Iterator<Item = &SharedPage> {
        self.shared.iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::PageHasher;

    #[test]
    fn pages_that_were_appended_last_are_sorted_beside_those_before() {
        let hasher = PageHasher::new(b"", 1);
        let mut hashes = Vec::new();
        hasher.extend(&mut hashes, &[5, 6]);
        let mut pool = KvPool::new(5);
        let mut pages: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        let mut table = BlockTable::with_capacity(5);
        // From the last one on.
        (0..5).for_each(|_| table.push(pages.pop().unwrap()));
        table.publish_next(hashes[0], &mut pool);
        table.sort_from(2);
        assert_eq!(table.numbers(), [4, 3, 0, 1, 2]);
        assert!(table.owned().map(Page::number).eq([3, 0, 1, 2]));
        pool.check_integrity([&table].into_iter());
        table.release(&mut pool);
    }

    #[test]
    fn a_table_gives_everything_back_and_keeps_the_shortest_prefix_longest() {
        let hasher = PageHasher::new(b"", 1);
        let mut hashes = Vec::new();
        hasher.extend(&mut hashes, &[5, 6]);
        let mut pool = KvPool::new(3);
        let mut table = BlockTable::with_capacity(3);
        (0..3).for_each(|_| table.push(pool.allocate().unwrap()));
        hashes.iter().for_each(|&hash| table.publish_next(hash, &mut pool));
        pool.check_integrity([&table].into_iter());
        table.release(&mut pool);
        pool.check_integrity(std::iter::empty());
        let _pages = [pool.allocate().unwrap(), pool.allocate().unwrap()];
        assert!(pool.find(hashes[1]).is_none());
        assert!(pool.find(hashes[0]).is_some());
    }
}
