//! Activations as products on tensor cores take them (`kernels/cuda/rounding.cuh`): in 16 bits.

use super::buffer::{Activations, Linear};
use super::driver::{Address, Arg, Driver};
use super::stream::Stream;
use super::weight::Form;

/// Threads of a block of `round_rows` (`kernels/cuda/gemm.cu`).
const THREADS: usize = 128;

/// To what they are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Rounding {
    /// f16, each row times a power of two.
    F16,
    /// bf16.
    BF16,
}

impl Rounding {
    /// For a product with weights of such a form, if tensor cores take it.
    pub(super) const fn of(form: Form) -> Option<Self> {
        match form {
            Form::F32 => None,
            Form::BF16 => Some(Self::BF16),
            Form::F16 | Form::Nibbles | Form::Bytes | Form::FineBytes | Form::F8 => Some(Self::F16),
        }
    }

    /// For all parts of a weight alike: then nobody else needs to see the activations.
    pub(super) fn of_all<D: Driver>(weight: &Linear<D>) -> Option<Self> {
        let mut roundings = weight.parts.iter().map(|part| Self::of(part.form));
        let first = roundings.next().flatten();
        first.filter(|_| roundings.all(|other| other == first))
    }

    /// Of two kernels, the one that does it.
    pub(super) fn choose(self, [f16, bf16]: [&'static str; 2]) -> &'static str {
        match self {
            Self::F16 => f16,
            Self::BF16 => bf16,
        }
    }
}

/// Rows of activations rounded, in memory that the next rows take: the kernel that makes them is enqueued when one has
/// this, and products with them before anybody has another.
#[derive(Debug)]
pub(super) struct Rounded {
    pub(super) rounding: Rounding,
    /// `[rows, cols]`, rows filled up to a multiple of eight elements.
    pub(super) values: Address,
    /// What each row of a product is to be multiplied by, of f16.
    pub(super) scales: Address,
    /// Those that are computed.
    pub(super) rows: usize,
    pub(super) cols: usize,
}

impl Rounded {
    /// Where they go in memory that has room for them: see [`Rounded::bytes`].
    pub(super) fn at(start: Address, rounding: Rounding, rows: usize, cols: usize) -> Self {
        let scales = if rounding == Rounding::F16 { start } else { Address::NULL };
        Self { rounding, values: start.offset(Self::scales_bytes(rows)), scales, rows, cols }
    }

    /// Bytes they take.
    pub(super) fn bytes(rows: usize, cols: usize) -> usize {
        Self::scales_bytes(rows) + rows * cols.next_multiple_of(8) * size_of::<u16>()
    }

    /// Scales come first; what follows them is aligned.
    fn scales_bytes(rows: usize) -> usize {
        (rows * size_of::<f32>()).next_multiple_of(16)
    }

    /// Kernels take both.
    pub(super) fn args(&self) -> [Arg; 2] {
        [self.values.into(), self.scales.into()]
    }

    /// Has `x` rounded, by a kernel of its own.
    pub(super) fn round<D: Driver>(&self, stream: &Stream<D>, x: &Activations<D>) {
        let [values, scales] = self.args();
        let args = [x.address().into(), values, scales, x.cols.into()];
        let kernel = self.rounding.choose(["round_rows_f16", "round_rows_bf16"]);
        stream.launch(kernel, [self.rows, 1, 1], THREADS, &args);
    }
}
