//! Every page, and who has it.

use super::{BlockTable, LentPage, Page, PageHash, SharedPage, prefix::PrefixIndex};

/// Who has a page that is neither free nor published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// Nobody: it is free or in the index.
    Nobody,
    /// A sequence, as a [`Page`].
    Sequence,
    /// Another worker, as a [`LentPage`].
    Worker,
    /// A worker that may still write to it although nobody wants that any more.
    Quarantine,
}

/// Every page of the KV cache, in exactly one state each.
#[derive(Debug)]
pub struct KvPool {
    free: Vec<u32>,
    holders: Box<[Holder]>,
    /// Pages handed out as [`Page`].
    owned: usize,
    /// Pages handed out as [`LentPage`], those in quarantine left out.
    lent: usize,
    quarantined: usize,
    index: PrefixIndex,
    /// References found by the integrity check, by page number.
    scratch: Box<[u32]>,
}

/// How many pages are in each state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageCounts {
    /// Holding nothing.
    pub free: usize,
    /// Published, used by nobody, kept for a prefix hit.
    pub cached: usize,
    /// Used by sequences: owned by one, or shared.
    pub owned: usize,
    /// Lent to other workers, which fill them.
    pub lent: usize,
    /// No longer wanted, and not free before it is certain that no worker writes to them.
    pub quarantined: usize,
}

impl KvPool {
    /// A pool of `pages` free pages, numbered from 0.
    pub fn new(pages: usize) -> Self {
        assert!(u32::try_from(pages).is_ok_and(|pages| pages < u32::MAX), "page numbers are 32 bits");
        Self {
            // Popped from the end: low numbers go first.
            free: (0..pages as u32).rev().collect(),
            holders: vec![Holder::Nobody; pages].into(),
            owned: 0,
            lent: 0,
            quarantined: 0,
            index: PrefixIndex::new(pages),
            scratch: vec![0; pages].into(),
        }
    }

    /// Takes a page: a free one, else the cached one that has been unused for longest. `None`: all are in use.
    pub fn allocate(&mut self) -> Option<Page> {
        let page = self.free.pop().or_else(|| self.index.evict())?;
        self.pass(page, Holder::Nobody, Holder::Sequence);
        self.owned += 1;
        Some(Page(page))
    }

    /// Takes back a page with whatever was in it.
    pub fn free(&mut self, page: Page) {
        self.disown(&page);
        self.free.push(page.0);
    }

    /// Lends a page to another worker.
    pub fn lend(&mut self, page: Page) -> LentPage {
        self.disown(&page);
        self.pass(page.0, Holder::Nobody, Holder::Worker);
        self.lent += 1;
        LentPage(page.0)
    }

    /// Ends a loan whose page is wanted: the worker has filled it, or was never told of it.
    pub fn take_back(&mut self, page: LentPage) -> Page {
        self.pass(page.0, Holder::Worker, Holder::Sequence);
        self.lent -= 1;
        self.owned += 1;
        Page(page.0)
    }

    /// Notes that the content of a lent page is not wanted any more, though it may still be written. Its [`LentPage`]
    /// stays with whoever watches over the loan.
    pub fn quarantine(&mut self, page: u32) {
        self.pass(page, Holder::Worker, Holder::Quarantine);
        self.lent -= 1;
        self.quarantined += 1;
    }

    /// Ends a loan whose page nobody wants: no worker can write to it any more.
    pub fn free_lent(&mut self, page: LentPage) {
        match std::mem::replace(&mut self.holders[page.0 as usize], Holder::Nobody) {
            Holder::Worker => self.lent -= 1,
            Holder::Quarantine => self.quarantined -= 1,
            holder => panic!("page {} is not lent but with {holder:?}", page.0),
        }
        self.free.push(page.0);
    }

    /// Makes a full page immutable and findable. If its content has been published before, the other copy is used from
    /// here on and this one is freed: they are equal bit for bit.
    pub fn publish(&mut self, page: Page, hash: PageHash) -> SharedPage {
        if let Some(other) = self.find(hash) {
            self.free(page);
            return other;
        }
        self.disown(&page);
        self.index.insert(page.0, hash);
        SharedPage(page.0)
    }

