use super::{EncodeError, Tokenizer};

/// Text is tokenized in pieces of about this many bytes when it may be too long.
const PIECE_BYTES: usize = 32 << 10;
/// Words on both sides of a cut are no longer than this, in bytes.
const WORD_BYTES: usize = 32;
/// How much more tokens the pieces on both sides of a cut may have than the whole: a token a byte of the two words, and
/// as much again for a special token's text that was cut in two.
const CUT_SLACK: usize = 4 * WORD_BYTES;
/// Normalizing may shorten text outside ASCII: canonical composition replaces at most this many bytes by one.
const COMPOSITION: usize = 4;
/// Text of up to this many bytes an allowed token is simply encoded; English has about four.
const DIRECT_BYTES_PER_TOKEN: usize = 8;

/// Encodes unless the text has more than `limit` tokens, which is found out at a cost that depends on `limit` rather
/// than on the text: no token is longer than the longest of the vocabulary, and pieces cut between words have about as
/// many tokens as the whole. Both give numbers the text certainly exceeds; only text they do not convict is encoded as
/// a whole.
pub(super) fn encode(
    tokenizer: &Tokenizer,
    text: &str,
    add_special: bool,
    limit: usize,
) -> Result<Vec<u32>, EncodeError> {
    if text.len() > DIRECT_BYTES_PER_TOKEN.saturating_mul(limit) {
        let at_least = at_least(tokenizer, text, limit)?;
        if at_least > limit {
            return Err(EncodeError::TooLong { at_least, limit });
        }
    }
    let ids = tokenizer.encode(text, add_special)?;
    if ids.len() > limit {
        return Err(EncodeError::TooLong { at_least: ids.len(), limit });
    }
    Ok(ids)
}

/// A number of tokens `text` certainly reaches; counting stops beyond `limit`.
pub(super) fn at_least(tokenizer: &Tokenizer, text: &str, limit: usize) -> Result<usize, EncodeError> {
    let by_length = |text: &str| {
        let shrink = if tokenizer.normalizes && !text.is_ascii() { COMPOSITION } else { 1 };
        text.len() / (shrink * tokenizer.table.longest())
    };
    let mut known = by_length(text);
    let (mut counted, mut rest) = (0, text);
    while known <= limit && !rest.is_empty() {
        let (piece, after) = rest.split_at(piece_len(rest));
        rest = after;
        // A piece without a place to cut is one enormous word: counting its tokens would say nothing about the whole.
        counted += match rest.is_empty() || is_cut(piece, rest) {
            true => tokenizer.encode(piece, false)?.len().saturating_sub(CUT_SLACK),
            false => by_length(piece),
        };
        known = known.max(counted);
    }
    Ok(known)
}

/// Where to end the next piece: at the last good cut of the first [`PIECE_BYTES`], or there if it has none.
fn piece_len(text: &str) -> usize {
    if text.len() <= PIECE_BYTES {
        return text.len();
    }
    let end = text.floor_char_boundary(PIECE_BYTES);
    let from = text.floor_char_boundary(end / 2);
    let starts = text[from..end].char_indices().map(|(at, _)| from + at);
    starts.rev().find(|&at| is_cut(&text[..at], &text[at..])).unwrap_or(end)
}

/// Whether every way of splitting text into words that is in use splits here, up to the two words next to it: between a
/// letter or digit and something else that begins a word, both words short.
fn is_cut(before: &str, after: &str) -> bool {
    let ends_word = before.chars().next_back().is_some_and(char::is_alphanumeric);
    let begins_word = after.chars().next().is_some_and(|c| !c.is_alphanumeric());
    let short = |mut chars: std::iter::Take<&mut dyn Iterator<Item = char>>| chars.any(|c| !c.is_alphanumeric());
    ends_word
        && begins_word
        && short((&mut before.chars().rev() as &mut dyn Iterator<Item = char>).take(WORD_BYTES / 4))
        && short((&mut after.chars().skip(1) as &mut dyn Iterator<Item = char>).take(WORD_BYTES / 4))
}
