//! Drawing and scoring whole batches. What a single draw has to fulfil is tested beside the code.

use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{RowTask, SampleRow, Sampled, SamplingParams};

use crate::support::{Random, Subject};
use crate::watched;

const VOCAB: usize = 1013;

/// The rows of one call: owned, for [`SampleRow`] borrows.
struct Rows {
    logits: Vec<f32>,
    params: Vec<SamplingParams>,
    outputs: Vec<Vec<u32>>,
    logprobs: Vec<Option<u32>>,
}

impl Rows {
    fn random(count: usize, random: &mut Random) -> Self {
        let params = |random: &mut Random| SamplingParams {
            temperature: random.pick(&[0.0, 0.3, 0.8, 1.0, 1.5]),
            top_k: random.pick(&[0, 0, 1, 20, 400, 5000]),
            top_p: random.pick(&[1.0, 1.0, 0.9, 0.5]),
            min_p: random.pick(&[0.0, 0.0, 0.05]),
            repetition_penalty: random.pick(&[1.0, 1.0, 1.3]),
            presence_penalty: random.pick(&[0.0, 0.0, 0.7]),
            frequency_penalty: random.pick(&[0.0, 0.0, -0.4]),
            logit_bias: if random.below(4) == 0 { vec![(7, 3.5), (1000, -100.0)] } else { Vec::new() },
            seed: random.bits(),
        };
        Self {
            logits: random.normals(count * VOCAB).iter().map(|x| x * 3.0).collect(),
            params: (0..count).map(|_| params(random)).collect(),
            outputs: (0..count).map(|i| (0..i % 9).map(|_| random.below(VOCAB) as u32).collect()).collect(),
            logprobs: (0..count).map(|_| random.pick(&[None, None, Some(0), Some(5), Some(20)])).collect(),
        }
    }

    fn row(&self, i: usize) -> SampleRow<'_> {
        let task = match i % 5 {
            4 => RowTask::Score { token: (i * 31 % VOCAB) as u32 },
            3 => RowTask::Sample { params: &self.params[i], suppress: &[3, 700] },
            _ => RowTask::Sample { params: &self.params[i], suppress: &[] },
        };
        SampleRow { task, prompt: &[1, 2, 3, 2], output: &self.outputs[i], logprobs: self.logprobs[i] }
    }

    /// The rows of `span`, sampled in one call.
    fn sample<B: Subject>(&self, backend: &mut B, span: std::ops::Range<usize>) -> Vec<Sampled> {
        let mut logits = backend.filled(&self.logits[span.start * VOCAB..span.end * VOCAB], VOCAB);
        let mut out = vec![Sampled::default(); span.len()];
        backend.sample(&mut logits, &|i| self.row(span.start + i), &mut out);
        out
    }
}

pub(crate) fn mixed_rows_match_the_reference<B: Subject>() {
    let mut random = Random::new(91);
    for count in [1, 2, 17, 70] {
        let rows = Rows::random(count, &mut random);
        let ours = rows.sample(&mut B::any(), 0..count);
        let want = rows.sample(&mut ReferenceBackend, 0..count);
        for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
            let row = rows.row(i);
            assert_eq!(ours.token, want.token, "row {i}: {row:?}");
            if row.logprobs.is_some() {
                // Sums of about a thousand single precision weights.
                assert!((ours.logprob - want.logprob).abs() < 1e-5, "row {i}");
                assert_eq!(ours.top_len, want.top_len, "row {i}");
                for (ours, want) in ours.top.iter().zip(&want.top).take(want.top_len as usize) {
                    assert_eq!(ours.0, want.0, "row {i}");
                    assert!((ours.1 - want.1).abs() < 1e-5, "row {i}");
                }
            }
        }
        watched::held();
    }
}

/// Equal in all that is specified.
fn assert_same(ours: &Sampled, theirs: &Sampled, row: &SampleRow<'_>, what: &str) {
    assert_eq!(ours.token, theirs.token, "{what}");
    if row.logprobs.is_some() {
        assert_eq!(ours.logprob.to_bits(), theirs.logprob.to_bits(), "{what}");
        let top = |sampled: &Sampled| sampled.top[..sampled.top_len as usize].to_vec();
        assert_eq!(top(ours), top(theirs), "{what}");
    }
}

pub(crate) fn a_row_is_drawn_alike_alone_and_in_a_batch<B: Subject>() {
    let rows = Rows::random(70, &mut Random::new(92));
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
