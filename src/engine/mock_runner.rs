//! A runner in place of a model, for clusters that are tried out without hardware.

use std::{
    io,
    ops::Range,
    os::unix::fs::FileExt,
    thread,
    time::{Duration, Instant},
};

use engine_kernels::{Batch, KvRegion, RowTask, SampleRow, Sampled, SequenceSpan, TokenMask};

use super::{Runner, RunnerError};

/// Bytes of what a token leaves in each layer of its page.
const CELL_BYTES: usize = size_of::<u64>();

/// What takes the place of a model in a mock.
#[derive(Debug, Clone)]
pub struct MockModel {
    /// How long a step takes, whatever it computes.
    pub step: Duration,
    /// How long each token of a step that belongs to a prompt takes, in addition.
    pub prompt_token: Duration,
    /// Tokens to answer in.
    pub words: Range<u32>,
}

/// A runner that only keeps time. In the pages a token leaves a digest of itself and everything before it, and what is
/// drawn is a digest of what the pages hold: a page that went astray, or came late, changes the text.
///
/// It reaches the pages through their file, so that nothing here has to be `unsafe`.
pub(crate) struct MockRunner {
    model: MockModel,
    region: KvRegion,
    block_size: usize,
}

/// A digest of a digest and what follows.
pub(super) fn mix(state: u64, value: u64) -> u64 {
    (state ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

/// One of the tokens that a mask allows.
fn among(mask: &TokenMask, suppress: &[u32], state: u64) -> u32 {
    let allowed = || mask.tokens().filter(move |id| !suppress.contains(id));
    let count = allowed().count().max(1);
    allowed().nth((state >> 32) as usize % count).unwrap_or(0)
}

impl MockRunner {
    /// `region` is memory that has a file.
    pub(crate) fn new(model: MockModel, region: KvRegion, block_size: usize) -> Self {
        Self { model, region, block_size }
    }

    /// Where the cell of a position begins in the file of the pages.
    fn offset(&self, batch: &Batch, span: &SequenceSpan, layer: usize, position: usize) -> u64 {
        let shape = self.region.shape();
        let page = batch.block_tables[span.table_start as usize + position / self.block_size] as usize;
        let cell = position % self.block_size * CELL_BYTES;
        (layer * shape.layer_stride() + page * shape.page_bytes + cell) as u64
    }

    fn read(&self, batch: &Batch, span: &SequenceSpan, layer: usize, position: usize) -> io::Result<u64> {
        let mut cell = [0; CELL_BYTES];
        let file = self.region.file().ok_or(io::ErrorKind::Unsupported)?;
        file.read_exact_at(&mut cell, self.offset(batch, span, layer, position))?;
        Ok(u64::from_le_bytes(cell))
    }

    /// Writes the cells of a sequence's next tokens, those of a page at a time.
    fn write(&self, batch: &Batch, span: &SequenceSpan, layer: usize) -> io::Result<()> {
        let file = self.region.file().ok_or(io::ErrorKind::Unsupported)?;
        let end = span.context_len as usize;
        let mut position = end - span.query_len as usize;
        let mut tokens = batch.tokens[span.query_start as usize..].iter();
        let mut state = match position {
            0 => layer as u64,
            _ => self.read(batch, span, layer, position - 1)?,
        };
        let mut cells = Vec::with_capacity(self.block_size * CELL_BYTES);
        while position < end {
            let page_end = end.min((position / self.block_size + 1) * self.block_size);
            cells.clear();
            for token in tokens.by_ref().take(page_end - position) {
                state = mix(state, u64::from(*token) + 1);
                cells.extend_from_slice(&state.to_le_bytes());
            }
            file.write_all_at(&cells, self.offset(batch, span, layer, position))?;
            position = page_end;
        }
        Ok(())
    }

    /// What follows the token at `position`: it hangs on that token's own cells, and on another page, of which each
    /// position looks at the next.
    fn draw(&self, batch: &Batch, span: &SequenceSpan, position: usize, row: &SampleRow<'_>) -> io::Result<Sampled> {
        let layers = self.region.shape().layers;
        let other_page = position % (position / self.block_size + 1);
        let elsewhere = position.min(other_page * self.block_size + self.block_size - 1);
        let mut state = self.read(batch, span, position % layers, position)?;
        state = mix(state, self.read(batch, span, (position + 1) % layers, elsewhere)?);
        let token = match row.task {
            RowTask::Score { token } => token,
            RowTask::Sample { params, suppress, mask } => {
                if params.temperature > 0.0 {
                    state = mix(state, params.seed);
                }
                let words = &self.model.words;
                let word = |state: u64| words.start + (state >> 32) as u32 % (words.end - words.start).max(1);
                // Whoever suppresses all words gets one of them.
                for _ in 0..words.len() {
                    if !suppress.contains(&word(state)) {
                        break;
                    }
                    state = mix(state, 1);
                }
                // Grammars are followed, in words or not.
                mask.map_or_else(|| word(state), |mask| among(mask, suppress, state))
            }
        };
        let mut sampled = Sampled { token, logprob: -((state >> 40) as f32) / 1e7, ..Sampled::default() };
        for (alternative, top) in sampled.top.iter_mut().take(row.logprobs.unwrap_or(0) as usize).enumerate() {
            *top = (token.saturating_sub(alternative as u32), sampled.logprob - alternative as f32);
            sampled.top_len += 1;
        }
        Ok(sampled)
    }

    fn compute<'a>(
        &self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> io::Result<()> {
        let started = Instant::now();
        // One token of a sequence is a decode: that a chunk of a prompt may be as short changes little.
        let lengths = batch.sequences.iter().map(|span| span.query_len);
        let prompt_tokens: u32 = lengths.filter(|&length| length > 1).sum();
        let takes = self.model.step + self.model.prompt_token * prompt_tokens;
        let layers = self.region.shape().layers;
        for layer in 0..layers {
            let done = started + takes * (layer + 1) as u32 / layers as u32;
            thread::sleep(done.saturating_duration_since(Instant::now()));
            for span in &batch.sequences {
                self.write(batch, span, layer)?;
            }
            layer_done(layer);
        }
        let mut spans = batch.sequences.iter();
        let mut span = spans.next();
        for (i, (&logit_row, out)) in batch.logit_rows.iter().zip(out).enumerate() {
            // Rows and sequences are in one order.
            while span.is_some_and(|span| logit_row >= span.query_start + span.query_len) {
                span = spans.next();
            }
            let Some(span) = span else { return Err(io::ErrorKind::InvalidInput.into()) };
            *out = self.draw(batch, span, batch.positions[logit_row as usize] as usize, &row(i))?;
        }
        Ok(())
    }
}

impl Runner for MockRunner {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        self.compute(batch, row, out, layer_done).map_err(|error| RunnerError(format!("a mock's pages: {error}")))
    }
}

#[cfg(test)]
mod tests {
    use engine_kernels::{RegionShape, SamplingParams, SequenceId};

    use super::*;

    const BLOCK: usize = 4;

    fn runner() -> MockRunner {
        let model = MockModel { step: Duration::ZERO, prompt_token: Duration::ZERO, words: 10..1000 };
        let shape = RegionShape { layers: 2, pages: 8, page_bytes: 64 };
        MockRunner::new(model, KvRegion::shared(shape).unwrap(), BLOCK)
    }

    /// The token after `tokens`, of which `known` are in the pages of `table`.
    fn next(runner: &mut MockRunner, tokens: &[u32], known: usize, table: &[u32]) -> u32 {
        let mut batch = Batch::default();
        batch.push(&tokens[known..], known as u32, table, tokens.len() - known - 1);
        let params = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        let row = |_| SampleRow {
            task: RowTask::Sample { params: &params, suppress: &[], mask: None },
            sequence: SequenceId(0),
            prompt: tokens,
            output: &[],
            logprobs: None,
        };
        let (mut out, mut layers) = ([Sampled::default()], Vec::new());
        runner.execute(&batch, &row, &mut out, &mut |layer| layers.push(layer)).unwrap();
        assert_eq!(layers, [0, 1]);
        out[0].token
    }

    #[test]
    fn what_follows_hangs_on_the_tokens_and_not_on_where_or_in_what_pieces_they_were_computed() {
        let tokens: Vec<u32> = (0..13).collect();
        let whole = next(&mut runner(), &tokens, 0, &[0, 1, 2, 3]);
        let mut other = runner();
        next(&mut other, &tokens[..6], 0, &[7, 5]);
        assert_eq!(next(&mut other, &tokens, 6, &[7, 5, 1, 0]), whole);
        let mut changed = tokens.clone();
        changed[2] = 99;
        assert_ne!(next(&mut runner(), &changed, 0, &[0, 1, 2, 3]), whole);
    }

    #[test]
    fn a_page_that_holds_something_else_changes_what_follows() {
        let tokens: Vec<u32> = (0..16).collect();
        let (mut undisturbed, mut disturbed) = (runner(), runner());
        for runner in [&mut undisturbed, &mut disturbed] {
            next(runner, &tokens[..12], 0, &[0, 1, 2]);
        }
        let table = [0, 1, 2, 3];
        let mut differ = 0;
        // The second page is gone.
        for layer in 0..2 {
            let at = layer * disturbed.region.shape().layer_stride() + 64;
            disturbed.region.file().unwrap().write_all_at(&[0; 32], at as u64).unwrap();
        }
        for known in 12..16 {
            let tokens = &tokens[..=known];
            let answers = [&mut undisturbed, &mut disturbed].map(|runner| next(runner, tokens, known, &table));
            differ += usize::from(answers[0] != answers[1]);
        }
        assert!(differ > 0, "nobody looked at it");
    }
}
