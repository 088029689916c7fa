//! Drawing and scoring whole batches. What a single draw has to fulfil is tested beside the code.

use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{Backend, RowTask, SampleRow, Sampled, SamplingParams, SequenceId, TokenMask};

use crate::support::{Random, Subject};
use crate::watched;

const VOCAB: usize = 1013;

/// The rows of one call: owned, for [`SampleRow`] borrows.
struct Rows {
    vocabulary: usize,
    /// Whether some tokens are known, and some must not be drawn.
    has_tasks: bool,
    logits: Vec<f32>,
    params: Vec<SamplingParams>,
    outputs: Vec<Vec<u32>>,
    /// Of those rows that have one, which tokens there are to draw from.
    masks: Vec<Option<TokenMask>>,
    logprobs: Vec<Option<u32>>,
}

fn any_params(random: &mut Random) -> SamplingParams {
    SamplingParams {
        temperature: random.pick(&[0.0, 0.3, 0.8, 1.0, 1.5]),
        top_k: random.pick(&[0, 0, 1, 20, 400, 5000]),
        top_p: random.pick(&[1.0, 1.0, 0.9, 0.5]),
        min_p: random.pick(&[0.0, 0.0, 0.05]),
        repetition_penalty: random.pick(&[1.0, 1.0, 1.3]),
        presence_penalty: random.pick(&[0.0, 0.0, 0.7]),
        frequency_penalty: random.pick(&[0.0, 0.0, -0.4]),
        logit_bias: if random.below(4) == 0 { vec![(7, 3.5), (1000, -100.0)] } else { Vec::new() },
        seed: random.bits(),
    }
}

impl Rows {
    fn random(count: usize, random: &mut Random) -> Self {
        Self {
            vocabulary: VOCAB,
            has_tasks: true,
            logits: random.normals(count * VOCAB).iter().map(|x| x * 3.0).collect(),
            params: (0..count).map(|_| any_params(random)).collect(),
            outputs: (0..count).map(|i| (0..i % 9).map(|_| random.below(VOCAB) as u32).collect()).collect(),
            masks: vec![None; count],
            logprobs: (0..count).map(|_| random.pick(&[None, None, Some(0), Some(5), Some(20)])).collect(),
        }
    }

    /// Every way to cut, in logits of one shape: where few tokens are in question and where many, and at the numbers at
    /// which a backend may go another way.
    fn cut(vocabulary: usize, shape: &dyn Fn(usize, f32) -> f32, random: &mut Random) -> Self {
        let mut params = Vec::new();
        for top_k in [0, 1, 20, 256, 257, 600, vocabulary as u32 - 1, vocabulary as u32] {
            for (top_p, min_p, temperature) in
                [(1.0, 0.0, 1.0), (0.95, 0.0, 1.0), (0.95, 0.3, 0.7), (1e-9, 0.0, 1.0), (1.0, 0.3, 1e-30)]
            {
                let seed = random.bits();
                params.push(SamplingParams { temperature, top_k, top_p, min_p, seed, ..SamplingParams::default() });
            }
        }
        let count = params.len();
        let normals = random.normals(count * vocabulary);
        Self {
            vocabulary,
            has_tasks: false,
            logits: normals.into_iter().enumerate().map(|(i, x)| shape(i % vocabulary, x)).collect(),
            params,
            outputs: vec![Vec::new(); count],
            masks: vec![None; count],
            logprobs: (0..count).map(|i| [None, Some(0), Some(20)][i % 3]).collect(),
        }
    }

    /// The same with a mask for most rows, of every density: none of the tokens, one, few, half, nearly all, all.
    fn masked(mut self, random: &mut Random) -> Self {
        let words = self.vocabulary.div_ceil(32);
        for (i, mask) in self.masks.iter_mut().enumerate() {
            let word = |random: &mut Random| random.bits() as u32;
            let mut bits: Vec<u32> = match i % 9 {
                0 => continue,
                1 => vec![0; words],
                2 => vec![u32::MAX; words],
                3 => (0..words).map(|_| word(random)).collect(),
                4 => (0..words).map(|_| word(random) & word(random) & word(random) & word(random)).collect(),
                5 => (0..words).map(|_| word(random) | word(random) | word(random) | word(random)).collect(),
                6 => (0..words).map(|_| random.pick(&[0, u32::MAX])).collect(),
                _ => {
                    let id = random.below(self.vocabulary);
                    (0..words).map(|word| if word == id / 32 { 1 << (id % 32) } else { 0 }).collect()
                }
            };
            // Nobody looks at what stands behind a vocabulary's bits, in its last word or after that.
            if i % 2 == 0 {
                bits[words - 1] |= u32::MAX.checked_shl((self.vocabulary - 32 * (words - 1)) as u32).unwrap_or(0);
                bits.push(word(random));
            }
            *mask = Some(TokenMask::from_words(bits));
        }
        self
    }

