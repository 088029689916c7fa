use std::{fs, io, ops::Range, path::Path};

use serde_json::{Map, Value, json};

/// Bytes and a special token come first; the rest are words.
const VOCAB_SIZE: usize = 2048;
/// The words.
pub(super) const WORDS: Range<u32> = 257..VOCAB_SIZE as u32;
const END: &str = "<|end|>";
const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:";

const HIDDEN: usize = 32;
const HEADS: usize = 2;
const HEAD_DIM: usize = HIDDEN / HEADS;
const LAYERS: usize = 2;

/// Writes the files of a small Llama without weights into `folder`: its shape says how large pages are, its tokenizer
/// and template are used as any model's. Equal arguments give equal files: mocks on different hosts serve the same
/// model.
pub(super) fn write(folder: &Path, max_model_len: usize) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let write = |name: &str, json: Value| fs::write(folder.join(name), json.to_string());
    write("config.json", config(max_model_len))?;
    write("tokenizer.json", tokenizer())?;
    write("tokenizer_config.json", json!({"chat_template": TEMPLATE, "eos_token": END}))
}

fn config(max_model_len: usize) -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "torch_dtype": "float32",
        "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": 1, "head_dim": HEAD_DIM,
        "max_position_embeddings": max_model_len, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "tie_word_embeddings": false, "eos_token_id": 256,
    })
}

/// A vocabulary of all bytes, one special token, and words to answer in. Without merges, text is encoded byte by byte.
fn tokenizer() -> Value {
    let mut vocabulary = Map::new();
    let mut add = |name: String| {
        let id = vocabulary.len();
        vocabulary.entry(name).or_insert(id.into());
    };
    (0..=u8::MAX).for_each(|byte| add(spelling(byte).into()));
    add(END.to_owned());
    let consonants = "bdfghjklmnprstvwz".chars();
    let syllables: Vec<String> =
        consonants.flat_map(|consonant| "aeiou".chars().map(move |vowel| format!("{consonant}{vowel}"))).collect();
    let words = syllables.iter().flat_map(|first| syllables.iter().map(move |second| format!("{first}{second}")));
    // `Ġ` is a space.
    words.step_by(4).take(WORDS.len()).for_each(|word| add(format!("\u{120}{word}")));
    let bytes = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    json!({
        "version": "1.0",
        "added_tokens": [{
            "id": 256, "content": END, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false,
        }],
        "normalizer": null, "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {
            "type": "BPE", "vocab": vocabulary, "merges": [], "dropout": null, "unk_token": null,
            "continuing_subword_prefix": null, "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
        },
    })
}

/// How byte-level vocabularies spell a byte: printable Latin-1 as itself, the others from U+0100 on (GPT-2's alphabet).
fn spelling(byte: u8) -> char {
    let printable = |byte: u8| matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
    if printable(byte) {
        return byte.into();
    }
    let others_before = (0..byte).filter(|&other| !printable(other)).count() as u32;
    char::from_u32(0x100 + others_before).unwrap_or(char::REPLACEMENT_CHARACTER)
}

#[cfg(test)]
mod tests {
    use engine_models::{LoadFormat, ModelSource, OpenOptions};

    use super::*;

    #[test]
    fn the_model_opens_and_its_tokenizer_reads_all_text() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 4096).unwrap();
        let options = OpenOptions { load_format: LoadFormat::Dummy, ..OpenOptions::default() };
        let source = ModelSource::open(folder.path().to_str().unwrap(), &options).unwrap();
        assert!(source.chat_template().is_some());
        assert_eq!(source.config().vocab_size, VOCAB_SIZE);
        let tokenizer = source.tokenizer().unwrap();
        assert_eq!(tokenizer.vocab_size(), VOCAB_SIZE);
        let text = "Grüße, 世界! 🙂\n\t";
        let tokens = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokens.len(), text.len());
        assert_eq!(tokenizer.decode(&tokens, true), text);
        assert_eq!(tokenizer.token_to_id(END), Some(256));
        assert!(tokenizer.token_bytes(VOCAB_SIZE as u32 - 1).starts_with(b" "));
    }
}
