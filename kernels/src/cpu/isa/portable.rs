use std::cmp::Ordering;

use float8::F8E4M3;
use half::{bf16, f16};

use super::{F8_UNIT, Isa, LANES, PEAK_UNIT};
use crate::dtype::IQ4_VALUES;

/// Arrays and loops, on any machine. Slow where `f32::mul_add` is a library call, but right.
#[derive(Clone, Copy)]
pub(super) struct Portable;

type Lanes = [f32; LANES];

#[inline(always)]
fn zip(a: Lanes, b: Lanes, f: impl Fn(f32, f32) -> f32) -> Lanes {
    std::array::from_fn(|i| f(a[i], b[i]))
}

#[inline(always)]
fn dot(mut sum: [i32; LANES], w: &[i16; 4 * LANES], a: [i8; 4]) -> [i32; LANES] {
    for (column, sum) in sum.iter_mut().enumerate() {
        for (k, &a) in a.iter().enumerate() {
            *sum += i32::from(w[column * 4 + k]) * i32::from(a);
        }
    }
    sum
}

// SAFETY (of every block below): the trait's callers vouch for the elements behind each pointer; reads and writes are
// unaligned.
impl Isa for Portable {
    type F = Lanes;
    type W = [i16; 4 * LANES];
    type I = [i32; LANES];
    const ROWS_MAX: usize = 1;
    const SUMS_MAX: usize = 1;
    const GROUPS_MAX: usize = 1;
    const PEAK_FIRST: bool = false;