    /// A reference to the page published under `hash`.
    pub fn find(&mut self, hash: PageHash) -> Option<SharedPage> {
        let page = self.index.find(hash)?;
        self.index.retain(page);
        Some(SharedPage(page))
    }

    /// Whether a page is published under `hash`.
    pub fn is_published(&self, hash: PageHash) -> bool {
        self.index.find(hash).is_some()
    }

    /// Whether a page is published under `hash` and in use: taking it costs no memory.
    pub fn is_in_use(&self, hash: PageHash) -> bool {
        self.index.find(hash).is_some_and(|page| self.index.references(page) > 0)
    }

    /// Gives back a reference. Of several pages of a sequence the last one first: it is then the first to be evicted,
    /// and a shorter prefix stays findable.
    pub fn release(&mut self, page: SharedPage) {
        self.index.release(page.0);
    }

    /// Pages that can be allocated now.
    pub fn available(&self) -> usize {
        self.free.len() + self.index.unused()
    }

    /// Pages of each state; they add up to all.
    pub fn counts(&self) -> PageCounts {
        let (free, cached, lent, quarantined) = (self.free.len(), self.index.unused(), self.lent, self.quarantined);
        let owned = self.holders.len() - free - cached - lent - quarantined;
        PageCounts { free, cached, owned, lent, quarantined }
    }

    /// Whether another worker may write to a page, wanted or not.
    pub fn is_lent(&self, page: u32) -> bool {
        matches!(self.holders[page as usize], Holder::Worker | Holder::Quarantine)
    }

