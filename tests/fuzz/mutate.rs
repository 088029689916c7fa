//! Seeded random changes to inputs: the kinds of damage that find bugs in parsers.

use crate::random::SplitMix64;

/// A seed is a whole run.
pub(crate) struct Rng(SplitMix64);

impl Rng {
    /// The run of `seed`.
    pub(crate) fn new(seed: u64) -> Self {
        Self(SplitMix64::new(seed))
    }

    /// A number below `bound` (0 if that is 0).
    pub(crate) fn below(&mut self, bound: usize) -> usize {
        self.0.below(bound.max(1) as u64) as usize
    }
}

/// Longest input made.
const MAX_BYTES: usize = 1 << 18;
/// Numbers at which arithmetic on lengths goes wrong.
const EDGES: [u64; 12] =
    [0, 1, 0x7F, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0xFFFF_FFFF, 1 << 32, 1 << 40, i64::MAX as u64, u64::MAX - 7, u64::MAX];
/// Text with a meaning in JSON, templates or headers.
const WORDS: [&str; 30] = [
    "null",
    "true",
    "-1",
    "0",
    "1e999",
    "-0.0",
    "1e-400",
    "18446744073709551616",
    "0.5",
    "[]",
    "{}",
    "\"\"",
    "\"\\u0000\"",
    "\"\\ud800\"",
    "{\"a\":",
    "[",
    "]",
    "}",
    ",",
    ":",
    "\"",
    "\\",
    "{{",
    "{%",
    "{#",
    "<|im_start|>",
    "é",
    "🦀",
    "\u{202e}",
    "\u{0}",
];

/// A changed copy of `base`; `other` is a second input to take pieces from.
pub(crate) fn mutate(rng: &mut Rng, base: &[u8], other: &[u8]) -> Vec<u8> {
    let mut input = base.to_vec();
    for _ in 0..1 + rng.below(4) {
        once(rng, &mut input, other);
    }
    input.truncate(MAX_BYTES);
    input
}

fn once(rng: &mut Rng, input: &mut Vec<u8>, other: &[u8]) {
    let at = rng.below(input.len() + 1);
    match rng.below(11) {
        0 if at < input.len() => input[at] ^= 1 << rng.below(8),
        1 if at < input.len() => input[at] = rng.below(256) as u8,
        2 => overwrite_number(rng, input, at),
        3 => input.truncate(at),
        4 => {
            let end = (at + 1 + rng.below(32)).min(input.len());
            input.drain(at..end);
        }
        5 => {
            // A piece of this input, somewhere else or many times over.
            let end = (at + 1 + rng.below(64)).min(input.len());
            let piece = input[at..end].to_vec();
            let to = rng.below(input.len() + 1);
            let times = if rng.below(8) == 0 { 1 + rng.below(500) } else { 1 };
            splice(input, to, &piece.repeat(times));
        }
        6 => {
            let start = rng.below(other.len());
            let end = (start + 1 + rng.below(other.len())).min(other.len());
            splice(input, at, &other[start..end]);
        }
        7 => {
            input.truncate(at);
            let start = rng.below(other.len());
            input.extend_from_slice(&other[start.min(other.len())..]);
        }
        8 => splice(input, at, WORDS[rng.below(WORDS.len())].as_bytes()),
        9 => replace_token(rng, input, at),
        _ => {
            // Nesting, up to far beyond what any parser recurses into.
            let open = [&b"["[..], b"{\"a\":", b"{\"content\":[", b"[["][rng.below(4)];
            splice(input, at, &open.repeat(1 << rng.below(15)));
        }
    }
}

fn splice(input: &mut Vec<u8>, at: usize, piece: &[u8]) {
    let at = at.min(input.len());
    input.splice(at..at, piece.iter().copied());
}

/// Puts a number from [`EDGES`], or one near the one that stands there, over 1, 2, 4 or 8 little-endian bytes.
fn overwrite_number(rng: &mut Rng, input: &mut [u8], at: usize) {
    let width = 1 << rng.below(4);
    // Headers align their numbers more often than not.
    let at = if rng.below(2) == 0 { at / width * width } else { at };
    let Some(field) = input.get_mut(at..at + width) else { return };
    let mut bytes = [0; 8];
    bytes[..width].copy_from_slice(field);
    let old = u64::from_le_bytes(bytes);
    let new = match rng.below(3) {
        0 => EDGES[rng.below(EDGES.len())],
        1 => old.wrapping_add(rng.below(17) as u64).wrapping_sub(8),
        _ => old << rng.below(64),
    };
    field.copy_from_slice(&new.to_le_bytes()[..width]);
}

/// Puts a word in place of the run of letters and digits at `at`.
fn replace_token(rng: &mut Rng, input: &mut Vec<u8>, at: usize) {
    let is_word = |byte: &u8| byte.is_ascii_alphanumeric() || *byte == b'.' || *byte == b'-';
    let start = input[..at].iter().rposition(|byte| !is_word(byte)).map_or(0, |before| before + 1);
    let end = input[at..].iter().position(|byte| !is_word(byte)).map_or(input.len(), |after| at + after);
    let word = WORDS[rng.below(WORDS.len())].as_bytes().to_vec();
    input.splice(start..end, word);
}
