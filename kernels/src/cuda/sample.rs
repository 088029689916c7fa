//! Sampling on the device: describing the rows, and reading what came out.

use super::buffer::{Activations, Buffer, Fetched, PlainWord, Staged, bytes_of};
use super::driver::{Address, Driver};
use super::seats::{SEAT_TOKENS, SEATS, Seats};
use super::stream::Stream;
use crate::sampling::uniform;
use crate::{Batch, MAX_TOP_LOGPROBS, RowTask, SampleRow, Sampled, SamplingParams, TokenMask};

/// Threads of a block (`kernels/cuda/sample.cu`).
const THREADS: usize = 1024;
/// Largest vocabulary whose weights, in the kernel's units, add up to less than 2^64.
const VOCABULARY_MAX: usize = 1 << 19;

/// `sample::Row` of `kernels/cuda/sample.cu`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Row {
    uniform: f64,
    lowest: f64,
    inverse_temperature: f32,
    top_p: f32,
    repetition_penalty: f32,
    presence_penalty: f32,
    frequency_penalty: f32,
    top_k: i32,
    known: i32,
    alternatives: i32,
    touched: i32,
    touched_end: i32,
    counts_last: i32,
    seat: i32,
    moves_in: i32,
    mask: i32,
}

/// `sample::Touched`.
#[derive(Debug, Clone, Copy, PartialEq)]
#[repr(C)]
struct Touched {
    id: u32,
    bias: f32,
    marks: u32,
    before: f32,
}

impl Touched {
    /// A token that was drawn last, or the row in which it was.
    fn latest(id: u32) -> Self {
        Self { id, bias: 0.0, marks: SEEN + 1, before: 0.0 }
    }
}

const SEEN: u32 = 1 << 30;
const SUPPRESSED: u32 = 1 << 29;

/// `sample::Outcome`.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Outcome {
    token: u32,
    impossible: u32,
    logprob: f32,
    top_len: u32,
    ids: [u32; MAX_TOP_LOGPROBS],
    logprobs: [f32; MAX_TOP_LOGPROBS],
}

// SAFETY: two doubles, then fourteen words: no padding.
unsafe impl PlainWord for Row {}
// SAFETY: four words.
unsafe impl PlainWord for Touched {}

/// What sampling needs between steps.
pub(super) struct Sampler<D: Driver> {
    rows: Vec<Row>,
    touched: Vec<Touched>,
    /// The masks of those rows that have one, each as long as the vocabulary.
    masks: Vec<u32>,
    /// For each token, its place in `touched` plus one; all 0 between rows.
    places: Vec<u32>,
    described: Staged<D>,
    seats: Seats,
    /// What is listed at each seat, once somebody wants that, if there is room for it.
    lists: Option<Buffer<D>>,
    outcomes: Fetched<D>,
    /// The tokens of a step by themselves, for the next one's penalties: two steps in turns, since rows are drawn side
    /// by side, and some before others have looked.
    tokens: [Buffer<D>; 2],
    /// Whose turn it is.
    turn: usize,
}

impl<D: Driver> Sampler<D> {
    pub(super) fn new() -> Self {
        Self {
            rows: Vec::new(),
            touched: Vec::new(),
            masks: Vec::new(),
            places: Vec::new(),
            described: Staged::new(),
            seats: Seats::new(),
            lists: None,
            outcomes: Fetched::new(),
            tokens: [Buffer::missing(), Buffer::missing()],
            turn: 0,
        }
    }

    /// Makes room for the outcomes of steps of so many rows. Whether they are elsewhere from now on.
    pub(super) fn reserve(&mut self, stream: &Stream<D>, rows: usize) -> bool {
        let elsewhere = self.outcomes.reserve(stream, rows * size_of::<Outcome>());
        if elsewhere {
            let bytes = self.outcomes.capacity() / size_of::<Outcome>() * size_of::<u32>();
            self.tokens = [(); 2].map(|()| Buffer::zeroed(stream, bytes));
        }
        elsewhere
    }

    /// Makes lists, unless somebody wanted them before. Whether there are any: without, everything is sent each step.
    pub(super) fn make_lists(&mut self, stream: &Stream<D>) -> bool {
        let lists = self.lists.get_or_insert_with(|| {
            let bytes = SEATS * (1 + SEAT_TOKENS) * size_of::<Touched>();
            let lists = Buffer::zeroed_if_there_is_room(stream, bytes);
            if lists.address() == Address::NULL && stream.check().is_ok() {
                tracing::warn!(
                    mib = bytes >> 20,
                    "the device has little memory left: for each token of a sequence with penalties, all before it are \
                     sent again (a smaller KV cache leaves more)"
                );
            }
            lists
        });
        lists.address() != Address::NULL
    }

