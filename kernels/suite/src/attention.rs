//! Paged causal attention over ragged batches.

use std::ops::Range;

use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{AttentionShape, Batch, KvDType, KvLayout, QkNorm};

use crate::rope::table;
use crate::support::{Random, Subject, assert_near, assert_same_bits};
use crate::watched;

/// Everything about a layer that changes how it is computed.
#[derive(Debug, Clone, Copy)]
struct Case {
    shape: AttentionShape,
    block_size: usize,
    dtype: KvDType,
    qk_norm: bool,
    /// Elements of a head that are rotated.
    rotary: usize,
}

impl Case {
    fn new(heads: usize, kv_heads: usize, head_dim: usize, block_size: usize, dtype: KvDType) -> Self {
        let shape = AttentionShape { heads, kv_heads, head_dim };
        Self { shape, block_size, dtype, qk_norm: (heads + head_dim / 8).is_multiple_of(2), rotary: head_dim }
    }

    /// What two right answers may differ by. Scores and sums in single precision are off by some 1e-6. The rest is keys
    /// that lie so near the middle between two numbers of the cache's type that a last bit decides which one they
    /// become: a step of 2^-11, 2^-8 or 2^-4 of one of a key's elements, hence about as much of a weight.
    ///
    /// A backend that rounds queries and weights as well is off by two more such steps, most of all in the first rows,
    /// where one weight is a large part of the sum; to f16 for keys of 8 bits, whose own steps are far larger.
    fn tolerance<B: Subject>(&self) -> f32 {
        let roundings = if self.is_tiled::<B>() { 3.0 } else { 1.0 };
        match self.dtype {
            KvDType::F32 => 5e-5,
            KvDType::F16 => roundings * 1e-3,
            KvDType::BF16 => roundings * 8e-3,
            KvDType::F8 => 6.4e-2,
        }
    }

    /// Whether a single token is computed otherwise than a chunk of several.
    fn is_tiled<B: Subject>(&self) -> bool {
        B::tiles_prompts(self.shape.head_dim, self.dtype)
    }

    /// Tokens of the smallest chunk that gives the bits of a whole prompt.
    fn least<B: Subject>(&self) -> usize {
        if self.is_tiled::<B>() { 2 } else { 1 }
    }
}

/// One sequence: projections of all its tokens, and where its pages are.
#[derive(Debug, Clone)]
struct Sequence {
    qkv: Vec<f32>,
    pages: Vec<u32>,
    /// Tokens that are in the cache already.
    cached: usize,
}

const BLOCKS: usize = 256;
const LAYER: usize = 1;

/// A backend with a cache and the weights of one layer.
struct Layer<B: Subject> {
    backend: B,
    case: Case,
    cache: B::KvCache,
    rope: B::Rope,
    norms: [B::Vector; 2],
}

impl<B: Subject> Layer<B> {
    fn new(case: Case, threads: usize) -> Self {
        let mut backend = B::with_threads(threads);
        let AttentionShape { kv_heads, head_dim, .. } = case.shape;
        let layout =
            KvLayout { layers: 2, kv_heads, head_dim, block_size: case.block_size, blocks: BLOCKS, dtype: case.dtype };
        let cache = backend.kv_cache(layout).unwrap();
        let rope = backend.rope(table(case.rotary / 2, 1024));
        let mut random = Random::new(5);
        let norms = [(); 2].map(|()| {
            let weights: Vec<f32> = (0..head_dim).map(|_| 0.5 + random.unit()).collect();
            backend.vector(&weights)
        });
        Self { backend, case, cache, rope, norms }
    }

