use serde_json::Value;

use super::TokenizerError;

/// How the names of tokens in a vocabulary stand for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spelling {
    /// GPT-2's: every byte is one printable character of the name (space is `Ġ`).
    ByteLevel,
    /// SentencePiece's: `▁` is a space, `<0x0A>` a byte if `byte_fallback`.
    SentencePiece { byte_fallback: bool },
}

/// The bytes each token adds to a text, and which tokens are special.
pub(super) struct TokenTable {
    /// All tokens' bytes, one after the other.
    bytes: Vec<u8>,
    /// Where each token's bytes end; they begin where the previous one's end.
    ends: Vec<u32>,
    special: Vec<bool>,
    longest: usize,
    strips_space: bool,
}

impl TokenTable {
    /// Builds the table for a tokenizer and the `decoder` part of its JSON.
    pub(super) fn new(tokenizer: &tokenizers::Tokenizer, decoder: &Value) -> Result<Self, TokenizerError> {
        let (spelling, strips_space) = read_decoder(decoder)?;
        let added = tokenizer.get_added_tokens_decoder();
        let highest_added = added.keys().copied().max().map_or(0, |id| id as usize + 1);
        let highest = tokenizer.get_vocab(false).into_values().max().map_or(0, |id| id as usize + 1);
        let len = highest.max(highest_added);
        let mut table =
            Self { bytes: Vec::new(), ends: Vec::new(), special: vec![false; len], longest: 1, strips_space };
        for id in 0..len as u32 {
            let start = table.bytes.len();
            if let Some(name) = tokenizer.id_to_token(id) {
                spelling.append_bytes(&name, &mut table.bytes);
            }
            table.longest = table.longest.max(table.bytes.len() - start);
            table.ends.push(table.bytes.len() as u32);
        }
        for (&id, token) in &added {
            table.special[id as usize] = token.special;
        }
        Ok(table)
    }

    /// Tokens.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    /// Bytes of the longest token.
    pub(super) fn longest(&self) -> usize {
        self.longest
    }

    /// Whether a text loses one leading space, which encoding had put there.
    pub(super) fn strips_space(&self) -> bool {
        self.strips_space
    }

    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }

    pub(super) fn is_special(&self, id: u32) -> bool {
        self.special.get(id as usize).copied().unwrap_or(false)
    }
}

impl Spelling {
    fn append_bytes(self, name: &str, out: &mut Vec<u8>) {
        match self {
            Self::ByteLevel => {
                let start = out.len();
                for c in name.chars() {
                    match byte_of(c) {
                        Some(byte) => out.push(byte),
                        None => {
                            // Added tokens are spelled as they are.
                            out.truncate(start);
                            out.extend_from_slice(name.as_bytes());
                            return;
                        }
                    }
                }
            }
            Self::SentencePiece { byte_fallback } => match byte_name(name) {
                Some(byte) if byte_fallback => out.push(byte),
                _ => out.extend_from_slice(name.replace('▁', " ").as_bytes()),
            },
        }
    }
}

/// The byte a character of GPT-2's alphabet stands for: printable Latin-1 for itself, the other 68 bytes, in order, as
/// the characters from U+0100 on (`bytes_to_unicode` of OpenAI's GPT-2).
fn byte_of(c: char) -> Option<u8> {
    match c as u32 {
        n @ (0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff) => Some(n as u8),
        n @ 0x100..=0x120 => Some((n - 0x100) as u8),
        n @ 0x121..=0x142 => Some((n - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// The byte of a token named `<0x..>`.
fn byte_name(name: &str) -> Option<u8> {
    let digits = name.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Reads the decoder of a `tokenizer.json`: how names stand for bytes, and whether a text loses a leading space.
fn read_decoder(decoder: &Value) -> Result<(Spelling, bool), TokenizerError> {
    let kind = decoder["type"].as_str().unwrap_or("none");
    let unknown = |name: &str| TokenizerError::UnknownDecoder { decoder: name.into() };
    match kind {
        "ByteLevel" => Ok((Spelling::ByteLevel, false)),
        "Metaspace" => {
            let prepends = decoder["prepend_scheme"] != "never" && decoder["add_prefix_space"] != false;
            Ok((Spelling::SentencePiece { byte_fallback: false }, prepends))
        }
        "Sequence" => {
            let steps = decoder["decoders"].as_array().map_or(&[][..], Vec::as_slice);
            let (mut byte_fallback, mut strips) = (false, false);
            for step in steps {
                match step["type"].as_str().unwrap_or("none") {
                    "ByteLevel" if steps.len() == 1 => return Ok((Spelling::ByteLevel, false)),
                    "Replace" if step["pattern"]["String"] == "▁" && step["content"] == " " => {}
                    "ByteFallback" => byte_fallback = true,
                    "Fuse" => {}
                    "Strip" if step["content"] == " " && step["start"] == 1 && step["stop"] == 0 => strips = true,
                    other => return Err(unknown(other)),
                }
            }
            Ok((Spelling::SentencePiece { byte_fallback }, strips))
        }
        other => Err(unknown(other)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpt2s_alphabet_is_inverted() {
        // The original, in the direction OpenAI wrote it.
        let mut next = 0x100;
        for byte in 0..=255u8 {
            let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
            let c = if printable {
                char::from(byte)
            } else {
                next += 1;
                char::from_u32(next - 1).unwrap()
            };
            assert_eq!(byte_of(c), Some(byte));
        }
        assert_eq!(byte_of('汉'), None);
    }
}
