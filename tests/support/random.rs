#![allow(dead_code, reason = "each test uses some of it")]

/// Pseudo-random numbers by SplitMix64 (Steele, Lea and Flood 2014): the same for a seed on every machine and in every
/// version.
pub(crate) struct SplitMix64(u64);

impl SplitMix64 {
    /// Those of a seed.
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.bits() % bound
    }
}

/// Spreads every bit over all.
pub(crate) fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
