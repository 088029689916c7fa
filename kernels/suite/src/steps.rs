//! Steps of the CUDA backend as a whole: recorded, replayed, warmed up. The layer they are steps of is there for other
//! tests too.

use engine_kernels::cuda::{CudaBackend, Driver, Start};
use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{
    Attention, AttentionShape, Backend, Batch, DType, DrawsAhead, KvDType, KvLayout, Matrix, Projection, QkNorm,
    Residual, RmsNorm, RopeTable, RowTask, SampleRow, Sampled, SamplingParams, SequenceId, WarmUp,
};

use crate::{OnDevice, Watched, watched};

/// Its attention.
pub const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 16 };
/// Width of its hidden states.
pub const HIDDEN: usize = 64;
/// Rows of its embedding.
pub const VOCABULARY: usize = 50;
/// Tokens of a page.
pub const BLOCK_SIZE: usize = 16;
/// Pages: those that sequences share, and one for each that writes.
pub const BLOCKS: usize = SHARED + ROWS_MAX;
const SHARED: usize = 64;
/// Most rows of a step.
pub const ROWS_MAX: usize = 24;
/// Positions there are.
const CONTEXT_MAX: u32 = 512;

/// What a layer has behind its attention.
struct Mlp<B: Backend> {
    gate_up: B::Linear,
    down: B::Linear,
    both: B::Activations,
    inner: B::Activations,
}

/// Width of its gated activation.
const INNER: usize = 96;

/// A layer of a model, in any backend.
pub struct Layer<B: Backend> {
    /// What computes it.
    pub backend: B,
    table: B::Linear,
    norm: B::Vector,
    qkv: B::Linear,
    q_norm: B::Vector,
    output: B::Linear,
    mlp: Option<Mlp<B>>,
    rope: B::Rope,
    cache: B::KvCache,
    residual: Residual<B::Activations>,
    selected: B::Activations,
    projected: B::Activations,
    mixed: B::Activations,
    logits: B::Activations,
}

/// Numbers between -1 and 1.
pub fn numbers(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) % 2003) as f32 / 1000.0 - 1.0).collect()
}

impl<B: Backend> Layer<B> {
    /// One with something in every page; its weights are f32, and attention is all it has.
    pub fn new(backend: B) -> Self {
        Self::of(backend, DType::F32, false)
    }

    /// One with weights of another type of floats, and whole.
    pub fn whole(backend: B, dtype: DType) -> Self {
        Self::of(backend, dtype, true)
    }

    fn of(mut backend: B, dtype: DType, is_whole: bool) -> Self {
        let mut weight = |rows: usize, cols: usize, seed: u32| {
            let values = numbers(rows * cols, seed).into_iter();
            let bytes: Vec<u8> = match dtype {
                DType::F16 => values.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect(),
                DType::BF16 => values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
                _ => values.flat_map(f32::to_le_bytes).collect(),
            };
            backend.linear_weight(&[Matrix::new(dtype, rows, cols, &bytes).unwrap()]).unwrap()
        };
        let (table, qkv) = (weight(VOCABULARY, HIDDEN, 1), weight(SHAPE.qkv_width(), HIDDEN, 2));
        let output = weight(HIDDEN, SHAPE.q_width(), 3);
        let mlp = is_whole.then(|| (weight(2 * INNER, HIDDEN, 7), weight(HIDDEN, INNER, 8)));
        let mlp = mlp.map(|(gate_up, down)| {
            let [both, inner] = [2 * INNER, INNER].map(|width| backend.activations(ROWS_MAX, width));
            Mlp { gate_up, down, both, inner }
        });
        let layout = KvLayout {
            layers: 1,
            kv_heads: SHAPE.kv_heads,
            head_dim: SHAPE.head_dim,
            block_size: BLOCK_SIZE,
            blocks: BLOCKS,
            dtype: KvDType::BF16,
        };
        let mut layer = Self {
            table,
            qkv,
            output,
            mlp,
            norm: backend.vector(&numbers(HIDDEN, 4)),
            q_norm: backend.vector(&numbers(SHAPE.head_dim, 5)),
            rope: backend.rope(RopeTable::new(&numbers(SHAPE.head_dim / 2, 6), 1.0, CONTEXT_MAX as usize)),
            cache: backend.kv_cache(layout).unwrap(),
            residual: Residual::new(&mut backend, ROWS_MAX, HIDDEN),
            selected: backend.activations(ROWS_MAX, HIDDEN),
            projected: backend.activations(ROWS_MAX, SHAPE.qkv_width()),
            mixed: backend.activations(ROWS_MAX, SHAPE.q_width()),
            logits: backend.activations(ROWS_MAX, VOCABULARY),
            backend,
        };
        for page in 0..BLOCKS as u32 {
            let mut batch = Batch::default();
            batch.push(&[page % 7; BLOCK_SIZE], 0, &[page], 0);
            layer.step(&batch);
        }
        layer
    }

