use crate::cache::{BlockTable, PageHash, PageHasher};

/// One request's tokens and how far they are computed. Made by whoever submits it, with all the memory it will ever
/// need, so that nothing is allocated while it runs.
#[derive(Debug)]
pub struct Sequence {
    /// Prompt, then output.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// How many were added before it.
    pub(super) arrival: u64,
    /// Tokens whose keys and values are in the pages of `table`.
    pub(super) num_computed: usize,
    pub(super) table: BlockTable,
    /// Hashes of the full pages of `tokens`; of the output's pages once they are published.
    pub(super) hashes: Vec<PageHash>,
    /// Prompt tokens whose log-probabilities are no longer owed: all of them unless the request asked for them, else the
    /// first, which nothing predicts, and those that followed.
    pub(super) scored: usize,
    /// Whether a step has computed any of it.
    pub(super) started: bool,
}

impl Sequence {
    /// A sequence that starts with `prompt`, at least one token, and grows by at most `max_tokens`. With `score_prompt`
    /// the logits of every prompt position are wanted.
    pub fn new(prompt: &[u32], max_tokens: usize, score_prompt: bool, hasher: &PageHasher) -> Self {
        assert!(!prompt.is_empty(), "a sequence starts with a token");
        let capacity = prompt.len() + max_tokens;
        let pages = capacity.div_ceil(hasher.block_size());
        let mut tokens = Vec::with_capacity(capacity);
        tokens.extend_from_slice(prompt);
        let mut hashes = Vec::with_capacity(pages);
        hasher.extend(&mut hashes, prompt);
        Self {
            tokens,
            prompt_len: prompt.len(),
            arrival: 0,
            num_computed: 0,
            table: BlockTable::with_capacity(pages),
            hashes,
            scored: if score_prompt { 1 } else { prompt.len() },
            started: false,
        }
    }

    /// Prompt and output.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The prompt.
    pub fn prompt(&self) -> &[u32] {
        &self.tokens[..self.prompt_len]
    }

    /// What was generated.
    pub fn output(&self) -> &[u32] {
        &self.tokens[self.prompt_len..]
    }

    /// Page numbers, in order.
    pub fn block_table(&self) -> &[u32] {
        self.table.numbers()
    }

    /// Tokens not computed yet.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    pub(super) fn push_token(&mut self, token: u32) {
        debug_assert_eq!(self.remaining(), 0, "a token follows from all those before it");
        debug_assert!(self.tokens.len() < self.tokens.capacity(), "the sequence is at its limit");
        self.tokens.push(token);
    }

    /// How many leading tokens may come from the cache: not the last, whose logits are wanted, and no position that a
    /// prompt log-probability is still owed for.
    pub(super) fn cacheable_tokens(&self) -> usize {
        if self.scored < self.prompt_len { self.scored - 1 } else { self.tokens.len() - 1 }
    }

    /// First position from `start` on whose logits are wanted, given that everything before `start` is computed.
    pub(super) fn logits_from(&self, start: usize) -> usize {
        self.cacheable_tokens().max(start)
    }

    /// Notes that positions up to `num_computed` have been computed and their logits looked at.
    pub(super) fn advance(&mut self, tokens: usize) {
        self.started = true;
        self.num_computed += tokens;
        self.scored = self.scored.max((self.num_computed + 1).min(self.prompt_len));
    }

    /// Forgets what was computed; the tokens stay.
    pub(super) fn restart(&mut self) {
        debug_assert!(self.table.is_empty(), "pages are given back first");
        self.num_computed = 0;
    }
}
