#[path = "../../../tests/support/assets.rs"]
mod assets;

use std::sync::{Arc, LazyLock};

use proptest::prelude::*;
use serde_json::{Value, json};

use assets::{cached, demo_model};

use super::{EncodeError, Tokenizer, TokenizerError};
use crate::gguf::Gguf;
use crate::gguf::testing::GgufWriter;

static DEMO: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_gguf(&Gguf::open(&demo_model()).unwrap()).unwrap()));

static QWEN3: LazyLock<Arc<Tokenizer>> =
    LazyLock::new(|| Arc::new(Tokenizer::from_file(&cached("qwen3-tokenizer/tokenizer.json", "test-assets")).unwrap()));

/// Made by Hugging Face's tokenizers: tests/reference/make_token_goldens.py.
static GOLDENS: LazyLock<Vec<Value>> =
    LazyLock::new(|| serde_json::from_str(include_str!("../../../tests/reference/tokens.json")).unwrap());

fn streamed(tokenizer: &Arc<Tokenizer>, ids: &[u32], skip_special: bool) -> String {
    let mut stream = tokenizer.decode_stream(skip_special);
    let mut text = String::new();
    ids.iter().for_each(|&id| text.push_str(stream.push(id)));
    text + stream.finish()
}

fn check_goldens(tokenizer: &Arc<Tokenizer>, name: &str) {
    for case in GOLDENS.iter() {
        let text = case["text"].as_str().unwrap();
        let expected: Vec<u32> = serde_json::from_value(case[name]["ids"].clone()).unwrap();
        assert_eq!(tokenizer.encode(text, false).unwrap(), expected, "{text:?}");
        assert_eq!(tokenizer.encode_bounded(text, false, expected.len()).unwrap(), expected, "{text:?}");
        for (key, skip_special) in [("decoded", false), ("without_special", true)] {
            let decoded = case[name][key].as_str().unwrap_or(text);
            assert_eq!(tokenizer.decode(&expected, skip_special), decoded, "{text:?}");
            assert_eq!(streamed(tokenizer, &expected, skip_special), decoded, "{text:?}");
        }
    }
}

#[test]
fn the_demo_models_ids_are_those_of_hugging_face() {
    check_goldens(&DEMO, "smollm2");
}

#[test]
fn qwen3s_ids_are_those_of_hugging_face() {
    check_goldens(&QWEN3, "qwen3");
}

#[test]
fn special_tokens_have_names_and_ids() {
    let end = DEMO.token_to_id("<|im_end|>").unwrap();
    assert!(DEMO.is_special(end) && !DEMO.is_special(1000) && !DEMO.is_special(u32::MAX));
    assert_eq!(DEMO.token_name(end).as_deref(), Some("<|im_end|>"));
    assert_eq!(DEMO.vocab_size(), 49_152);
    assert_eq!(DEMO.token_bytes(u32::MAX), b"");
    // Qwen3's tool call marks are added tokens, but text.
    let call = QWEN3.token_to_id("<tool_call>").unwrap();
    assert!(!QWEN3.is_special(call));
    assert_eq!(QWEN3.decode(&[call], true), "<tool_call>");
}

#[test]
fn tokens_that_are_no_text_by_themselves_have_names_of_their_own() {
    let ids = DEMO.encode("🙂", false).unwrap();
    assert!(ids.len() > 1 && DEMO.token_name(u32::MAX).is_none());
    for &id in &ids {
        assert_eq!(DEMO.token_to_id(&DEMO.token_name(id).unwrap()), Some(id));
    }
}

#[test]
fn text_far_beyond_the_limit_is_refused_without_tokenizing_it() {
    // Had all of it been tokenized, `at_least` would be the whole count.
    for text in ["Some words, and more. ".repeat(200_000), "你好，世界。".repeat(200_000), "x".repeat(4_000_000)]
    {
        for tokenizer in [&*DEMO, &*QWEN3] {
            let limit = 1000;
            let Err(EncodeError::TooLong { at_least, .. }) = tokenizer.encode_bounded(&text, false, limit) else {
                panic!("not refused");
            };
            assert!(at_least > limit && at_least < 100 * limit, "{at_least}");
        }
    }
}

#[test]
fn the_limit_itself_is_allowed_and_one_more_is_not() {
    let text = "Counting tokens is exact at the limit. ".repeat(50);
    let ids = DEMO.encode(&text, false).unwrap();
    assert_eq!(DEMO.encode_bounded(&text, false, ids.len()).unwrap(), ids);
    let refused = DEMO.encode_bounded(&text, false, ids.len() - 1);
    assert_eq!(refused, Err(EncodeError::TooLong { at_least: ids.len(), limit: ids.len() - 1 }));
}

#[test]
fn a_character_spread_over_tokens_appears_with_the_last_of_them() {
    let ids = DEMO.encode("𒀀", false).unwrap();
    assert!(ids.len() > 1);
    let mut stream = DEMO.decode_stream(false);
    let texts: Vec<String> = ids.iter().map(|&id| stream.push(id).to_owned()).collect();
    assert!(texts[..ids.len() - 1].iter().all(String::is_empty), "{texts:?}");
    assert_eq!(texts[ids.len() - 1], "𒀀");
    assert_eq!(stream.finish(), "");

    let mut stream = DEMO.decode_stream(false);
    assert_eq!(stream.push(ids[0]), "");
    assert_eq!(stream.finish(), "\u{fffd}");
    assert_eq!(stream.finish(), "");
}

