//! The `tokenizer.json` a GGUF file's vocabulary came from.

use std::collections::HashMap;

use serde_json::{Value, json};

use super::TokenizerError;
use crate::gguf::{Array, Gguf};

/// `tokenizer.ggml.token_type`, after SentencePiece's.
mod token_type {
    pub(super) const UNKNOWN: i64 = 2;
    pub(super) const CONTROL: i64 = 3;
    pub(super) const USER_DEFINED: i64 = 4;
}

/// Texts of tokens that end an answer, as llama.cpp has them: many files name only one end token, and another is what
/// their chat template ends turns with. Those of architectures that are not read here are left out.
const END_TEXTS: [&str; 17] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
    "</s>",
];

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const SEED_CODER: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+";

/// How byte-level BPE vocabularies split text into words, by the names llama.cpp gives them (`tokenizer.ggml.pre`).
struct PreTokenizer {
    names: &'static [&'static str],
    /// Applied one after the other, each splitting what the previous one left.
    patterns: &'static [&'static str],
    /// A word that is in the vocabulary is one token, whatever the merges say.
    ignore_merges: bool,
    /// Canonical composition first.
    nfc: bool,
    /// Whether a text begins with the beginning-of-sequence token if the file does not say.
    add_bos: bool,
}

const PRE_TOKENIZERS: &[PreTokenizer] = &[
    PreTokenizer {
        names: &["smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"],
        patterns: &[r"\p{N}", GPT2],
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["gpt-2", "phi-2", "olmo", "mpt", "mellum", "a.x-4.0", "trillion"],
        patterns: &[GPT2],
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        nfc: false,
        add_bos: true,
    },
    PreTokenizer { names: &["smaug-bpe"], patterns: &[LLAMA3], ignore_merges: false, nfc: false, add_bos: false },
    PreTokenizer {
        names: &["qwen2", "deepseek-r1-qwen", "megrez"],
        patterns: &[QWEN2],
        ignore_merges: false,
        nfc: true,
        add_bos: false,
    },
    PreTokenizer { names: &["tekken"], patterns: &[TEKKEN], ignore_merges: true, nfc: false, add_bos: true },
    PreTokenizer { names: &["seed-coder"], patterns: &[SEED_CODER], ignore_merges: false, nfc: false, add_bos: false },
    PreTokenizer {
        names: &["deepseek-coder"],
        patterns: &[r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u{800}-\u{9fa5}\u{ac00}-\u{d7ff}]+", r"\p{N}"],
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
    PreTokenizer {
        names: &["default"],
        patterns: &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    },
];

/// Whether a token of this text and type ends an answer. Some conversions have called such tokens user-defined.
pub(crate) fn ends_answers(text: &str, kind: i64) -> bool {
    matches!(kind, token_type::CONTROL | token_type::USER_DEFINED) && END_TEXTS.contains(&text)
}

/// Translates the metadata of a GGUF file.
pub(super) fn tokenizer_json(file: &Gguf) -> Result<Value, TokenizerError> {
    let vocabulary = Vocabulary::read(file)?;
    match file.string("tokenizer.ggml.model")?.ok_or(TokenizerError::MissingKey { key: "tokenizer.ggml.model" })? {
        "gpt2" => byte_level(file, &vocabulary),
        "llama" => sentence_piece(file, &vocabulary),
        model => Err(TokenizerError::UnknownModel { model: model.into() }),
    }
}

/// The token list, and what is special in it.
struct Vocabulary<'a> {
    tokens: Vec<&'a str>,
    /// As many as tokens.
    types: Vec<i64>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a Gguf) -> Result<Self, TokenizerError> {
        let key = "tokenizer.ggml.tokens";
        let tokens: Vec<&str> = strings(file, key)?;
        let types = match file.array("tokenizer.ggml.token_type")? {
            Some(array) => array.integers().map(Iterator::collect).unwrap_or_default(),
            None => vec![1; tokens.len()],
        };
        if types.len() != tokens.len() {
            let problem = format!("{} types for {} tokens", types.len(), tokens.len());
            return Err(TokenizerError::Metadata { key: "tokenizer.ggml.token_type", problem });
        }
        Ok(Self { tokens, types })
    }

    fn ids(&self) -> Value {
        self.tokens.iter().enumerate().map(|(id, token)| (token.to_string(), Value::from(id))).collect()
    }

    /// Control tokens steer the model; user-defined ones are text that is never split, unless they end answers.
    fn added_tokens(&self) -> Value {
        let added = self.types.iter().zip(&self.tokens).enumerate().filter_map(|(id, (&kind, token))| {
            let special = matches!(kind, token_type::CONTROL | token_type::UNKNOWN) || ends_answers(token, kind);
            (special || kind == token_type::USER_DEFINED).then(|| {
                json!({
                    "id": id, "content": token, "special": special,
                    "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
                })
            })
        });
        added.collect()
    }

    /// What is put around a text: `tokenizer.ggml.add_bos_token` and `add_eos_token`.
    fn post_processor(&self, file: &Gguf, bos_default: bool) -> Result<Value, TokenizerError> {
        let mut pieces = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
        let mut special = serde_json::Map::new();
        for (flag, key, default) in [
            ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.bos_token_id", bos_default),
            ("tokenizer.ggml.add_eos_token", "tokenizer.ggml.eos_token_id", false),
        ] {
            if !file.boolean(flag)?.unwrap_or(default) {
                continue;
            }
            let id = file.unsigned(key)?.ok_or(TokenizerError::MissingKey { key })?;
            let token = usize::try_from(id)
                .ok()
                .and_then(|id| self.tokens.get(id))
                .ok_or_else(|| TokenizerError::Metadata { key, problem: format!("{id} is outside the vocabulary") })?;
            special.insert(token.to_string(), json!({"id": token, "ids": [id], "tokens": [token]}));
            let piece = json!({"SpecialToken": {"id": token, "type_id": 0}});
            pieces.insert(if flag.contains("bos") { 0 } else { pieces.len() }, piece);
        }
        if special.is_empty() {
            return Ok(Value::Null);
        }
        Ok(json!({"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": special}))
    }
}