    /// Where the outcomes of the step before are: its rows' tokens, for the step that is enqueued next.
    pub(super) fn outcomes(&self) -> Address {
        self.outcomes.address()
    }

    /// Enqueues sampling or scoring of each row of `logits`. Their outcomes are those from `first` on.
    pub(super) fn draw<'a>(
        &mut self,
        stream: &Stream<D>,
        logits: &Activations<D>,
        first: usize,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
    ) {
        let vocabulary = logits.cols;
        assert!(vocabulary <= VOCABULARY_MAX, "a vocabulary of {vocabulary} tokens");
        assert!((first + logits.rows) * size_of::<Outcome>() <= self.outcomes.capacity(), "room was made first");
        self.rows.clear();
        self.touched.clear();
        self.masks.clear();
        if self.places.len() < vocabulary {
            self.places.resize(vocabulary, 0);
        }
        for i in 0..logits.rows {
            let described = self.describe(stream, &row(i), vocabulary);
            self.rows.push(described);
        }

        let (rows, touched, masks) = (bytes_of(&self.rows), bytes_of(&self.touched), bytes_of(&self.masks));
        self.described.reserve(stream, rows.len() + touched.len() + masks.len());
        self.described.upload(stream, &[rows, touched, masks]);
        let [at_rows, at_touched, at_masks] =
            [0, rows.len(), rows.len() + touched.len()].map(|offset| self.described.address().offset(offset));
        let lists = self.lists.as_ref().map_or(Address::NULL, Buffer::address);
        if self.rows.iter().any(|row| row.seat >= 0 || row.counts_last != 0) {
            let latest = self.tokens[1 - self.turn].address();
            let args = [at_rows.into(), at_touched.into(), lists.into(), latest.into()];
            stream.launch("tally_rows", [logits.rows, 1, 1], THREADS, &args);
        }
        let args = [
            logits.address().into(),
            vocabulary.into(),
            at_rows.into(),
            at_touched.into(),
            lists.into(),
            at_masks.into(),
            self.tokens[self.turn].address().offset(first * size_of::<u32>()).into(),
            self.outcomes.address().offset(first * size_of::<Outcome>()).into(),
        ];
        stream.launch("sample_rows", [logits.rows, 1, 1], THREADS, &args);
    }

    /// Nothing that was fetched waits to be collected.
    pub(super) fn assert_idle(&self) {
        self.outcomes.assert_idle();
    }

    /// Ends a step: enqueues a copy of its outcomes, the first `rows`, to the host.
    pub(super) fn fetch(&mut self, stream: &Stream<D>, rows: usize) {
        self.turn = 1 - self.turn;
        self.seats.next_step();
        self.outcomes.download(stream, rows * size_of::<Outcome>());
    }

    /// Waits for the earliest outcomes that were fetched and not collected.
    pub(super) fn collect(&mut self, stream: &Stream<D>, out: &mut [Sampled]) {
        let outcomes = self.outcomes.show(stream, out.len() * size_of::<Outcome>());
        for (out, bytes) in out.iter_mut().zip(outcomes.chunks_exact(size_of::<Outcome>())) {
            // SAFETY: the kernel has written an outcome there, whose every bit pattern is a value.
            let outcome = unsafe { bytes.as_ptr().cast::<Outcome>().read_unaligned() };
            out.token = outcome.token;
            out.impossible = outcome.impossible != 0;
            out.logprob = outcome.logprob;
            out.top_len = outcome.top_len;
            let top = outcome.ids.into_iter().zip(outcome.logprobs);
            out.top.iter_mut().zip(top).take(outcome.top_len as usize).for_each(|(slot, entry)| *slot = entry);
        }
    }

    fn describe(&mut self, stream: &Stream<D>, row: &SampleRow<'_>, vocabulary: usize) -> Row {
        let (first, mut seating, mut masked) = (self.touched.len(), Seating::default(), None);
        let greedy = SamplingParams::default();
        let (params, known) = match row.task {
            RowTask::Score { token } => {
                assert!((token as usize) < vocabulary, "token {token} of {vocabulary}");
                (&greedy, token as i32)
            }
            RowTask::Sample { params, suppress, mask } => {
                seating = self.seat_or_list(stream, params, suppress, row);
                masked = mask.map(|mask| self.list_mask(mask, vocabulary));
                (params, -1)
            }
        };
        let temperature = f64::from(params.temperature);
        let lowest = if params.min_p > 0.0 { temperature * libm::log(params.min_p.into()) } else { f64::NEG_INFINITY };
        let position = (row.prompt.len() + row.output.len()) as u64;
        Row {
            uniform: uniform(params.seed, position),
            lowest,
            // Finite, so that the likeliest token weighs e^(0 · x) = 1 however small the temperature.
            inverse_temperature: if temperature == 0.0 { 0.0 } else { (1.0 / params.temperature).min(f32::MAX) },
            top_p: params.top_p,
            repetition_penalty: params.repetition_penalty,
            presence_penalty: params.presence_penalty,
            frequency_penalty: params.frequency_penalty,
            top_k: params.top_k.min(vocabulary as u32) as i32,
            known,
            alternatives: row.logprobs.map_or(-1, |wanted| wanted.min(MAX_TOP_LOGPROBS as u32) as i32),
            touched: first as i32,
            touched_end: self.touched.len() as i32,
            counts_last: seating.counts_last.into(),
            seat: seating.seat.map_or(-1, |seat| seat as i32),
            moves_in: seating.moves_in.into(),
            mask: masked.map_or(-1, |place| place as i32),
        }
    }

    /// Lists a mask; its place among those of this call.
    fn list_mask(&mut self, mask: &TokenMask, vocabulary: usize) -> usize {
        let words = vocabulary.div_ceil(u32::BITS as usize);
        self.masks.extend_from_slice(&mask.words()[..words]);
        self.masks.len() / words - 1
    }

    /// Lists what a row touches: of a sequence whose seat holds the rest, the latest token.
    fn seat_or_list(
        &mut self,
        stream: &Stream<D>,
        params: &SamplingParams,
        suppress: &[u32],
        row: &SampleRow<'_>,
    ) -> Seating {
        if !params.penalises() || !self.make_lists(stream) {
            let counts_last = self.touch(params, suppress, row);
            return Seating { counts_last, ..Seating::default() };
        }
        let (sequence, tokens) = (row.sequence, row.prompt.len() + row.output.len());
        if let Some(&latest) = row.output.last()
            && let Some(seat) = self.seats.go_on(sequence, tokens, suppress)
        {
            self.touched.push(Touched::latest(latest));
            return Seating { seat: Some(seat), moves_in: false, counts_last: true };
        }
        let first = self.touched.len();
        let counts_last = self.touch(params, suppress, row);
        let seat = self.seats.move_in(sequence, tokens, self.touched.len() - first, suppress);
        Seating { seat, moves_in: true, counts_last }
    }

    /// Lists each token whose logit a request changes, once. Whether one is listed last that the host does not know
    /// yet, which may be among the others too.
    fn touch(&mut self, params: &SamplingParams, suppress: &[u32], row: &SampleRow<'_>) -> bool {
        let Self { touched, places, .. } = self;
        let first = touched.len();
        let mut entry = |id: u32, change: &dyn Fn(&mut Touched)| {
            let place = &mut places[id as usize];
            if *place == 0 {
                touched.push(Touched { id, bias: 0.0, marks: 0, before: 0.0 });
                *place = touched.len() as u32;
            }
            change(&mut touched[*place as usize - 1]);
        };
        for &(id, bias) in &params.logit_bias {
            entry(id, &|token| token.bias += bias);
        }
        for &id in suppress {
            entry(id, &|token| token.marks |= SUPPRESSED);
        }
        if params.repetition_penalty != 1.0 {
            row.prompt.iter().for_each(|&id| entry(id, &|token| token.marks |= SEEN));
        }
        let output = if params.penalises() { row.output } else { &[] };
        let known = output.iter().filter(|&&id| id & Batch::PLACEHOLDER == 0);
        known.for_each(|&id| entry(id, &|token| token.marks = (token.marks | SEEN) + 1));
        for token in &touched[first..] {
            places[token.id as usize] = 0;
        }
        let drawn = output.last().filter(|&&id| id & Batch::PLACEHOLDER != 0);
        touched.extend(drawn.map(|&id| Touched::latest(id)));
        drawn.is_some()
    }
}

/// Where a sequence sits.
#[derive(Default)]
struct Seating {
    seat: Option<usize>,
    /// Whether what is listed there is another's, or no longer holds, and everything is sent.
    moves_in: bool,
    /// Whether the last token that is sent may be listed already.
    counts_last: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_have_these_sizes() {
        // Eights first and words after them: the same layout in both languages.
        assert_eq!((size_of::<Row>(), size_of::<Touched>(), size_of::<Outcome>()), (72, 16, 176));
    }
}