/// A SentencePiece vocabulary: three special tokens, 256 bytes, a few pieces.
fn sentence_piece() -> GgufWriter {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(String::from).to_vec();
    let mut types = vec![2, 3, 3];
    let mut scores = vec![0.0; 3];
    for byte in 0..=255 {
        tokens.push(format!("<0x{byte:02X}>"));
        types.push(6);
        scores.push(0.0);
    }
    for (i, piece) in ["he", "ll", "▁w", "or", "▁he", "ld", "hell", "▁hell", "▁hello", "wor"].iter().enumerate()
    {
        tokens.push((*piece).into());
        types.push(1);
        scores.push(-(i as f32));
    }
    for c in "▁helowrd".chars() {
        tokens.push(c.into());
        types.push(1);
        scores.push(-1e6);
    }
    let mut writer = GgufWriter::default();
    let mut bytes = 6u32.to_le_bytes().to_vec();
    bytes.extend((scores.len() as u64).to_le_bytes());
    scores.iter().for_each(|score| bytes.extend(score.to_le_bytes()));
    writer.string("tokenizer.ggml.model", "llama");
    writer.strings("tokenizer.ggml.tokens", &tokens.iter().map(String::as_str).collect::<Vec<_>>());
    writer.i32s("tokenizer.ggml.token_type", &types);
    writer.raw("tokenizer.ggml.scores", 9, &bytes);
    writer.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.eos_token_id", 2);
    writer
}

fn load(writer: &GgufWriter) -> Result<Arc<Tokenizer>, TokenizerError> {
    Ok(Arc::new(Tokenizer::from_gguf(&Gguf::from_bytes(writer.build()).unwrap())?))
}

#[test]
fn sentence_piece_merges_by_score_and_falls_back_to_bytes() {
    let tokenizer = load(&sentence_piece()).unwrap();
    let names = |text: &str| -> Vec<String> {
        let ids = tokenizer.encode(text, true).unwrap();
        ids.iter().map(|&id| tokenizer.token_name(id).unwrap()).collect()
    };
    // `▁w` scores better than `or`, and so keeps `wor` from ever being made.
    assert_eq!(names("hello world"), ["<s>", "▁hello", "▁w", "or", "ld"]);
    assert_eq!(names("é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    for text in ["hello world", "é", " two  spaces ", "日本 👍\n", "</s>"] {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids, false), text);
        assert_eq!(streamed(&tokenizer, &ids, false), text);
    }
    let ids = tokenizer.encode("world", false).unwrap();
    let mut stream = tokenizer.continue_stream(true);
    assert_eq!(stream.push(ids[0]), " w");
}

#[test]
fn a_file_says_which_tokens_go_around_a_text() {
    let ids = |writer: &GgufWriter, add_special| load(writer).unwrap().encode("he", add_special).unwrap();
    let bare = ids(&sentence_piece(), false);
    assert_eq!(ids(&sentence_piece(), true), [&[1], &bare[..]].concat());
    let mut both = sentence_piece();
    both.bool("tokenizer.ggml.add_eos_token", true);
    assert_eq!(ids(&both, true), [&[1], &bare[..], &[2]].concat());
    let mut neither = sentence_piece();
    neither.bool("tokenizer.ggml.add_bos_token", false);
    assert_eq!(ids(&neither, true), bare);
}

#[test]
fn a_user_defined_token_is_text_unless_it_ends_answers() {
    let mut writer = GgufWriter::default();
    writer.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", "qwen2");
    writer.strings("tokenizer.ggml.tokens", &["a", "<|im_end|>", "<tool_call>"]).strings("tokenizer.ggml.merges", &[]);
    writer.i32s("tokenizer.ggml.token_type", &[1, 4, 4]);
    let tokenizer = load(&writer).unwrap();
    let ids = tokenizer.encode("a<tool_call><|im_end|>", true).unwrap();
    assert_eq!(ids, [0, 2, 1]);
    assert_eq!(tokenizer.decode(&ids, true), "a<tool_call>");
    assert_eq!(tokenizer.decode(&ids, false), "a<tool_call><|im_end|>");
}

#[test]
fn what_is_not_supported_is_named() {
    let mut writer = GgufWriter::default();
    writer.string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", &["a", "b", "ab"]);
    writer.strings("tokenizer.ggml.merges", &["a b"]);
    let error = load(&writer).unwrap_err().to_string();
    assert!(error.contains("`tokenizer.ggml.pre`"), "{error}");
    writer.string("tokenizer.ggml.pre", "klingon");
    let error = load(&writer).unwrap_err().to_string();
    assert!(error.contains("`klingon`") && error.contains("qwen2"), "{error}");

    let mut writer = GgufWriter::default();
    writer.string("tokenizer.ggml.model", "bert").strings("tokenizer.ggml.tokens", &["a"]);
    assert!(load(&writer).unwrap_err().to_string().contains("`bert`"));
    assert!(load(&GgufWriter::default()).unwrap_err().to_string().contains("tokenizer.ggml.tokens"));

    let json = json!({"version": "1.0", "added_tokens": [], "normalizer": null, "pre_tokenizer": null,
        "post_processor": null, "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": true},
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}});
    assert!(Tokenizer::from_json(json).unwrap_err().to_string().contains("`WordPiece`"));
}

