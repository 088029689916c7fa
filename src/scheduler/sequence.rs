//! A request's tokens, and how far they are computed.

use engine_kernels::Batch;

use crate::cache::{BlockTable, PageHash, PageHasher, Salt};

/// One request's tokens and how far they are computed. Made by whoever submits it, with all the memory it will ever
/// need, so that nothing is allocated while it runs.
#[derive(Debug)]
pub struct Sequence {
    /// Prompt, then output; the last may be [`Batch::PLACEHOLDER`] and a row.
    tokens: Vec<u32>,
    prompt_len: usize,
    /// Tokens it ends with at the latest.
    tokens_max: usize,
    /// How many were added before it.
    pub(super) arrival: u64,
    /// Tokens whose keys and values are in the pages of `table`.
    pub(super) num_computed: usize,
    pub(super) table: BlockTable,
    /// Hashes of the full pages of `tokens`; of the output's pages once they are published. None, if nothing is to be
    /// found again.
    pub(super) hashes: Vec<PageHash>,
    /// Gives pages their hashes: whose pages these may also be is a matter of its root.
    hasher: PageHasher,
    /// Prompt tokens whose log-probabilities are no longer owed: all of them unless the request asked for them, else
    /// the first, which nothing predicts, and those that followed.
    pub(super) scored: usize,
    /// Whether a step has computed any of it.
    pub(super) started: bool,
    /// Prompt tokens found in the cache when it was first looked at closely.
    pub(super) cached: Option<usize>,
    pub(super) prefill_at: PrefillAt,
    /// How often another worker took it on and did not bring it to an end.
    pub(super) lost: u32,
    /// Whether another worker's keys and values are what it continues from.
    pub(super) from_afar: bool,
    /// Numbers of the pages lent for it, while another worker fills them.
    pub(super) lent: Vec<u32>,
    /// Whether its keys and values are all that is wanted: no logits, no tokens.
    pub(super) prefill_only: bool,
}

/// Where the prompt of a sequence is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum PrefillAt {
    /// Wherever the router says, which is asked until some of it is computed.
    Undecided,
    /// Here, until it has to start again.
    Here,
    /// Here, however often it starts again.
    HereForGood,
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
            tokens_max: capacity,
            arrival: 0,
            num_computed: 0,
            table: BlockTable::with_capacity(pages),
            hashes,
            hasher: *hasher,
            scored: if score_prompt { 1 } else { prompt.len() },
            started: false,
            cached: None,
            prefill_at: PrefillAt::Undecided,
            lost: 0,
            from_afar: false,
            lent: Vec::new(),
            prefill_only: false,
        }
    }

    /// A sequence whose keys and values are computed for another worker. All of it may come from the cache, nothing is
    /// sampled, and once computed it is held until [`Scheduler::remove`](super::Scheduler::remove).
    pub fn prefill_only(tokens: &[u32], hasher: &PageHasher) -> Self {
        Self { prefill_only: true, prefill_at: PrefillAt::HereForGood, ..Self::new(tokens, 0, false, hasher) }
    }

    /// Continues an answer whose first tokens were generated elsewhere: as after a preemption, they are computed like a
    /// prompt. With the sequence's prompt unscored and nothing computed.
    pub fn resume(&mut self, output: &[u32]) {
        debug_assert!(output.is_empty() || self.scored >= self.prompt_len && self.num_computed == 0);
        self.tokens.extend_from_slice(output);
        self.hash_pages(self.tokens.len());
    }

    /// Gives the full pages of the first `tokens` tokens their hashes.
    pub(super) fn hash_pages(&mut self, tokens: usize) {
        self.hasher.extend(&mut self.hashes, &self.tokens[..tokens]);
    }

    /// What its pages are kept apart by.
    pub fn salt(&self) -> Option<Salt> {
        self.hasher.salt()
    }

    /// Prompt and output. As long as the last token is not known, [`Batch::PLACEHOLDER`] and the row of the step under
    /// way that it is drawn in stand for it.
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

    /// Tokens whose keys and values are there.
    pub fn num_computed(&self) -> usize {
        self.num_computed
    }

    /// Whether keys and values of all its tokens are there, or will be before the next step.
    pub fn is_computed(&self) -> bool {
        self.remaining() == 0
    }

    /// Prompt tokens found in the cache when it was first scheduled.
    pub fn cached_tokens(&self) -> usize {
        self.cached.unwrap_or(0)
    }

    /// Whether another worker has prefilled it.
    pub fn is_from_afar(&self) -> bool {
        self.from_afar
    }

    /// Whether its last token is not known yet: a placeholder stands for it.
    pub fn has_placeholder(&self) -> bool {
        self.tokens.last().is_some_and(|token| token & Batch::PLACEHOLDER != 0)
    }

    /// Whether the next step has nothing to compute for it: either all its tokens are computed and what was sampled is
    /// not known yet, or that unknown token is the last it may have.
    pub(super) fn awaits_outcome(&self) -> bool {
        let is_last = self.has_placeholder() && self.tokens.len() == self.tokens_max;
        !self.prefill_only && (self.remaining() == 0 || is_last)
    }

    /// Whether one token is left, whose logits are wanted.
    pub(super) fn decodes(&self) -> bool {
        self.remaining() == 1 && !self.prefill_only
    }

    /// Tokens not computed yet.
    pub(super) fn remaining(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    pub(super) fn push_token(&mut self, token: u32) {
        debug_assert_eq!(self.remaining(), 0, "a token follows from all those before it");
        debug_assert!(!self.has_placeholder() && self.tokens.len() < self.tokens_max, "the sequence is at its limit");
        self.tokens.push(token);
    }

    pub(super) fn reveal(&mut self, token: u32) {
        debug_assert!(self.has_placeholder(), "a token is revealed once");
        if let Some(last) = self.tokens.last_mut() {
            *last = token;
        }
    }

    /// Where it stands in the order of arrivals.
    pub fn arrival(&self) -> u64 {
        self.arrival
    }

    /// Whether log-probabilities of its prompt are still owed.
    pub(super) fn owes_scores(&self) -> bool {
        self.scored < self.prompt_len
    }

    /// How many leading tokens may come from the cache: not the last, whose logits are wanted, and no position that a
    /// prompt log-probability is still owed for.
    pub(super) fn cacheable_tokens(&self) -> usize {
        if self.prefill_only {
            self.tokens.len()
        } else if self.owes_scores() {
            self.scored - 1
        } else {
            self.tokens.len() - 1
        }
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
        debug_assert!(self.table.is_empty() && self.lent.is_empty(), "pages are given back first");
        self.num_computed = 0;
        self.from_afar = false;
        if self.prefill_at == PrefillAt::Here {
            self.prefill_at = PrefillAt::Undecided;
        }
    }
}
