//! What grammars cost, of the demo model and of Qwen3's tokenizer: printed, for people.

#[path = "../../tests/support/assets.rs"]
mod assets;

use std::time::{Duration, Instant};

use engine_models::{Tokenizer, gguf::Gguf};
use serde_json::json;

use super::*;

/// How long each mask took, and each token, in microseconds.
fn follow(grammar: &Grammar, tokens: &[u32]) -> (Vec<f64>, Vec<f64>) {
    let microseconds = |duration: Duration| 1e6 * duration.as_secs_f64();
    let mut matcher = grammar.matcher();
    let (mut masks, mut takes) = (Vec::new(), Vec::new());
    for &token in tokens {
        let started = Instant::now();
        let mask = matcher.allowed().unwrap();
        masks.push(microseconds(started.elapsed()));
        assert!(mask.allows(token), "the text fits");
        let started = Instant::now();
        matcher.take(token).unwrap();
        takes.push(microseconds(started.elapsed()));
    }
    (masks, takes)
}

#[test]
#[ignore = "prints what grammars cost, of the demo model and of Qwen3's tokenizer: make demo-model test-assets"]
fn what_masks_cost() {
    let demo = Tokenizer::from_gguf(&Gguf::open(&assets::demo_model()).unwrap()).unwrap();
    let qwen3 = Tokenizer::from_file(&assets::cached("qwen3-tokenizer/tokenizer.json", "test-assets")).unwrap();
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string"}, "age": {"type": "integer"}, "email": {"type": "string", "format": "email"},
            "address": {"type": "object", "properties": {
                "street": {"type": "string"}, "zip": {"type": "string", "pattern": "^[0-9]{5}$"},
            }, "required": ["street", "zip"], "additionalProperties": false},
            "tags": {"type": "array", "items": {"enum": ["new", "regular", "gone"]}},
            "note": {"type": "string", "maxLength": 200},
        },
        "required": ["name", "age", "email", "address", "tags", "note"], "additionalProperties": false,
    });
    let person = json!({
        "name": "Ada Lovelace", "age": 36, "email": "ada@example.com",
        "address": {"street": "12 St. James's Square", "zip": "10115"}, "tags": ["new", "regular"],
        "note": "The Engine weaves algebraical patterns just as the Jacquard loom weaves flowers and leaves.",
    });
    let text = serde_json::to_string_pretty(&person).unwrap();
    let thought = "Ada was born in 1815, so she was 36 when she died; she lived in London. ".repeat(20);
    let thought = format!("{thought}</think>\n\n{text}");
    let sums = "start: sum\nsum: product (\"+\" product)*\nproduct: NUMBER | \"(\" sum \")\"\nNUMBER: /[0-9]+/\n";
    for (name, tokenizer, vocab_size) in [("demo", demo, 49_152), ("Qwen3", qwen3, 151_936)] {
        let started = Instant::now();
        let vocabulary = Vocabulary::new(&tokenizer, vocab_size, &[2]).unwrap();
        println!("{name}: {vocab_size} tokens made ready in {:?}", started.elapsed());
        for (what, source, text) in [
            ("any JSON object", Source::json_object(), text.as_str()),
            ("JSON of a schema", Source::JsonSchema(schema.clone()), &text),
            (
                "a regular expression",
                Source::Regex(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ".to_owned()),
                "2026-11-29T07:08:09Z",
            ),
            (
                "JSON behind thoughts",
                Source::After {
                    open: None,
                    close: "</think>".to_owned(),
                    then: Box::new(Source::JsonSchema(schema.clone())),
                },
                &thought,
            ),
            ("sums by rules", Source::Lark(sums.to_owned()), "(12+3)+(6+(8+9))+10+11+12"),
        ] {
            let started = Instant::now();
            let grammar = vocabulary.compile(source.clone()).unwrap();
            let compiled = started.elapsed();
            let started = Instant::now();
            drop(vocabulary.cached(&source).unwrap());
            let copied = started.elapsed();
            let tokens = tokenizer.encode(text, false).unwrap();
            let (first, _) = follow(&grammar, &tokens);
            let later: (Vec<_>, Vec<_>) = (0..50).map(|_| follow(&grammar, &tokens)).unzip();
            let at = |values: &[f64], part: f64| {
                let mut sorted = values.to_vec();
                sorted.sort_by(f64::total_cmp);
                sorted[((sorted.len() - 1) as f64 * part) as usize]
            };
            let (masks, takes) = (later.0.concat(), later.1.concat());
            println!(
                "{name}, {what}, {} tokens: compiled in {compiled:?}, for another request copied in {copied:?}; masks \
                 of the first answer, µs p50 {:.0} max {:.0}; of later ones p50 {:.0} p99 {:.0} max {:.0}; a token p50 \
                 {:.1}",
                tokens.len(),
                at(&first, 0.5),
                at(&first, 1.0),
                at(&masks, 0.5),
                at(&masks, 0.99),
                at(&masks, 1.0),
                at(&takes, 0.5),
            );
        }
    }
}
