//! Steps of the CUDA backend as a whole: recorded and replayed. The layer they are steps of is there for other tests too.

use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{AttentionShape, Backend, Batch, DType, KvDType, KvLayout, Matrix, QkNorm, RopeTable};

use crate::{OnDevice, Start, Watched, watched};

/// Its attention.
pub const SHAPE: AttentionShape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 16 };
/// Width of its hidden states.
pub const HIDDEN: usize = 64;
/// Rows of its embedding.
pub const VOCABULARY: usize = 50;
/// Tokens of a page.
pub const BLOCK_SIZE: usize = 16;
/// Pages.
pub const BLOCKS: usize = 64;
/// Most rows of a step.
pub const ROWS_MAX: usize = 24;

/// A layer of a model, in any backend.
pub struct Layer<B: Backend> {
    /// What computes it.
    pub backend: B,
    table: B::Linear,
    norm: B::Vector,
    qkv: B::Linear,
    q_norm: B::Vector,
    output: B::Linear,
    rope: B::Rope,
    cache: B::KvCache,
    hidden: B::Activations,
    projected: B::Activations,
    mixed: B::Activations,
    out: B::Activations,
}

/// Numbers between -1 and 1.
pub fn numbers(len: usize, seed: u32) -> Vec<f32> {
    (0..len as u32).map(|i| ((i.wrapping_mul(2_654_435_761) ^ seed) % 2003) as f32 / 1000.0 - 1.0).collect()
}

impl<B: Backend> Layer<B> {
    /// One with something in every page.
    pub fn new(mut backend: B) -> Self {
        let mut weight = |rows: usize, cols: usize, seed: u32| {
            let bytes: Vec<u8> = numbers(rows * cols, seed).iter().flat_map(|x| x.to_le_bytes()).collect();
            backend.linear_weight(&[Matrix::new(DType::F32, rows, cols, &bytes).unwrap()]).unwrap()
        };
        let (table, qkv) = (weight(VOCABULARY, HIDDEN, 1), weight(SHAPE.qkv_width(), HIDDEN, 2));
        let output = weight(HIDDEN, SHAPE.q_width(), 3);
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
            norm: backend.vector(&numbers(HIDDEN, 4)),
            q_norm: backend.vector(&numbers(SHAPE.head_dim, 5)),
            rope: backend.rope(RopeTable::new(&numbers(SHAPE.head_dim / 2, 6), 1.0, 512)),
            cache: backend.kv_cache(layout).unwrap(),
            hidden: backend.activations(ROWS_MAX, HIDDEN),
            projected: backend.activations(ROWS_MAX, SHAPE.qkv_width()),
            mixed: backend.activations(ROWS_MAX, SHAPE.q_width()),
            out: backend.activations(ROWS_MAX, HIDDEN),
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
        let Self { backend, table, norm, qkv, q_norm, output, rope, cache, hidden, projected, mixed, out } = self;
        backend.step(batch, &mut |backend| {
            backend.embed(table, batch, hidden);
            // As wide as the hidden states here, and used for both.
            backend.rms_norm(hidden, norm, 1e-5, mixed);
            backend.linear(mixed, qkv, None, projected);
            let norm = QkNorm { q: &*q_norm, k: &*q_norm, eps: 1e-6 };
            backend.rope_and_cache(projected, SHAPE, Some(norm), rope, cache, 0, batch);
            backend.attention(projected, SHAPE, 0.25, cache, 0, batch, mixed);
            backend.linear(mixed, output, None, out);
        });
        let rows: Vec<u32> = (0..batch.tokens.len() as u32).collect();
        backend.select_rows(out, &rows, hidden);
        backend.read(hidden)
    }
}

/// One decoding step of sequences with these contexts, each in pages of its own.
pub fn decode(contexts: &[u32], turn: u32) -> Batch {
    let mut batch = Batch::default();
    for (i, &context) in (0..).zip(contexts) {
        let pages: Vec<u32> = (0..context.div_ceil(BLOCK_SIZE as u32)).map(|page| (i * 3 + page) % 64).collect();
        batch.push(&[(i * 7 + turn) % VOCABULARY as u32], context - 1, &pages, 0);
    }
    batch
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

#[track_caller]
fn assert_near(ours: &[f32], theirs: &[f32]) {
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
        let mut batch = Batch::default();
        batch.push(&[3], 399, &pages[..25], 0);
        // All in the same pages: nobody looks at their results.
        (0..others).for_each(|_| batch.push(&[4], 299, &pages[30..49], 0));
        let row = &layer.step(&batch)[..HIDDEN];
        results.push(row.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    }
    assert!(results.iter().all(|row| *row == results[0]), "{results:x?}");
}