    fn row(&self, i: usize) -> SampleRow<'_> {
        let (params, mask) = (&self.params[i], self.masks[i].as_ref());
        let task = match i % 5 {
            4 if self.has_tasks => RowTask::Score { token: (i * 31 % VOCAB) as u32 },
            3 if self.has_tasks => RowTask::Sample { params, suppress: &[3, 700], mask },
            _ => RowTask::Sample { params, suppress: &[], mask },
        };
        let (output, logprobs) = (&self.outputs[i], self.logprobs[i]);
        SampleRow { task, sequence: SequenceId(i as u64), prompt: &[1, 2, 3, 2], output, logprobs }
    }

    /// The rows of `span`, sampled in one call.
    fn sample<B: Subject>(&self, backend: &mut B, span: std::ops::Range<usize>) -> Vec<Sampled> {
        let values = span.start * self.vocabulary..span.end * self.vocabulary;
        let mut logits = backend.filled(&self.logits[values], self.vocabulary);
        let mut out = vec![Sampled::default(); span.len()];
        backend.sample(&mut logits, &|i| self.row(span.start + i), &mut out);
        out
    }
}

/// Equal to the reference in what is exact, and near in the rest.
fn assert_near(ours: &Sampled, want: &Sampled, row: &SampleRow<'_>, what: &str) {
    assert_eq!(ours.impossible, want.impossible, "{what}: {row:?}");
    if want.impossible {
        return;
    }
    assert_eq!(ours.token, want.token, "{what}: {row:?}");
    if row.logprobs.is_some() {
        // Sums of thousands of single precision weights; equal where both are infinite.
        let are_near = |ours: f32, want: f32| ours == want || (ours - want).abs() < 1e-5;
        assert!(are_near(ours.logprob, want.logprob), "{what}: {} and not {}", ours.logprob, want.logprob);
        assert_eq!(ours.top_len, want.top_len, "{what}");
        for (ours, want) in ours.top.iter().zip(&want.top).take(want.top_len as usize) {
            assert_eq!(ours.0, want.0, "{what}");
            assert!(are_near(ours.1, want.1), "{what}: {} and not {}", ours.1, want.1);
        }
    }
}

pub(crate) fn mixed_rows_match_the_reference<B: Subject>() {
    let mut random = Random::new(91);
    for count in [1, 2, 17, 70] {
        let rows = Rows::random(count, &mut random);
        let ours = rows.sample(&mut B::any(), 0..count);
        let want = rows.sample(&mut ReferenceBackend, 0..count);
        for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
            assert_near(ours, want, &rows.row(i), &format!("row {i}"));
        }
        watched::held();
    }
}

pub(crate) fn every_cut_matches_the_reference<B: Subject>() {
    type Shape = (&'static str, fn(usize, f32) -> f32);
    let shapes: [Shape; 9] = [
        ("a peak", |_, x| x * 3.0),
        ("flat, so that top_p keeps many", |_, x| x * 0.05),
        ("all alike", |_, _| 1.5),
        ("a few values", |_, x| (x * 4.0).round() / 2.0),
        ("hundreds that are likeliest", |i, x| if i % 7 == 3 { 9.0 } else { x }),
        ("nearly all impossible", |i, x| if i % 800 == 2 { x } else { f32::NEG_INFINITY }),
        ("no numbers", |i, x| match i % 100 {
            11 => f32::NAN,
            12 => f32::NEG_INFINITY,
            _ => x,
        }),
        ("infinite ones", |i, x| if i % 300 == 1 { f32::INFINITY } else { x }),
        ("all impossible", |i, _| if i % 2 == 0 { f32::NAN } else { f32::NEG_INFINITY }),
    ];
    let mut random = Random::new(94);
    // Multiples of what is loaded at a time, and not; fewer than there are threads, and more.
    for vocabulary in [5, 130, 4999] {
        for (name, shape) in shapes {
            let rows = Rows::cut(vocabulary, &shape, &mut random);
            let ours = rows.sample(&mut B::any(), 0..rows.params.len());
            let want = rows.sample(&mut ReferenceBackend, 0..rows.params.len());
            for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
                assert_near(ours, want, &rows.row(i), &format!("{name}, {vocabulary} tokens, row {i}"));
            }
            watched::held();
        }
    }
}

