//! The float micro-kernel: a few rows times sixteen columns, summed over `k` in order, one accumulator an output.
//! Weight products and attention share it.

use float8::F8E4M3;

use super::isa::{Isa, LANES};
use super::pack::{F8_BLOCK, F8_VALUES};

/// Element type of the matrix a tile reads.
pub(crate) trait Element: Copy + Send + Sync + 'static {
    /// Reads sixteen of them as f32.
    ///
    /// # Safety
    /// Sixteen are readable at `p`.
    unsafe fn load<I: Isa>(isa: I, p: *const Self) -> I::F;
    /// Reads one.
    ///
    /// # Safety
    /// One is readable at `p`.
    unsafe fn get(p: *const Self) -> f32;
}

/// The bits of an f16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct F16(u16);

/// The bits of a bf16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct BF16(u16);

/// The bits of an E4M3: see [`KvDType::F8`](crate::KvDType::F8).
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct F8(u8);

impl F8 {
    /// The nearest to `x`, ties to even. Without a branch, so that loops over it become vector instructions.
    #[inline(always)]
    pub(crate) fn bits_of(x: f32) -> u8 {
        const MAX: u32 = 448f32.to_bits();
        /// The smallest that has all bits of its mantissa.
        const NORMAL_MIN: u32 = (1.0f32 / 64.0).to_bits();
        /// Numbers from here to the next power of two are as far apart as the smallest of all.
        const COARSE: f32 = 16384.0;
        let (sign, magnitude) = ((x.to_bits() >> 24) as u8 & 0x80, x.to_bits() & 0x7fff_ffff);
        // The bits of positive numbers are in the numbers' order.
        let clamped = magnitude.min(MAX);
        let normal = ((clamped + 0x7_ffff + (clamped >> 20 & 1)) >> 20).wrapping_sub((127 - 7) << 3);
        let small = (f32::from_bits(clamped) + COARSE).to_bits() - COARSE.to_bits();
        let bits = if clamped < NORMAL_MIN { small } else { normal };
        sign | if magnitude > f32::INFINITY.to_bits() { 0x7f } else { bits as u8 }
    }
}

impl Element for f32 {
    #[inline(always)]
    unsafe fn load<I: Isa>(isa: I, p: *const Self) -> I::F {
        // SAFETY: as the trait says.
        unsafe { isa.load(p) }
    }
    #[inline(always)]
    unsafe fn get(p: *const Self) -> f32 {
        // SAFETY: as the trait says.
        unsafe { *p }
    }
}

