/// A page with one owner, who may write to it. Given back with [`KvPool::free`](super::KvPool::free), made immutable
/// with [`KvPool::publish`](super::KvPool::publish) or lent with [`KvPool::lend`](super::KvPool::lend); losing it loses
/// the page, which the integrity check finds.
#[derive(Debug)]
#[must_use = "a page that is dropped is lost to the pool"]
pub struct Page(pub(super) u32);

/// A counted reference to a full, immutable page. Given back with [`KvPool::release`](super::KvPool::release).
#[derive(Debug)]
#[must_use = "a reference that is dropped keeps its page for ever"]
pub struct SharedPage(pub(super) u32);

/// A page that another worker may be writing to. Nobody here reads it, writes it or gives it to anyone: it becomes a
/// [`Page`] again with [`KvPool::take_back`](super::KvPool::take_back), once its loan was completed or turned out never
/// to have begun, or is freed with [`KvPool::free_lent`](super::KvPool::free_lent), once no write can reach it any
/// more.
#[derive(Debug)]
#[must_use = "a loan that is dropped keeps its page for ever"]
pub struct LentPage(pub(super) u32);

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

impl LentPage {
    /// Its number: index into the backend's cache.
    pub fn number(&self) -> u32 {
        self.0
    }
}