    /// A step; what comes out of it, the rows of `batch` alone.
    pub fn step(&mut self, batch: &Batch) -> Vec<f32> {
        self.with_step(batch, |backend, operations| backend.step(batch, operations));
        let Self { backend, residual, selected, .. } = self;
        let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
        backend.select_rows(residual.normed(), &rows, selected);
        backend.read(selected)
    }

    fn with_step<R>(&mut self, batch: &Batch, step: impl FnOnce(&mut B, &mut dyn FnMut(&mut B)) -> R) -> R {
        let Self { backend, table, norm, qkv, q_norm, output, mlp, rope, cache, residual, projected, mixed, .. } = self;
        step(backend, &mut |backend| {
            let rms_norm = || RmsNorm { weight: &*norm, eps: 1e-5 };
            backend.embed(table, batch, residual.start());
            backend.norm_linear(residual, rms_norm(), qkv, None, projected);
            let norm = Some(QkNorm { q: &*q_norm, k: &*q_norm, eps: 1e-6 });
            let output = Projection { weight: &*output, bias: None };
            let attention = Attention { shape: SHAPE, scale: 0.25, norm, rope: &*rope, output };
            backend.add_attention(projected, attention, cache, 0, batch, mixed, residual, &mut |_| ());
            if let Some(Mlp { gate_up, down, both, inner }) = mlp {
                let [gate_up, down] = [&*gate_up, &*down].map(|weight| Projection { weight, bias: None });
                backend.add_mlp(residual, rms_norm(), gate_up, down, [both, inner]);
            }
            backend.norm(residual, rms_norm());
        })
    }
}

impl<D: Driver> Layer<CudaBackend<D>> {
    /// Enqueues a step and the drawing of a token for each of its rows: in every second none that is in its output, in
    /// the others less likely those that are there often, but in the third and the last only those that are there.
    pub fn draw(&mut self, batch: &Batch, outputs: &[Vec<u32>]) {
        self.with_step(batch, |backend, operations| backend.step(batch, operations));
        let Self { backend, table, residual, logits, .. } = self;
        backend.linear(residual.normed(), table, None, logits);
        let rows = batch.tokens.len();
        let params = |i: usize| SamplingParams {
            // High enough for many tokens to have a chance, of those whose logit is not 10,000 lower.
            temperature: 100.0,
            presence_penalty: if i == 2 || i + 1 == rows {
                // A single token that is not counted in shows soon.
                -10_000.0
            } else if i.is_multiple_of(2) {
                10_000.0
            } else {
                0.0
            },
            frequency_penalty: if i.is_multiple_of(2) { 0.0 } else { 100.0 },
            // Some are drawn again and again, and listed for other reasons too.
            logit_bias: (0..VOCABULARY as u32).step_by(8).map(|token| (token, 300.0)).collect(),
            seed: i as u64,
            ..SamplingParams::default()
        };
        let params: Vec<_> = (0..rows).map(params).collect();
        let row = |i: usize| {
            // What must not be drawn changes: all that the row touches is sent anew then, the latest token among it.
            let suppress: &[u32] = if i == 2 && outputs[i].len() % 3 == 1 { &[1] } else { &[] };
            // The last row says that it is of the first one's sequence, as no two rows may: nothing is remembered of it
            // then, as of a sequence that there is no room for.
            let sequence = SequenceId(if i + 1 == rows { 0 } else { i as u64 });
            let task = RowTask::Sample { params: &params[i], suppress, mask: None };
            SampleRow { task, sequence, prompt: &[0], output: &outputs[i], logprobs: Some(0) }
        };
        backend.draw(logits, 0, &row);
        backend.fetch(batch.tokens.len());
    }

