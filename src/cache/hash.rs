use serde::{Deserialize, Serialize};

/// Names the content of a full page: a digest of every token from the start of the sequence to the page's end. Equal
/// hashes of one [`PageHasher`] mean equal keys and values, because with one model those depend on nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash(pub(super) u128);

/// What keeps the pages of some requests apart from all others': a digest of their `cache_salt`, which itself goes no
/// further than the API. Workers pass it on, so that pages are kept apart wherever they are computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Salt([u8; blake3::KEY_LEN]);

impl Salt {
    /// The digest of a request's own words.
    pub fn of(words: &str) -> Self {
        Self(*blake3::hash(words.as_bytes()).as_bytes())
    }
}

/// Hashes full pages, each chained to the one before (the idea is vLLM's automatic prefix caching). BLAKE3 cut to 128
/// bits, from a root that nobody else knows: nobody can craft prompts whose pages collide with another's, nor such as
/// crowd a few places of the index. Each salt has a root of its own, so nothing but the root has to keep requests apart.
#[derive(Debug, Clone, Copy)]
pub struct PageHasher {
    /// What everything is chained to. `None`: no page has a hash, so none is found again.
    root: Option<PageHash>,
    /// What the root was made with.
    salt: Option<Salt>,
    block_size: usize,
}

impl PageHasher {
    /// `root` is what everything is chained to. Hashes never leave the process, so it may be as secret as can be.
    pub fn new(root: &[u8], block_size: usize) -> Self {
        assert!(block_size > 0, "a page holds at least one token");
        Self { root: Some(truncate(blake3::hash(root))), salt: None, block_size }
    }

    /// One that gives no page a hash: what a sequence computes is its own, and gone with it.
    pub fn without_hashes(block_size: usize) -> Self {
        assert!(block_size > 0, "a page holds at least one token");
        Self { root: None, salt: None, block_size }
    }

    /// The one for requests with this salt; without one, the same.
    pub fn salted(self, salt: Option<Salt>) -> Self {
        let Some(Salt(key)) = salt else { return self };
        // Keyed, so that it is no page's hash.
        let root = self.root.map(|root| truncate(blake3::keyed_hash(&key, &root.0.to_le_bytes())));
        Self { root, salt, ..self }
    }

    /// The salt of the requests it is for.
    pub fn salt(&self) -> Option<Salt> {
        self.salt
    }

    /// Tokens a page holds.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Appends to `hashes`, which covers the first pages of `tokens`, the hashes of the full pages that follow.
    pub fn extend(&self, hashes: &mut Vec<PageHash>, tokens: &[u32]) {
        let Some(root) = self.root else { return };
        for page in tokens.chunks_exact(self.block_size).skip(hashes.len()) {
            hashes.push(following(hashes.last().copied().unwrap_or(root), page));
        }
    }
}

/// Hash of a full page behind `parent`, which is the root before a sequence's first.
fn following(parent: PageHash, tokens: &[u32]) -> PageHash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&parent.0.to_le_bytes());
    for token in tokens {
        hasher.update(&token.to_le_bytes());
    }
    truncate(hasher.finalize())
}

fn truncate(hash: blake3::Hash) -> PageHash {
    let bytes = hash.as_bytes();
    let mut half = [0; 16];
    half.copy_from_slice(&bytes[..16]);
    PageHash(u128::from_le_bytes(half))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashes(hasher: PageHasher, tokens: &[u32]) -> Vec<PageHash> {
        let mut hashes = Vec::new();
        hasher.extend(&mut hashes, tokens);
        hashes
    }

    #[test]
    fn a_hash_names_the_root_the_tokens_and_everything_before_them() {
        let hasher = PageHasher::new(b"a", 2);
        let first = hashes(hasher, &[1, 2]);
        assert_eq!(first, hashes(hasher, &[1, 2]));
        assert_ne!(first, hashes(hasher, &[2, 1]));
        assert_ne!(first[0], hashes(hasher, &[1, 2, 1, 2])[1]);
        assert_ne!(first, hashes(PageHasher::new(b"b", 2), &[1, 2]));
    }

    #[test]
    fn equal_tokens_have_equal_hashes_under_the_same_salt_alone() {
        let hasher = PageHasher::new(b"a", 2);
        let salted = |words: &str| hashes(hasher.salted(Some(Salt::of(words))), &[1, 2, 3, 4]);
        assert_eq!(salted("x"), salted("x"));
        for (at, hash) in salted("x").iter().enumerate() {
            for other in [salted("y"), salted(""), hashes(hasher, &[1, 2, 3, 4])] {
                assert_ne!(*hash, other[at]);
            }
        }
        assert_eq!(hashes(hasher.salted(None), &[1, 2]), hashes(hasher, &[1, 2]));
        assert_ne!(salted("x"), hashes(PageHasher::new(b"b", 2).salted(Some(Salt::of("x"))), &[1, 2, 3, 4]));
    }

    #[test]
    fn without_hashes_no_page_has_one_and_the_salt_is_known_all_the_same() {
        let hasher = PageHasher::without_hashes(2).salted(Some(Salt::of("x")));
        assert_eq!(hashes(hasher, &[1, 2, 3, 4]), []);
        assert_eq!((hasher.salt(), hasher.block_size()), (Some(Salt::of("x")), 2));
    }

    #[test]
    fn extending_covers_full_pages_and_repeats_none() {
        let hasher = PageHasher::new(b"", 2);
        let mut hashes = Vec::new();
        hasher.extend(&mut hashes, &[1, 2, 3]);
        assert_eq!(hashes.len(), 1);
        hasher.extend(&mut hashes, &[1, 2, 3, 4, 5, 6, 7]);
        let mut at_once = Vec::new();
        hasher.extend(&mut at_once, &[1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(hashes, at_once);
    }
}
