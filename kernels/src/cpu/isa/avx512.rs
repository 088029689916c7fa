use std::arch::x86_64::*;

use super::{
    F8_UNIT, Isa, Kernel, PEAK_UNIT,
    avx2::{f16_of_f8, f16_of_finite_f8},
};
use crate::dtype::IQ4_VALUES;

/// AVX-512 with VNNI: sixteen lanes are one register, and `vpdpbusd` multiplies unsigned weights with signed
/// activations. Signed weights have 128 added (by flipping their top bit), which is taken off again as `128 × Σ
/// activations`.
#[derive(Clone, Copy)]
pub(super) struct Avx512(());

/// Runs `kernel` with these instructions.
///
/// # Safety
/// The processor has AVX-512 F, BW, VL, DQ and VNNI, and AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx512(()));
}

/// The bits that [`PEAK_UNIT`] shifts by.
const PEAK_SHIFT: u32 = PEAK_UNIT.trailing_zeros();

/// An intrinsic without memory operands.
macro_rules! pure {
    ($call:expr) => {
        // SAFETY: an `Avx512` exists only where the instructions do.
        unsafe { $call }
    };
}

impl Isa for Avx512 {
    type F = __m512;
    type W = __m512i;
    type I = __m512i;
    const ROWS_MAX: usize = 12;
    const SUMS_MAX: usize = 8;
    const GROUPS_MAX: usize = 2;
    const PEAK_FIRST: bool = true;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        pure!(_mm512_set1_ps(x))
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: __m512) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe {
            let wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements; who has AVX-512 has AVX2.
        unsafe {
            let halves = f16_of_f8(_mm_loadu_si128(p.cast()));
            _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(F8_UNIT))
        }
    }
    #[inline(always)]
    unsafe fn load_f8_small(self, p: *const u8) -> __m512 {
        // SAFETY: the caller vouches for sixteen elements; who has AVX-512 has AVX2.
        unsafe { _mm512_cvtph_ps(f16_of_finite_f8(_mm_loadu_si128(p.cast()))) }
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (__m512, __m512) {
        // SAFETY: the caller vouches for 32 elements.
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            (_mm512_castsi512_ps(_mm512_slli_epi32::<16>(both)), _mm512_castsi512_ps(_mm512_and_si512(both, high)))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: __m512) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { _mm256_storeu_si256(p.cast(), _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x)) }
    }
    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_add_ps(a, b))
    }
    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_sub_ps(a, b))
    }
    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_mul_ps(a, b))
    }
    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_div_ps(a, b))
    }
    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        pure!(_mm512_fmadd_ps(a, b, c))
    }
    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_max_ps(a, b))
    }
    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        pure!(_mm512_min_ps(a, b))
    }
    #[inline(always)]
    fn abs(self, a: __m512) -> __m512 {
        pure!(_mm512_abs_ps(a))
    }
    #[inline(always)]
    fn round(self, a: __m512) -> __m512 {
        pure!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn pow2(self, n: __m512) -> __m512 {
        // SAFETY: an `Avx512` exists only where the instructions do.
        unsafe {
            let exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
            _mm512_castsi512_ps(_mm512_slli_epi32::<23>(exponent))
        }
    }
    #[inline(always)]
    fn zero_if_lt(self, x: __m512, a: __m512, b: __m512) -> __m512 {
        // Not-less-than, unordered included: a NaN keeps `x`.
        pure!(_mm512_maskz_mov_ps(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b), x))
    }
    #[inline(always)]
    fn reduce_add(self, a: __m512) -> f32 {
        // SAFETY: an `Avx512` exists only where the instructions do.
        unsafe {
            let eight = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps::<1>(a));
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: __m512) -> f32 {
        pure!(_mm512_reduce_max_ps(a))
    }
    #[inline(always)]
    fn max_of_fours(self, a: __m512) -> __m512 {
        pure!({
            let twos = _mm512_max_ps(a, _mm512_permute_ps::<0b01_00_11_10>(a));
            _mm512_max_ps(twos, _mm512_permute_ps::<0b10_11_00_01>(twos))
        })
    }
    #[inline(always)]
    fn mask_not_lt(self, a: __m512, b: __m512) -> u32 {
        pure!(u32::from(_mm512_cmp_ps_mask::<_CMP_NLT_UQ>(a, b)))
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, x: __m512) {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe { _mm_storeu_si128(p.cast(), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(x))) }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn int_zero(self) -> __m512i {
        pure!(_mm512_setzero_si512())
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> (__m512i, __m512i) {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe {
            let both = _mm512_loadu_si512(p.cast());
            let mask = _mm512_set1_epi8(15);
            (_mm512_and_si512(both, mask), _mm512_and_si512(_mm512_srli_epi16::<4>(both), mask))
        }
    }
    #[inline(always)]
    unsafe fn load_u4_half(self, p: *const u8, shift: u32) -> __m512i {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe {
            let both = _mm512_srl_epi16(_mm512_loadu_si512(p.cast()), _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(both, _mm512_set1_epi8(15))
        }
    }
    #[inline(always)]
    fn raise(self, w: __m512i, upper: __m512i, shift: u32, mask: u8) -> __m512i {
        pure!({
            let shifted = _mm512_srl_epi16(upper, _mm_cvtsi32_si128(shift as i32));
            let bits = _mm512_and_si512(shifted, _mm512_set1_epi8(mask as i8));
            _mm512_or_si512(w, _mm512_slli_epi16::<4>(bits))
        })
    }
    #[inline(always)]
    fn look_up(self, w: __m512i) -> __m512i {
        // With 128 added, as `load_i8` returns them.
        const TABLE: [u8; 16] = {
            let mut table = [0; 16];
            let mut i = 0;
            while i < 16 {
                table[i] = IQ4_VALUES[i] as u8 ^ 0x80;
                i += 1;
            }
            table
        };
        // SAFETY: the table has sixteen bytes, and an `Avx512` exists only where the instructions do.
        unsafe { _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(TABLE.as_ptr().cast())), w) }
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> __m512i {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_u8(self, p: *mut u8, w: __m512i) {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { _mm512_storeu_si512(p.cast(), w) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> __m512i {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { _mm512_xor_si512(_mm512_loadu_si512(p.cast()), _mm512_set1_epi8(-128)) }
    }
    #[inline(always)]
    unsafe fn store_signed(self, p: *mut u8, w: __m512i) {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { self.store_u8(p, w) }
    }
    #[inline(always)]
    unsafe fn load_signed(self, p: *const u8) -> __m512i {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { self.load_u8(p) }
    }
    #[inline(always)]
    unsafe fn dot_u4(self, sum: __m512i, w: __m512i, a: *const i8) -> __m512i {
        // SAFETY: the caller vouches for four activations.
        unsafe { _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(a.cast::<i32>().read_unaligned())) }
    }
    #[inline(always)]
    unsafe fn dot_u6(self, sum: __m512i, w: (__m512i, __m512i), a: *const i8) -> __m512i {
        // SAFETY: the caller vouches for eight activations.
        unsafe { self.dot_u4(self.dot_u4(sum, w.0, a), w.1, a.add(4)) }
    }
    #[inline(always)]
    unsafe fn dot_i8(self, sum: __m512i, w: __m512i, a: *const i8) -> __m512i {
        // SAFETY: the caller vouches for four activations.
        unsafe { self.dot_u4(sum, w, a) }
    }
    #[inline(always)]
    fn widen_u4(self, sum: __m512i) -> __m512i {
        sum
    }
    #[inline(always)]
    unsafe fn peak_u6(self, sum: __m512i, w: __m512i, high: *const i8) -> __m512i {
        // SAFETY: the caller vouches for four activations.
        unsafe { _mm512_add_epi32(sum, _mm512_slli_epi32::<PEAK_SHIFT>(self.dot_u4(self.int_zero(), w, high))) }
    }
    #[inline(always)]
    unsafe fn peak_i8(self, sum: __m512i, w: __m512i, high: *const i8, less: i32) -> __m512i {
        // What is to be taken off is as many times `less` as a unit of the peak counts.
        const { assert!(PEAK_UNIT == 128) };
        // SAFETY: the caller vouches for four activations.
        unsafe {
            let peak = self.dot_u4(_mm512_set1_epi32(less), w, high);
            _mm512_add_epi32(sum, _mm512_slli_epi32::<PEAK_SHIFT>(peak))
        }
    }
    #[inline(always)]
    fn int_add(self, sum: __m512i, x: i32) -> __m512i {
        pure!(_mm512_add_epi32(sum, _mm512_set1_epi32(x)))
    }
    #[inline(always)]
    fn int_to_f32(self, sum: __m512i) -> __m512 {
        pure!(_mm512_cvtepi32_ps(sum))
    }
}
