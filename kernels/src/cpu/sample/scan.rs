//! Passes over a row of logits, written so that the compiler turns them into vector code, and compiled twice: for any
//! x86-64 and for AVX2. Both do the same single precision operations lane by lane (nothing is fused), so both give the
//! same bits.

use super::key::{key, logit_and_id};

/// Logits handled at a time. Sums are taken block by block, so this is part of what a draw depends on.
pub(super) const BLOCK: usize = 256;
const LANES: usize = 16;

/// Compiles `$body`, an `#[inline(always)]` function, for AVX2 as well, and picks one when called.
macro_rules! widest {
    ($(#[$doc:meta])* fn $name:ident($($arg:ident: $ty:ty),*) $(-> $out:ty)? = $body:ident) => {
        $(#[$doc])*
        pub(super) fn $name($($arg: $ty),*) $(-> $out)? {
            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") {
                #[target_feature(enable = "avx2")]
                fn wide($($arg: $ty),*) $(-> $out)? {
                    $body($($arg),*)
                }
                // SAFETY: the processor has AVX2: checked on the line above.
                return unsafe { wide($($arg),*) };
            }
            $body($($arg),*)
        }
    };
}

/// What one pass over the logits finds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Peak {
    /// Lowest id of the highest logit.
    pub(super) id: u32,
    /// The highest logit; -inf if there is none above.
    pub(super) logit: f32,
    /// Whether there is a NaN, which `id` and `logit` pass over, or +inf.
    pub(super) dirty: bool,
}

widest! {
    /// The highest logit and where it stands.
    fn peak(logits: &[f32]) -> Peak = peak_body
}

#[inline(always)]
fn peak_body(logits: &[f32]) -> Peak {
    let mut best = f32::NEG_INFINITY;
    let mut best_block = 0;
    let mut nan = false;
    for (block, xs) in logits.chunks(BLOCK).enumerate() {
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut nans = [0u32; LANES];
        let (groups, rest) = xs.as_chunks::<LANES>();
        for group in groups {
            for lane in 0..LANES {
                let x = group[lane];
                // False for NaN, which thereby never wins.
                max[lane] = if x > max[lane] { x } else { max[lane] };
                nans[lane] |= x.is_nan() as u32;
            }
        }
        let mut block_max = f32::NEG_INFINITY;
        for &x in max.iter().chain(rest) {
            block_max = if x > block_max { x } else { block_max };
        }
        nan |= nans.iter().any(|&n| n != 0) || rest.iter().any(|x| x.is_nan());
        if block_max > best {
            (best, best_block) = (block_max, block);
        }
    }
    let start = best_block * BLOCK;
    let within = logits[start..].iter().position(|&x| x == best).unwrap_or(0);
    Peak { id: (start + within) as u32, logit: best, dirty: nan || best == f32::INFINITY }
}

/// How logits become weights: `exp((logit - max) · inverse_temperature)`, and nothing for those below a cut.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weighing {
    pub(super) max: f32,
    pub(super) inverse_temperature: f32,
    /// Tokens whose [`key`] is below weigh nothing.
    pub(super) cut: u64,
}

impl Weighing {
    /// The weight of one logit, cut aside.
    #[inline(always)]
    pub(super) fn weight(&self, logit: f32) -> f32 {
        exp((logit - self.max) * self.inverse_temperature)
    }

    /// Weights of the block of logits that starts at id `start`. False if all of them are 0 (and `weights` untouched).
    #[inline(always)]
    fn block(&self, start: usize, logits: &[f32], weights: &mut [f32; BLOCK]) -> bool {
        let (cut, last) = logit_and_id(self.cut);
        // Of the tokens that stand exactly at the cut, those up to `last` are kept.
        let lowest = if start as u32 > last { cut.next_up() } else { cut };
        if !any_at_least(logits, lowest) {
            return false;
        }
        if logits.len() < BLOCK {
            *weights = [0.0; BLOCK];
        }
        for (weight, &x) in weights.iter_mut().zip(logits) {
            // The weight is worked out either way: a choice between two values needs no branch.
            let full = self.weight(x);
            *weight = if x >= lowest { full } else { 0.0 };
        }
        if (start..start + logits.len()).contains(&(last as usize)) {
            for i in last as usize - start + 1..logits.len() {
                if logits[i] == cut {
                    weights[i] = 0.0;
                }
            }
        }
        true
    }
}