impl Element for F16 {
    #[inline(always)]
    unsafe fn load<I: Isa>(isa: I, p: *const Self) -> I::F {
        // SAFETY: as the trait says.
        unsafe { isa.load_f16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn get(p: *const Self) -> f32 {
        // SAFETY: as the trait says.
        half::f16::from_bits(unsafe { (*p).0 }).to_f32()
    }
}

impl Element for BF16 {
    #[inline(always)]
    unsafe fn load<I: Isa>(isa: I, p: *const Self) -> I::F {
        // SAFETY: as the trait says.
        unsafe { isa.load_bf16(p.cast()) }
    }
    #[inline(always)]
    unsafe fn get(p: *const Self) -> f32 {
        // SAFETY: as the trait says.
        half::bf16::from_bits(unsafe { (*p).0 }).to_f32()
    }
}

impl Element for F8 {
    #[inline(always)]
    unsafe fn load<I: Isa>(isa: I, p: *const Self) -> I::F {
        // SAFETY: as the trait says.
        unsafe { isa.load_f8(p.cast()) }
    }
    #[inline(always)]
    unsafe fn get(p: *const Self) -> f32 {
        // SAFETY: as the trait says.
        F8E4M3::from_bits(unsafe { (*p).0 }).to_f32()
    }
}

/// `acc[r][c] += Σ_k a[r × a_stride + k] × w[k × w_stride + c × c_stride ..][..16]`, `k` ascending, fused.
///
/// # Safety
/// All those elements are readable.
#[inline(always)]
#[allow(clippy::too_many_arguments, reason = "two strided matrices")]
pub(crate) unsafe fn tile<I: Isa, E: Element, const R: usize, const C: usize>(
    isa: I,
    a: *const f32,
    a_stride: usize,
    w: *const E,
    w_stride: usize,
    c_stride: usize,
    depth: usize,
    acc: &mut [[I::F; C]; R],
) {
    let mut sums = *acc;
    for k in 0..depth {
        // SAFETY: as the function says.
        unsafe {
            let w = w.add(k * w_stride);
            let mut columns = [isa.zero(); C];
            for (c, column) in columns.iter_mut().enumerate() {
                *column = E::load(isa, w.add(c * c_stride));
            }
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = isa.splat(*a.add(r * a_stride + k));
                for (column, sum) in columns.iter().zip(sums) {
                    *sum = isa.fma(a, *column, *sum);
                }
            }
        }
    }
    *acc = sums;
}

/// As [`tile`], for bf16 in pairs of `k`: `w[k / 2 × 32 + c × c_stride ..]` holds sixteen columns of two `k` each.
///
/// # Safety
/// All those elements are readable, the second of the last pair included.
#[inline(always)]
pub(crate) unsafe fn tile_pairs<I: Isa, const R: usize, const C: usize>(
    isa: I,
    a: *const f32,
    a_stride: usize,
    w: *const u16,
    c_stride: usize,
    depth: usize,
    acc: &mut [[I::F; C]; R],
) {
    let mut sums = *acc;
    for pair in 0..depth.div_ceil(2) {
        // SAFETY: as the function says.
        unsafe {
            let w = w.add(pair * 32);
            let mut columns = [(isa.zero(), isa.zero()); C];
            for (c, column) in columns.iter_mut().enumerate() {
                *column = isa.load_bf16_pairs(w.add(c * c_stride));
            }
            let both = 2 * pair + 1 < depth;
            for (r, sums) in sums.iter_mut().enumerate() {
                let a = a.add(r * a_stride + 2 * pair);
                let (first, second) = (isa.splat(*a), isa.splat(if both { *a.add(1) } else { 0.0 }));
                for (column, sum) in columns.iter().zip(sums) {
                    *sum = isa.fma(first, column.0, *sum);
                    if both {
                        *sum = isa.fma(second, column.1, *sum);
                    }
                }
            }
        }
    }
    *acc = sums;
}

/// As [`tile`], for E4M3 in blocks of `k` with scales ([`Format::F8`](super::pack::Format::F8)): `w` is where a block
/// begins.
///
/// # Safety
/// All those elements are readable.
#[inline(always)]
pub(crate) unsafe fn tile_f8<I: Isa, const R: usize, const C: usize>(
    isa: I,
    a: *const f32,
    a_stride: usize,
    w: *const u8,
    c_stride: usize,
    depth: usize,
    acc: &mut [[I::F; C]; R],
) {
    let mut sums = *acc;
    for start in (0..depth).step_by(F8_BLOCK) {
        // SAFETY: as the function says.
        unsafe {
            let w = w.add(start / F8_BLOCK * (F8_VALUES + F8_BLOCK * LANES));
            let mut scales = [isa.zero(); C];
            for (c, scale) in scales.iter_mut().enumerate() {
                *scale = isa.load(w.add(c * c_stride).cast());
            }
            for k in 0..F8_BLOCK.min(depth - start) {
                let w = w.add(F8_VALUES + k * LANES);
                let mut columns = scales;
                for (c, column) in columns.iter_mut().enumerate() {
                    *column = isa.mul(isa.load_f8_small(w.add(c * c_stride)), *column);
                }
                for (r, sums) in sums.iter_mut().enumerate() {
                    let a = isa.splat(*a.add(r * a_stride + start + k));
                    for (column, sum) in columns.iter().zip(sums) {
                        *sum = isa.fma(a, *column, *sum);
                    }
                }
            }
        }
    }
    *acc = sums;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_rounds_to_the_nearest_of_eight_bits() {
        let check = |x: f32| {
            let (ours, want) = (F8::bits_of(x), F8E4M3::from_f32(x).to_bits());
            // Which NaN a NaN becomes is nobody's business.
            assert!(ours == want || ours | want | 0x80 == 0xff && x.is_nan(), "{x:e}: {ours:#x}, should be {want:#x}");
        };
        for bits in (0..=u32::MAX).step_by(9973) {
            check(f32::from_bits(bits));
        }
        for bits in 0..=255 {
            // Each, the middles between two, and their neighbours.
            let (x, next) = (F8E4M3::from_bits(bits).to_f32(), F8E4M3::from_bits(bits.wrapping_add(1)).to_f32());
            for near in [x, (x + next) / 2.0].into_iter().flat_map(|x| [x.next_down(), x, x.next_up()]) {
                check(near);
            }
        }
        for special in [f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 464.0, 1e30, -1e-30] {
            check(special);
        }
    }
}
