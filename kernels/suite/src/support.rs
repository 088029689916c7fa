//! Random numbers, random weights, and comparisons.

use engine_kernels::cpu::{CpuBackend, CpuOptions};
use engine_kernels::cuda::Start;
use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{Backend, Batch, DType, KvDType, Matrix};
use half::{bf16, f16};

use crate::{OnDevice, Watched, watched};

/// A backend under test: what of its roundings results show, and how to have one.
pub trait Subject: Backend + Sized {
    /// Whether [`Backend::linear`] rounds activations to integers before it multiplies them with weights that are
    /// quantised to integers.
    const ROUNDS_ACTIVATIONS: bool;

    /// Whether two levels of scales, as K-quants and IQ4_XS have them, are multiplied out and rounded to f16.
    const ROUNDS_SCALES: bool;

    /// Up to so many rows, products add up in another order than for more, so that only within the two are the bits the
    /// same.
    const FEW_ROWS: usize = 0;

    /// Whether attention, with such heads and such a cache, computes the rows of a chunk of two tokens and more in
    /// another way than a single one, so that only within the two are the bits the same, and rounds queries and weights
    /// to the cache's type then.
    fn tiles_prompts(_head_dim: usize, _dtype: KvDType) -> bool {
        false
    }

    /// To which type products of so many rows with weights of `dtype` round activations before they multiply, and
    /// weights, if they are quantised.
    fn narrows_to(_dtype: DType, _rows: usize) -> Option<DType> {
        None
    }

    /// One that works with so many threads.
    fn with_threads(threads: usize) -> Self;

    /// One for tests in which the number of threads plays no part.
    fn any() -> Self {
        Self::with_threads(2)
    }

    /// A buffer holding rows of `cols` values.
    fn filled(&mut self, values: &[f32], cols: usize) -> Self::Activations {
        let mut out = self.activations(values.len() / cols, cols);
        self.write(values, &mut out);
        out
    }

    /// The rows `tokens` of a table.
    fn embedded(&mut self, table: &Self::Linear, tokens: &[u32], out: &mut Self::Activations) {
        let mut batch = Batch::default();
        batch.push(tokens, 0, &[], tokens.len());
        self.begin(&batch);
        self.embed(table, &batch, out);
    }
}

impl Subject for ReferenceBackend {
    const ROUNDS_ACTIVATIONS: bool = false;
    const ROUNDS_SCALES: bool = false;

    fn with_threads(_: usize) -> Self {
        Self
    }
}

impl Subject for CpuBackend {
    const ROUNDS_ACTIVATIONS: bool = true;
    const ROUNDS_SCALES: bool = true;

    fn with_threads(threads: usize) -> Self {
        Self::new(CpuOptions { threads, level: None })
    }
}

impl<D: Start> Subject for OnDevice<D> {
    const ROUNDS_ACTIVATIONS: bool = false;
    const ROUNDS_SCALES: bool = true;
    const FEW_ROWS: usize = 16;

    fn tiles_prompts(head_dim: usize, dtype: KvDType) -> bool {
        dtype != KvDType::F32 && [64, 96, 128, 256].contains(&head_dim)
    }

    fn narrows_to(dtype: DType, rows: usize) -> Option<DType> {
        match dtype {
            _ if rows <= Self::FEW_ROWS => None,
            DType::F32 => None,
            DType::BF16 => Some(DType::BF16),
            _ => Some(DType::F16),
        }
    }

    fn with_threads(_: usize) -> Self {
        Self::new(Watched::start())
    }
}