#[test]
fn a_file_that_does_not_say_how_words_are_split_is_told_by_its_model() {
    let ids = |architecture: &str, token: &str| {
        let mut writer = GgufWriter::default();
        writer.string("general.architecture", architecture).string("tokenizer.ggml.model", "gpt2");
        writer.strings("tokenizer.ggml.tokens", &["1", "11", token]).strings("tokenizer.ggml.merges", &["1 1"]);
        writer.bool("tokenizer.ggml.add_bos_token", false);
        Ok::<_, TokenizerError>(load(&writer)?.encode("1111", true).unwrap())
    };
    // A word has one digit there, and up to three here.
    assert_eq!(ids("qwen2", "a").unwrap(), [0, 0, 0, 0]);
    assert_eq!(ids("qwen3", "a").unwrap(), [0, 0, 0, 0]);
    assert_eq!(ids("llama", "<|begin_of_text|>").unwrap(), [1, 0, 0]);
    let error = ids("llama", "a").unwrap_err().to_string();
    assert!(error.contains("`tokenizer.ggml.pre`"), "{error}");
}

#[test]
fn every_known_pre_tokenizer_is_one_tokenizers_accepts() {
    let names =
        ["smollm", "gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "tekken", "seed-coder", "deepseek-coder", "default"];
    for pre in names {
        let mut writer = GgufWriter::default();
        writer.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", pre);
        writer.strings("tokenizer.ggml.tokens", &["a", "Ġ", "1", "Ġa"]).strings("tokenizer.ggml.merges", &["Ġ a"]);
        writer.bool("tokenizer.ggml.add_bos_token", false);
        assert_eq!(load(&writer).unwrap().encode("a a1", true).unwrap(), [0, 3, 2], "{pre}");
    }
}

#[test]
fn words_are_split_as_llama_cpp_splits_them() {
    let ids = |pre: &str, text: &str| {
        let mut writer = GgufWriter::default();
        writer.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", pre);
        writer.strings("tokenizer.ggml.tokens", &["1", "11", "Ċ", "ĊĊ", "a", "b", "ab", "!", "!Ċ"]);
        writer.strings("tokenizer.ggml.merges", &["1 1", "Ċ Ċ", "! Ċ"]);
        writer.bool("tokenizer.ggml.add_bos_token", false);
        load(&writer).unwrap().encode(text, true).unwrap()
    };
    for pre in ["mellum", "a.x-4.0", "trillion", "pixtral", "midm-2.0", "smaug-bpe"] {
        assert_eq!(ids(pre, "11\n\n"), [1, 3], "{pre}");
    }
    assert_eq!(ids("minerva-7b", "11\n\n"), [0, 0, 3]);
    assert_eq!(ids("seed-coder", "11\n\n"), [0, 0, 3]);
    assert_eq!(ids("deepseek-coder", "11\n\n"), [0, 0, 2, 2]);
    assert_eq!(ids("smaug-bpe", "!\n"), [8]);
    assert_eq!(ids("seed-coder", "!\n"), [7, 2]);
    // Made by no merge.
    assert_eq!(ids("pixtral", "ab"), [6]);
    assert_eq!(ids("smaug-bpe", "ab"), [4, 5]);
}

proptest! {
    #[test]
    fn any_text_survives_encoding_and_decoding(text in any::<String>()) {
        let ids = DEMO.encode(&text, true).unwrap();
        prop_assert_eq!(&DEMO.decode(&ids, false), &text);
        prop_assert_eq!(&streamed(&DEMO, &ids, false), &text);
    }

    #[test]
    fn any_ids_stream_to_what_they_decode_to(ids in prop::collection::vec(0u32..50_000, 0..40), skip: bool) {
        prop_assert_eq!(streamed(&DEMO, &ids, skip), DEMO.decode(&ids, skip));
    }

    #[test]
    fn byte_tokens_stream_to_what_they_decode_to(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let ids: Vec<u32> = bytes.iter().map(|&byte| 3 + u32::from(byte)).collect();
        static TOKENIZER: LazyLock<Arc<Tokenizer>> = LazyLock::new(|| load(&sentence_piece()).unwrap());
        prop_assert_eq!(streamed(&TOKENIZER, &ids, false), TOKENIZER.decode(&ids, false));
    }

    #[test]
    fn a_bound_never_refuses_what_fits(words in prop::collection::vec("[ -~]{0,12}|\\PC{0,6}", 0..4000)) {
        let text = words.concat();
        let count = DEMO.encode(&text, false).unwrap().len();
        prop_assert!(super::bounded::at_least(&DEMO, &text, count).unwrap() <= count);
    }
}
