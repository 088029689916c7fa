use serde_json::json;

use super::*;

/// Ends an answer.
const END: u32 = 256;
/// Another token that is no text, though it has some.
const SPECIAL: u32 = 257;
/// Words beside the bytes.
const WORDS: [&str; 5] = ["true", "null", " the", "{\"", "yes"];
/// With what pads it.
const VOCABULARY: usize = 300;

/// A vocabulary of all bytes, two special tokens, and a few words.
fn vocabulary() -> Vocabulary {
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    tokens.extend([b"<end>".to_vec(), Vec::new()]);
    tokens.extend(WORDS.map(|word| word.as_bytes().to_vec()));
    tokens.resize(VOCABULARY, Vec::new());
    Vocabulary::of_tokens(tokens, &[END]).unwrap()
}

fn matcher(source: Source) -> Matcher {
    vocabulary().compile(source).unwrap().matcher()
}

fn allowed(matcher: &mut Matcher) -> Vec<u32> {
    matcher.allowed().unwrap().tokens().collect()
}

/// Whether a text, byte by byte, fits, and an answer may end with it.
fn fits(matcher: &Matcher, text: &str) -> bool {
    let mut matcher = matcher.clone();
    for byte in text.bytes() {
        if matcher.is_complete() || !allowed(&mut matcher).contains(&byte.into()) {
            return false;
        }
        matcher.take(byte.into()).unwrap();
    }
    matcher.is_complete() || allowed(&mut matcher).contains(&END)
}

fn refusal(source: Source) -> String {
    vocabulary().compile(source).unwrap_err().to_string()
}

fn regex(regex: &str) -> Source {
    Source::Regex(regex.to_owned())
}

#[test]
fn json_has_to_fit_its_schema() {
    let schema = json!({
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
            "next": {"anyOf": [{"$ref": "#/$defs/link"}, {"type": "null"}]},
        },
        "required": ["name", "age"],
        "additionalProperties": false,
        "$defs": {"link": {"type": "object", "properties": {"to": {"const": 1}}, "required": ["to"],
            "additionalProperties": false}},
    });
    let matcher = matcher(Source::JsonSchema(schema));
    for text in [
        r#"{"name":"Bob","age":5}"#,
        r#"{"name": "B\"ü", "age": 150, "tags": ["a", "b"]}"#,
        "{\n    \"name\": \"\",\n    \"age\": 0,\n    \"next\": {\"to\": 1}\n}",
        r#"{"name":"x","age":1,"next":null}"#,
    ] {
        assert!(fits(&matcher, text), "{text}");
    }
    for text in [
        "",
        "{}",
        r#"{"name":"Robert","age":5}"#,
        r#"{"name":"Bob","age":151}"#,
        r#"{"name":"Bob","age":5.5}"#,
        r#"{"name":"Bob","age":5,"more":1}"#,
        r#"{"name":"Bob","age":5,"tags":["a","b","a"]}"#,
        r#"{"name":"Bob","age":5,"next":{"to":2}}"#,
        r#"{"name":"Bob","age":5}x"#,
        r#"["name"]"#,
    ] {
        assert!(!fits(&matcher, text), "{text}");
    }
}

#[test]
fn between_the_parts_of_json_there_is_no_endless_white() {
    let matcher = matcher(Source::json_object());
    assert!(fits(&matcher, "{\n    \"a\": [1, 2]}"));
    assert!(!fits(&matcher, "{  \"a\": 1}"));
    assert!(!fits(&matcher, &format!("{{\n{}\"a\": 1}}", " ".repeat(41))));
    assert!(!fits(&matcher, "{\n\n\n\"a\": 1}"));
}

#[test]
fn a_regular_expression_matches_the_whole_answer() {
    let digits = matcher(regex(r"^\d{2,3}/[a-c]+$"));
    assert!(fits(&digits, "12/a") && fits(&digits, "123/cba"));
    assert!(!fits(&digits, "1/a") && !fits(&digits, "12/") && !fits(&digits, "1234/a") && !fits(&digits, "12/d"));
    // That dollar is one.
    let price = matcher(regex(r"\d\$"));
    assert!(fits(&price, "5$") && !fits(&price, "5"));
}