#[inline(always)]
fn any_at_least(logits: &[f32], lowest: f32) -> bool {
    highest(logits) >= lowest
}

/// The highest of a few logits, NaN passed over; -inf if there is none.
#[inline(always)]
fn highest(logits: &[f32]) -> f32 {
    let mut max = [f32::NEG_INFINITY; LANES];
    let (groups, rest) = logits.as_chunks::<LANES>();
    for group in groups {
        for lane in 0..LANES {
            max[lane] = if group[lane] > max[lane] { group[lane] } else { max[lane] };
        }
    }
    let larger = |a: f32, &b: &f32| if b > a { b } else { a };
    max.iter().chain(rest).fold(f32::NEG_INFINITY, larger)
}

widest! {
    /// The sum of all weights; `sums` receives that of each block.
    fn weigh(logits: &[f32], weighing: &Weighing, sums: &mut [f64]) -> f64 = weigh_body
}

#[inline(always)]
fn weigh_body(logits: &[f32], weighing: &Weighing, sums: &mut [f64]) -> f64 {
    let mut total = 0.0;
    let mut weights = [0.0; BLOCK];
    for (block, (xs, sum)) in logits.chunks(BLOCK).zip(sums).enumerate() {
        *sum = if weighing.block(block * BLOCK, xs, &mut weights) { self::sum(&weights) } else { 0.0 };
        total += *sum;
    }
    total
}

widest! {
    /// [`weigh`] for a cut that nothing is below, keeping the weights: `weights` has room for those of whole blocks.
    fn weigh_all(logits: &[f32], weighing: &Weighing, weights: &mut [f32]) -> f64 = weigh_all_body
}

#[inline(always)]
fn weigh_all_body(logits: &[f32], weighing: &Weighing, weights: &mut [f32]) -> f64 {
    let mut total = 0.0;
    for (block, (xs, weights)) in logits.chunks(BLOCK).zip(weights.as_chunks_mut::<BLOCK>().0).enumerate() {
        *weights = [0.0; BLOCK];
        weighing.block(block * BLOCK, xs, weights);
        total += sum(weights);
    }
    total
}

/// The sum of the weights of those logits of a block that reach `bar`: in lanes, then across.
#[inline(always)]
fn sum_from(weights: &[f32; BLOCK], logits: &[f32; BLOCK], bar: f32) -> f64 {
    let mut lanes = [0.0f32; LANES];
    for (weights, logits) in weights.as_chunks::<LANES>().0.iter().zip(logits.as_chunks::<LANES>().0) {
        for lane in 0..LANES {
            // All bits or none: a mask is sure to become vector code where a condition is not.
            let mask = 0u32.wrapping_sub((logits[lane] >= bar) as u32);
            lanes[lane] += f32::from_bits(weights[lane].to_bits() & mask);
        }
    }
    lanes.iter().map(|&lane| lane as f64).sum()
}

/// The sum of the weights of a block: in lanes, then across.
#[inline(always)]
fn sum(weights: &[f32; BLOCK]) -> f64 {
    let mut lanes = [0.0f32; LANES];
    for group in weights.as_chunks::<LANES>().0 {
        for lane in 0..LANES {
            lanes[lane] += group[lane];
        }
    }
    lanes.iter().map(|&lane| lane as f64).sum()
}

/// Bars whose masses one pass measures.
pub(super) const BARS: usize = 8;

