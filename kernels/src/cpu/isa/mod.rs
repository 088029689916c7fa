//! The vector instructions the kernels are written in.
//!
//! A kernel is generic over [`Isa`] and sees sixteen f32 lanes, whatever the machine has: one AVX-512 register, two
//! AVX2 registers or an array. [`Level::run`] picks the instance once a call, inside a function compiled for those
//! instructions (the pattern is that of the `pulp` crate). Every operation rounds the same way in every instance, so
//! all give the same bits.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod portable;

use super::quant::PEAK_UNIT;

/// Lanes of a vector, and columns of a packed weight group.
pub(crate) const LANES: usize = 16;

/// How much larger an E4M3 is than the f16 with its exponent's and mantissa's bits in the same places, whose bias is
/// larger.
pub(crate) const F8_UNIT: f32 = 256.0;

/// Sixteen-lane arithmetic. A value of the type is proof that the processor has the instructions.
///
/// Methods that take pointers read or write `LANES` elements unless they say otherwise, without alignment.
pub(crate) trait Isa: Copy + Send + Sync + 'static {
    /// Sixteen f32.
    type F: Copy;
    /// Weights of sixteen columns by four consecutive `k`, one byte each.
    type W: Copy;
    /// Integer sums of sixteen columns, within one block.
    type I: Copy;
    /// Rows of the tallest tiles: as many as the vector registers hold sums for. Plain Rust has no use for tiles, and
    /// is compiled for single rows alone.
    const ROWS_MAX: usize;
    /// The most f32 sums of a tile, rows times groups, that fit into registers beside the integer sums of a block and its
    /// weights.
    const SUMS_MAX: usize;
    /// Groups of columns whose weights meet a tile's rows together, so that each activation is read once for all.
    const GROUPS_MAX: usize;
    /// Whether a block's integer sums begin with what peaks add: cheaper where [`Isa::widen_u4`] does nothing and
    /// registers are many.
    const PEAK_FIRST: bool;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::F;
    /// Reads sixteen f32.
    unsafe fn load(self, p: *const f32) -> Self::F;
    /// Writes sixteen f32.
    unsafe fn store(self, p: *mut f32, x: Self::F);
    /// Reads sixteen f16.
    unsafe fn load_f16(self, p: *const u16) -> Self::F;
    /// Reads sixteen bf16.
    unsafe fn load_bf16(self, p: *const u16) -> Self::F;
    /// Reads sixteen E4M3.
    unsafe fn load_f8(self, p: *const u8) -> Self::F;
    /// Reads sixteen E4M3, none of them NaN, each divided by [`F8_UNIT`], exactly.
    unsafe fn load_f8_small(self, p: *const u8) -> Self::F;
    /// Reads sixteen pairs of bf16: the first of each pair, and the second.
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::F, Self::F);
    /// Writes sixteen f16, rounded to nearest even.
    unsafe fn store_f16(self, p: *mut u16, x: Self::F);
    /// `a + b`.
    fn add(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a - b`.
    fn sub(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b`.
    fn mul(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a / b`.
    fn div(self, a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// `if a > b { a } else { b }`: a NaN in either gives `b`.
    fn max(self, a: Self::F, b: Self::F) -> Self::F;
    /// `if a < b { a } else { b }`.
    fn min(self, a: Self::F, b: Self::F) -> Self::F;
    /// Absolute value.
    fn abs(self, a: Self::F) -> Self::F;
    /// To the nearest integer, ties to even.
    fn round(self, a: Self::F) -> Self::F;
    /// `2^n` for integral `n` in `-126..=127`.
    fn pow2(self, n: Self::F) -> Self::F;
    /// Zero where `a < b`, `x` elsewhere.
    fn zero_if_lt(self, x: Self::F, a: Self::F, b: Self::F) -> Self::F;
    /// Sum of the lanes: lane `i` with `i + 8`, then `+ 4`, `+ 2`, `+ 1`.
    fn reduce_add(self, a: Self::F) -> f32;
    /// Greatest lane.
    fn reduce_max(self, a: Self::F) -> f32;
    /// In each lane, the greatest of its four: of lanes `4 i` to `4 i + 3`.
    fn max_of_fours(self, a: Self::F) -> Self::F;
    /// A bit for each lane that is not `a < b`.
    fn mask_not_lt(self, a: Self::F, b: Self::F) -> u32;
    /// Rounds sixteen values within ±127 to bytes and writes them.
    unsafe fn store_i8(self, p: *mut i8, x: Self::F);

    /// All sums zero.
    fn int_zero(self) -> Self::I;
    /// Reads a packed 4-bit group of 64 bytes: the weights of the low nibbles, then those of the high ones.
    unsafe fn load_u4(self, p: *const u8) -> (Self::W, Self::W);
    /// Reads one of [`Isa::load_u4`]'s two: `shift` is 0 for that of the low nibbles, 4 for that of the high ones.
    unsafe fn load_u4_half(self, p: *const u8, shift: u32) -> Self::W;
    /// Adds to 4-bit weights what the bytes of `upper`, shifted right by `shift` and masked, have beyond the fourth bit.
    fn raise(self, w: Self::W, upper: Self::W, shift: u32, mask: u8) -> Self::W;
    /// The signed weights that 4-bit ones stand for in IQ4_NL and IQ4_XS.
    fn look_up(self, w: Self::W) -> Self::W;
    /// Reads unsigned weights, 64 bytes.
    unsafe fn load_u8(self, p: *const u8) -> Self::W;
    /// Writes what [`Isa::load_u8`] reads.
    unsafe fn store_u8(self, p: *mut u8, w: Self::W);
    /// Reads signed weights, 64 bytes.
    unsafe fn load_i8(self, p: *const u8) -> Self::W;
    /// Writes signed weights as this has them in registers, 64 bytes.
    unsafe fn store_signed(self, p: *mut u8, w: Self::W);
    /// Reads what [`Isa::store_signed`] wrote.
    unsafe fn load_signed(self, p: *const u8) -> Self::W;
    /// Adds the products of 4-bit weights with four activations at `a`. At most eight such additions make a block.
    unsafe fn dot_u4(self, sum: Self::I, w: Self::W, a: *const i8) -> Self::I;
    /// Adds the products of weights of at most 6 bits with eight activations at `a`, four for each of the two.
    unsafe fn dot_u6(self, sum: Self::I, w: (Self::W, Self::W), a: *const i8) -> Self::I;
    /// Adds the products of signed 8-bit weights with four activations (none of them -128) at `a`.
    unsafe fn dot_i8(self, sum: Self::I, w: Self::W, a: *const i8) -> Self::I;
    /// The sums made by [`Isa::dot_u4`], in the form of all others.
    fn widen_u4(self, sum: Self::I) -> Self::I;
    /// Adds [`PEAK_UNIT`] times the products of weights of at most 6 bits with four activations at `high`.
    unsafe fn peak_u6(self, sum: Self::I, w: Self::W, high: *const i8) -> Self::I;
    /// Adds [`PEAK_UNIT`] times the products of signed 8-bit weights with four activations (none of them -128) at
    /// `high`. `less` is the sum of all activations that go in, those of peaks times [`PEAK_UNIT`], negated: for
    /// instruction sets whose products want unsigned weights.
    unsafe fn peak_i8(self, sum: Self::I, w: Self::W, high: *const i8, less: i32) -> Self::I;
    /// Adds `x` to each sum.
    fn int_add(self, sum: Self::I, x: i32) -> Self::I;
    /// The sums as f32.
    fn int_to_f32(self, sum: Self::I) -> Self::F;

    /// Asks for the cache line at `p`, which may be anywhere.
    #[inline(always)]
    fn prefetch(self, _p: *const u8) {}

    /// All lanes zero.
    #[inline(always)]
    fn zero(self) -> Self::F {
        self.splat(0.0)
    }

    /// Reads `n <= 16` f32; the other lanes are zero.
    ///
    /// # Safety
    /// `n` values are readable at `p`.
    #[inline(always)]
    unsafe fn load_partial(self, p: *const f32, n: usize) -> Self::F {
        debug_assert!(n <= LANES);
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the caller vouches for `n` values; `lanes` holds sixteen.
        unsafe {
            std::ptr::copy_nonoverlapping(p, lanes.as_mut_ptr(), n);
            self.load(lanes.as_ptr())
        }
    }

    /// Writes the first `n <= 16` lanes.
    ///
    /// # Safety
    /// `n` values are writable at `p`.
    #[inline(always)]
    unsafe fn store_partial(self, p: *mut f32, x: Self::F, n: usize) {
        debug_assert!(n <= LANES);
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the caller vouches for `n` values; `lanes` holds sixteen.
        unsafe {
            self.store(lanes.as_mut_ptr(), x);
            std::ptr::copy_nonoverlapping(lanes.as_ptr(), p, n);
        }
    }

    /// `e^x`, relative error below 2e-7; zero below -87, where the result would be subnormal. Above 88 it saturates.
    ///
    /// Cody and Waite's reduction to `|r| <= ln(2)/2` and the polynomial of Cephes' `expf`.
    #[inline(always)]
    fn exp(self, x: Self::F) -> Self::F {
        let floor = self.splat(-87.0);
        let clamped = self.min(self.splat(88.0), self.max(floor, x));
        let n = self.round(self.mul(clamped, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-0.693_359_4), clamped);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(1.987_569_1e-4);
        p = self.fma(p, r, self.splat(1.398_199_9e-3));
        p = self.fma(p, r, self.splat(8.333_452e-3));
        p = self.fma(p, r, self.splat(4.166_579_6e-2));
        p = self.fma(p, r, self.splat(1.666_666_5e-1));
        p = self.fma(p, r, self.splat(0.5));
        let y = self.fma(p, self.mul(r, r), self.add(r, self.splat(1.0)));
        self.zero_if_lt(self.mul(y, self.pow2(n)), x, floor)
    }
}

/// A kernel, to be compiled once for each instruction set. `run` must be `#[inline(always)]`, and so must all it calls.
pub(crate) trait Kernel {
    /// Does the work.
    fn run<I: Isa>(self, isa: I);
}

/// Instruction sets to choose from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    /// Plain Rust: any machine.
    Portable,
    /// AVX2, FMA and F16C: x86-64 since 2013.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI: Ice Lake and Zen 4 onwards.
    Avx512,
}

impl Level {
    /// The widest this processor has.
    pub fn detect() -> Self {
        [Self::Avx512, Self::Avx2].into_iter().find(|level| level.is_available()).unwrap_or(Self::Portable)
    }

    /// Whether this processor can run it.
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.is_available()
                    && is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512vnni")
            }
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx2 | Self::Avx512 => false,
        }
    }
}

/// A level this processor was found to have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Dispatch(Level);

impl Dispatch {
    /// `None` if this processor cannot run `level`.
    pub(crate) fn new(level: Level) -> Option<Self> {
        level.is_available().then_some(Self(level))
    }

    /// Runs `kernel` with this level's instructions.
    #[inline]
    pub(crate) fn run<K: Kernel>(self, kernel: K) {
        match self.0 {
            Level::Portable => kernel.run(portable::Portable),
            // SAFETY: `new` found the instructions.
            #[cfg(target_arch = "x86_64")]
            Level::Avx2 => unsafe { avx2::run(kernel) },
            // SAFETY: `new` found the instructions.
            #[cfg(target_arch = "x86_64")]
            Level::Avx512 => unsafe { avx512::run(kernel) },
            #[cfg(not(target_arch = "x86_64"))]
            Level::Avx2 | Level::Avx512 => unreachable!("never available here"),
        }
    }
}

#[cfg(test)]
mod tests;
