//! A language model that shows what it read: its "keys and values" are hashes of the tokens so far, and a token it
//! generates is a hash of all pages. One wrong write anywhere, and the answer is another.

use crate::random::mix;

/// Tokens of a page.
pub(crate) const PAGE_TOKENS: usize = 4;
/// Layers, each written on its own.
pub(crate) const LAYERS: usize = 2;
/// Tokens of an answer.
pub(crate) const ANSWER_TOKENS: usize = 3;

/// What a page of one layer holds.
pub(crate) type Content = u64;

/// The hashes that the pages of `tokens` are made of, page by page: each of everything up to its page's end.
pub(crate) fn page_hashes(tokens: &[u32]) -> Vec<u64> {
    let mut hash = 1;
    tokens
        .chunks(PAGE_TOKENS)
        .map(|page| {
            hash = page.iter().fold(hash, |hash, &token| mix(hash ^ u64::from(token)));
            hash
        })
        .collect()
}

/// What a layer keeps in a page.
pub(crate) fn content(page_hash: u64, layer: usize) -> Content {
    mix(page_hash ^ (layer as u64 + 1) << 48)
}

/// The token generated after `position` others, from the prompt's last token and what the cache holds.
pub(crate) fn next_token(last: u32, position: usize, pages: impl Iterator<Item = [Content; LAYERS]>) -> u64 {
    let cache = pages.flatten().fold(0, |hash, content| mix(hash ^ content));
    mix(cache ^ u64::from(last) ^ (position as u64) << 32)
}

/// What the prompt's answer must be.
pub(crate) fn reference(prompt: &[u32]) -> [u64; ANSWER_TOKENS] {
    let (&last, before) = prompt.split_last().expect("a prompt has tokens");
    let hashes = page_hashes(before);
    std::array::from_fn(|position| {
        next_token(last, position, hashes.iter().map(|&hash| std::array::from_fn(|layer| content(hash, layer))))
    })
}
