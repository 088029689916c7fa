use std::arch::x86_64::*;

use super::{F8_UNIT, Isa, Kernel, PEAK_UNIT};
use crate::dtype::IQ4_VALUES;

/// AVX2, FMA and F16C: sixteen lanes are two registers.
///
/// Integer products go through `vpmaddubsw`, which sums pairs to 16 bits. 4-bit weights: 8 × 2 × 15 × 127 fits, so a
/// whole block is summed in 16 bits. 6-bit weights: 2 × 2 × 63 × 127 fits, so two pairs are summed and then widened.
/// 8-bit weights: the activation takes the weight's sign, and each pair (at most 2 × 128 × 127) is widened at once. All
/// are exact.
#[derive(Clone, Copy)]
pub(super) struct Avx2(());

/// Runs `kernel` with these instructions.
///
/// # Safety
/// The processor has AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn run<K: Kernel>(kernel: K) {
    kernel.run(Avx2(()));
}

/// The same expression of a half, for both: closures would be functions of their own, compiled without the
/// instructions.
macro_rules! both {
    ($pair:expr, |$half:ident| $body:expr) => {{
        let pair = $pair;
        // SAFETY: an `Avx2` exists only where the instructions do.
        unsafe {
            [
                {
                    let $half = pair[0];
                    $body
                },
                {
                    let $half = pair[1];
                    $body
                },
            ]
        }
    }};
}

/// Both halves through one intrinsic.
macro_rules! lanewise {
    ($intrinsic:ident, $($operand:expr),+) => {
        // SAFETY: an `Avx2` exists only where the instructions do.
        unsafe { [$intrinsic($($operand[0]),+), $intrinsic($($operand[1]),+)] }
    };
}

/// Sixteen E4M3 as f16, each divided by [`F8_UNIT`], exactly: the bits of exponent and mantissa, a place where f16 has
/// them, mean the same but for the exponent's bias. The one NaN there is becomes one.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub(super) unsafe fn f16_of_f8(bits: __m128i) -> __m256i {
    // SAFETY: as the function says.
    unsafe {
        let wide = _mm256_cvtepu8_epi16(bits);
        let sign = _mm256_slli_epi16::<8>(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)));
        let magnitude = _mm256_slli_epi16::<7>(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)));
        let is_nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x7f << 7));
        let nan = _mm256_and_si256(is_nan, _mm256_set1_epi16(0x7e00));
        _mm256_or_si256(_mm256_or_si256(sign, magnitude), nan)
    }
}

/// The same for none that is NaN.
///
/// # Safety
/// The processor has AVX2.
#[inline(always)]
pub(super) unsafe fn f16_of_finite_f8(bits: __m128i) -> __m256i {
    // SAFETY: as the function says.
    unsafe {
        // The sign is in all upper bits now; the second of them has to go.
        let wide = _mm256_slli_epi16::<7>(_mm256_cvtepi8_epi16(bits));
        _mm256_and_si256(wide, _mm256_set1_epi16(0xbfffu16 as i16))
    }
}

