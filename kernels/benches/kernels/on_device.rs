//! The measurements.

use engine_kernels::cuda::{CudaBackend, Device, Driver};
use engine_kernels::{AttentionShape, Backend, Batch, DType, KvDType, KvLayout, Matrix, QkNorm, RopeTable};

type Cuda = CudaBackend<Device>;

/// What of a model determines how long its kernels take.
struct Shape {
    name: &'static str,
    hidden: usize,
    ffn: usize,
    layers: usize,
    vocabulary: usize,
    heads: AttentionShape,
}

const fn heads(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim }
}

const REAL: [Shape; 3] = [
    Shape { name: "Qwen3-0.6B", hidden: 1024, ffn: 3072, layers: 28, vocabulary: 151_936, heads: heads(16, 8, 128) },
    Shape { name: "Qwen3-8B", hidden: 4096, ffn: 12_288, layers: 36, vocabulary: 151_936, heads: heads(32, 8, 128) },
    Shape { name: "Llama-3-8B", hidden: 4096, ffn: 14_336, layers: 32, vocabulary: 128_256, heads: heads(32, 8, 128) },
];
const TINY: [Shape; 1] =
    [Shape { name: "tiny", hidden: 64, ffn: 96, layers: 2, vocabulary: 100, heads: heads(2, 1, 64) }];

const BLOCK_SIZE: usize = 16;
/// Repetitions of what is measured, in each of so many measurements, of which the median counts.
const REPETITIONS: usize = 20;
const MEASUREMENTS: usize = 5;
/// Operations of mma in a millisecond.
const MMA_PER_MS: f64 = 600e9;

/// What a measurement did at least: bytes that had to move, and operations of products.
#[derive(Clone, Copy)]
struct Work {
    bytes: usize,
    operations: usize,
}

/// Prints one row: time, bytes, the part of the copy's bandwidth that makes, and the rate of operations; and the floor,
/// which is the longer of the bytes at that bandwidth and the operations at the rate that mma has on an H100 or H200
/// (about 600 Tflop/s), as a part of the time.
fn report(what: &str, milliseconds: f64, work: Work, bandwidth: f64) {
    let (bytes, operations) = (work.bytes as f64, work.operations as f64);
    let rate = bytes / milliseconds / 1e6;
    let floor_ms = (bytes / bandwidth / 1e6).max(operations / MMA_PER_MS);
    println!(
        "| {what} | {:.1} | {:.2} | {rate:.0} | {:.0} % | {:.1} | {:.0} % |",
        milliseconds * 1e3,
        bytes / 1e6,
        100.0 * rate / bandwidth,
        operations / milliseconds / 1e9,
        100.0 * floor_ms / milliseconds
    );
}

/// Milliseconds of one call of `work`, which only enqueues.
fn time(backend: &mut Cuda, mut work: impl FnMut(&mut Cuda)) -> f64 {
    work(backend);
    work(backend);
    let mut times: Vec<f64> = (0..MEASUREMENTS)
        .map(|_| {
            let start = backend.driver().record().expect("an event");
            (0..REPETITIONS).for_each(|_| work(backend));
            let end = backend.driver().record().expect("an event");
            backend.driver().wait(&end).expect("the work ends");
            f64::from(backend.driver().milliseconds(&start, &end).expect("times")) / REPETITIONS as f64
        })
        .collect();
    backend.check().expect("nothing failed");
    times.sort_by(f64::total_cmp);
    times[MEASUREMENTS / 2]
}

/// A bf16 weight with values around 0.
fn weight(backend: &mut Cuda, rows: usize, cols: usize) -> <Cuda as Backend>::Linear {
    let value = |i: usize| half_of(((i * 2_654_435_761) % 1999) as f32 / 1e5 - 0.01);
    let bytes: Vec<u8> = (0..rows * cols).flat_map(value).collect();
    backend.linear_weight(&[Matrix::new(DType::BF16, rows, cols, &bytes).expect("a matrix")]).expect("room for it")
}

/// bf16, cut off.
fn half_of(x: f32) -> [u8; 2] {
    let bytes = x.to_le_bytes();
    [bytes[2], bytes[3]]
}

/// GB/s that copying rows reaches, read and written.
fn bandwidth(backend: &mut Cuda, tiny: bool) -> f64 {
    let (rows, cols) = if tiny { (4, 64) } else { (4096, 16_384) };
    let x = filled(backend, rows, cols);
    let mut out = backend.activations(rows, cols);
    let all: Vec<u32> = (0..rows as u32).collect();
    let milliseconds = time(backend, |backend| backend.select_rows(&x, &all, &mut out));
    (2 * rows * cols * 4) as f64 / milliseconds / 1e6
}

