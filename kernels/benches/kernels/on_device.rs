//! The measurements.

use engine_kernels::cuda::{CudaBackend, Device, Driver};
use engine_kernels::{
    AttentionShape, Backend, Batch, DType, KvDType, KvLayout, Matrix, QkNorm, Residual, RmsNorm, RopeTable,
};

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

/// Milliseconds of one call of `work`, which only enqueues, and is told how often it was called before.
fn time(backend: &mut Cuda, mut work: impl FnMut(&mut Cuda, usize)) -> f64 {
    let mut calls = 0;
    let mut work = |backend: &mut Cuda| {
        work(backend, calls);
        calls += 1;
    };
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

/// What is read again and again has to be more than this together, or it would come from a cache: several times the
/// largest there is.
const BEYOND_CACHES: usize = 256 << 20;

/// How many of something of so many bytes are beyond caches.
fn copies(bytes: usize, tiny: bool) -> usize {
    if tiny { 2 } else { BEYOND_CACHES.div_ceil(bytes).clamp(1, 64) }
}

/// Copies of a bf16 weight with values around 0, of which each layer has another.
struct Weights {
    copies: Vec<<Cuda as Backend>::Linear>,
}

impl Weights {
    fn new(backend: &mut Cuda, rows: usize, cols: usize, tiny: bool) -> Self {
        let value = |i: usize| half_of(((i * 2_654_435_761) % 1999) as f32 / 1e5 - 0.01);
        let bytes: Vec<u8> = (0..rows * cols).flat_map(value).collect();
        let matrix = Matrix::new(DType::BF16, rows, cols, &bytes).expect("a matrix");
        let copies = copies(bytes.len(), tiny);
        Self { copies: (0..copies).map(|_| backend.linear_weight(&[matrix]).expect("room for it")).collect() }
    }

    fn of(&self, layer: usize) -> &<Cuda as Backend>::Linear {
        &self.copies[layer % self.copies.len()]
    }

    fn bytes(&self, backend: &Cuda) -> usize {
        backend.linear_bytes(self.of(0))
    }
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
    let milliseconds = time(backend, |backend, _| backend.select_rows(&x, &all, &mut out));
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

/// All weights.
struct Model {
    qkv: Weights,
    output: Weights,
    gate_up: Weights,
    down: Weights,
    head: Weights,
    norm: <Cuda as Backend>::Vector,
    head_norm: <Cuda as Backend>::Vector,
    rope: <Cuda as Backend>::Rope,
}

fn measure(backend: &mut Cuda, shape: &Shape, bandwidth: f64, tiny: bool) {
    let Shape { name, hidden, ffn, vocabulary, heads, .. } = *shape;
    let model = Model {
        qkv: Weights::new(backend, heads.qkv_width(), hidden, tiny),
        output: Weights::new(backend, hidden, heads.q_width(), tiny),
        gate_up: Weights::new(backend, 2 * ffn, hidden, tiny),
        down: Weights::new(backend, hidden, ffn, tiny),
        head: Weights::new(backend, vocabulary, hidden, tiny),
        norm: backend.vector(&vec![1.0; hidden]),
        head_norm: backend.vector(&vec![1.0; heads.head_dim]),
        rope: backend.rope(RopeTable::new(&vec![0.01; heads.head_dim / 2], 1.0, 65_536)),
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
            let milliseconds = time(backend, |backend, call| backend.linear(&x, weight.of(call), None, &mut result));
            let work = Work { bytes: 2 * cols * out + 4 * rows * (cols + out), operations: 2 * rows * cols * out };
            report(&format!("{name}: {what} [{out}, {cols}] × {rows}"), milliseconds, work, bandwidth);
        }
    }
    for rows in if tiny { vec![1, 8] } else { vec![1, 2, 4, 8, 16] } {
        fused(backend, shape, &model, rows, bandwidth);
    }
    let prompts = [(512, 0), (2048, 0), (512, 7680), (16_384, 0)];
    for (tokens, cached) in if tiny { &[(20, 9)][..] } else { &prompts[..] } {
        prefill(backend, shape, *tokens, *cached, bandwidth);
    }
    let contexts = [(1, 512), (1, 8192), (1, 65_536), (16, 512), (64, 512), (256, 512)];
    for (sequences, context) in if tiny { vec![(1, 200)] } else { contexts.to_vec() } {
        step(backend, shape, &model, (sequences, context), bandwidth, tiny);
    }
}

/// The products of a layer together with what is done in the same kernel when there are few rows.
fn fused(backend: &mut Cuda, shape: &Shape, model: &Model, rows: usize, bandwidth: f64) {
    let Shape { name, hidden, ffn, heads, .. } = *shape;
    let norm = || RmsNorm { weight: &model.norm, eps: 1e-6 };
    let mut residual = Residual::new(backend, rows, hidden);
    let values: Vec<f32> = (0..rows * hidden).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect();
    backend.write(&values, residual.start());
    let mut qkv = backend.activations(rows, heads.qkv_width());
    let (mixed, inner) = (filled(backend, rows, heads.q_width()), filled(backend, rows, ffn));
    let (mut both, mut out) = (backend.activations(rows, 2 * ffn), backend.activations(rows, ffn));
    let row = |backend: &Cuda, what: &str, weight: &Weights, milliseconds, values: usize| {
        let bytes = weight.bytes(backend) + 4 * rows * values;
        // Operations of so few rows are far from any floor, and not counted.
        report(&format!("{name}: {what} × {rows}"), milliseconds, Work { bytes, operations: 0 }, bandwidth);
    };

    let milliseconds = time(backend, |backend, call| {
        backend.norm_linear(&mut residual, norm(), model.qkv.of(call), None, &mut qkv);
    });
    row(backend, "norm and qkv", &model.qkv, milliseconds, hidden + heads.qkv_width());
    let milliseconds = time(backend, |backend, call| {
        backend.norm_linear_silu_mul(&mut residual, norm(), model.gate_up.of(call), None, &mut both, &mut out);
    });
    row(backend, "norm, gate and up, silu", &model.gate_up, milliseconds, hidden + ffn);
    // The sum grows and grows, which takes no longer.
    let milliseconds = time(backend, |backend, call| {
        backend.add_linear(&mixed, model.output.of(call), None, &mut residual);
    });
    row(backend, "output, added", &model.output, milliseconds, heads.q_width() + 2 * hidden);
    let milliseconds = time(backend, |backend, call| {
        backend.add_linear(&inner, model.down.of(call), None, &mut residual);
    });
    row(backend, "down, added", &model.down, milliseconds, ffn + 2 * hidden);
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
    let milliseconds = time(backend, |backend, _| {
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
    (sequences, context): (usize, usize),
    bandwidth: f64,
    tiny: bool,
) {
    let Shape { name, hidden, ffn, layers, vocabulary, heads } = *shape;
    let pages = 4 * sequences * context * heads.kv_heads * heads.head_dim;
    let caches = copies(pages, tiny);
    let batch = decode(sequences, context);
    let layout = KvLayout {
        layers: caches,
        kv_heads: heads.kv_heads,
        head_dim: heads.head_dim,
        block_size: BLOCK_SIZE,
        blocks: batch.block_tables.len(),
        dtype: KvDType::BF16,
    };
    let mut cache = backend.kv_cache(layout).expect("room for pages");
    let scale = 1.0 / (heads.head_dim as f32).sqrt();

    let mut residual = Residual::new(backend, sequences, hidden);
    let mut qkv = filled(backend, sequences, heads.qkv_width());
    let mut mixed = backend.activations(sequences, heads.q_width());
    let mut gate_up = backend.activations(sequences, 2 * ffn);
    let mut inner = backend.activations(sequences, ffn);
    let mut logits = backend.activations(sequences, vocabulary);
    let sized = format!("{name}: {sequences} × {context} tokens");

    backend.begin(&batch);
    let milliseconds = time(backend, |backend, call| {
        backend.attention(&qkv, heads, scale, &cache, call % caches, &batch, &mut mixed);
    });
    // Operations of decoding are far from any floor, and not counted.
    let work = |bytes| Work { bytes, operations: 0 };
    report(&format!("{sized}: attention of a layer"), milliseconds, work(pages), bandwidth);

    let milliseconds = time(backend, |backend, _| {
        backend.step(&batch, &mut |backend| {
            backend.embed(model.head.of(0), &batch, residual.start());
            let rms_norm = || RmsNorm { weight: &model.norm, eps: 1e-6 };
            for layer in 0..layers {
                backend.norm_linear(&mut residual, rms_norm(), model.qkv.of(layer), None, &mut qkv);
                let norm = QkNorm { q: &model.head_norm, k: &model.head_norm, eps: 1e-6 };
                let pages = layer % caches;
                backend.rope_and_cache(&mut qkv, heads, Some(norm), &model.rope, &mut cache, pages, &batch);
                backend.attention(&qkv, heads, scale, &cache, pages, &batch, &mut mixed);
                backend.add_linear(&mixed, model.output.of(layer), None, &mut residual);
                let weight = model.gate_up.of(layer);
                backend.norm_linear_silu_mul(&mut residual, rms_norm(), weight, None, &mut gate_up, &mut inner);
                backend.add_linear(&inner, model.down.of(layer), None, &mut residual);
            }
            backend.norm(&mut residual, rms_norm());
            backend.linear(residual.normed(), model.head.of(0), None, &mut logits);
        });
    });
    let weights = [&model.qkv, &model.output, &model.gate_up, &model.down].map(|weights| weights.bytes(backend));
    let bytes = layers * (weights.iter().sum::<usize>() + pages) + model.head.bytes(backend);
    report(&format!("{sized}: a step"), milliseconds, work(bytes), bandwidth);
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
