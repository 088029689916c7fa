/// One sequence's part of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceSpan {
    /// Row of the sequence's first token in this step's `[tokens, …]` tensors.
    pub query_start: u32,
    /// Tokens of the sequence computed in this step: 1 when decoding, a chunk of the prompt when prefilling.
    pub query_len: u32,
    /// Tokens of the sequence in the KV cache once this step is done, this step's included.
    pub context_len: u32,
    /// Where the sequence's block table starts in [`Batch::block_tables`].
    pub table_start: u32,
}

/// What one forward pass computes: a ragged batch of tokens of several sequences, prefill chunks and decodes mixed.
///
/// All attention metadata is here, in flat arrays that are refilled, never reallocated, each step (the idea is
/// nano-vllm's, after vLLM's `cu_seqlens` and `slot_mapping`). Token `i` of a sequence lives in page
/// `block_tables[table_start + i / block_size]` at offset `i % block_size`.
#[derive(Debug, Default)]
pub struct Batch {
    /// Token ids, `[tokens]`; or [`Batch::PLACEHOLDER`] and a row, for a backend that draws ahead.
    pub tokens: Vec<u32>,
    /// Position of each token in its own sequence, `[tokens]`.
    pub positions: Vec<u32>,
    /// The sequences, in row order; their spans tile `0..tokens`.
    pub sequences: Vec<SequenceSpan>,
    /// The sequences' block tables one after the other: page numbers. A page that a sequence writes in this step is in
    /// no other sequence's table.
    pub block_tables: Vec<u32>,
    /// Rows whose logits are wanted, ascending.
    pub logit_rows: Vec<u32>,
}

impl Batch {
    /// Added to a row of the step before: stands for the token that is drawn there, which the host may not know yet.
    /// See [`DrawsAhead`](crate::DrawsAhead).
    pub const PLACEHOLDER: u32 = 1 << 31;

    /// An empty batch that will not allocate below these sizes.
    pub fn with_capacity(tokens: usize, sequences: usize, blocks: usize) -> Self {
        Self {
            tokens: Vec::with_capacity(tokens),
            positions: Vec::with_capacity(tokens),
            sequences: Vec::with_capacity(sequences),
            block_tables: Vec::with_capacity(blocks),
            logit_rows: Vec::with_capacity(tokens),
        }
    }

    /// Empties the batch and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.block_tables.clear();
        self.logit_rows.clear();
    }

    /// Appends one sequence: `tokens` are its next tokens, the first of them at `position`; `block_table` covers
    /// everything up to and including them. `logits_from` counts the leading tokens whose logits nobody wants
    /// (`tokens.len() - 1` for ordinary prefill and decode, `tokens.len()` for a chunk that is not the last).
    pub fn push(&mut self, tokens: &[u32], position: u32, block_table: &[u32], logits_from: usize) {
        let query_start = self.tokens.len() as u32;
        let query_len = tokens.len() as u32;
        self.sequences.push(SequenceSpan {
            query_start,
            query_len,
            context_len: position + query_len,
            table_start: self.block_tables.len() as u32,
        });
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(position..position + query_len);
        self.block_tables.extend_from_slice(block_table);
        self.logit_rows.extend(query_start + logits_from as u32..query_start + query_len);
    }
}