fn strings<'a>(file: &'a Gguf, key: &'static str) -> Result<Vec<&'a str>, TokenizerError> {
    let array: Array<'a> = file.array(key)?.ok_or(TokenizerError::MissingKey { key })?;
    let strings = array.strings().ok_or(TokenizerError::Metadata { key, problem: "not a list of strings".into() })?;
    Ok(strings.collect())
}

/// GPT-2's kind: words are spelled in bytes, and merged by a list of pairs.
fn byte_level(file: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Value, TokenizerError> {
    let name = pre_tokenizer_name(file, vocabulary)?;
    let pre = PRE_TOKENIZERS.iter().find(|pre| pre.names.contains(&name)).ok_or_else(|| {
        let known = PRE_TOKENIZERS.iter().flat_map(|pre| pre.names).copied().collect::<Vec<_>>().join(", ");
        TokenizerError::UnknownPreTokenizer { pre: name.into(), known }
    })?;
    let key = "tokenizer.ggml.merges";
    let merges = strings(file, key)?;
    let merges: Option<Vec<_>> = merges.iter().map(|merge| split_merge(merge)).collect();
    let merges = merges.ok_or(TokenizerError::Metadata { key, problem: "an entry is not a pair".into() })?;
    let split = |pattern: &&str| {
        let pattern = json!({"Regex": pattern});
        json!({"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": false})
    };
    let mut steps: Vec<Value> = pre.patterns.iter().map(split).collect();
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    steps.push(bytes.clone());
    Ok(json!({
        "version": "1.0",
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": if pre.nfc { json!({"type": "NFC"}) } else { Value::Null },
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "post_processor": vocabulary.post_processor(file, pre.add_bos)?,
        "decoder": bytes,
        "model": {
            "type": "BPE", "vocab": vocabulary.ids(), "merges": merges, "ignore_merges": pre.ignore_merges,
            "dropout": null, "unk_token": null, "continuing_subword_prefix": null, "end_of_word_suffix": null,
            "fuse_unk": false, "byte_fallback": false,
        },
    }))
}

/// How words are split. Files from before that was written down are told by their model: llama.cpp takes `default` for
/// them, and warns that answers are the worse for it.
fn pre_tokenizer_name<'a>(file: &'a Gguf, vocabulary: &Vocabulary<'_>) -> Result<&'a str, TokenizerError> {
    let key = "tokenizer.ggml.pre";
    if let Some(name) = file.string(key)? {
        if name == "default" {
            tracing::warn!("{key} is `default`, which no model was trained with: its converter did not know the model");
        }
        return Ok(name);
    }
    match file.string("general.architecture")? {
        Some("qwen2" | "qwen3") => Ok("qwen2"),
        _ if vocabulary.tokens.contains(&"<|begin_of_text|>") => Ok("llama-bpe"),
        _ => Err(TokenizerError::MissingKey { key }),
    }
}

/// `a b`, the two sides of a merge. No side is empty, so a space at the very beginning belongs to the left one.
fn split_merge(merge: &str) -> Option<[&str; 2]> {
    let at = 1 + merge.bytes().skip(1).position(|byte| byte == b' ')?;
    let (left, right) = (&merge[..at], &merge[at + 1..]);
    (!right.is_empty()).then_some([left, right])
}

/// SentencePiece's kind: the pair whose union scores best is merged first, so the merges follow from the scores (as
/// transformers' `generate_merges` does it); what is not in the vocabulary is spelled in byte tokens.
fn sentence_piece(file: &Gguf, vocabulary: &Vocabulary<'_>) -> Result<Value, TokenizerError> {
    let key = "tokenizer.ggml.scores";
    let array = file.array(key)?.ok_or(TokenizerError::MissingKey { key })?;
    let scores: Vec<f64> = array.floats().map(Iterator::collect).unwrap_or_default();
    if scores.len() != vocabulary.tokens.len() {
        let problem = format!("{} scores for {} tokens", scores.len(), vocabulary.tokens.len());
        return Err(TokenizerError::Metadata { key, problem });
    }
    let space_prefix = file.boolean("tokenizer.ggml.add_space_prefix")?.unwrap_or(true);
    let mut normalizers = vec![json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})];
    let mut decoders = vec![
        json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
        json!({"type": "ByteFallback"}),
        json!({"type": "Fuse"}),
    ];
    if space_prefix {
        normalizers.insert(0, json!({"type": "Prepend", "prepend": "▁"}));
        decoders.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
    }
    let unknown = vocabulary.types.iter().position(|&kind| kind == token_type::UNKNOWN);
    Ok(json!({
        "version": "1.0",
        "added_tokens": vocabulary.added_tokens(),
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": null,
        "post_processor": vocabulary.post_processor(file, true)?,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE", "vocab": vocabulary.ids(), "merges": merges_by_score(&vocabulary.tokens, &scores),
            "ignore_merges": false, "dropout": null, "unk_token": unknown.map(|id| vocabulary.tokens[id]),
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true,
        },
    }))
}

/// Every way of making a token of two others, best score first; among equals the longer left side first, as
/// transformers has it.
fn merges_by_score<'a>(tokens: &[&'a str], scores: &[f64]) -> Vec<[&'a str; 2]> {
    let ids: HashMap<&str, usize> = tokens.iter().enumerate().map(|(id, token)| (*token, id)).collect();
    let mut merges = Vec::new();
    for (token, &score) in tokens.iter().zip(scores) {
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let mut local: Vec<_> = splits.filter_map(|(l, r)| Some((ids.get(l)?, ids.get(r)?, score, [l, r]))).collect();
        local.sort_by_key(|&(l, r, ..)| (l, r));
        merges.extend(local);
    }
    let length = |side: &str| side.chars().count();
    merges.sort_by(|(.., a_score, a), (.., b_score, b)| {
        b_score.total_cmp(a_score).then_with(|| (length(b[0]), length(b[1])).cmp(&(length(a[0]), length(a[1]))))
    });
    merges.into_iter().map(|(.., sides)| sides).collect()
}
