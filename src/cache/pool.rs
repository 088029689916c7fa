use super::{BlockTable, Page, PageHash, SharedPage, prefix::PrefixIndex};

/// Every page of the KV cache, in exactly one state each.
#[derive(Debug)]
pub struct KvPool {
    free: Vec<u32>,
    /// Pages handed out as [`Page`], by number.
    owned: Box<[bool]>,
    owned_count: usize,
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
}

impl KvPool {
    /// A pool of `pages` free pages, numbered from 0.
    pub fn new(pages: usize) -> Self {
        assert!(u32::try_from(pages).is_ok_and(|pages| pages < u32::MAX), "page numbers are 32 bits");
        Self {
            // Popped from the end: low numbers go first.
            free: (0..pages as u32).rev().collect(),
            owned: vec![false; pages].into(),
            owned_count: 0,
            index: PrefixIndex::new(pages),
            scratch: vec![0; pages].into(),
        }
    }

    /// Takes a page: a free one, else the cached one that has been unused for longest. `None`: all are in use.
    pub fn allocate(&mut self) -> Option<Page> {
        let page = self.free.pop().or_else(|| self.index.evict())?;
        assert!(!std::mem::replace(&mut self.owned[page as usize], true), "page {page} has an owner");
        self.owned_count += 1;
        Some(Page(page))
    }

    /// Takes back a page with whatever was in it.
    pub fn free(&mut self, page: Page) {
        self.disown(&page);
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

    /// Whether a page is published under `hash` and in use: taking it costs no memory.
    pub fn is_in_use(&self, hash: PageHash) -> bool {
        self.index.find(hash).is_some_and(|page| self.index.references(page) > 0)
    }

    /// Gives back a reference. Of several pages of a sequence the last one first: it is then the first to be evicted, and a
    /// shorter prefix stays findable.
    pub fn release(&mut self, page: SharedPage) {
        self.index.release(page.0);
    }

    /// Pages that can be allocated now.
    pub fn available(&self) -> usize {
        self.free.len() + self.index.unused()
    }

    /// Pages of each state; they add up to all.
    pub fn counts(&self) -> PageCounts {
        let (free, cached) = (self.free.len(), self.index.unused());
        PageCounts { free, cached, owned: self.owned.len() - free - cached }
    }

    /// Panics unless every page is in exactly one state and every reference is held by one of `tables`, which are all
    /// there are.
    pub fn check_integrity<'a>(&mut self, tables: impl Iterator<Item = &'a BlockTable>) {
        self.index.check_integrity();
        self.scratch.fill(0);
        for &page in &self.free {
            assert!(!self.owned[page as usize] && !self.index.contains(page), "free page {page} is in use");
            self.scratch[page as usize] += 1;
        }
        assert!(self.scratch.iter().all(|&seen| seen <= 1), "a page is free twice");
        self.scratch.fill(0);
        let mut owned = 0;
        for table in tables {
            for page in table.owned() {
                assert!(self.owned[page.0 as usize] && !self.index.contains(page.0), "page {} has no owner", page.0);
                self.scratch[page.0 as usize] += 1;
                owned += 1;
            }
            for page in table.shared() {
                self.scratch[page.0 as usize] += 1;
            }
        }
        assert_eq!(owned, self.owned_count, "an owned page is in no block table");
        for (page, &seen) in self.scratch.iter().enumerate() {
            let expected = u32::from(self.owned[page]) + self.index.references(page as u32);
            assert_eq!(seen, expected, "page {page} is in {seen} block tables instead of {expected}");
        }
        let published = (0..self.owned.len() as u32).filter(|&page| self.index.contains(page)).count();
        assert_eq!(self.free.len() + self.owned_count + published, self.owned.len(), "pages were lost");
    }

    fn disown(&mut self, page: &Page) {
        assert!(std::mem::take(&mut self.owned[page.0 as usize]), "page {} has no owner", page.0);
        self.owned_count -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::PageHasher;

    fn hash(token: u32) -> PageHash {
        PageHasher::new(b"", 1).page(None, &[token])
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
        assert_eq!(pool.counts(), PageCounts { free: 1, cached: 1, owned: 0 });
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
        assert_eq!(pool.counts(), PageCounts { free: 1, cached: 0, owned: 1 });
        pool.release(first);
        assert_eq!(pool.counts().owned, 1);
        pool.release(second);
        assert_eq!(pool.counts(), PageCounts { free: 1, cached: 1, owned: 0 });
    }

    #[test]
    #[should_panic(expected = "in no block table")]
    fn a_lost_page_is_noticed() {
        let mut pool = KvPool::new(2);
        let _lost = pool.allocate();
        pool.check_integrity(std::iter::empty());
    }
}
