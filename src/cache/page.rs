/// A page with one owner, who may write to it. Given back with [`KvPool::free`](super::KvPool::free) or made immutable with
/// [`KvPool::publish`](super::KvPool::publish); losing it loses the page, which the integrity check finds.
#[derive(Debug)]
#[must_use = "a page that is dropped is lost to the pool"]
pub struct Page(pub(super) u32);

/// A counted reference to a full, immutable page. Given back with [`KvPool::release`](super::KvPool::release).
#[derive(Debug)]
#[must_use = "a reference that is dropped keeps its page for ever"]
pub struct SharedPage(pub(super) u32);

impl Page {
    /// Its number: index into the backend's cache.
    pub fn number(&self) -> u32 {
        self.0
    }
}

impl SharedPage {
    /// Its number: index into the backend's cache.
    pub fn number(&self) -> u32 {
        self.0
    }
}
