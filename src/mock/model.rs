use std::{fs, io, path::Path};

use serde_json::{Map, Value, json};

/// Special tokens and bytes come first; the rest are words.
const VOCAB_SIZE: usize = 1024;
const END: &str = "<|end|>";
const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:";

const HIDDEN: usize = 32;
const HEADS: usize = 2;
const HEAD_DIM: usize = HIDDEN / HEADS;
const LAYERS: usize = 2;

/// Writes the files of a small Llama into `folder`. Equal arguments give equal files: mocks on different hosts serve the
/// same model.
pub(super) fn write(folder: &Path, max_model_len: usize) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let write = |name: &str, json: Value| fs::write(folder.join(name), json.to_string());
    fs::write(folder.join("model.safetensors"), weights())?;
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

/// Made-up weights as a safetensors file. Unlike those that trained models begin with, they make attention look hard at
/// single positions and let what it finds there outweigh the token itself: what is answered then hangs on all of the
/// prompt's keys and values, as it must to show a page gone astray.
fn weights() -> Vec<u8> {
    let mut tensors = vec![
        ("model.embed_tokens.weight".to_owned(), vec![VOCAB_SIZE, HIDDEN], 6.0),
        ("model.norm.weight".to_owned(), vec![HIDDEN], 0.0),
        ("lm_head.weight".to_owned(), vec![VOCAB_SIZE, HIDDEN], 3.0),
    ];
    for layer in 0..LAYERS {
        for (name, shape, gain) in [
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN], 2.0),
            ("self_attn.k_proj", vec![HEAD_DIM, HIDDEN], 2.0),
            ("self_attn.v_proj", vec![HEAD_DIM, HIDDEN], 2.0),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN], 2.0),
            ("mlp.gate_proj", vec![HIDDEN, HIDDEN], 1.0),
            ("mlp.up_proj", vec![HIDDEN, HIDDEN], 1.0),
            ("mlp.down_proj", vec![HIDDEN, HIDDEN], 1.0),
            ("input_layernorm", vec![HIDDEN], 0.0),
            ("post_attention_layernorm", vec![HIDDEN], 0.0),
        ] {
            tensors.push((format!("model.layers.{layer}.{name}.weight"), shape, gain));
        }
    }
    let (mut header, mut data) = (Map::new(), Vec::new());
    let mut state = 1u64;
    for (name, shape, gain) in tensors {
        let start = data.len();
        for _ in 0..shape.iter().product() {
            // SplitMix64 (Steele, Lea and Flood 2014), as a number between -1 and 1.
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let bits = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            let uniform = ((bits >> 40) as f32) / 8_388_608.0 - 1.0;
            // Norms are ones; the others are spread so that a gain of 1 keeps the size of what they multiply.
            let spread = 3f32.sqrt() / (HIDDEN as f32).sqrt();
            let value = if gain == 0.0 { 1.0 } else { gain * spread * uniform };
            data.extend_from_slice(&f32::to_le_bytes(value));
        }
        header.insert(name, json!({"dtype": "F32", "shape": shape, "data_offsets": [start, data.len()]}));
    }
    let mut header = Value::Object(header).to_string().into_bytes();
    // Data starts at a multiple of eight bytes.
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
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
    words.step_by(9).take(VOCAB_SIZE - 257).for_each(|word| add(format!("\u{120}{word}")));
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
    use engine_models::{ModelSource, OpenOptions};

    use super::*;

    #[test]
    fn the_model_opens_and_its_tokenizer_reads_all_text() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 4096).unwrap();
        let source = ModelSource::open(folder.path().to_str().unwrap(), &OpenOptions::default()).unwrap();
        assert!(source.chat_template().is_some());
        assert_eq!(source.config().vocab_size, VOCAB_SIZE);
        let tokenizer = source.tokenizer().unwrap();
        assert_eq!(tokenizer.vocab_size(), VOCAB_SIZE);
        let text = "Grüße, 世界! 🙂\n\t";
        let tokens = tokenizer.encode(text, true).unwrap();
        assert_eq!(tokens.len(), text.len());
        assert_eq!(tokenizer.decode(&tokens, true), text);
        assert_eq!(tokenizer.token_to_id(END), Some(256));
        assert!(tokenizer.token_text(VOCAB_SIZE as u32 - 1).starts_with(' '));
    }
}
