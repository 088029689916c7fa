//! Pages by the hash of the text up to their end.

use super::PageHash;

const NONE: u32 = u32::MAX;

/// What the index knows of one page.
#[derive(Debug, Clone, Copy)]
struct Node {
    /// Set while the page is published.
    hash: Option<PageHash>,
    /// References out; 0: the page is in the list of the unused.
    references: u32,
    /// Next page in the same hash bucket.
    chain: u32,
    /// Neighbours in the list of the unused: towards the longest unused, towards the latest.
    older: u32,
    newer: u32,
}

/// Published pages by hash: a chained hash table and a list in order of last use, both threaded through one array with
/// an entry a page. No entry is ever allocated, moved or rehashed.
#[derive(Debug)]
pub(super) struct PrefixIndex {
    nodes: Box<[Node]>,
    buckets: Box<[u32]>,
    oldest: u32,
    newest: u32,
    unused: usize,
}

impl PrefixIndex {
    pub(super) fn new(pages: usize) -> Self {
        let empty = Node { hash: None, references: 0, chain: NONE, older: NONE, newer: NONE };
        Self {
            nodes: vec![empty; pages].into(),
            buckets: vec![NONE; pages.next_power_of_two()].into(),
            oldest: NONE,
            newest: NONE,
            unused: 0,
        }
    }

    /// The page published under `hash`.
    pub(super) fn find(&self, hash: PageHash) -> Option<u32> {
        let mut page = self.buckets[self.bucket(hash)];
        while page != NONE {
            let node = &self.nodes[page as usize];
            if node.hash == Some(hash) {
                return Some(page);
            }
            page = node.chain;
        }
        None
    }

    /// Publishes `page`, with one reference out.
    pub(super) fn insert(&mut self, page: u32, hash: PageHash) {
        debug_assert!(self.find(hash).is_none(), "a hash names one page");
        let bucket = self.bucket(hash);
        let chain = std::mem::replace(&mut self.buckets[bucket], page);
        let node = &mut self.nodes[page as usize];
        assert!(node.hash.is_none(), "page {page} is published already");
        *node = Node { hash: Some(hash), references: 1, chain, older: NONE, newer: NONE };
    }

    /// Takes one more reference to a published page.
    pub(super) fn retain(&mut self, page: u32) {
        if self.references(page) == 0 {
            self.unlink(page);
        }
        self.nodes[page as usize].references += 1;
    }

    /// Gives a reference back; the last one makes the page the most recently used of the unused.
    pub(super) fn release(&mut self, page: u32) {
        let newest = self.newest;
        let node = &mut self.nodes[page as usize];
        assert!(node.hash.is_some() && node.references > 0, "page {page} has no reference to give back");
        node.references -= 1;
        if node.references == 0 {
            (node.older, node.newer) = (newest, NONE);
            *self.link_newer(newest) = page;
            self.newest = page;
            self.unused += 1;
        }
    }

    /// Withdraws the page that has been unused for longest.
    pub(super) fn evict(&mut self) -> Option<u32> {
        let page = self.oldest;
        if page == NONE {
            return None;
        }
        self.unlink(page);
        let hash = self.nodes[page as usize].hash.take()?;
        let after = self.nodes[page as usize].chain;
        let bucket = self.bucket(hash);
        let mut link = &mut self.buckets[bucket];
        while *link != page {
            link = &mut self.nodes[*link as usize].chain;
        }
        *link = after;
        Some(page)
    }

    /// Published pages nobody refers to.
    pub(super) fn unused(&self) -> usize {
        self.unused
    }

    /// References out to a page; 0 if it is unused or not published.
    pub(super) fn references(&self, page: u32) -> u32 {
        self.nodes[page as usize].references
    }

    /// Whether a page is published.
    pub(super) fn contains(&self, page: u32) -> bool {
        self.nodes[page as usize].hash.is_some()
    }

    /// Walks everything and panics on the first contradiction.
    pub(super) fn check_integrity(&self) {
        let (mut walked, mut page, mut before) = (0, self.oldest, NONE);
        while page != NONE {
            let node = &self.nodes[page as usize];
            assert!(node.hash.is_some() && node.references == 0, "page {page} is in use and in the list of the unused");
            assert_eq!(node.older, before, "the list of the unused is broken at page {page}");
            walked += 1;
            assert!(walked <= self.unused, "the list of the unused is longer than its count");
            (before, page) = (page, node.newer);
        }
        assert_eq!((walked, self.newest), (self.unused, before), "the list of the unused lost its end");
        let published = self.nodes.iter().filter(|node| node.hash.is_some());
        let idle = published.clone().filter(|node| node.references == 0).count();
        assert_eq!(idle, self.unused, "an unused page is missing from its list");
        for hash in published.filter_map(|node| node.hash) {
            assert!(self.find(hash).is_some(), "a published page cannot be found");
        }
    }

    fn bucket(&self, hash: PageHash) -> usize {
        // The hash is uniform already, and the table's length a power of two.
        hash.0 as usize & (self.buckets.len() - 1)
    }

    fn unlink(&mut self, page: u32) {
        let Node { older, newer, .. } = self.nodes[page as usize];
        *self.link_newer(older) = newer;
        if newer == NONE {
            self.newest = older;
        } else {
            self.nodes[newer as usize].older = older;
        }
        self.unused -= 1;
    }

    /// The link that leads from `page` to the next newer one; from nothing to the oldest.
    fn link_newer(&mut self, page: u32) -> &mut u32 {
        if page == NONE { &mut self.oldest } else { &mut self.nodes[page as usize].newer }
    }
}
