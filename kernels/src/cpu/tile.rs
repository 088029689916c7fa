//! The float micro-kernel: a few rows times sixteen columns, summed over `k` in order, one accumulator an output.
//! Weight products and attention share it.

use super::isa::Isa;

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
pub(crate) struct Half(u16);

/// The bits of a bf16.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub(crate) struct Brain(u16);

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

impl Element for Half {
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

impl Element for Brain {
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