    /// What was drawn in the earliest step that was not looked at: tokens, and bits of their log-probabilities.
    pub fn drawn(&mut self, rows: usize) -> Vec<(u32, u32)> {
        let mut out = vec![Sampled::default(); rows];
        self.backend.collect(&mut out);
        out.iter().map(|sampled| (sampled.token, sampled.logprob.to_bits())).collect()
    }

    /// Warms up for all that the layer can compute; how many steps were recorded.
    pub fn warm_up(&mut self) -> usize {
        let mut largest = Batch::default();
        largest.push(&[0; ROWS_MAX], 0, &[0; ROWS_MAX * BLOCKS], 0);
        let sizes = self.backend.warm_up_sizes(ROWS_MAX);
        let decoding = sizes.into_iter().map(|size| decode(&vec![CONTEXT_MAX; size], 0));
        let steps: Vec<Batch> = std::iter::once(largest).chain(decoding).collect();
        let warm_up = |batch: &Batch| -> WarmUp {
            self.with_step(batch, |backend, operations| backend.warm_up(batch, operations))
        };
        steps.iter().map(warm_up).map(|warm_up| warm_up.recorded).sum()
    }
}

/// One decoding step of sequences with these contexts. Each has a last page of its own, where its token goes.
pub fn decode(contexts: &[u32], turn: u32) -> Batch {
    let mut batch = Batch::default();
    for (i, &context) in (0..).zip(contexts) {
        let shared = (context - 1) / BLOCK_SIZE as u32;
        let pages = (0..shared).map(|page| (i * 3 + page) % SHARED as u32).chain([SHARED as u32 + i]);
        let pages: Vec<u32> = pages.collect();
        batch.push(&[(i * 7 + turn) % VOCABULARY as u32], context - 1, &pages, 0);
    }
    batch
}

/// Steps of sizes in each bucket, with contexts of all lengths, prompts in between; the same every time.
pub fn all_kinds() -> impl Iterator<Item = Batch> {
    [1, 2, 3, 6, 9, 16, 17, ROWS_MAX].into_iter().flat_map(|sequences| {
        let long = vec![CONTEXT_MAX; sequences];
        let turn = sequences as u32;
        let mixed: Vec<u32> = (0..turn).map(|i| 1 + (i * 97 + turn * 31) % CONTEXT_MAX).collect();
        let short = vec![turn; sequences];
        [decode(&short, turn), prompt(turn.max(2)), decode(&mixed, turn), decode(&long, turn)]
    })
}

fn prompt(tokens: u32) -> Batch {
    let mut batch = Batch::default();
    let ids: Vec<u32> = (0..tokens).map(|i| i % VOCABULARY as u32).collect();
    batch.push(&ids, 0, &[0, 1], ids.len());
    batch
}

fn device<D: Start>() -> Layer<OnDevice<D>> {
    Layer::new(OnDevice::new(Watched::start()))
}

/// Whether results are near those of the reference.
///
/// # Panics
///
/// They are not.
#[track_caller]
pub fn assert_near(ours: &[f32], theirs: &[f32]) {
    assert_eq!(ours.len(), theirs.len());
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= 0.02 * (1.0 + b.abs()), "element {i} is {a}, should be {b}");
    }
    watched::held();
}