pub(crate) fn masked_rows_match_the_reference<B: Subject>() {
    let mut random = Random::new(95);
    let mut all = Vec::new();
    for count in [1, 2, 17, 70] {
        let rows = Rows::random(count, &mut random).masked(&mut random);
        all.push(("mixed", rows));
    }
    type Shape = (&'static str, fn(usize, f32) -> f32);
    let shapes: [Shape; 4] = [
        ("a peak", |_, x| x * 3.0),
        ("all alike", |_, _| 1.5),
        ("hundreds that are likeliest", |i, x| if i % 7 == 3 { 9.0 } else { x }),
        ("no numbers, and infinite ones", |i, x| match i % 100 {
            11 => f32::NAN,
            12 => f32::NEG_INFINITY,
            13 => f32::INFINITY,
            _ => x,
        }),
    ];
    // Vocabularies that end amid a word and amid a load, and with one.
    for vocabulary in [5, 128, 4999] {
        for (name, shape) in shapes {
            all.push((name, Rows::cut(vocabulary, &shape, &mut random).masked(&mut random)));
        }
    }
    for (name, rows) in all {
        let count = rows.params.len();
        let ours = rows.sample(&mut B::any(), 0..count);
        let want = rows.sample(&mut ReferenceBackend, 0..count);
        for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
            let row = rows.row(i);
            assert_near(ours, want, &row, &format!("{name}, {} tokens, row {i}", rows.vocabulary));
            // Known outright, whatever the reference says.
            if let (RowTask::Sample { mask: Some(mask), .. }, false) = (row.task, ours.impossible) {
                assert!(mask.allows(ours.token), "{name}, row {i}: {} is not in the mask", ours.token);
            }
        }
        watched::held();
    }
}

/// Equal in all that is specified.
fn assert_same(ours: &Sampled, theirs: &Sampled, row: &SampleRow<'_>, what: &str) {
    assert_eq!((ours.token, ours.impossible), (theirs.token, theirs.impossible), "{what}");
    if row.logprobs.is_some() {
        assert_eq!(ours.logprob.to_bits(), theirs.logprob.to_bits(), "{what}");
        let top = |sampled: &Sampled| sampled.top[..sampled.top_len as usize].to_vec();
        assert_eq!(top(ours), top(theirs), "{what}");
    }
}

pub(crate) fn a_row_is_drawn_alike_alone_and_in_a_batch<B: Subject>() {
    let mut random = Random::new(92);
    let rows = Rows::random(70, &mut random).masked(&mut random);
    let mut backend = B::any();
    let together = rows.sample(&mut backend, 0..70);
    for (i, together) in together.iter().enumerate() {
        let alone = rows.sample(&mut backend, i..i + 1).remove(0);
        assert_same(&alone, together, &rows.row(i), &format!("row {i}"));
    }
    let some = rows.sample(&mut backend, 20..50);
    for (i, sampled) in some.iter().enumerate() {
        assert_same(sampled, &together[20 + i], &rows.row(20 + i), &format!("row {i} of 20..50"));
    }
}

pub(crate) fn the_number_of_threads_changes_nothing<B: Subject>() {
    let rows = Rows::random(23, &mut Random::new(93));
    let one = rows.sample(&mut B::with_threads(1), 0..23);
    for threads in [2, 3] {
        let more = rows.sample(&mut B::with_threads(threads), 0..23);
        for (i, (more, one)) in more.iter().zip(&one).enumerate() {
            assert_same(more, one, &rows.row(i), &format!("row {i}, {threads} threads"));
        }
    }
}

/// Half of all tokens.
const EVERY_SECOND: [u32; VOCAB / 2] = {
    let mut tokens = [0; VOCAB / 2];
    let mut i = 0;
    while i < tokens.len() {
        tokens[i] = 2 * i as u32;
        i += 1;
    }
    tokens
};

/// A sequence that is drawn for in several calls.
struct Growing {
    params: SamplingParams,
    prompt: Vec<u32>,
    output: Vec<u32>,
    /// With fewer in the output, some must not be drawn.
    min_tokens: usize,
    logprobs: Option<u32>,
}