#[test]
fn one_of_the_choices_is_the_answer() {
    let texts = ["yes", "no", "no, but \"why\"?", "a.c\n(1|2)", "ü"];
    let matcher = matcher(Source::Choice(texts.map(str::to_owned).to_vec()));
    texts.iter().for_each(|text| assert!(fits(&matcher, text), "{text}"));
    ["", "ye", "yesno", "abc\n(1|2)", "no, "].iter().for_each(|text| assert!(!fits(&matcher, text), "{text}"));
}

#[test]
fn a_grammar_of_rules_is_followed() {
    let sums = "start: sum\nsum: product (\"+\" product)*\nproduct: NUMBER | \"(\" sum \")\"\nNUMBER: /[0-9]+/\n";
    let matcher = matcher(Source::Lark(sums.to_owned()));
    assert!(fits(&matcher, "1") && fits(&matcher, "1+22") && fits(&matcher, "((1+2)+3)+4"));
    assert!(!fits(&matcher, "(1") && !fits(&matcher, "1+") && !fits(&matcher, "1)"));
}

#[test]
fn json_texts_stand_in_their_frames() {
    let frame = |before: &str, schema: serde_json::Value| Frame {
        before: before.into(),
        schema,
        after: "}\n</b>".into(),
        strict: true,
    };
    let integer = json!({"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer", "minimum": 0, "maximum": 9}}});
    let frames = vec![
        frame("<b>\n{\"é\\\u{7f}\u{1}\u{2028} %json\": ", integer),
        frame("<b>\n{\"f\": ", json!({"type": "array", "items": {"const": 1}, "maxItems": 2})),
    ];
    let (one, other) = ("<b>\n{\"é\\\u{7f}\u{1}\u{2028} %json\": 7}\n</b>", "<b>\n{\"f\": [1, 1]}\n</b>");
    let framed = |open: &str, between: Option<&str>, close: &str, or| {
        let (open, frames, close) = (open.to_owned(), frames.clone(), close.to_owned());
        matcher(Source::Framed { open, frames, between: between.map(str::to_owned), close, or })
    };
    let alone = framed("", None, "", None);
    let or_null = framed("", None, "", Some(json!({"type": "null"})));
    let several = framed("", Some("; "), "", None);
    for text in [one, other] {
        assert!(fits(&alone, text) && fits(&several, text) && fits(&or_null, text), "{text}");
    }
    assert!(fits(&or_null, "null") && !fits(&alone, "null"));
    let both = format!("{one}; {other}; {one}");
    assert!(fits(&several, &both) && !fits(&alone, &both));
    for text in [
        "",
        "7",
        "<b>\n{\"f\": 7}\n</b>",
        "<b>\n{\"f\": [1,      1]}\n</b>",
        &format!("{one}; "),
        &format!("{one}{other}"),
    ] {
        assert!(!fits(&several, text), "{text}");
    }
    let (list, single) = (framed(" [", Some(", "), "]", None), framed(" [", None, "]", None));
    let (of_one, of_three) = (format!(" [{one}]"), format!(" [{one}, {other}, {one}]"));
    assert!(fits(&list, &of_one) && fits(&list, &of_three) && fits(&single, &of_one) && !fits(&single, &of_three));
    for text in
        [one, " []", &format!("[{one}]"), &format!(" [{one}"), &format!(" [{one}, ]"), &format!(" [{one}{one}]")]
    {
        assert!(!fits(&list, text), "{text}");
    }
}

/// JSON in brackets.
fn bracketed(schema: serde_json::Value, strict: bool) -> Source {
    let frames = vec![Frame { before: "(".into(), schema, after: ")".into(), strict }];
    Source::Framed { open: String::new(), frames, between: None, close: String::new(), or: None }
}

