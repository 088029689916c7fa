//! GGML's quantised blocks of all types taken apart in one way, for backends to repack.
//!
//! Two-level scales, those of K-quants and IQ4_XS, are multiplied out and rounded to f16: one part in 2,000 of what a
//! 4-bit weight is uncertain by anyway. Q4_0's `-8 × scale` is exact.
//!
//! Q2_K is not here: it has a minimum for every 16 weights, and no form in which CPUs keep weights has.

use half::f16;

use crate::DType;
use crate::dtype::IQ4_VALUES;

/// Weights decoded at a time.
pub(crate) const BLOCK: usize = 32;

/// 32 weights of one row: `scales[i / 16] × quants[i] + minimum`.
pub(crate) struct Decoded {
    pub(crate) quants: [i8; BLOCK],
    pub(crate) scales: [f16; 2],
    pub(crate) minimum: f16,
}

fn half(bytes: &[u8], at: usize) -> f16 {
    f16::from_le_bytes([bytes[at], bytes[at + 1]])
}

/// 32 quants: the nibbles of `bytes[..16]`, low ones first, with a fifth bit from `high` and `offset` taken off.
fn nibbles(bytes: &[u8], high: u32, offset: i8) -> [i8; BLOCK] {
    std::array::from_fn(|i| {
        let nibble = if i < 16 { bytes[i] & 15 } else { bytes[i - 16] >> 4 };
        (nibble | ((high >> i & 1) << 4) as u8) as i8 - offset
    })
}

/// 32 quants of IQ4_NL and IQ4_XS: the values that the nibbles of `bytes[..16]` stand for.
fn looked_up(bytes: &[u8]) -> [i8; BLOCK] {
    nibbles(bytes, 0, 0).map(|nibble| IQ4_VALUES[nibble as usize])
}

/// Scale of sub-block `j` of 16 of Q3_K: 6 bits each, packed into twelve bytes, offset by 32.
fn scale_of_sixteen(s: &[u8], j: usize) -> f32 {
    let (low, high) = (s[j % 8] >> (j / 8 * 4) & 15, s[8 + j % 4] >> (j / 4 * 2) & 3);
    f32::from(low | high << 4) - 32.0
}

/// Scale and minimum of sub-block `j` of Q4_K and Q5_K: 6 bits each, packed into twelve bytes.
fn scale_and_minimum(s: &[u8], j: usize) -> (u8, u8) {
    if j < 4 {
        (s[j] & 63, s[j + 4] & 63)
    } else {
        (s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4)
    }
}

/// Decodes block `block` (of 32, also in the types whose own blocks are 256 long) of a row.
pub(crate) fn decode(dtype: DType, row: &[u8], block: usize) -> Decoded {
    let own = block * BLOCK / dtype.block_len();
    let b = &row[own * dtype.block_bytes()..][..dtype.block_bytes()];
    let sub = block % (dtype.block_len() / BLOCK);
    let plain = |quants, scale, minimum| Decoded { quants, scales: [scale; 2], minimum };
    let word = |at: usize| u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    match dtype {
        DType::Q4_0 => plain(nibbles(&b[2..], 0, 0), half(b, 0), f16::from_f32(-8.0 * half(b, 0).to_f32())),
        DType::Q4_1 => plain(nibbles(&b[4..], 0, 0), half(b, 0), half(b, 2)),
        DType::Q5_0 => plain(nibbles(&b[6..], word(2), 16), half(b, 0), f16::ZERO),
        DType::Q5_1 => plain(nibbles(&b[8..], word(4), 0), half(b, 0), half(b, 2)),
        DType::Q8_0 => plain(std::array::from_fn(|i| b[2 + i] as i8), half(b, 0), f16::ZERO),
        DType::Q3K => {
            let quants = std::array::from_fn(|i| {
                let low = b[32 + sub / 4 * 32 + i] >> (sub % 4 * 2) & 3;
                (low | (b[i] >> sub & 1) << 2) as i8 - 4
            });
            let scale = |i| f16::from_f32(half(b, 108).to_f32() * scale_of_sixteen(&b[96..108], 2 * sub + i));
            Decoded { quants, scales: [scale(0), scale(1)], minimum: f16::ZERO }
        }
        DType::Q4K | DType::Q5K => {
            let (scale, minimum) = scale_and_minimum(&b[4..16], sub);
            let (high, low) = b[16..].split_at(if dtype == DType::Q5K { 32 } else { 0 });
            let quants = std::array::from_fn(|i| {
                let nibble = low[sub / 2 * 32 + i] >> (4 * (sub % 2)) & 15;
                (nibble | high.get(i).map_or(0, |h| (h >> sub & 1) << 4)) as i8
            });
            let scale = f16::from_f32(half(b, 0).to_f32() * f32::from(scale));
            plain(quants, scale, f16::from_f32(-half(b, 2).to_f32() * f32::from(minimum)))
        }
        DType::Q6K => {
            // Two halves of 128; in each, four runs of 32 share 64 bytes of low and 32 bytes of high bits.
            let (part, run) = (sub / 4, sub % 4);
            let quants = std::array::from_fn(|i| {
                let low = b[part * 64 + run % 2 * 32 + i] >> (4 * (run / 2)) & 15;
                let high = b[128 + part * 32 + i] >> (2 * run) & 3;
                (low | high << 4) as i8 - 32
            });
            let scale = |i| f16::from_f32(half(b, 208).to_f32() * f32::from(b[192 + part * 8 + run * 2 + i] as i8));
            Decoded { quants, scales: [scale(0), scale(1)], minimum: f16::ZERO }
        }
        DType::IQ4NL => plain(looked_up(&b[2..]), half(b, 0), f16::ZERO),
        DType::IQ4XS => {
            let high = u16::from_le_bytes([b[2], b[3]]) >> (2 * sub) & 3;
            let scale = b[4 + sub / 2] >> (sub % 2 * 4) & 15 | (high as u8) << 4;
            let scale = f16::from_f32(half(b, 0).to_f32() * (f32::from(scale) - 32.0));
            plain(looked_up(&b[8 + 16 * sub..]), scale, f16::ZERO)
        }
        DType::F32 | DType::F16 | DType::BF16 | DType::F8 => unreachable!("no integers times a scale"),
    }
}