    #[inline(always)]
    fn splat(self, x: f32) -> Lanes {
        [x; LANES]
    }
    #[inline(always)]
    unsafe fn load(self, p: *const f32) -> Lanes {
        // SAFETY: see above.
        unsafe { p.cast::<Lanes>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(self, p: *mut f32, x: Lanes) {
        // SAFETY: see above.
        unsafe { p.cast::<Lanes>().write_unaligned(x) }
    }
    #[inline(always)]
    unsafe fn load_f16(self, p: *const u16) -> Lanes {
        // SAFETY: see above.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_bf16(self, p: *const u16) -> Lanes {
        // SAFETY: see above.
        let bits = unsafe { p.cast::<[u16; LANES]>().read_unaligned() };
        bits.map(|b| bf16::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_f8(self, p: *const u8) -> Lanes {
        // SAFETY: see above.
        let bits = unsafe { p.cast::<[u8; LANES]>().read_unaligned() };
        bits.map(|b| F8E4M3::from_bits(b).to_f32())
    }
    #[inline(always)]
    unsafe fn load_f8_small(self, p: *const u8) -> Lanes {
        // SAFETY: as above.
        unsafe { self.load_f8(p) }.map(|x| x / F8_UNIT)
    }
    #[inline(always)]
    unsafe fn load_bf16_pairs(self, p: *const u16) -> (Lanes, Lanes) {
        // SAFETY: see above; pairs are 32 elements.
        let bits = unsafe { p.cast::<[[u16; 2]; LANES]>().read_unaligned() };
        (bits.map(|b| bf16::from_bits(b[0]).to_f32()), bits.map(|b| bf16::from_bits(b[1]).to_f32()))
    }
    #[inline(always)]
    unsafe fn store_f16(self, p: *mut u16, x: Lanes) {
        // SAFETY: see above.
        unsafe { p.cast::<[u16; LANES]>().write_unaligned(x.map(|v| f16::from_f32(v).to_bits())) }
    }
    #[inline(always)]
    fn add(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| a / b)
    }
    #[inline(always)]
    fn fma(self, a: Lanes, b: Lanes, c: Lanes) -> Lanes {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    fn max(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Lanes, b: Lanes) -> Lanes {
        zip(a, b, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn abs(self, a: Lanes) -> Lanes {
        a.map(f32::abs)
    }
    #[inline(always)]
    fn round(self, a: Lanes) -> Lanes {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn pow2(self, n: Lanes) -> Lanes {
        n.map(|n| f32::from_bits(((n as i32).wrapping_add(127) as u32) << 23))
    }
    #[inline(always)]
    fn zero_if_lt(self, x: Lanes, a: Lanes, b: Lanes) -> Lanes {
        std::array::from_fn(|i| if a[i] < b[i] { 0.0 } else { x[i] })
    }
    #[inline(always)]
    fn reduce_add(self, mut a: Lanes) -> f32 {
        for step in [8, 4, 2, 1] {
            for i in 0..step {
                a[i] += a[i + step];
            }
        }
        a[0]
    }
    #[inline(always)]
    fn reduce_max(self, a: Lanes) -> f32 {
        a.into_iter().fold(f32::NEG_INFINITY, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn max_of_fours(self, a: Lanes) -> Lanes {
        let max = |a: Lanes, other: usize| self.max(a, std::array::from_fn(|i| a[i ^ other]));
        max(max(a, 2), 1)
    }
    #[inline(always)]
    fn mask_not_lt(self, a: Lanes, b: Lanes) -> u32 {
        a.iter()
            .zip(b)
            .enumerate()
            .fold(0, |mask, (i, (&a, b))| mask | u32::from(a.partial_cmp(&b) != Some(Ordering::Less)) << i)
    }
    #[inline(always)]
    unsafe fn store_i8(self, p: *mut i8, x: Lanes) {
        // SAFETY: see above.
        unsafe { p.cast::<[i8; LANES]>().write_unaligned(x.map(|x| x.round_ties_even() as i8)) }
    }

    #[inline(always)]
    fn int_zero(self) -> Self::I {
        [0; LANES]
    }
    #[inline(always)]
    unsafe fn load_u4(self, p: *const u8) -> (Self::W, Self::W) {
        // SAFETY: see above; 64 bytes.
        let bytes = unsafe { p.cast::<[u8; 4 * LANES]>().read_unaligned() };
        (bytes.map(|b| i16::from(b & 15)), bytes.map(|b| i16::from(b >> 4)))
    }
    #[inline(always)]
    unsafe fn load_u4_half(self, p: *const u8, shift: u32) -> Self::W {
        // SAFETY: see above; 64 bytes.
        unsafe { p.cast::<[u8; 4 * LANES]>().read_unaligned() }.map(|b| i16::from((b >> shift) & 15))
    }
    #[inline(always)]
    fn raise(self, w: Self::W, upper: Self::W, shift: u32, mask: u8) -> Self::W {
        std::array::from_fn(|i| w[i] | (upper[i] >> shift & i16::from(mask)) << 4)
    }
    #[inline(always)]
    fn look_up(self, w: Self::W) -> Self::W {
        w.map(|w| IQ4_VALUES[w as usize].into())
    }
    #[inline(always)]
    unsafe fn load_u8(self, p: *const u8) -> Self::W {
        // SAFETY: see above; 64 bytes.
        unsafe { p.cast::<[u8; 4 * LANES]>().read_unaligned() }.map(i16::from)
    }
    #[inline(always)]
    unsafe fn store_u8(self, p: *mut u8, w: Self::W) {
        // SAFETY: see above; 64 bytes.
        unsafe { p.cast::<[u8; 4 * LANES]>().write_unaligned(w.map(|w| w as u8)) }
    }
    #[inline(always)]
    unsafe fn load_i8(self, p: *const u8) -> Self::W {
        // SAFETY: see above; 64 bytes.
        unsafe { p.cast::<[i8; 4 * LANES]>().read_unaligned() }.map(i16::from)
    }
    #[inline(always)]
    unsafe fn store_signed(self, p: *mut u8, w: Self::W) {
        // SAFETY: see above; 64 bytes.
        unsafe { self.store_u8(p, w) }
    }
    #[inline(always)]
    unsafe fn load_signed(self, p: *const u8) -> Self::W {
        // SAFETY: see above; 64 bytes.
        unsafe { self.load_i8(p) }
    }
    #[inline(always)]
    unsafe fn dot_u4(self, sum: Self::I, w: Self::W, a: *const i8) -> Self::I {
        // SAFETY: see above; four activations.
        dot(sum, &w, unsafe { a.cast::<[i8; 4]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn dot_u6(self, sum: Self::I, w: (Self::W, Self::W), a: *const i8) -> Self::I {
        // SAFETY: see above; eight activations.
        unsafe { self.dot_u4(self.dot_u4(sum, w.0, a), w.1, a.add(4)) }
    }
    #[inline(always)]
    unsafe fn dot_i8(self, sum: Self::I, w: Self::W, a: *const i8) -> Self::I {
        // SAFETY: see above; four activations.
        dot(sum, &w, unsafe { a.cast::<[i8; 4]>().read_unaligned() })
    }
    #[inline(always)]
    fn widen_u4(self, sum: Self::I) -> Self::I {
        sum
    }
    #[inline(always)]
    unsafe fn peak_u6(self, sum: Self::I, w: Self::W, high: *const i8) -> Self::I {
        // SAFETY: see above; four activations.
        let products = dot([0; LANES], &w, unsafe { high.cast::<[i8; 4]>().read_unaligned() });
        std::array::from_fn(|i| sum[i] + PEAK_UNIT * products[i])
    }
    #[inline(always)]
    unsafe fn peak_i8(self, sum: Self::I, w: Self::W, high: *const i8, _less: i32) -> Self::I {
        // SAFETY: see above; four activations.
        unsafe { self.peak_u6(sum, w, high) }
    }
    #[inline(always)]
    fn int_add(self, sum: Self::I, x: i32) -> Self::I {
        sum.map(|s| s.wrapping_add(x))
    }
    #[inline(always)]
    fn int_to_f32(self, sum: Self::I) -> Lanes {
        sum.map(|s| s as f32)
    }
}