#[test]
fn what_a_schema_says_that_cannot_be_followed_says_nothing_unless_it_is_strict() {
    let object = |field: serde_json::Value| {
        let properties = json!({"field": field});
        json!({"type": "object", "properties": properties, "required": ["field"], "additionalProperties": false})
    };
    for (field, fitting, other) in [
        (json!({"type": "array", "items": {"enum": ["a"]}, "uniqueItems": true}), r#"["a","a"]"#, r#"["b"]"#),
        (json!({"type": "array", "items": {"type": "null"}, "contains": {"type": "null"}}), "[null]", "[1]"),
        (json!({"type": "object", "propertyNames": {"pattern": "^(?!x)"}}), r#"{"x":1}"#, "1"),
        (json!({"type": "object", "dependentRequired": {"a": ["b"]}}), r#"{"a":1}"#, "[]"),
        (json!({"type": "integer", "not": {"const": 1}}), "1", "1.5"),
        (json!({"type": "string", "format": "path"}), r#""/a b""#, "1"),
        (json!({"type": "string", "format": "binary", "maxLength": 2}), r#""ab""#, r#""abc""#),
        (json!({"anyOf": [{"type": "string", "pattern": r"^(?!^[-+.]*$)\d*$"}]}), r#""+""#, "1"),
        (json!({"type": "string", "pattern": "(?<=a)b"}), r#""c""#, "1"),
        (json!({"type": "string", "maxLength": 65_536}), r#""ab""#, "1"),
        (json!({"type": "integer", "multipleOf": 4_294_967_291_u64}), "3", r#""a""#),
        (json!({"type": "object", "patternProperties": {"^(?!x)": {"type": "null"}}}), "{}", "[]"),
    ] {
        let matcher = matcher(bracketed(object(field.clone()), false));
        assert!(fits(&matcher, &format!("({{\"field\":{fitting}}})")), "{field}");
        assert!(!fits(&matcher, &format!("({{\"field\":{other}}})")), "{field}");
        let said = refusal(bracketed(object(field), true));
        assert!(!said.is_empty() && !said.contains("%json"), "{said}");
    }
    // What can be followed is.
    let pattern = json!({"type": "string", "pattern": "^[ab]$"});
    let matcher = matcher(bracketed(pattern, false));
    assert!(fits(&matcher, r#"("a")"#) && !fits(&matcher, r#"("c")"#));
}

#[test]
fn each_of_several_texts_may_be_as_long_as_a_grammar() {
    let described = |bytes| json!({"type": "null", "description": "a".repeat(bytes)});
    let frame = |bytes, digit| Frame { before: digit, schema: described(bytes), after: String::new(), strict: false };
    let of = |bytes: usize, texts: usize| Source::Framed {
        open: String::new(),
        frames: (0..texts).map(|index| frame(bytes, format!("{index:02}"))).collect(),
        between: None,
        close: String::new(),
        or: None,
    };
    assert!(fits(&matcher(of(60_000, 8)), "07null"));
    assert!(refusal(of(70_000, 1)).contains("too large"));
    assert!(refusal(of(30_000, 20)).contains("too large"));
}

/// What a source describes, behind text between marks; `None`: the text has begun.
fn after(open: Option<&str>, then: Source) -> Source {
    Source::After { open: open.map(str::to_owned), close: "</t>".into(), then: Box::new(then) }
}

#[test]
fn before_what_is_described_there_may_be_any_text_up_to_a_mark() {
    for (then, fitting, other) in [
        (Source::JsonSchema(json!({"enum": ["a"]})), r#""a""#, "a"),
        (regex("[0-9]{2}/x"), "12/x", "1"),
        (Source::Choice(vec!["yes".into(), "no".into()]), "yes", "yesno"),
        (Source::Lark("start: \"[\" word \"]\"\nword: /[a-z]+/\n%ignore / /\n".into()), "[ ab]", "[]"),
        (bracketed(json!({"type": "integer", "minimum": 0, "maximum": 9}), true), "(7)", "7"),
    ] {
        let (begun, optional) = (matcher(after(None, then.clone())), matcher(after(Some("<t>"), then)));
        for text in ["", "a", "\nHm, \"<\" {</ é🙂 </t\n<t>\n"] {
            for space in ["", "\n", "\n\n"] {
                let whole = format!("{text}</t>{space}{fitting}");
                assert!(fits(&begun, &whole) && fits(&optional, &format!("<t>{whole}")), "{whole}");
                let whole = format!("{text}</t>{space}{other}");
                assert!(!fits(&begun, &whole) && !fits(&optional, &format!("<t>{whole}")), "{whole}");
            }
            assert!(!fits(&begun, text) && !fits(&optional, &format!("<t>{text}")), "{text}");
        }
        assert!(fits(&optional, fitting) && !fits(&optional, other) && !fits(&begun, fitting), "{fitting}");
        for whole in [format!("a</t>b</t>{fitting}"), format!("a</t>\n\n\n{fitting}")] {
            assert!(!fits(&begun, &whole), "{whole}");
        }
    }
}

#[test]
fn an_answer_may_end_when_it_is_complete_and_not_before() {
    let mut matcher = matcher(regex("ab?"));
    assert_eq!(allowed(&mut matcher), [u32::from(b'a')]);
    matcher.take(b'a'.into()).unwrap();
    assert!(!matcher.is_complete());
    assert_eq!(allowed(&mut matcher), [u32::from(b'b'), END]);
    let mut ended = matcher.clone();
    ended.take(END).unwrap();
    assert!(ended.is_complete());
    matcher.take(b'b'.into()).unwrap();
    assert!(matcher.is_complete());
    assert!(matcher.allowed().unwrap().is_empty(), "nothing follows");
}

#[test]
fn the_last_bracket_completes_json() {
    let mut matcher = matcher(Source::json_object());
    let text = br#"{"a": {}}"#;
    for (at, &byte) in text.iter().enumerate() {
        assert!(!matcher.is_complete(), "after {at} bytes");
        matcher.take(byte.into()).unwrap();
    }
    assert!(matcher.is_complete());
}

#[test]
fn special_tokens_and_what_pads_a_vocabulary_are_no_text() {
    let mut matcher = matcher(regex("(?s:.*)"));
    let ids = allowed(&mut matcher);
    assert!(ids.contains(&END), "an empty answer fits");
    assert!(!ids.contains(&SPECIAL));
    assert!(ids.iter().all(|&id| id <= SPECIAL + WORDS.len() as u32), "{ids:?}");
    // Letters, and every word.
    assert!(
        (u32::from(b'a')..=b'z'.into()).chain(SPECIAL + 1..=SPECIAL + WORDS.len() as u32).all(|id| ids.contains(&id))
    );
    // The text of the token that ends an answer is a text like any other.
    let mut spelled = self::matcher(regex("<end>"));
    assert_eq!(allowed(&mut spelled), [u32::from(b'<')]);
}

#[test]
fn tokens_of_several_bytes_may_come_where_their_bytes_may() {
    let mut matcher = matcher(Source::JsonSchema(json!({"type": "object", "properties": {"a": {"type": "boolean"}},
        "required": ["a"], "additionalProperties": false})));
    let word = |word: &str| SPECIAL + 1 + WORDS.iter().position(|&other| other == word).unwrap() as u32;
    let ids = allowed(&mut matcher);
    assert!(ids.contains(&word("{\"")) && !ids.contains(&word("true")) && !ids.contains(&END));
    matcher.take(word("{\"")).unwrap();
    b"a\":".iter().for_each(|&byte| matcher.take(byte.into()).unwrap());
    let ids = allowed(&mut matcher);
    assert!(ids.contains(&word("true")) && !ids.contains(&word("null")) && !ids.contains(&word("yes")));
    matcher.take(word("true")).unwrap();
    matcher.take(b'}'.into()).unwrap();
    assert!(matcher.is_complete());
}

#[test]
fn a_token_that_does_not_fit_is_an_error() {
    let mut matcher = matcher(regex("ab"));
    assert!(matcher.take(b'b'.into()).is_err());
    assert!(!matcher.is_complete());
    assert!(matcher.allowed().is_err());
}

#[test]
fn answers_of_one_grammar_do_not_disturb_each_other() {
    let grammar = vocabulary().compile(Source::Choice(vec!["ab".into(), "cd".into()])).unwrap();
    let (mut one, mut other) = (grammar.matcher(), grammar.matcher());
    one.take(b'a'.into()).unwrap();
    other.take(b'c'.into()).unwrap();
    assert_eq!((allowed(&mut one), allowed(&mut other)), (vec![u32::from(b'b')], vec![u32::from(b'd')]));
    assert_eq!(allowed(&mut grammar.matcher()), [u32::from(b'a'), u32::from(b'c')]);
}

#[test]
fn without_a_token_that_ends_answers_a_grammar_ends_them() {
    let tokens = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    let vocabulary = Vocabulary::of_tokens(tokens, &[]).unwrap();
    let mut matcher = vocabulary.compile(regex("a+b")).unwrap().matcher();
    matcher.take(b'a'.into()).unwrap();
    assert_eq!(allowed(&mut matcher), [u32::from(b'a'), u32::from(b'b')]);
    matcher.take(b'b'.into()).unwrap();
    assert!(matcher.is_complete());
}

#[test]
fn any_of_several_tokens_that_end_answers_may_end_one() {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let tokens = bytes.chain([b"<end>".to_vec(), b"<stop>".to_vec()]).collect();
    let beyond = 1000;
    let vocabulary = Vocabulary::of_tokens(tokens, &[END, SPECIAL, beyond]).unwrap();
    let mut matcher = vocabulary.compile(regex("ab?")).unwrap().matcher();
    assert_eq!(matcher.eos_token_ids(), [END, SPECIAL]);
    assert_eq!(allowed(&mut matcher), [u32::from(b'a')]);
    matcher.take(b'a'.into()).unwrap();
    assert_eq!(allowed(&mut matcher), [u32::from(b'b'), END, SPECIAL]);
    for end in [END, SPECIAL] {
        let mut ended = matcher.clone();
        ended.take(end).unwrap();
        assert!(ended.is_complete());
    }
}

#[test]
fn tokens_that_have_no_place_in_a_trie_never_come() {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let tokens = bytes.chain([b" ".repeat(600), b"\xffa".to_vec(), b" ".repeat(500)]).collect();
    let vocabulary = Vocabulary::of_tokens(tokens, &[]).unwrap();
    let ids = allowed(&mut vocabulary.compile(regex("(?s:.*)")).unwrap().matcher());
    assert_eq!(ids.into_iter().filter(|&id| id >= 0xff).collect::<Vec<_>>(), [258]);
}

#[test]
fn where_no_token_says_what_has_to_follow_none_may_come() {
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    tokens[usize::from(b'b')].clear();
    let mut matcher = Vocabulary::of_tokens(tokens, &[]).unwrap().compile(regex("ab")).unwrap().matcher();
    matcher.take(b'a'.into()).unwrap();
    assert!(allowed(&mut matcher).is_empty());
}

#[test]
fn what_makes_no_grammar_is_refused_with_a_reason() {
    let schema = Source::JsonSchema;
    let lark = |text: &str| Source::Lark(text.to_owned());
    for (source, reason) in [
        (schema(json!({"type": "strange"})), "strange"),
        (schema(json!(5)), "object"),
        (schema(json!(false)), "nothing"),
        (schema(json!({"$ref": "#/$defs/missing"})), "missing"),
        (schema(json!({"$ref": "http://example.com/schema.json"})), "example.com"),
        (schema(json!({"type": "string", "minLength": 5, "maxLength": 2})), ""),
        (regex("é/a(b"), "unclosed group (at '(b')"),
        (regex(r"(?=a)b"), "look-around"),
        (regex(r"a\bb"), "borders of words"),
        (after(None, regex("a*(b|[c")), "unclosed character class (at '[c')"),
        (Source::Choice(Vec::new()), "nothing to choose"),
        (lark("start: missing"), "missing"),
        (lark("begin: \"a\""), "start"),
        (lark("start: <|im_end|>"), "special tokens"),
        (lark(&format!("start: <[{SPECIAL}]>")), "no answer fits"),
        (after(None, lark(&format!("start: <[{SPECIAL}]>"))), "no answer fits"),
        (after(Some("<t>"), lark(&format!("start: <[{SPECIAL}]>"))), "no answer fits"),
        (lark(""), ""),
        (schema(json!({"type": "integer", "multipleOf": 4_294_967_291_u64})), "multipleOf"),
        (schema(json!({"type": "object", "x-guidance": {"lenient": true}})), "x-guidance"),
    ] {
        let said = refusal(source.clone());
        assert!(said.contains(reason) && !said.is_empty(), "{source:?}: {said}");
        assert!(!said.contains("<state>") && !said.contains("non-verbose") && said.len() < 1000, "{said}");
        assert!(!said.contains("start: /"), "{said}");
    }
}

#[test]
fn what_is_too_large_is_refused() {
    let long = "a".repeat(70_000);
    assert!(refusal(Source::Regex(long.clone())).contains("too large"));
    assert!(refusal(Source::Lark(format!("start: \"{long}\""))).contains("too large"));
    assert!(refusal(Source::JsonSchema(json!({"const": long}))).contains("too large"));
    assert!(refusal(Source::Choice((0..2000).map(|i| i.to_string()).collect())).contains("too large"));
    // What would take minutes of a thread, or more memory than an answer is worth.
    let patterns: serde_json::Map<_, _> = (0..100).map(|i| (format!("^a{i}"), json!({}))).collect();
    let members: Vec<_> = (0..300).map(|i| json!({"const": i})).collect();
    let at_once: Vec<_> = (0..17).map(|i| json!({"pattern": format!("^(a|b)*a(a|b){{{i}}}$")})).collect();
    for (schema, limit) in [
        (json!({"type": "object", "patternProperties": patterns}), "32"),
        (json!({"items": {"oneOf": members}}), "256"),
        (json!({"allOf": members}), "256"),
        (json!({"type": "string", "allOf": at_once}), "16"),
        (json!({"anyOf": [{"type": "null"}, {"type": "string", "minLength": 10_001}]}), "10000"),
        (json!({"type": "string", "pattern": "a?".repeat(3000)}), "4096"),
        (json!({"properties": {"text": {"type": "string", "maxLength": 10_001}}}), "10000"),
    ] {
        let said = refusal(Source::JsonSchema(schema));
        assert!(said.contains("too large") && said.contains(limit), "{said}");
    }
    assert!(refusal(regex(&"a?".repeat(3000))).contains("4096"));
    // Names of properties are no keywords.
    let named =
        json!({"type": "object", "properties": {"maxLength": {"type": "integer"}, "pattern": {"type": "null"}}});
    vocabulary().compile(Source::JsonSchema(named)).unwrap();
    assert!(refusal(Source::Lark(format!("start: {}\"a\"{}", "(".repeat(100), ")".repeat(100)))).contains("too large"));
}

#[test]
fn every_punctuation_mark_can_be_chosen() {
    let marks: Vec<String> =
        (b'!'..=b'~').filter(u8::is_ascii_punctuation).map(|mark| char::from(mark).to_string()).collect();
    let grammar = vocabulary().compile(Source::Choice(marks.clone())).unwrap();
    for mark in marks {
        let mut matcher = grammar.matcher();
        matcher.allowed().unwrap();
        matcher.take(u32::from(mark.as_bytes()[0])).unwrap();
        assert!(matcher.is_complete(), "{mark}");
    }
}

#[test]
fn one_of_several_that_nobody_can_tell_apart_is_any_of_them() {
    let union = json!({
        "oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}],
        "$defs": {"a": {"type": "integer"}, "b": {"type": "number"}},
    });
    let mut matcher = vocabulary().compile(Source::JsonSchema(union)).unwrap().matcher();
    matcher.allowed().unwrap();
    matcher.take(u32::from(b'7')).unwrap();
}

#[test]
fn the_longest_text_that_is_counted_can_be_followed_to_its_end() {
    let long = json!({"type": "string", "maxLength": 10_000});
    let mut matcher = vocabulary().compile(Source::JsonSchema(long)).unwrap().matcher();
    for byte in b"\"".iter().chain(&[b'a'; 10_000]).chain(b"\"") {
        matcher.allowed().unwrap();
        matcher.take(u32::from(*byte)).unwrap();
    }
    assert!(matcher.is_complete());
}

#[test]
fn grammars_that_are_made_to_take_long_are_refused_or_end_in_an_error() {
    let chain = (0..4700).map(|i| format!("r{i}: r{}\n", i + 1)).collect::<String>();
    let terminals = (0..4700).map(|i| format!("T{i}: T{}\n", i + 1)).collect::<String>();
    let mut nested = json!({"type": "integer"});
    (0..100).for_each(|_| nested = json!({"type": "array", "items": nested}));
    let hard = [
        regex("(a{1,1000}){1,1000}"),
        regex("((a|b|c)*d){1,30000}"),
        regex(&format!("({})*", (0..200).map(|i| format!("[ab]*a[ab]{{{i}}}c")).collect::<Vec<_>>().join("|"))),
        Source::Lark(format!("start: r0\n{chain}r4700: \"a\"\n")),
        Source::Lark(format!("start: T0\n{terminals}T4700: \"a\"\n")),
        Source::Lark("start: start start | \"a\" | \"\"\n".to_owned()),
        Source::JsonSchema(nested),
        Source::JsonSchema(json!({"type": "string", "maxLength": 1_000_000, "pattern": "^(a|b)*a(a|b){15}$"})),
        Source::JsonSchema(json!({"type": "array", "minItems": 100_000, "items": {"type": "integer"}})),
    ];
    let vocabulary = vocabulary();
    for source in hard {
        let Ok(grammar) = vocabulary.compile(source) else { continue };
        let mut matcher = grammar.matcher();
        // As a model would that has no mind of its own.
        for step in 0..300u64 {
            let Ok(mask) = matcher.allowed() else { break };
            let ids: Vec<u32> = mask.tokens().collect();
            let id = ids[(step.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as usize % ids.len()];
            if matcher.take(id).is_err() || matcher.is_complete() {
                break;
            }
        }
    }
}

#[test]
fn a_grammar_in_its_own_words_may_be_ambiguous_up_to_a_point() {
    // After each letter, as many ways to have come there as there are letters.
    let follow = |source: Source, begun: &str| {
        let mut matcher = matcher(source);
        begun.bytes().for_each(|byte| matcher.take(byte.into()).unwrap());
        (0..500u32).find(|_| matcher.allowed().and_then(|_| matcher.take(b'a'.into())).is_err())
    };
    let ambiguous = || Source::Lark("start: word\nword: word word | \"a\"\n".to_owned());
    let other = || Source::Lark("start: word*\nword: \"a\"\n".to_owned());
    let limit = follow(ambiguous(), "").unwrap();
    assert_eq!(follow(other(), ""), None);
    // Behind a text it is about the same.
    let behind = follow(after(None, ambiguous()), "b</t>").unwrap();
    assert!(limit.abs_diff(behind) < 20, "{limit} {behind}");
    assert_eq!(follow(after(None, other()), "b</t>"), None);
}