    /// One step over spans of some sequences; the rows of each.
    fn step(&mut self, spans: &[(&Sequence, Range<usize>)]) -> Vec<Vec<f32>> {
        let Case { shape, block_size, qk_norm, .. } = self.case;
        let mut batch = Batch::default();
        let mut qkv = Vec::new();
        for (sequence, span) in spans {
            let pages = &sequence.pages[..span.end.div_ceil(block_size)];
            batch.push(&vec![0; span.len()], span.start as u32, pages, span.len());
            qkv.extend(&sequence.qkv[span.start * shape.qkv_width()..span.end * shape.qkv_width()]);
        }
        let mut qkv = self.backend.filled(&qkv, shape.qkv_width());
        let mut out = self.backend.activations(batch.tokens.len(), shape.q_width());
        let [q, k] = &self.norms;
        let norm = qk_norm.then_some(QkNorm { q, k, eps: 1e-6 });
        self.backend.begin(&batch);
        self.backend.rope_and_cache(&mut qkv, shape, norm, &self.rope, &mut self.cache, LAYER, &batch);
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        self.backend.attention(&qkv, shape, scale, &self.cache, LAYER, &batch, &mut out);
        let out = self.backend.read(&out);
        let rows = |(span, start): (&SpanOf<'_>, usize)| out[start..start + span.1.len() * shape.q_width()].to_vec();
        let mut start = 0;
        let mut results = Vec::new();
        for span in spans {
            results.push(rows((span, start)));
            start += span.1.len() * shape.q_width();
        }
        results
    }

    /// Puts keys and values of all tokens into the cache.
    fn fill(&mut self, sequences: &[Sequence]) {
        let width = self.case.shape.qkv_width();
        for sequence in sequences {
            let tokens = sequence.qkv.len() / width;
            let mut batch = Batch::default();
            batch.push(&vec![0; tokens], 0, &sequence.pages, tokens);
            let mut qkv = self.backend.filled(&sequence.qkv, width);
            let [q, k] = &self.norms;
            let norm = self.case.qk_norm.then_some(QkNorm { q, k, eps: 1e-6 });
            self.backend.begin(&batch);
            self.backend.rope_and_cache(&mut qkv, self.case.shape, norm, &self.rope, &mut self.cache, LAYER, &batch);
        }
    }

    /// Steps, each a list of (sequence, tokens), until all is computed; all rows of each sequence.
    fn run(&mut self, sequences: &[Sequence], plan: &Plan) -> Vec<Vec<f32>> {
        let mut done: Vec<usize> = sequences.iter().map(|sequence| sequence.cached).collect();
        let mut out = vec![Vec::new(); sequences.len()];
        for step in plan {
            let spans: Vec<_> = step.iter().map(|&(i, tokens)| (&sequences[i], done[i]..done[i] + tokens)).collect();
            for (&(i, tokens), rows) in step.iter().zip(self.step(&spans)) {
                out[i].extend(rows);
                done[i] += tokens;
            }
        }
        for (done, sequence) in done.iter().zip(sequences) {
            assert_eq!(*done, sequence.qkv.len() / self.case.shape.qkv_width(), "the plan computes everything");
        }
        out
    }
}

type SpanOf<'a> = (&'a Sequence, Range<usize>);
type Plan = Vec<Vec<(usize, usize)>>;

/// Sequences of the given lengths in shuffled pages.
fn sequences(case: Case, lens: &[usize], random: &mut Random) -> Vec<Sequence> {
    let mut pages = random.shuffled(BLOCKS).into_iter();
    let mut sequence = |len: usize| Sequence {
        qkv: random.normals(len * case.shape.qkv_width()),
        pages: pages.by_ref().take(len.div_ceil(case.block_size)).collect(),
        cached: 0,
    };
    lens.iter().map(|&len| sequence(len)).collect()
}

fn one_shot(lens: &[usize]) -> Plan {
    vec![lens.iter().copied().enumerate().collect()]
}

fn one_by_one(len: usize) -> Plan {
    vec![vec![(0, 1)]; len]
}

/// Random chunks of random sequences, decodes and prefills mixed; none of fewer than `least` tokens in a longer
/// sequence.
fn ragged(lens: &[usize], least: usize, random: &mut Random) -> Plan {
    let mut left = lens.to_vec();
    let mut plan = Vec::new();
    while left.iter().any(|&tokens| tokens > 0) {
        let mut step = Vec::new();
        for (i, left) in left.iter_mut().enumerate() {
            if *left > 0 && random.below(4) > 0 {
                let most = random.pick(&[1, 1, 7, 40, 300]);
                let tokens = least + random.below(most);
                let tokens = if tokens + least > *left { *left } else { tokens };
                step.push((i, tokens));
                *left -= tokens;
            }
        }
        if !step.is_empty() {
            plan.push(step);
        }
    }
    plan
}

