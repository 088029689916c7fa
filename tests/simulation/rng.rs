use crate::random::SplitMix64;

/// What a run draws: a seed decides all of it.
pub(crate) struct Rng(SplitMix64);

impl Rng {
    pub(crate) fn new(seed: u64) -> Self {
        let mut rng = Self(SplitMix64::new(seed));
        rng.0.bits();
        rng
    }

    /// Below `bound`.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        // The high half of a product: no division, and a bias nobody can see.
        ((u128::from(self.0.bits()) * u128::from(bound)) >> 64) as u64
    }

    /// From `low` up to and with `high`.
    pub(crate) fn within(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high - low + 1)
    }

    /// True so many times in a thousand.
    pub(crate) fn per_mille(&mut self, times: u64) -> bool {
        self.below(1_000) < times
    }

    /// An index into something of this length.
    pub(crate) fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }
}