impl Growing {
    fn row(&self, number: usize) -> SampleRow<'_> {
        let Self { params, prompt, output, min_tokens, logprobs } = self;
        let suppress = if output.len() < *min_tokens { &EVERY_SECOND[..] } else { &[] };
        let task = RowTask::Sample { params, suppress, mask: None };
        SampleRow { task, sequence: SequenceId(number as u64), prompt, output, logprobs: *logprobs }
    }
}

/// Draws for those sequences in one call, and compares with the reference.
fn draw_for<B: Subject>(backend: &mut B, sequences: &[Growing], who: &[usize], vocabulary: usize, random: &mut Random) {
    let mut logits: Vec<f32> = random.normals(who.len() * vocabulary).iter().map(|x| x * 3.0).collect();
    for (row, &i) in logits.chunks_mut(vocabulary).zip(who) {
        let Growing { prompt, output, .. } = &sequences[i];
        // What is drawn hangs on what was seen, and how often.
        output.iter().chain(&prompt[prompt.len().saturating_sub(40)..]).for_each(|&token| row[token as usize] += 6.0);
        // That nothing can be drawn is no reason to forget anything.
        if output.len() % 5 == 2 {
            row.fill(f32::NAN);
        }
    }
    let row = |i: usize| sequences[who[i]].row(who[i]);
    let mut ours = vec![Sampled::default(); who.len()];
    let mut want = ours.clone();
    let mut filled = backend.filled(&logits, vocabulary);
    backend.sample(&mut filled, &row, &mut ours);
    let mut filled = ReferenceBackend.filled(&logits, vocabulary);
    ReferenceBackend.sample(&mut filled, &row, &mut want);
    for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
        assert_near(ours, want, &row(i), &format!("sequence {}", who[i]));
    }
    watched::held();
}

/// They go on, pause, go on by several tokens, ask the same again, come and go, and are more than a device remembers.
pub(crate) fn what_is_remembered_of_sequences_changes_nothing<B: Subject>() {
    let mut random = Random::new(96);
    let mut backend = B::any();
    // More than there are seats in kernels/src/cuda/seats.rs.
    let token = |random: &mut Random| random.below(VOCAB) as u32;
    let mut sequences: Vec<Growing> = (0..300)
        .map(|_| Growing {
            params: SamplingParams { repetition_penalty: random.pick(&[1.0, 1.3, 0.7]), ..any_params(&mut random) },
            prompt: (0..1 + random.below(40)).map(|_| token(&mut random)).collect(),
            output: Vec::new(),
            min_tokens: random.below(4),
            logprobs: random.pick(&[None, Some(0), Some(3)]),
        })
        .collect();
    for turn in 0..16 {
        let takes_part = |i: usize, random: &mut Random| match turn {
            // All, those of before and others in front of them, and then some.
            0 => i >= 20,
            1 => i < 40 || i.is_multiple_of(8),
            _ => i % 20 == 3 && random.below(4) > 0,
        };
        let who: Vec<usize> = (0..sequences.len()).filter(|&i| takes_part(i, &mut random)).collect();
        draw_for(&mut backend, &sequences, &who, VOCAB, &mut random);
        for &i in &who {
            let output = &mut sequences[i].output;
            for _ in 0..random.pick(&[1, 1, 1, 1, 1, 1, 0, 2]) {
                // Every other one came before.
                let again = output.last().copied().filter(|_| random.below(2) == 0);
                output.push(again.unwrap_or_else(|| token(&mut random)));
            }
        }
    }
}

/// As many different tokens as a device remembers of a sequence, and more.
pub(crate) fn contexts_of_very_many_tokens_are_looked_at_whole<B: Subject>() {
    // Beyond SEAT_TOKENS of kernels/src/cuda/seats.rs; the prompt is just below.
    const VOCABULARY: usize = 16_500;
    let mut random = Random::new(97);
    let mut backend = B::any();
    let mut sequences = [Growing {
        params: SamplingParams { repetition_penalty: 1.5, ..SamplingParams::default() },
        prompt: (0..16_381).collect(),
        output: Vec::new(),
        min_tokens: 0,
        logprobs: Some(2),
    }];
    for turn in 0..5 {
        draw_for(&mut backend, &sequences, &[0], VOCABULARY, &mut random);
        sequences[0].output.push(16_400 + turn);
    }
}