/// A small seeded generator: xorshift64* (Vigna 2016).
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub(crate) fn bits(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// In `0..n`.
    pub(crate) fn below(&mut self, n: usize) -> usize {
        (self.bits() >> 33) as usize % n
    }

    /// In `[0, 1)`.
    pub(crate) fn unit(&mut self) -> f32 {
        (self.bits() >> 40) as f32 / (1u32 << 24) as f32
    }

    /// In `[-1, 1)`.
    pub(crate) fn signed(&mut self) -> f32 {
        self.unit() * 2.0 - 1.0
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    /// Roughly normal: variance 1, mean 0.
    pub(crate) fn normal(&mut self) -> f32 {
        (0..12).map(|_| self.unit()).sum::<f32>() - 6.0
    }

    pub(crate) fn normals(&mut self, len: usize) -> Vec<f32> {
        (0..len).map(|_| self.normal()).collect()
    }

    /// `0..n` in random order.
    pub(crate) fn shuffled(&mut self, n: usize) -> Vec<u32> {
        let mut ids: Vec<u32> = (0..n as u32).collect();
        for i in (1..n).rev() {
            ids.swap(i, self.below(i + 1));
        }
        ids
    }
}

pub(crate) const FLOATS: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
pub(crate) const QUANTIZED: [DType; 12] = [
    DType::Q4_0,
    DType::Q4_1,
    DType::Q5_0,
    DType::Q5_1,
    DType::Q8_0,
    DType::Q4K,
    DType::Q5K,
    DType::Q6K,
    DType::F8,
    DType::Q3K,
    DType::IQ4NL,
    DType::IQ4XS,
];

/// A weight as it would stand in a file.
pub(crate) struct Weight {
    pub(crate) dtype: DType,
    rows: usize,
    cols: usize,
    bytes: Vec<u8>,
}

impl Weight {
    pub(crate) fn matrix(&self) -> Matrix<'_> {
        Matrix::new(self.dtype, self.rows, self.cols, &self.bytes).unwrap()
    }

    /// Random weights. Blocks are any bits at all, with scales such that weights are around 1 in magnitude.
    pub(crate) fn random(dtype: DType, rows: usize, cols: usize, random: &mut Random) -> Self {
        let bytes = if dtype.is_quantized() {
            let len = rows * dtype.row_bytes(cols);
            let mut bytes: Vec<u8> = (0..len).map(|_| random.bits() as u8).collect();
            // Where the scales are, and the largest values they multiply.
            let (scales, largest): (&[usize], f32) = match dtype {
                DType::Q4_0 => (&[0], 8.0),
                DType::Q4_1 => (&[0, 2], 16.0),
                DType::Q5_0 => (&[0], 16.0),
                DType::Q5_1 => (&[0, 2], 32.0),
                DType::Q8_0 => (&[0], 128.0),
                DType::Q3K => (&[108], 4.0 * 32.0),
                DType::Q4K => (&[0, 2], 16.0 * 64.0),
                DType::Q5K => (&[0, 2], 32.0 * 64.0),
                DType::Q6K => (&[208], 32.0 * 128.0),
                DType::IQ4NL => (&[0], 127.0),
                DType::IQ4XS => (&[0], 127.0 * 32.0),
                DType::F8 => (&[0], 448.0),
                DType::F32 | DType::F16 | DType::BF16 => unreachable!("not quantised"),
            };
            for block in bytes.chunks_exact_mut(dtype.block_bytes()) {
                for &at in scales {
                    let scale = 2.0 * (random.unit() * 2.0 - 1.0) / largest;
                    match dtype {
                        DType::F8 => block[at..at + 4].copy_from_slice(&scale.to_le_bytes()),
                        _ => block[at..at + 2].copy_from_slice(&f16::from_f32(scale).to_le_bytes()),
                    }
                }
                if dtype == DType::F8 {
                    // None is NaN.
                    block[4..].iter_mut().for_each(|quant| *quant ^= u8::from(*quant & 0x7f == 0x7f));
                }
            }
            bytes
        } else {
            return Self::of(dtype, cols, &random.normals(rows * cols));
        };
        Self { dtype, rows, cols, bytes }
    }

    /// The given values, rounded to a float type.
    pub(crate) fn of(dtype: DType, cols: usize, values: &[f32]) -> Self {
        let bytes = match dtype {
            DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
            DType::BF16 => values.iter().flat_map(|&v| bf16::from_f32(v).to_le_bytes()).collect(),
            _ => unreachable!("float types only"),
        };
        Self { dtype, rows: values.len() / cols, cols, bytes }
    }
}

/// `x` in a narrower type. Rows of activations that become f16 are brought near the upper end of its range first.
pub(crate) fn narrowed(x: &[f32], cols: usize, dtype: DType, is_weight: bool) -> Vec<f32> {
    let narrow = |row: &[f32]| {
        let most = row.iter().fold(0.0f32, |most, x| most.max(x.abs()));
        let scale = if is_weight || most == 0.0 { 1.0 } else { (most.log2().floor() - 14.0).exp2() };
        let one = |x: &f32| match dtype {
            DType::BF16 => bf16::from_f32(*x).to_f32(),
            _ => f16::from_f32(x / scale).to_f32() * scale,
        };
        row.iter().map(one).collect::<Vec<_>>()
    };
    x.chunks(cols).flat_map(narrow).collect()
}

/// What a backend may make of a weight of `dtype` that is `value`: [`Weight::random`] makes minimums of at most 1/8, so
/// scale times quant is within 1/8 of the value, and each of the two may be off by half a unit of f16 in the last place
/// (or of its smallest numbers). Otherwise a fused multiply-add of scale, quant and minimum, which is nearer the truth
/// than the two roundings of llama.cpp, may differ in the last bit.
pub(crate) fn weight_tolerance<B: Subject>(dtype: DType, value: f32) -> f32 {
    match dtype {
        DType::Q3K | DType::Q4K | DType::Q5K | DType::Q6K | DType::IQ4XS if B::ROUNDS_SCALES => {
            (value.abs() + 0.25) / 2048.0 + 1e-6
        }
        _ => 5e-7,
    }
}

/// Bit for bit equality; any NaN fails.
#[track_caller]
pub(crate) fn assert_same_bits(ours: &[f32], theirs: &[f32], what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!(!a.is_nan() && a.to_bits() == b.to_bits(), "{what}: element {i} is {a:e} here and {b:e} there");
    }
    watched::held();
}

/// `|ours - theirs| <= tolerance(i)` everywhere; any NaN fails.
#[track_caller]
pub(crate) fn assert_near(ours: &[f32], theirs: &[f32], tolerance: impl Fn(usize) -> f32, what: &str) {
    assert_eq!(ours.len(), theirs.len(), "{what}: lengths");
    for (i, (a, b)) in ours.iter().zip(theirs).enumerate() {
        let tolerance = tolerance(i);
        // So written that a NaN fails.
        assert!((a - b).abs() <= tolerance, "{what}: element {i} is {a:e}, should be {b:e} within {tolerance:e}");
    }
    watched::held();
}