pub(crate) const DTYPES: [KvDType; 4] = [KvDType::F32, KvDType::F16, KvDType::BF16, KvDType::F8];

/// Every head count with every head size; page sizes and types of the cache take turns.
fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (i, (heads, kv_heads)) in [(1, 1), (4, 4), (6, 3), (9, 3), (7, 1), (14, 2), (5, 1)].into_iter().enumerate() {
        for (j, head_dim) in [8, 16, 64, 80, 128].into_iter().enumerate() {
            let turn = i * 5 + j;
            let mut case = Case::new(heads, kv_heads, head_dim, [8, 16, 32, 64][turn % 4], DTYPES[turn % 3]);
            if turn % 7 == 3 {
                case.rotary = head_dim / 2;
            }
            cases.push(case);
        }
    }
    cases.push(Case::new(4, 2, 96, 128, KvDType::F16));
    cases.push(Case::new(4, 1, 256, 128, KvDType::BF16));
    cases.push(Case::new(2, 2, 256, 16, KvDType::F32));
    cases.push(Case::new(4, 2, 96, 64, KvDType::F8));
    cases
}

fn compare<B: Subject>(case: Case, lens: &[usize], seed: u64) {
    let mut random = Random::new(seed);
    let sequences = sequences(case, lens, &mut random);
    let plan = ragged(lens, 1, &mut random);
    let ours = Layer::<B>::new(case, 2).run(&sequences, &plan);
    let want = Layer::<ReferenceBackend>::new(case, 1).run(&sequences, &one_shot(lens));
    for (i, (ours, want)) in ours.iter().zip(&want).enumerate() {
        assert_near(ours, want, |_| case.tolerance::<B>(), &format!("{case:?}, sequence {i} of {lens:?}"));
    }
}

pub(crate) fn ragged_batches_match_the_reference<B: Subject>() {
    for (seed, case) in cases().into_iter().enumerate() {
        compare::<B>(case, &[1, 37, 9, 70], 100 + seed as u64);
    }
}

pub(crate) fn long_contexts_match_the_reference<B: Subject>() {
    // Across one and two borders of 256 keys, and exactly up to one.
    compare::<B>(Case::new(3, 1, 64, 16, KvDType::F16), &[256, 520, 257], 31);
    compare::<B>(Case::new(2, 2, 8, 8, KvDType::F32), &[512, 255], 32);
    compare::<B>(Case::new(4, 2, 16, 64, KvDType::BF16), &[777, 3], 33);
    compare::<B>(Case::new(7, 1, 128, 32, KvDType::F32), &[300], 34);
    // Where keys of tiles come in turns: each turn again and again.
    for (head_dim, dtype) in [(128, KvDType::BF16), (96, KvDType::F16), (256, KvDType::BF16)] {
        compare::<B>(Case::new(1, 1, head_dim, 128, dtype), &[900], 35);
    }
}

pub(crate) fn large_groups_and_contexts_of_many_partitions_match_the_reference<B: Subject>() {
    // The last token of each sequence alone, behind prompts: decoding, with partitions at the end of every length.
    let shapes = [
        (8, 1, 64, KvDType::BF16),
        (16, 2, 128, KvDType::F16),
        (8, 1, 256, KvDType::BF16),
        (12, 1, 40, KvDType::F32),
        (4, 2, 96, KvDType::BF16),
        (4, 1, 128, KvDType::F32),
        (16, 2, 128, KvDType::F8),
        (4, 1, 256, KvDType::F8),
    ];
    for (i, (heads, kv_heads, head_dim, dtype)) in shapes.into_iter().enumerate() {
        let case = Case::new(heads, kv_heads, head_dim, [16, 32, 64, 128][i % 4], dtype);
        let mut random = Random::new(300 + i as u64);
        let lens = [128, 129, 145, 1 + random.below(400), 384 + random.below(129)];
        decode::<B>(case, &lens, &mut random);
    }
}

