use super::*;

/// Every operation once, on given operands; what comes out, as bits.
struct Probe<'a> {
    a: &'a [f32; LANES],
    b: &'a [f32; LANES],
    bytes: &'a [u8; 64],
    activations: &'a [i8; 4],
    out: &'a mut Vec<u32>,
}

impl Kernel for Probe<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // SAFETY: every pointer is to an array of the size its method reads or writes.
        unsafe {
            let (a, b) = (isa.load(self.a.as_ptr()), isa.load(self.b.as_ptr()));
            let (low, high) = isa.load_u4(self.bytes.as_ptr());
            let activations = self.activations.as_ptr();
            let u4 = isa.dot_u4(isa.dot_u4(isa.int_zero(), low, activations), high, activations);
            let upper = isa.load_u8(self.bytes.as_ptr());
            let six = (isa.raise(low, upper, 4, 3), isa.raise(high, upper, 6, 1));
            let [p, q, r, s] = *self.activations;
            let eight = [p, q, r, s, s, r, q, p];
            let u6 = isa.peak_u6(isa.dot_u6(isa.int_zero(), six, eight.as_ptr()), six.0, activations);
            let table = isa.look_up(high);
            let mut stored = [0; 64];
            isa.store_signed(stored.as_mut_ptr(), table);
            let signed = isa.dot_i8(
                isa.dot_i8(isa.int_zero(), table, activations),
                isa.load_signed(stored.as_ptr()),
                activations,
            );
            let i8 = isa.dot_i8(isa.int_zero(), isa.load_i8(self.bytes.as_ptr()), activations);
            let sum = self.activations.iter().map(|&a| i32::from(a)).sum::<i32>();
            let i8 = isa.peak_i8(i8, isa.load_i8(self.bytes.as_ptr()), activations, -sum * (1 + PEAK_UNIT));
            let [u4_low, u4_high] = [0, 4].map(|shift| isa.load_u4_half(self.bytes.as_ptr(), shift));
            let signed = isa.peak_i8(signed, table, [0; 4].as_ptr(), -sum * 2);
            let widened = isa.widen_u4(u4);
            let finite = self.bytes.map(|byte| if byte & 0x7f == 0x7f { 0 } else { byte });
            let (first, second) = isa.load_bf16_pairs(self.bytes.as_ptr().cast());
            for lanes in [
                isa.add(a, b),
                isa.sub(a, b),
                isa.mul(a, b),
                isa.div(a, b),
                isa.fma(a, b, a),
                isa.max(a, b),
                isa.min(a, b),
                isa.abs(a),
                isa.max_of_fours(a),
                isa.round(a),
                isa.exp(a),
                isa.zero_if_lt(a, b, a),
                isa.int_to_f32(isa.peak_u6(widened, u4_low, activations)),
                isa.int_to_f32(isa.peak_u6(widened, u4_high, activations)),
                isa.int_to_f32(isa.int_add(u6, -32 * sum)),
                isa.int_to_f32(signed),
                isa.int_to_f32(i8),
                isa.splat(isa.reduce_add(a)),
                isa.splat(isa.reduce_max(a)),
                first,
                second,
                isa.load_bf16(self.bytes.as_ptr().cast()),
                isa.load_f16(self.bytes.as_ptr().cast()),
                isa.load_f8(self.bytes.as_ptr()),
                isa.load_f8_small(finite.as_ptr()),
            ] {
                let mut values = [0.0f32; LANES];
                isa.store(values.as_mut_ptr(), lanes);
                // Which NaN a NaN becomes is nobody's business.
                self.out.extend(values.map(|v| if v.is_nan() { f32::NAN.to_bits() } else { v.to_bits() }));
            }
            let mut halves = [0u16; LANES];
            isa.store_f16(halves.as_mut_ptr(), a);
            self.out.extend(halves.map(u32::from));
            let mut quants = [0i8; LANES];
            isa.store_i8(quants.as_mut_ptr(), a);
            self.out.extend(quants.map(|q| q as u32));
            self.out.push(isa.mask_not_lt(a, b));
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    for _ in 0..200 {
        let a: [f32; LANES] = std::array::from_fn(|_| (next() - 0.5) * 250.0);
        let b: [f32; LANES] = std::array::from_fn(|_| (next() - 0.5) * 3.0);
        let bytes: [u8; 64] = std::array::from_fn(|_| (next() * 256.0) as u8);
        let activations: [i8; 4] = std::array::from_fn(|_| ((next() - 0.5) * 254.9) as i8);
        let results = [Level::Portable, Level::Avx2, Level::Avx512].map(|level| {
            let mut out = Vec::new();
            if let Some(dispatch) = Dispatch::new(level) {
                dispatch.run(Probe { a: &a, b: &b, bytes: &bytes, activations: &activations, out: &mut out });
            }
            out
        });
        for other in &results[1..] {
            assert!(other.is_empty() || *other == results[0]);
        }
    }
}

struct Exp<'a>(&'a [f32; LANES], &'a mut [f32; LANES]);

impl Kernel for Exp<'_> {
    #[inline(always)]
    fn run<I: Isa>(self, isa: I) {
        // SAFETY: both are sixteen lanes.
        unsafe { isa.store(self.1.as_mut_ptr(), isa.exp(isa.load(self.0.as_ptr()))) }
    }
}

#[test]
fn the_exponential_is_within_two_in_ten_million() {
    let dispatch = Dispatch::new(Level::detect()).expect("detected");
    let mut worst = 0.0f64;
    for step in 0..20_000 {
        let x: [f32; LANES] = std::array::from_fn(|i| -87.0 + 175.0 * (step * LANES + i) as f32 / 320_000.0);
        let mut y = [0.0; LANES];
        dispatch.run(Exp(&x, &mut y));
        for (x, y) in x.into_iter().zip(y) {
            let exact = f64::from(x).exp();
            worst = worst.max((f64::from(y) - exact).abs() / exact);
        }
    }
    assert!(worst < 2e-7, "{worst:e}");
    let mut y = [1.0; LANES];
    dispatch.run(Exp(&[f32::NEG_INFINITY; LANES], &mut y));
    assert_eq!(y, [0.0; LANES]);
    dispatch.run(Exp(&[f32::NAN; LANES], &mut y));
    assert!(y.iter().all(|y| y.is_nan()));
}