impl Isa for Avx2 {
    type F = [__m256; 2];
    type W = [__m256i; 2];
    type I = [__m256i; 2];
    const ROWS_MAX: usize = 6;
    const SUMS_MAX: usize = 1;
    const GROUPS_MAX: usize = 1;
    const PEAK_FIRST: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Self::F {
        // SAFETY: an `Avx2` exists only where the instructions do.
        [unsafe { _mm256_set1_ps(x) }; 2]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Self::F {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Self::F) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe {
            _mm256_storeu_ps(p, x[0]);
            _mm256_storeu_ps(p.add(8), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Self::F {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe {
            let p = p.cast::<__m128i>();
            [_mm256_cvtph_ps(_mm_loadu_si128(p)), _mm256_cvtph_ps(_mm_loadu_si128(p.add(1)))]
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Self::F {
        let p = p.cast::<__m128i>();
        // SAFETY: the caller vouches for sixteen elements.
        let halves = unsafe { [_mm_loadu_si128(p), _mm_loadu_si128(p.add(1))] };
        both!(halves, |h| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(h))))
    }
    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> Self::F {
        // SAFETY: the caller vouches for sixteen elements.
        let halves = unsafe { f16_of_f8(_mm_loadu_si128(p.cast())) };
        // SAFETY: an `Avx2` exists only where the instructions do.
        let halves = unsafe { [_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves)] };
        both!(halves, |h| _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(F8_UNIT)))
    }
    #[inline(always)]
    unsafe fn load_f8_small(self, p: *const u8) -> Self::F {
        // SAFETY: the caller vouches for sixteen elements.
        let halves = unsafe { f16_of_finite_f8(_mm_loadu_si128(p.cast())) };
        // SAFETY: an `Avx2` exists only where the instructions do.
        let halves = unsafe { [_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves)] };
        both!(halves, |h| _mm256_cvtph_ps(h))
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Self::F, Self::F) {
        // SAFETY: the caller vouches for 32 elements.
        unsafe {
            let p = p.cast::<__m256i>();
            let (a, b) = (_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1)));
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            (
                [_mm256_castsi256_ps(_mm256_slli_epi32::<16>(a)), _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b))],
                [_mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high))],
            )
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: Self::F) {
        // SAFETY: the caller vouches for sixteen elements.
        unsafe {
            let p = p.cast::<__m128i>();
            _mm_storeu_si128(p, _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[0]));
            _mm_storeu_si128(p.add(1), _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(x[1]));
        }
    }
    #[inline(always)]
    fn add(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(_mm256_add_ps, a, b)
    }
    #[inline(always)]
    fn sub(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(_mm256_sub_ps, a, b)
    }
    #[inline(always)]
    fn mul(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(_mm256_mul_ps, a, b)
    }
    #[inline(always)]
    fn div(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(_mm256_div_ps, a, b)
    }
    #[inline(always)]
    fn fma(self, a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        lanewise!(_mm256_fmadd_ps, a, b, c)
    }
    #[inline(always)]
    fn max(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(_mm256_max_ps, a, b)
    }
    #[inline(always)]
    fn min(self, a: Self::F, b: Self::F) -> Self::F {
        lanewise!(_mm256_min_ps, a, b)
    }
    #[inline(always)]
    fn abs(self, a: Self::F) -> Self::F {
        let sign = self.splat(-0.0);
        lanewise!(_mm256_andnot_ps, sign, a)
    }
    #[inline(always)]
    fn round(self, a: Self::F) -> Self::F {
        both!(a, |a| _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a))
    }
    #[inline(always)]
    fn pow2(self, n: Self::F) -> Self::F {
        both!(n, |n| {
            let exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
            _mm256_castsi256_ps(_mm256_slli_epi32::<23>(exponent))
        })
    }
    #[inline(always)]
    fn zero_if_lt(self, x: Self::F, a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: an `Avx2` exists only where the instructions do.
        unsafe {
            [
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a[0], b[0]), x[0]),
                _mm256_andnot_ps(_mm256_cmp_ps::<_CMP_LT_OQ>(a[1], b[1]), x[1]),
            ]
        }
    }
    #[inline(always)]
    fn reduce_add(self, a: Self::F) -> f32 {
        // SAFETY: an `Avx2` exists only where the instructions do.
        unsafe {
            let eight = _mm256_add_ps(a[0], a[1]);
            let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn reduce_max(self, a: Self::F) -> f32 {
        // SAFETY: an `Avx2` exists only where the instructions do.
        unsafe {
            let eight = _mm256_max_ps(a[0], a[1]);
            let four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)))
        }
    }
    #[inline(always)]
    fn max_of_fours(self, a: Self::F) -> Self::F {
        let twos = both!(a, |a| _mm256_max_ps(a, _mm256_permute_ps::<0b01_00_11_10>(a)));
        both!(twos, |a| _mm256_max_ps(a, _mm256_permute_ps::<0b10_11_00_01>(a)))
    }
    #[inline(always)]
    fn mask_not_lt(self, a: Self::F, b: Self::F) -> u32 {
        // SAFETY: an `Avx2` exists only where the instructions do.
        let [low, high] = [0, 1].map(|i| unsafe { _mm256_movemask_ps(_mm256_cmp_ps::<_CMP_NLT_UQ>(a[i], b[i])) });
        (low | high << 8) as u32
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, x: Self::F) {
        // SAFETY: the caller vouches for sixteen bytes.
        unsafe {
            let (low, high) = (_mm256_cvtps_epi32(x[0]), _mm256_cvtps_epi32(x[1]));
            // Packing works within 128-bit halves; the permutation puts the quarters back in order.
            let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(low, high));
            let bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words));
            _mm_storeu_si128(p.cast(), bytes);
        }
    }

    #[inline(always)]
    fn prefetch(self, p: *const u8) {
        // SAFETY: a prefetch of any address is harmless.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(p.cast()) }
    }
    #[inline(always)]
    fn int_zero(self) -> Self::I {
        // SAFETY: an `Avx2` exists only where the instructions do.
        [unsafe { _mm256_setzero_si256() }; 2]
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> (Self::W, Self::W) {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe {
            let p = p.cast::<__m256i>();
            let (a, b) = (_mm256_loadu_si256(p), _mm256_loadu_si256(p.add(1)));
            let mask = _mm256_set1_epi8(15);
            (
                [_mm256_and_si256(a, mask), _mm256_and_si256(b, mask)],
                [_mm256_and_si256(_mm256_srli_epi16::<4>(a), mask), _mm256_and_si256(_mm256_srli_epi16::<4>(b), mask)],
            )
        }
    }
    #[inline(always)]
    unsafe fn load_u4_half(self, p: *const u8, shift: u32) -> Self::W {
        // SAFETY: the caller vouches for 64 bytes.
        let both = unsafe { self.load_u8(p) };
        both!(both, |w| _mm256_and_si256(_mm256_srl_epi16(w, _mm_cvtsi32_si128(shift as i32)), _mm256_set1_epi8(15)))
    }
    #[inline(always)]
    fn raise(self, w: Self::W, upper: Self::W, shift: u32, mask: u8) -> Self::W {
        // SAFETY: an `Avx2` exists only where the instructions do.
        let (shift, mask) = unsafe { (_mm_cvtsi32_si128(shift as i32), _mm256_set1_epi8(mask as i8)) };
        let bits = both!(upper, |u| _mm256_slli_epi16::<4>(_mm256_and_si256(_mm256_srl_epi16(u, shift), mask)));
        lanewise!(_mm256_or_si256, w, bits)
    }
    #[inline(always)]
    fn look_up(self, w: Self::W) -> Self::W {
        // SAFETY: the table has sixteen bytes, and an `Avx2` exists only where the instructions do.
        let table = unsafe { _mm256_broadcastsi128_si256(_mm_loadu_si128(IQ4_VALUES.as_ptr().cast())) };
        both!(w, |w| _mm256_shuffle_epi8(table, w))
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::W {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn store_u8(self, p: *mut u8, w: Self::W) {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe {
            _mm256_storeu_si256(p.cast(), w[0]);
            _mm256_storeu_si256(p.add(32).cast(), w[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::W {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { self.load_u8(p) }
    }
    #[inline(always)]
    unsafe fn store_signed(self, p: *mut u8, w: Self::W) {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { self.store_u8(p, w) }
    }
    #[inline(always)]
    unsafe fn load_signed(self, p: *const u8) -> Self::W {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { self.load_i8(p) }
    }
    #[inline(always)]
    unsafe fn dot_u4(self, sum: Self::I, w: Self::W, a: *const i8) -> Self::I {
        // SAFETY: the caller vouches for four activations.
        unsafe {
            let a = _mm256_set1_epi32(a.cast::<i32>().read_unaligned());
            [
                _mm256_add_epi16(sum[0], _mm256_maddubs_epi16(w[0], a)),
                _mm256_add_epi16(sum[1], _mm256_maddubs_epi16(w[1], a)),
            ]
        }
    }
    #[inline(always)]
    unsafe fn dot_u6(self, sum: Self::I, w: (Self::W, Self::W), a: *const i8) -> Self::I {
        // SAFETY: the caller vouches for eight activations.
        let (first, second) = unsafe {
            let a = a.cast::<i32>();
            (_mm256_set1_epi32(a.read_unaligned()), _mm256_set1_epi32(a.add(1).read_unaligned()))
        };
        let (first, second) =
            (both!(w.0, |w| _mm256_maddubs_epi16(w, first)), both!(w.1, |w| _mm256_maddubs_epi16(w, second)));
        let pairs = lanewise!(_mm256_add_epi16, first, second);
        let products = both!(pairs, |p| _mm256_madd_epi16(p, _mm256_set1_epi16(1)));
        lanewise!(_mm256_add_epi32, sum, products)
    }
    #[inline(always)]
    unsafe fn dot_i8(self, sum: Self::I, w: Self::W, a: *const i8) -> Self::I {
        // SAFETY: the caller vouches for four activations.
        let products = unsafe { self.products_i8::<1>(w, a) };
        lanewise!(_mm256_add_epi32, sum, products)
    }
    #[inline(always)]
    fn widen_u4(self, sum: Self::I) -> Self::I {
        // SAFETY: an `Avx2` exists only where the instructions do.
        both!(sum, |s| _mm256_madd_epi16(s, _mm256_set1_epi16(1)))
    }
    #[inline(always)]
    unsafe fn peak_u6(self, sum: Self::I, w: Self::W, high: *const i8) -> Self::I {
        // SAFETY: the caller vouches for four activations.
        let high = unsafe { _mm256_set1_epi32(high.cast::<i32>().read_unaligned()) };
        let pairs = both!(w, |w| _mm256_maddubs_epi16(w, high));
        let peak = both!(pairs, |p| _mm256_madd_epi16(p, _mm256_set1_epi16(PEAK_UNIT as i16)));
        lanewise!(_mm256_add_epi32, sum, peak)
    }
    #[inline(always)]
    unsafe fn peak_i8(self, sum: Self::I, w: Self::W, high: *const i8, _less: i32) -> Self::I {
        // SAFETY: the caller vouches for four activations.
        let products = unsafe { self.products_i8::<{ PEAK_UNIT as i16 }>(w, high) };
        lanewise!(_mm256_add_epi32, sum, products)
    }
    #[inline(always)]
    fn int_add(self, sum: Self::I, x: i32) -> Self::I {
        both!(sum, |s| _mm256_add_epi32(s, _mm256_set1_epi32(x)))
    }
    #[inline(always)]
    fn int_to_f32(self, sum: Self::I) -> Self::F {
        both!(sum, |s| _mm256_cvtepi32_ps(s))
    }
}

impl Avx2 {
    /// `FACTOR` times the products of signed 8-bit weights with four activations at `a`.
    #[inline(always)]
    unsafe fn products_i8<const FACTOR: i16>(self, w: [__m256i; 2], a: *const i8) -> [__m256i; 2] {
        // SAFETY: the caller vouches for four activations.
        let a = unsafe { _mm256_set1_epi32(a.cast::<i32>().read_unaligned()) };
        both!(w, |w| {
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
            _mm256_madd_epi16(pairs, _mm256_set1_epi16(FACTOR))
        })
    }
}