    /// Panics unless every page is in exactly one state and every reference is held by one of `tables`, which are all
    /// there are. Loans are in nobody's table; whoever lends compares [`KvPool::counts`] with what it lent.
    pub fn check_integrity<'a>(&mut self, tables: impl Iterator<Item = &'a BlockTable>) {
        self.index.check_integrity();
        self.scratch.fill(0);
        for &page in &self.free {
            let unused = self.holders[page as usize] == Holder::Nobody && !self.index.contains(page);
            assert!(unused, "free page {page} is in use");
            self.scratch[page as usize] += 1;
        }
        assert!(self.scratch.iter().all(|&seen| seen <= 1), "a page is free twice");
        self.scratch.fill(0);
        let mut owned = 0;
        for table in tables {
            for page in table.owned() {
                let held = self.holders[page.0 as usize] == Holder::Sequence && !self.index.contains(page.0);
                assert!(held, "page {} has no owner", page.0);
                self.scratch[page.0 as usize] += 1;
                owned += 1;
            }
            for page in table.shared() {
                self.scratch[page.0 as usize] += 1;
            }
        }
        assert_eq!(owned, self.owned, "an owned page is in no block table");
        for (page, &seen) in self.scratch.iter().enumerate() {
            let holder = self.holders[page];
            let expected = u32::from(holder == Holder::Sequence) + self.index.references(page as u32);
            assert_eq!(seen, expected, "page {page} is in {seen} block tables instead of {expected}");
            let published = self.index.contains(page as u32);
            assert!(!published || holder == Holder::Nobody, "published page {page} is with {holder:?}");
        }
        let with = |wanted: Holder| self.holders.iter().filter(|&&holder| holder == wanted).count();
        assert_eq!(
            (with(Holder::Worker), with(Holder::Quarantine)),
            (self.lent, self.quarantined),
            "loans are miscounted"
        );
        let published = (0..self.holders.len() as u32).filter(|&page| self.index.contains(page)).count();
        let accounted = self.free.len() + published + self.owned + self.lent + self.quarantined;
        assert_eq!(accounted, self.holders.len(), "pages were lost");
    }

    fn disown(&mut self, page: &Page) {
        self.pass(page.0, Holder::Sequence, Holder::Nobody);
        self.owned -= 1;
    }

    fn pass(&mut self, page: u32, from: Holder, to: Holder) {
        let holder = std::mem::replace(&mut self.holders[page as usize], to);
        assert_eq!(holder, from, "page {page} is not where it should be");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::PageHasher;

    const NONE: PageCounts = PageCounts { free: 0, cached: 0, owned: 0, lent: 0, quarantined: 0 };

    fn hash(token: u32) -> PageHash {
        let mut hashes = Vec::new();
        PageHasher::new(b"", 1).extend(&mut hashes, &[token]);
        hashes[0]
    }

    fn published(pool: &mut KvPool, token: u32) -> SharedPage {
        let page = pool.allocate().unwrap();
        pool.publish(page, hash(token))
    }

    #[test]
    fn an_unused_page_is_found_again_until_its_memory_is_needed() {
        let mut pool = KvPool::new(2);
        let shared = published(&mut pool, 7);
        let number = shared.number();
        pool.release(shared);
        assert_eq!(pool.counts(), PageCounts { free: 1, cached: 1, ..NONE });
        let again = pool.find(hash(7)).unwrap();
        assert_eq!(again.number(), number);
        pool.release(again);
        let pages: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(pages.len(), 2);
        assert!(pool.find(hash(7)).is_none());
        pages.into_iter().for_each(|page| pool.free(page));
        pool.check_integrity(std::iter::empty());
    }

    #[test]
    fn the_longest_unused_page_is_evicted_first() {
        let mut pool = KvPool::new(3);
        let pages = [1, 2, 3].map(|token| published(&mut pool, token));
        pages.into_iter().for_each(|page| pool.release(page));
        let used_again = pool.find(hash(1)).unwrap();
        pool.release(used_again);
        let page = pool.allocate().unwrap();
        assert!(pool.find(hash(2)).is_none());
        for token in [1, 3] {
            let found = pool.find(hash(token)).unwrap();
            pool.release(found);
        }
        pool.free(page);
        pool.check_integrity(std::iter::empty());
    }

    #[test]
    fn a_page_in_use_is_never_evicted() {
        let mut pool = KvPool::new(1);
        let shared = published(&mut pool, 1);
        assert!(pool.is_in_use(hash(1)));
        assert!(pool.allocate().is_none());
        pool.release(shared);
        assert!(!pool.is_in_use(hash(1)));
        assert!(pool.allocate().is_some());
    }

    #[test]
    fn publishing_equal_content_twice_keeps_one_copy() {
        let mut pool = KvPool::new(2);
        let first = published(&mut pool, 1);
        let second = published(&mut pool, 1);
        assert_eq!(first.number(), second.number());
        assert_eq!(pool.counts(), PageCounts { free: 1, owned: 1, ..NONE });
        pool.release(first);
        assert_eq!(pool.counts().owned, 1);
        pool.release(second);
        assert_eq!(pool.counts(), PageCounts { free: 1, cached: 1, ..NONE });
    }

    #[test]
    fn a_lent_page_is_nobodys_until_its_loan_ends() {
        let mut pool = KvPool::new(3);
        let [first, second, third] = [(); 3].map(|()| pool.allocate().unwrap());
        let [first, second, third] = [first, second, third].map(|page| pool.lend(page));
        assert_eq!(pool.counts(), PageCounts { lent: 3, ..NONE });
        assert!(pool.allocate().is_none());
        let filled = pool.take_back(first);
        let shared = pool.publish(filled, hash(1));
        pool.release(shared);
        pool.quarantine(second.number());
        assert_eq!(pool.counts(), PageCounts { cached: 1, lent: 1, quarantined: 1, ..NONE });
        pool.check_integrity(std::iter::empty());
        pool.free_lent(third);
        pool.free_lent(second);
        assert_eq!(pool.counts(), PageCounts { free: 2, cached: 1, ..NONE });
        pool.check_integrity(std::iter::empty());
    }

    #[test]
    #[should_panic(expected = "not where it should be")]
    fn a_page_in_quarantine_is_not_taken_back() {
        let mut pool = KvPool::new(1);
        let page = pool.allocate().unwrap();
        let lent = pool.lend(page);
        pool.quarantine(lent.number());
        let _page = pool.take_back(lent);
    }

    #[test]
    #[should_panic(expected = "in no block table")]
    fn a_lost_page_is_noticed() {
        let mut pool = KvPool::new(2);
        let _lost = pool.allocate();
        pool.check_integrity(std::iter::empty());
    }
}