pub(crate) fn steps_that_are_replayed_compute_what_the_reference_does<D: Start>() {
    let (mut layer, mut reference) = (device::<D>(), Layer::new(ReferenceBackend));
    for batch in [prompt(20), prompt(17)] {
        assert_near(&layer.step(&batch), &reference.step(&batch));
    }
    assert_eq!(layer.backend.graphs(), 0, "prompts are not recorded");
    // Different numbers of sequences of the same bucket, at contexts that grow, then others.
    for turn in 0..4 {
        for sequences in [1, 3, 4] {
            let contexts: Vec<u32> = (0..sequences).map(|i| 17 + turn + i).collect();
            let batch = decode(&contexts, turn);
            assert_near(&layer.step(&batch), &reference.step(&batch));
        }
    }
    assert_eq!(layer.backend.graphs(), 2, "one for a sequence, one for three or four");
}

pub(crate) fn steps_that_were_warmed_up_for_compute_what_others_do<D: Start>() {
    let (mut warm, mut reference) = (device::<D>(), Layer::new(ReferenceBackend));
    let mut eager = Layer::new(OnDevice::<D>::new(Watched::start()).with_graphs_max(0));
    let recorded = warm.warm_up();
    assert!(recorded > 10, "{recorded}");
    for batch in all_kinds() {
        let ours = warm.step(&batch);
        // That no page was touched shows here too.
        let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&ours), bits(&eager.step(&batch)), "{:?}", batch.sequences);
        assert_near(&ours, &reference.step(&batch));
    }
    assert_eq!(warm.backend.graphs(), recorded, "nothing was recorded in vain");
}

/// With what rounds activations for the products behind it among what is recorded.
pub(crate) fn warmed_up_steps_of_whole_layers_compute_what_others_do<D: Start>() {
    for dtype in [DType::BF16, DType::F16] {
        let mut warm = Layer::whole(OnDevice::<D>::new(Watched::start()), dtype);
        let mut eager = Layer::whole(OnDevice::<D>::new(Watched::start()).with_graphs_max(0), dtype);
        let mut reference = Layer::whole(ReferenceBackend, dtype);
        let recorded = warm.warm_up();
        for batch in all_kinds() {
            let ours = warm.step(&batch);
            let bits = |values: &[f32]| values.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
            assert_eq!(bits(&ours), bits(&eager.step(&batch)), "{dtype:?}, {:?}", batch.sequences);
            assert_near(&ours, &reference.step(&batch));
        }
        assert_eq!(warm.backend.graphs(), recorded, "nothing was recorded in vain");
    }
}

pub(crate) fn tokens_drawn_ahead_are_what_the_next_step_reads<D: Start>() {
    let [mut ahead, mut told] = [(); 2].map(|()| device::<D>());
    draw_alike(&mut ahead, &mut told);
    assert_eq!(ahead.backend.graphs(), 1);
    watched::held();
}