widest! {
    /// For each bar, what the tokens whose logits reach it weigh together. `weights` is what [`weigh_all`] filled.
    fn masses(logits: &[f32], weights: &[f32], bars: &[f32; BARS]) -> [f64; BARS] = masses_body
}

#[inline(always)]
fn masses_body(logits: &[f32], weights: &[f32], bars: &[f32; BARS]) -> [f64; BARS] {
    let mut masses = [0.0; BARS];
    let mut padded = [f32::NEG_INFINITY; BLOCK];
    for (xs, weights) in logits.chunks(BLOCK).zip(weights.as_chunks::<BLOCK>().0) {
        let xs = match xs.as_array::<BLOCK>() {
            Some(xs) => xs,
            None => {
                padded[..xs.len()].copy_from_slice(xs);
                &padded
            }
        };
        for (mass, &bar) in masses.iter_mut().zip(bars) {
            *mass += sum_from(weights, xs, bar);
        }
    }
    masses
}

widest! {
    /// How many logits are at least `lowest` and below `end`.
    fn count(logits: &[f32], lowest: f32, end: f32) -> usize = count_body
}

#[inline(always)]
fn count_body(logits: &[f32], lowest: f32, end: f32) -> usize {
    let in_block = |xs: &[f32]| xs.iter().map(|&x| (x >= lowest && x < end) as u32).sum::<u32>() as usize;
    logits.chunks(BLOCK).map(in_block).sum()
}

/// The first token, in the order of ids, at which the sum of weights exceeds `target`. `sums` is what [`weigh`] made of
/// the same arguments.
pub(super) fn invert(logits: &[f32], weighing: &Weighing, sums: &[f64], target: f64) -> u32 {
    let mut reached = 0.0;
    let mut drawn = 0;
    for (block, (xs, &sum)) in logits.chunks(BLOCK).zip(sums).enumerate() {
        if sum > 0.0 && reached + sum <= target {
            reached += sum;
            // Should rounding carry the target past the last block, this is the block to draw from.
            drawn = block;
        } else if sum > 0.0 {
            return within_block(block, xs, weighing, target - reached);
        }
    }
    let start = drawn * BLOCK;
    within_block(drawn, &logits[start..logits.len().min(start + BLOCK)], weighing, f64::INFINITY)
}

fn within_block(block: usize, logits: &[f32], weighing: &Weighing, target: f64) -> u32 {
    let mut weights = [0.0; BLOCK];
    weighing.block(block * BLOCK, logits, &mut weights);
    let mut reached = 0.0;
    let mut drawn = 0;
    for (i, &weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        drawn = i;
        reached += weight as f64;
        if reached > target {
            break;
        }
    }
    (block * BLOCK + drawn) as u32
}

widest! {
    /// Collects the [`key`]s of all logits that are at least `lowest` and below `end`, in the order of ids. `keys` has
    /// room for all.
    fn collect(logits: &[f32], lowest: f32, end: f32, keys: &mut Vec<u64>) = collect_body
}

#[inline(always)]
fn collect_body(logits: &[f32], lowest: f32, end: f32, keys: &mut Vec<u64>) {
    keys.clear();
    for (group, xs) in logits.chunks(LANES).enumerate() {
        // What is looked for is rare: most groups are passed over at the speed of comparing.
        if xs.iter().map(|&x| (x >= lowest && x < end) as u32).sum::<u32>() > 0 {
            let wanted = xs.iter().enumerate().filter(|(_, x)| **x >= lowest && **x < end);
            keys.extend(wanted.map(|(i, &x)| key(x, group * LANES + i)));
        }
    }
}

widest! {
    /// Leaves the keys of the `n` likeliest tokens in `keys`, the least likely of them last, the others in any order.
    /// `n` is at least 1 and at most the number of logits; `keys` has room for all logits.
    fn likeliest(logits: &[f32], n: usize, keys: &mut Vec<u64>) = likeliest_body
}