/// The last token of each sequence in a step, together and alone.
fn decode<B: Subject>(case: Case, lens: &[usize], random: &mut Random) {
    let sequences = sequences(case, lens, random);
    let last: Vec<_> = lens.iter().enumerate().map(|(i, &len)| (&sequences[i], len - 1..len)).collect();
    let mut ours = Layer::<B>::new(case, 2);
    let mut reference = Layer::<ReferenceBackend>::new(case, 1);
    ours.fill(&sequences);
    reference.fill(&sequences);
    let (together, want) = (ours.step(&last), reference.step(&last));
    for (i, (together, want)) in together.iter().zip(&want).enumerate() {
        let what = format!("{case:?}, sequence {i} of {lens:?}");
        assert_near(together, want, |_| case.tolerance::<B>(), &what);
        let alone = ours.step(&last[i..=i]);
        assert_same_bits(&alone[0], together, &what);
    }
}

pub(crate) fn decoding_with_every_group_head_and_type_matches_the_reference<B: Subject>() {
    let mut random = Random::new(320);
    for heads in [1, 2, 4, 8] {
        for head_dim in [64, 128, 256] {
            for dtype in DTYPES {
                decode::<B>(Case::new(heads, 1, head_dim, 32, dtype), &[33, 2], &mut random);
            }
        }
    }
}

/// All rows of one sequence computed by itself in a single step.
fn alone<B: Subject>(case: Case, sequence: &Sequence) -> Vec<f32> {
    let len = sequence.qkv.len() / case.shape.qkv_width();
    Layer::<B>::new(case, 1).run(std::slice::from_ref(sequence), &one_shot(&[len])).remove(0)
}

pub(crate) fn batching_chunking_and_paging_change_no_bit<B: Subject>() {
    let mut long: Vec<Case> = DTYPES.map(|dtype| Case::new(6, 2, 64, 16, dtype)).into();
    long.push(Case::new(2, 1, 128, 32, KvDType::BF16));
    let runs =
        cases().into_iter().map(|case| (case, [5, 70, 33])).chain(long.into_iter().map(|case| (case, [300, 1, 530])));
    for (seed, (case, lens)) in runs.enumerate() {
        let mut random = Random::new(200 + seed as u64);
        let sequences = sequences(case, &lens, &mut random);
        let alone: Vec<_> = sequences.iter().map(|sequence| alone::<B>(case, sequence)).collect();
        for plan in [one_shot(&lens), ragged(&lens, case.least::<B>(), &mut random)] {
            let together = Layer::<B>::new(case, 2).run(&sequences, &plan);
            for (i, (together, alone)) in together.iter().zip(&alone).enumerate() {
                assert_same_bits(together, alone, &format!("{case:?}, sequence {i} of {lens:?}, planned {plan:?}"));
            }
        }
        // Decoding from the first token on, in other pages.
        let mut moved = sequences[2].clone();
        moved.pages = random.shuffled(BLOCKS)[..moved.pages.len()].to_vec();
        let decoded = Layer::<B>::new(case, 1).run(&[moved], &one_by_one(lens[2]));
        let what = format!("{case:?}, {} tokens one by one", lens[2]);
        if case.is_tiled::<B>() {
            assert_near(&decoded[0], &alone[2], |_| case.tolerance::<B>(), &what);
        } else {
            assert_same_bits(&decoded[0], &alone[2], &what);
        }
    }
}

pub(crate) fn decoding_beside_others_changes_no_bit<B: Subject>() {
    for case in [Case::new(6, 2, 64, 16, KvDType::F16), Case::new(2, 1, 128, 32, KvDType::BF16)] {
        let mut random = Random::new(45);
        let lens = [40, 150, 131];
        let sequences = sequences(case, &lens, &mut random);
        // The first 100 tokens are a prompt, the others decoded: alone, in other pages, and beside prompts and decodes.
        let decoding = |i: usize| [vec![vec![(i, 100)]], vec![vec![(i, 1)]; 31]].concat();
        let mut moved = sequences[2].clone();
        moved.pages = random.shuffled(BLOCKS)[..moved.pages.len()].to_vec();
        let alone = Layer::<B>::new(case, 1).run(&[moved], &decoding(0)).remove(0);
        let mut plan = decoding(2);
        plan[3].insert(0, (0, 39));
        plan[4].extend([(0, 1), (1, 100)]);
        plan[5..30].iter_mut().for_each(|step| step.push((1, 2)));
        let together = Layer::<B>::new(case, 2).run(&sequences, &plan).remove(2);
        assert_same_bits(&together, &alone, &format!("{case:?}"));
    }
}

