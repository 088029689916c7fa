//! KV pages: who holds which, and which can be found again.
//!
//! A page holds the keys and values of `block_size` consecutive tokens of one sequence, all layers. The memory itself
//! is the backend's; here are page numbers. A page is *free*, *owned* by one sequence that fills it ([`Page`]),
//! *shared* once full and published under the hash of everything up to its end ([`SharedPage`]), *cached*: published,
//! used by nobody, kept for a prefix hit until its memory is needed, *lent* to another worker that fills it
//! ([`LentPage`]), or in *quarantine*: lent, not wanted any more, and perhaps still written. Handles are moved, never
//! copied, so a page has one writer at most and a published page none. Everything is sized at start; nothing here
//! allocates afterwards.

mod hash;
mod page;
mod pool;
mod prefix;
mod table;

pub use hash::{PageHash, PageHasher, Salt};
pub use page::{LentPage, Page, SharedPage};
pub use pool::{KvPool, PageCounts};
pub use table::BlockTable;