/// Draws for sequences in steps that are enqueued one ahead of what is known, and in steps that are told each token;
/// what was drawn in each.
///
/// # Panics
///
/// That is not the same, or not what penalties allow.
pub fn draw_alike<D: Driver>(
    ahead: &mut Layer<CudaBackend<D>>,
    told: &mut Layer<CudaBackend<D>>,
) -> Vec<Vec<(u32, u32)>> {
    const ROWS: usize = 5;
    const STEPS: usize = 8;
    [&mut *ahead, &mut *told].into_iter().for_each(|layer| layer.backend.make_room(ROWS_MAX));
    // Each row goes on with the token of the row after it. The first steps are recorded.
    let after = |row: usize| (row + 1) % ROWS;
    let start = || (decode(&[40; ROWS], 0), vec![Vec::new(); ROWS]);
    let next = |batch: &mut Batch, outputs: &mut [Vec<u32>], tokens: [u32; ROWS]| {
        batch.tokens.copy_from_slice(&tokens);
        batch.positions.iter_mut().for_each(|position| *position += 1);
        batch.sequences.iter_mut().for_each(|sequence| sequence.context_len += 1);
        outputs.iter_mut().zip(tokens).for_each(|(output, token)| output.push(token));
    };
    let (mut batch, mut outputs) = start();
    let mut expected = Vec::new();
    for _ in 0..STEPS {
        told.draw(&batch, &outputs);
        let drawn = told.drawn(ROWS);
        for (row, is_drawn_again) in [(0, false), (2, true), (ROWS - 1, true)] {
            let (token, output) = (drawn[row].0, &outputs[row]);
            assert!(output.is_empty() || output.contains(&token) == is_drawn_again, "{token} after {output:?}");
        }
        next(&mut batch, &mut outputs, std::array::from_fn(|row| drawn[after(row)].0));
        expected.push(drawn);
    }
    // Of the row that nothing is remembered of, some are listed for their bias before they are counted in, some not.
    let counted = &outputs[ROWS - 1][..STEPS - 1];
    let biased = counted.iter().filter(|&token| token % 8 == 0).count();
    assert!((1..counted.len()).contains(&biased), "{counted:?}");

    let (mut batch, mut outputs) = start();
    let mut drawn = Vec::new();
    for step in 0..STEPS {
        ahead.draw(&batch, &outputs);
        // One step is ahead of what is known.
        if step > 0 {
            let known = ahead.drawn(ROWS);
            for (row, output) in outputs.iter_mut().enumerate() {
                output[step - 1] = known[after(row)].0;
            }
            drawn.push(known);
        }
        next(&mut batch, &mut outputs, std::array::from_fn(|row| Batch::PLACEHOLDER | after(row) as u32));
    }
    drawn.push(ahead.drawn(ROWS));
    assert_eq!(drawn, expected);
    expected
}

pub(crate) fn contexts_of_several_partitions_are_split_replayed_and_merged<D: Start>() {
    let (mut layer, mut reference) = (device::<D>(), Layer::new(ReferenceBackend));
    for turn in 0..3 {
        let batch = decode(&[390 + turn], turn);
        assert_near(&layer.step(&batch), &reference.step(&batch));
    }
    assert_eq!(layer.backend.graphs(), 1);
}

pub(crate) fn a_block_table_that_outgrows_its_place_is_recorded_anew<D: Start>() {
    let (mut layer, mut reference) = (device::<D>(), Layer::new(ReferenceBackend));
    for turn in 0..3 {
        layer.step(&decode(&[20; 2], turn));
        reference.step(&decode(&[20; 2], turn));
    }
    assert_eq!(layer.backend.graphs(), 1);
    // 24 sequences with tables of 32 pages: more than the first 4 KiB.
    let batch = decode(&[500; ROWS_MAX], 0);
    let mut long = Batch::default();
    for sequence in 0..ROWS_MAX {
        let at = batch.sequences[sequence].table_start as usize;
        long.push(&[3], 20, &batch.block_tables[at..at + 32].repeat(2), 0);
    }
    layer.step(&long);
    assert_eq!(layer.backend.graphs(), 0);
    reference.step(&long);
    for turn in 3..6 {
        let batch = decode(&[20; 2], turn);
        assert_near(&layer.step(&batch), &reference.step(&batch));
    }
    assert_eq!(layer.backend.graphs(), 1);
}

pub(crate) fn how_attention_is_cut_changes_no_bit<D: Start>() {
    // Alone a partition is a block's work; beside others, of which there are enough, several are or all.
    let mut layer = device::<D>();
    let pages: Vec<u32> = (0..BLOCKS as u32).collect();
    let mut results = Vec::new();
    for others in [0, 1, 3, 15] {
        // What it leaves is not what the next step finds, and is not added to.
        let mut before = Batch::default();
        before.push(&[9], 299, &pages[30..49], 0);
        layer.step(&before);
        let mut batch = Batch::default();
        batch.push(&[3], 399, &pages[..25], 0);
        // All in the same pages: nobody looks at their results.
        (0..others).for_each(|_| batch.push(&[4], 299, &pages[30..49], 0));
        let row = &layer.step(&batch)[..HIDDEN];
        results.push(row.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    }
    assert!(results.iter().all(|row| *row == results[0]), "{results:x?}");
}