pub(crate) fn the_number_of_threads_changes_no_bit<B: Subject>() {
    for case in [Case::new(9, 3, 64, 16, KvDType::F16), Case::new(2, 1, 80, 8, KvDType::F32)] {
        let mut random = Random::new(41);
        let lens = [290, 1, 40, 5];
        let sequences = sequences(case, &lens, &mut random);
        let plan = ragged(&lens, 1, &mut random);
        let one = Layer::<B>::new(case, 1).run(&sequences, &plan);
        for threads in [2, 3] {
            let more = Layer::<B>::new(case, threads).run(&sequences, &plan);
            assert_same_bits(&more.concat(), &one.concat(), &format!("{case:?}, {threads} threads"));
        }
    }
}

pub(crate) fn a_shared_prefix_reads_like_a_computed_one<B: Subject>() {
    for (case, pages) in [(Case::new(4, 2, 64, 16, KvDType::BF16), 3), (Case::new(3, 1, 16, 64, KvDType::F16), 5)] {
        let mut random = Random::new(51);
        let prefix = pages * case.block_size;
        let last = case.least::<B>();
        let lens = [prefix + 20, prefix + 11, prefix + last];
        let mut all = sequences(case, &lens, &mut random);
        let width = case.shape.qkv_width();
        let parent = all[0].clone();
        for child in &mut all[1..] {
            child.qkv[..prefix * width].copy_from_slice(&parent.qkv[..prefix * width]);
        }
        let alone: Vec<_> = all.iter().map(|sequence| alone::<B>(case, sequence)).collect();
        for child in &mut all[1..] {
            child.pages[..pages].copy_from_slice(&parent.pages[..pages]);
            child.cached = prefix;
        }
        let plan = vec![vec![(0, prefix)], vec![(0, 20), (1, 4), (2, last)], vec![(1, 7)]];
        let shared = Layer::<B>::new(case, 2).run(&all, &plan);
        for (i, (shared, alone)) in shared.iter().zip(&alone).enumerate() {
            let skipped = all[i].cached * case.shape.q_width();
            assert_same_bits(shared, &alone[skipped..], &format!("{case:?}, sequence {i}"));
        }
    }
}

pub(crate) fn what_earlier_owners_left_in_pages_is_never_read<B: Subject>() {
    for case in [
        Case::new(4, 2, 64, 16, KvDType::F16),
        Case::new(3, 3, 8, 64, KvDType::BF16),
        Case::new(2, 1, 128, 32, KvDType::F32),
        Case::new(1, 1, 128, 64, KvDType::BF16),
        Case::new(1, 1, 256, 32, KvDType::F16),
        Case::new(1, 1, 96, 128, KvDType::BF16),
    ] {
        for poison in [f32::NAN, f32::INFINITY] {
            let mut random = Random::new(61);
            let lens = [case.block_size * 2 + 3, 5, 1];
            let fresh = sequences(case, &lens, &mut random);
            let alone: Vec<_> = fresh.iter().map(|sequence| alone::<B>(case, sequence)).collect();
            let mut layer = Layer::<B>::new(case, 2);
            for sequence in &fresh {
                // Fills the pages this sequence will get to their last slot.
                let tokens = sequence.pages.len() * case.block_size;
                let qkv = vec![poison; tokens * case.shape.qkv_width()];
                layer.step(&[(&Sequence { qkv, ..sequence.clone() }, 0..tokens)]);
            }
            let reused = layer.run(&fresh, &ragged(&lens, case.least::<B>(), &mut random));
            assert_same_bits(&reused.concat(), &alone.concat(), &format!("{case:?} after {poison}"));
        }
    }
}

