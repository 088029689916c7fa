/// Tokens that may be drawn, where a grammar says which: a bit a token, the lowest id in the lowest bit of the first
/// word, as llguidance gives them and a device reads them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TokenMask {
    words: Vec<u32>,
}

impl TokenMask {
    /// Takes over such words.
    pub fn from_words(words: Vec<u32>) -> Self {
        Self { words }
    }

    /// All of a vocabulary.
    pub fn all(vocab_size: usize) -> Self {
        Self { words: vec![u32::MAX; vocab_size.div_ceil(32)] }
    }

    /// These of a vocabulary, which they have to be part of.
    pub fn of_tokens(vocab_size: usize, tokens: impl IntoIterator<Item = u32>) -> Self {
        let mut words = vec![0u32; vocab_size.div_ceil(32)];
        tokens.into_iter().for_each(|token| words[token as usize / 32] |= 1 << (token % 32));
        Self { words }
    }

    /// Whether a token may be drawn; none behind the mask's end may.
    pub fn allows(&self, token: u32) -> bool {
        self.words.get(token as usize / 32).is_some_and(|word| word >> (token % 32) & 1 == 1)
    }

    /// Whether no token may be drawn.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The tokens that may be drawn, in ascending order.
    pub fn tokens(&self) -> impl Iterator<Item = u32> {
        (0..self.words.len() as u32 * 32).filter(move |&token| self.allows(token))
    }

    /// Takes a token out.
    pub fn forbid(&mut self, token: u32) {
        if let Some(word) = self.words.get_mut(token as usize / 32) {
            *word &= !(1 << (token % 32));
        }
    }

    /// Takes all tokens out that `other` does not allow.
    pub fn intersect(&mut self, other: &Self) {
        let shared = self.words.len().min(other.words.len());
        self.words[..shared].iter_mut().zip(&other.words).for_each(|(word, other)| *word &= other);
        self.words[shared..].fill(0);
    }

    /// The words, for whoever goes through all of them.
    pub(crate) fn words(&self) -> &[u32] {
        &self.words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_allows_the_tokens_it_is_of() {
        let mut mask = TokenMask::of_tokens(70, [69, 0, 31, 32]);
        assert_eq!(mask.words(), [1 | 1 << 31, 1, 1 << 5]);
        assert_eq!(mask.tokens().collect::<Vec<_>>(), [0, 31, 32, 69]);
        assert!(mask.allows(32) && !mask.allows(33) && !mask.allows(1000));
        mask.forbid(31);
        mask.forbid(1000);
        assert_eq!(mask, TokenMask::of_tokens(70, [0, 32, 69]));
    }

    #[test]
    fn of_two_masks_what_both_allow_is_left() {
        let mut mask = TokenMask::of_tokens(70, [0, 40, 69]);
        mask.intersect(&TokenMask::all(100));
        assert_eq!(mask, TokenMask::of_tokens(70, [0, 40, 69]));
        mask.intersect(&TokenMask::of_tokens(64, [1, 40]));
        assert_eq!(mask, TokenMask::of_tokens(70, [40]));
        assert!(!mask.is_empty());
        mask.intersect(&TokenMask::default());
        assert!(mask.is_empty());
    }
}