#[inline(always)]
fn likeliest_body(logits: &[f32], n: usize, keys: &mut Vec<u64>) {
    // Keeps a buffer of candidates; whenever it is full, only the best `n` stay and raise the bar for those to come.
    let room = (2 * n).max(n + 256).min(logits.len());
    keys.clear();
    keys.extend(logits[..room].iter().enumerate().map(|(id, &x)| key(x, id)));
    let mut bar = keep_best(keys, n);
    for (block, xs) in logits[room..].chunks(64).enumerate() {
        // A later token needs a higher logit than the bar: on a tie the lower id is the likelier.
        if !any_at_least(xs, bar.next_up()) {
            continue;
        }
        for (i, &x) in xs.iter().enumerate() {
            if x > bar {
                keys.push(key(x, room + block * 64 + i));
                if keys.len() == room {
                    bar = keep_best(keys, n);
                }
            }
        }
    }
    keep_best(keys, n);
}

/// Drops all but the `n` highest keys, and returns the logit of the lowest of them, which is put last.
fn keep_best(keys: &mut Vec<u64>, n: usize) -> f32 {
    keys.select_nth_unstable_by(n - 1, |a, b| b.cmp(a));
    keys.truncate(n);
    logit_and_id(keys[n - 1]).0
}

/// `e^x` for `x <= 0`, within 2 units in the last place; 0 below -87, where the result would no longer be a normal
/// number. Range reduction and polynomial of Cephes' `expf` (Moshier).
#[allow(clippy::excessive_precision, reason = "the constants as published")]
#[inline(always)]
fn exp(x: f32) -> f32 {
    const SHIFT: f32 = 12_582_912.0; // 1.5 · 2^23: adding it leaves the nearest integer in the low bits.
    const LN_2_HIGH: f32 = 0.693_359_375;
    const LN_2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x > -87.0 { x } else { -87.0 };
    let shifted = clamped * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = clamped - n * LN_2_HIGH - n * LN_2_LOW;
    let mut p = 1.987_569_15e-4;
    p = p * r + 1.398_199_950_7e-3;
    p = p * r + 8.333_451_907_3e-3;
    p = p * r + 4.166_579_589_4e-2;
    p = p * r + 1.666_666_545_9e-1;
    p = p * r + 5.000_000_120_1e-1;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    let result = (p * r * r + r + 1.0) * power;
    if x > -87.0 { result } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_two_units_in_the_last_place() {
        for i in 0..1_000_000 {
            let x = -86.9 * i as f32 / 1e6;
            let exact = (x as f64).exp();
            assert!((exp(x) as f64 / exact - 1.0).abs() < 2.0 * f32::EPSILON as f64, "exp({x})");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
    }

    #[test]
    fn the_peak_is_the_lowest_of_equals_and_never_nan() {
        for len in [1, 15, 16, 17, 255, 256, 257, 1000] {
            let mut logits = vec![f32::NAN; len];
            assert_eq!(peak(&logits), Peak { id: 0, logit: f32::NEG_INFINITY, dirty: true });
            logits[len - 1] = -3.0;
            logits[len / 2] = -3.0;
            assert_eq!(peak(&logits).id as usize, len / 2);
            logits.fill(1.5);
            assert_eq!(peak(&logits), Peak { id: 0, logit: 1.5, dirty: false });
        }
    }

    #[test]
    fn both_compilations_give_the_same_bits() {
        let logits: Vec<f32> = (0..5000).map(|i| (i as f32 * 0.37).sin() * 12.0).collect();
        let weighing = Weighing { max: 12.0, inverse_temperature: 1.3, cut: key(-7.0, 2000) };
        let (mut wide, mut plain) = (vec![0.0; 20], vec![0.0; 20]);
        assert_eq!(weigh(&logits, &weighing, &mut wide), weigh_body(&logits, &weighing, &mut plain));
        assert_eq!(wide, plain);
    }
}