fn filled(backend: &mut Cuda, rows: usize, cols: usize) -> <Cuda as Backend>::Activations {
    let mut x = backend.activations(rows, cols);
    let values: Vec<f32> = (0..rows * cols).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
    backend.write(&values, &mut x);
    x
}

/// One decoding step of `sequences` sequences with `context` tokens each.
fn decode(sequences: usize, context: usize) -> Batch {
    let pages = context.div_ceil(BLOCK_SIZE);
    let mut batch = Batch::default();
    for sequence in 0..sequences {
        let table: Vec<u32> = (sequence * pages..(sequence + 1) * pages).map(|page| page as u32).collect();
        batch.push(&[1], context as u32 - 1, &table, 0);
    }
    batch
}

/// A layer's weights and everybody's buffers.
struct Model {
    qkv: <Cuda as Backend>::Linear,
    output: <Cuda as Backend>::Linear,
    gate_up: <Cuda as Backend>::Linear,
    down: <Cuda as Backend>::Linear,
    head: <Cuda as Backend>::Linear,
    norm: <Cuda as Backend>::Vector,
    head_norm: <Cuda as Backend>::Vector,
    rope: <Cuda as Backend>::Rope,
}

fn measure(backend: &mut Cuda, shape: &Shape, bandwidth: f64, tiny: bool) {
    let Shape { name, hidden, ffn, layers, vocabulary, heads } = *shape;
    let model = Model {
        qkv: weight(backend, heads.qkv_width(), hidden),
        output: weight(backend, hidden, heads.q_width()),
        gate_up: weight(backend, 2 * ffn, hidden),
        down: weight(backend, hidden, ffn),
        head: weight(backend, vocabulary, hidden),
        norm: backend.vector(&vec![1.0; hidden]),
        head_norm: backend.vector(&vec![1.0; heads.head_dim]),
        rope: backend.rope(RopeTable::new(&vec![0.01; heads.head_dim / 2], 1.0, 8192)),
    };
    let products = [
        ("qkv", &model.qkv, hidden, heads.qkv_width()),
        ("output", &model.output, heads.q_width(), hidden),
        ("gate and up", &model.gate_up, hidden, 2 * ffn),
        ("down", &model.down, ffn, hidden),
        ("logits", &model.head, hidden, vocabulary),
    ];
    for rows in if tiny { vec![1, 17] } else { vec![1, 4, 16, 17, 32, 64, 128, 512, 2048, 8192] } {
        for (what, weight, cols, out) in products.iter().filter(|product| rows <= 64 || product.0 != "logits") {
            let x = filled(backend, rows, *cols);
            let mut result = backend.activations(rows, *out);
            let milliseconds = time(backend, |backend| backend.linear(&x, weight, None, &mut result));
            let work = Work { bytes: 2 * cols * out + 4 * rows * (cols + out), operations: 2 * rows * cols * out };
            report(&format!("{name}: {what} [{out}, {cols}] × {rows}"), milliseconds, work, bandwidth);
        }
    }
    let prompts = [(512, 0), (2048, 0), (512, 7680), (16_384, 0)];
    for (tokens, cached) in if tiny { &[(20, 9)][..] } else { &prompts[..] } {
        prefill(backend, shape, *tokens, *cached, bandwidth);
    }
    for (sequences, context) in if tiny { vec![(1, 200)] } else { vec![(1, 512), (1, 8192), (64, 512), (256, 512)] } {
        step(backend, shape, &model, sequences, context, layers, bandwidth);
    }
}

/// Attention of a layer, for a chunk of a prompt behind `cached` tokens.
fn prefill(backend: &mut Cuda, shape: &Shape, tokens: usize, cached: usize, bandwidth: f64) {
    let Shape { name, heads, .. } = *shape;
    let blocks = (tokens + cached).div_ceil(BLOCK_SIZE);
    let mut batch = Batch::default();
    batch.push(&vec![1; tokens], cached as u32, &(0..blocks as u32).collect::<Vec<_>>(), 0);
    let layout = KvLayout {
        layers: 1,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        block_size: BLOCK_SIZE,
        blocks,
        dtype: KvDType::BF16,
    };
    let cache = backend.kv_cache(layout).expect("room for pages");
    let qkv = filled(backend, tokens, heads.qkv_width());
    let mut mixed = backend.activations(tokens, heads.q_width());
    backend.begin(&batch);
    let scale = 1.0 / (heads.head_dim as f32).sqrt();
    let milliseconds = time(backend, |backend| {
        backend.attention(&qkv, heads, scale, &cache, 0, &batch, &mut mixed);
    });
    // Each token sees those before it, and itself.
    let pairs = tokens * cached + tokens * (tokens + 1) / 2;
    let pages = 4 * (tokens + cached) * heads.kv_heads * heads.head_dim;
    let work =
        Work { bytes: pages + 8 * tokens * heads.q_width(), operations: 4 * pairs * heads.heads * heads.head_dim };
    let what = format!("{name}: prompt of {tokens} behind {cached}: attention of a layer");
    report(&what, milliseconds, work, bandwidth);
}

