/// Names the content of a full page: a digest of every token from the start of the sequence to the page's end. Equal
/// hashes of one [`PageHasher`] mean equal keys and values, because with one model those depend on nothing else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageHash(pub(super) u128);

/// Hashes full pages, each chained to the one before (the idea is vLLM's automatic prefix caching). BLAKE3 cut to 128
/// bits, from a root that nobody else knows: nobody can craft prompts whose pages collide with another's, nor such as
/// crowd a few places of the index.
#[derive(Debug, Clone, Copy)]
pub struct PageHasher {
    root: PageHash,
    block_size: usize,
}

impl PageHasher {
    /// `root` is what everything is chained to. Hashes never leave the process, so it may be as secret as can be.
    pub fn new(root: &[u8], block_size: usize) -> Self {
        assert!(block_size > 0, "a page holds at least one token");
        Self { root: truncate(blake3::hash(root)), block_size }
    }

    /// Tokens a page holds.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Hash of a page of `block_size` tokens that follows `parent`, or starts the sequence.
    pub fn page(&self, parent: Option<PageHash>, tokens: &[u32]) -> PageHash {
        debug_assert_eq!(tokens.len(), self.block_size, "only full pages have a hash");
        let mut hasher = blake3::Hasher::new();
        hasher.update(&parent.unwrap_or(self.root).0.to_le_bytes());
        for token in tokens {
            hasher.update(&token.to_le_bytes());
        }
        truncate(hasher.finalize())
    }

    /// Appends to `hashes`, which covers the first pages of `tokens`, the hashes of the full pages that follow.
    pub fn extend(&self, hashes: &mut Vec<PageHash>, tokens: &[u32]) {
        for page in tokens.chunks_exact(self.block_size).skip(hashes.len()) {
            hashes.push(self.page(hashes.last().copied(), page));
        }
    }
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

    #[test]
    fn a_hash_names_the_root_the_tokens_and_everything_before_them() {
        let hasher = PageHasher::new(b"a", 2);
        let first = hasher.page(None, &[1, 2]);
        assert_eq!(first, hasher.page(None, &[1, 2]));
        assert_ne!(first, hasher.page(None, &[2, 1]));
        assert_ne!(first, hasher.page(Some(first), &[1, 2]));
        assert_ne!(first, PageHasher::new(b"b", 2).page(None, &[1, 2]));
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