pub(crate) fn one_key_gives_its_value_and_equal_keys_their_mean<B: Subject>() {
    for (dtype, head_dim) in DTYPES.into_iter().flat_map(|dtype| [16, 64, 128].map(|head_dim| (dtype, head_dim))) {
        let case = Case { qk_norm: false, ..Case::new(4, 2, head_dim, 8, dtype) };
        let shape = case.shape;
        let (kv_width, q_width) = (2 * head_dim, shape.q_width());
        let mut random = Random::new(71);
        let mut sequence = sequences(case, &[20], &mut random).remove(0);
        // Without queries, all keys are alike, however they are rotated.
        for row in sequence.qkv.chunks_exact_mut(shape.qkv_width()) {
            row[..shape.q_width()].fill(0.0);
        }
        let out = alone::<B>(case, &sequence);
        let mut sums = vec![0.0; kv_width];
        for token in 0..20 {
            let values = &sequence.qkv[token * shape.qkv_width() + q_width + kv_width..][..kv_width];
            sums.iter_mut().zip(values).for_each(|(sum, &value)| *sum += dtype.round(value));
            // Heads 0 and 1 read the first key/value head, 2 and 3 the second.
            let mean = |i: usize| sums[i / kv_width * head_dim + i % head_dim] / (token + 1) as f32;
            let want: Vec<f32> = (0..q_width).map(mean).collect();
            assert_near(&out[token * q_width..][..q_width], &want, |_| 3e-6, &format!("{case:?}, token {token}"));
        }
    }
}

pub(crate) fn a_cache_of_eight_bits_holds_every_number_that_they_make<B: Subject>() {
    let number = |bits: u32| {
        let magnitude = match (bits >> 3 & 15, bits & 7) {
            (15, 7) => f32::NAN,
            (0, mantissa) => mantissa as f32 / 512.0,
            (exponent, mantissa) => (8 + mantissa) as f32 * 2f32.powi(exponent as i32 - 10),
        };
        if bits < 128 { magnitude } else { -magnitude }
    };
    let numbers: Vec<f32> = (0..256).map(number).collect();
    let case = Case { qk_norm: false, ..Case::new(2, 2, 128, 16, KvDType::F8) };
    let mut sequence = sequences(case, &[2], &mut Random::new(72)).remove(0);
    // Both tokens have them all as their values, and nothing else that is not zero.
    sequence.qkv = [vec![0.0; 512], numbers.clone()].concat().repeat(2);
    for plan in [one_by_one(2), one_shot(&[2])] {
        let out = Layer::<B>::new(case, 1).run(std::slice::from_ref(&sequence), &plan).remove(0);
        for (i, (ours, want)) in out.iter().zip(numbers.iter().cycle()).enumerate() {
            // Neighbours are farther apart than that.
            let is_right = if want.is_nan() { ours.is_nan() } else { (ours - want).abs() <= 1e-5 * want.abs() };
            assert!(is_right, "token {}, bits {:#x}: {ours:e}, should be {want:e}", i / 256, i % 256);
        }
        assert_eq!(out.len(), 2 * 256);
        watched::held();
    }
}

pub(crate) fn a_score_far_above_the_others_takes_all<B: Subject>() {
    let case = Case { qk_norm: false, rotary: 2, ..Case::new(1, 1, 16, 16, KvDType::F32) };
    let mut random = Random::new(81);
    let mut sequence = sequences(case, &[600], &mut random).remove(0);
    for (token, row) in sequence.qkv.chunks_exact_mut(48).enumerate() {
        row[..32].fill(0.0);
        // Scores far beyond what exp can hold, in both directions; token 300 is highest from its place on.
        row[15] = 100.0;
        row[31] = if token == 300 { 500.0 } else { -(token as f32) };
    }
    let out = alone::<B>(case, &sequence);
    for token in 0..600 {
        let winner = if token < 300 { 0 } else { 300 };
        let value = &sequence.qkv[winner * 48 + 32..][..16];
        assert_near(&out[token * 16..][..16], value, |_| 1e-5, &format!("token {token}"));
    }
}
