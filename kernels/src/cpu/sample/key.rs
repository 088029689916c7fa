//! Tokens in the order of their likelihood, as integers: comparing two is one instruction, and there are no ties.

/// A cut no token is below: the [`key`] of -inf and the highest id.
pub(super) const KEEP_ALL: u64 = (!f32::NEG_INFINITY.to_bits() as u64) << 32;

/// Orders tokens as likelihood does: the higher logit is the greater key, and on ties the lower id.
#[inline(always)]
pub(super) fn key(logit: f32, id: usize) -> u64 {
    // Adding 0 makes 0 of -0, which otherwise would be the lesser of two equals. The bits of floats order like
    // sign-magnitude integers: turn them into unsigned ones.
    let bits = (logit + 0.0).to_bits();
    let ordered = if bits >> 31 == 1 { !bits } else { bits | 1 << 31 };
    (ordered as u64) << 32 | !(id as u32) as u64
}

/// The inverse of [`key`].
#[inline(always)]
pub(super) fn logit_and_id(key: u64) -> (f32, u32) {
    let ordered = (key >> 32) as u32;
    let bits = if ordered >> 31 == 1 { ordered & !(1 << 31) } else { !ordered };
    (f32::from_bits(bits), !(key as u32))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_order_by_logit_and_then_by_lower_id() {
        let ascending = [f32::NEG_INFINITY, f32::MIN, -1.0, -1e-40, 0.0, 1e-40, 2.0, f32::MAX];
        for pair in ascending.windows(2) {
            assert!(key(pair[0], 0) < key(pair[1], 9));
        }
        assert!(key(-0.0, 1) > key(0.0, 2));
        for x in ascending {
            assert_eq!(logit_and_id(key(x, 7)), (x, 7));
        }
        assert_eq!(KEEP_ALL, key(f32::NEG_INFINITY, u32::MAX as usize));
    }
}