/// Attention alone, then a whole step.
fn step(
    backend: &mut Cuda,
    shape: &Shape,
    model: &Model,
    sequences: usize,
    context: usize,
    layers: usize,
    bandwidth: f64,
) {
    let Shape { name, hidden, ffn, vocabulary, heads, .. } = *shape;
    let batch = decode(sequences, context);
    let layout = KvLayout {
        layers: 1,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        block_size: BLOCK_SIZE,
        blocks: batch.block_tables.len(),
        dtype: KvDType::BF16,
    };
    let mut cache = backend.kv_cache(layout).expect("room for pages");
    let scale = 1.0 / (heads.head_dim as f32).sqrt();
    let pages = 4 * sequences * context * heads.kv_heads * heads.head_dim;

    let [mut residual, mut normed, mut delta] = [(); 3].map(|()| filled(backend, sequences, hidden));
    let mut qkv = filled(backend, sequences, heads.qkv_width());
    let mut mixed = backend.activations(sequences, heads.q_width());
    let mut gate_up = backend.activations(sequences, 2 * ffn);
    let mut inner = backend.activations(sequences, ffn);
    let mut logits = backend.activations(sequences, vocabulary);
    let sized = format!("{name}: {sequences} × {context} tokens");

    backend.begin(&batch);
    let milliseconds = time(backend, |backend| {
        backend.attention(&qkv, heads, scale, &cache, 0, &batch, &mut mixed);
    });
    // Operations of decoding are far from any floor, and not counted.
    let work = |bytes| Work { bytes, operations: 0 };
    report(&format!("{sized}: attention of a layer"), milliseconds, work(pages), bandwidth);

    let milliseconds = time(backend, |backend| {
        backend.step(&batch, &mut |backend| {
            backend.embed(&model.head, &batch, &mut residual);
            for _ in 0..layers {
                backend.add_rms_norm(&mut residual, &delta, &model.norm, 1e-6, &mut normed);
                backend.linear(&normed, &model.qkv, None, &mut qkv);
                let norm = QkNorm { q: &model.head_norm, k: &model.head_norm, eps: 1e-6 };
                backend.rope_and_cache(&mut qkv, heads, Some(norm), &model.rope, &mut cache, 0, &batch);
                backend.attention(&qkv, heads, scale, &cache, 0, &batch, &mut mixed);
                backend.linear(&mixed, &model.output, None, &mut delta);
                backend.add_rms_norm(&mut residual, &delta, &model.norm, 1e-6, &mut normed);
                backend.linear(&normed, &model.gate_up, None, &mut gate_up);
                backend.silu_mul(&gate_up, &mut inner);
                backend.linear(&inner, &model.down, None, &mut delta);
            }
            backend.add_rms_norm(&mut residual, &delta, &model.norm, 1e-6, &mut normed);
            backend.linear(&normed, &model.head, None, &mut logits);
        });
    });
    let weights = [&model.qkv, &model.output, &model.gate_up, &model.down].map(|weight| backend.linear_bytes(weight));
    let bytes = layers * (weights.iter().sum::<usize>() + pages) + backend.linear_bytes(&model.head);
    report(&format!("{sized}: a step, its layers one and the same"), milliseconds, work(bytes), bandwidth);
}

/// Measures everything and prints it.
pub(super) fn run(tiny: bool) {
    let mut backend = Cuda::new(Device::new(0).expect("a CUDA device"));
    let bandwidth = bandwidth(&mut backend, tiny);
    println!("{}: a copy of rows moves {bandwidth:.0} GB/s, read and written\n", backend.driver().name());
    println!("| what | µs | MB | GB/s | of a copy | Tflop/s | floor of the time |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for shape in if tiny { &TINY[..] } else { &REAL[..] } {
        measure(&mut backend, shape, bandwidth, tiny);
    }
}
