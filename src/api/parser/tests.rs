use proptest::prelude::*;

use super::*;

fn wanted(thoughts: Thoughts, calls: Option<CallFormat>) -> Wanted {
    Wanted { thoughts, show_thoughts: true, calls, calls_opened: false, calls_max: usize::MAX }
}

/// Of an answer that has to be calls of a list, which the prompt has opened.
fn opened_list() -> Wanted {
    Wanted { calls_opened: true, ..wanted(Thoughts::No, Some(CallFormat::Mistral)) }
}

/// What `text` is when it comes in one piece, and whether it made calls.
fn read(wanted: Wanted, text: &str) -> (Pieces, bool) {
    let (mut parser, mut pieces) = (Parser::new(wanted), Pieces::default());
    parser.push(text, &mut pieces);
    parser.finish(&mut pieces);
    assert_eq!(parser.bytes_held(), 0);
    (pieces, parser.made_calls())
}

/// Thoughts, content, and names with arguments of calls.
fn told(wanted: Wanted, text: &str) -> (String, String, Vec<(String, String)>) {
    let (pieces, made_calls) = read(wanted, text);
    assert_eq!(made_calls, !pieces.calls.is_empty());
    let calls = pieces.calls.into_iter().enumerate().map(|(index, call)| {
        assert_eq!(call.index, index);
        (call.name, call.arguments)
    });
    (pieces.thoughts, pieces.content, calls.collect())
}

fn thoughts_and_content(thoughts: Thoughts, text: &str) -> (String, String) {
    let (thoughts, content, calls) = told(wanted(thoughts, None), text);
    assert!(calls.is_empty());
    (thoughts, content)
}

fn pair(thoughts: &str, content: &str) -> (String, String) {
    (thoughts.into(), content.into())
}

#[test]
fn what_a_model_was_taught_is_seen_from_its_template() {
    let parsers = |source: &str| {
        let Parsers { thoughts, calls } = Parsers::of_template(&ChatTemplate::new(source, "", "").unwrap());
        (thoughts, calls)
    };
    let goldens: serde_json::Value =
        serde_json::from_str(include_str!("../../../tests/reference/templates.json")).unwrap();
    let known = |name: &str| parsers(goldens["templates"][name].as_str().unwrap());
    assert_eq!(known("qwen3"), (true, Some(CallFormat::Hermes)));
    assert_eq!(known("smollm2"), (false, None));
    assert_eq!(parsers("{{ messages }}<think>"), (true, None));
    assert_eq!(parsers("{{ tools }} {\"name\": name, \"parameters\": values}"), (false, Some(CallFormat::Llama3Json)));
    assert_eq!(parsers("{{ tools }} {\"name\", \"parameters\"}[TOOL_CALLS] ["), (false, Some(CallFormat::Mistral)));
    // Nobody is told of functions; or calls are no JSON; or nothing shows how they are written.
    for source in [
        "<tool_call>",
        "{{ tools }}<tool_call><function=name>",
        "{{ tools }}<tool_call><arg_key>",
        "[TOOL_CALLS]",
        "{{ tools }}[TOOL_CALLS]name[ARGS]",
        "{{ tools }}",
    ] {
        assert_eq!(parsers(source), (false, None));
    }
}

#[test]
fn thoughts_are_told_from_what_is_said() {
    use Thoughts::{IfOpened, No, Opened};
    for (thoughts, text, expected) in [
        (IfOpened, "<think>\nHm.\n\nYes.\n</think>\n\nHello. ", pair("Hm.\n\nYes.", "Hello. ")),
        (IfOpened, "\n <think>a</think>b", pair("a", "b")),
        (Opened, "\nHm. <b\n</think>\nHello", pair("Hm. <b", "Hello")),
        // A model that does not think today.
        (IfOpened, "<think>\n\n</think>\n\nHello", pair("", "Hello")),
        (IfOpened, "\n Hello <think>a</think>", pair("", "\n Hello <think>a</think>")),
        (IfOpened, "<thinking", pair("", "<thinking")),
        // Cut off.
        (IfOpened, " <thin", pair("", " <thin")),
        (IfOpened, "<think>Hm.\n</thi", pair("Hm.\n</thi", "")),
        (Opened, "Hm.\n", pair("Hm.", "")),
        (Opened, "", pair("", "")),
        (No, "<think>a</think>b", pair("", "<think>a</think>b")),
    ] {
        assert_eq!(thoughts_and_content(thoughts, text), expected, "{text:?}");
    }
}

#[test]
fn thoughts_that_nobody_wants_to_see_are_left_out() {
    let wanted = Wanted { show_thoughts: false, ..wanted(Thoughts::IfOpened, None) };
    assert_eq!(told(wanted, "<think>a</think>b"), (String::new(), "b".into(), Vec::new()));
}

#[test]
fn whether_an_answer_begins_amid_thoughts_is_seen_from_what_it_follows() {
    assert_eq!(Thoughts::after("<|im_start|>assistant\n<think>\n"), Thoughts::Opened);
    assert_eq!(Thoughts::after("<think>\n\n</think>\n\n"), Thoughts::IfOpened);
    assert_eq!(Thoughts::after("what does <think> do?\n<|im_start|>assistant\n"), Thoughts::IfOpened);
    assert_eq!(Thoughts::amid("<think>\nFirst"), Thoughts::Opened);
    assert_eq!(Thoughts::amid("<think>a</think>The"), Thoughts::No);
    assert_eq!(Thoughts::amid("The"), Thoughts::No);
}

#[test]
fn what_has_a_form_has_it_behind_the_thoughts() {
    let form = || Source::Regex("a".into());
    assert_eq!(Thoughts::No.before(form()), form());
    for (thoughts, expected) in [(Thoughts::IfOpened, Some("<think>")), (Thoughts::Opened, None)] {
        let Source::After { open, close, then } = thoughts.before(form()) else { panic!("{thoughts:?}") };
        assert_eq!((open.as_deref(), &*close, *then), (expected, "</think>", form()));
    }
}

fn call(name: &str, arguments: &str) -> (String, String) {
    (name.into(), arguments.into())
}

#[test]
fn calls_stand_between_marks_anywhere_in_an_answer() {
    let read = |text: &str| told(wanted(Thoughts::IfOpened, Some(CallFormat::Hermes)), text);
    let one = "<tool_call>\n{\"name\": \"f\", \"arguments\": {\"b\": 1.5, \"a\": [\"</tool_call>\"]}}\n</tool_call>";
    let made = || call("f", "{\"b\": 1.5, \"a\": [\"</tool_call>\"]}");
    assert_eq!(read(one), (String::new(), String::new(), vec![made()]));
    assert_eq!(read(&format!("{one}\n{one}")), (String::new(), String::new(), vec![made(), made()]));
    let text = format!("<think>\nI call f.\n</think>\n\nOne moment.\n\n{one}\nDone\n");
    assert_eq!(read(&text), ("I call f.".into(), "One moment.\nDone".into(), vec![made()]));
    // Not closed, as some models leave their last one, or cut amid that.
    let open = one.strip_suffix("\n</tool_call>").unwrap();
    for end in ["", "\n", "\n</tool_c"] {
        assert_eq!(read(&format!(" {open}{end}")), (String::new(), String::new(), vec![made()]));
    }
    for (written, arguments) in [
        ("{\"name\": \"f\"}", "{}"),
        ("{\"arguments\": null, \"name\": \"f\"}", "{}"),
        ("{\"name\": \"f\", \"parameters\": {}, \"more\": 1}", "{}"),
        ("{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}", "{\"a\": 1}"),
        ("{\"name\": \"f\", \"arguments\": \"a\"}", "\"a\""),
    ] {
        let text = format!("<tool_call>{written}</tool_call>");
        assert_eq!(read(&text), (String::new(), String::new(), vec![call("f", arguments)]), "{text}");
    }
}

#[test]
fn arguments_are_told_as_they_were_written() {
    let arguments = "{\"id\": 123456789012345678901234567890, \"price\": 0.10, \"a\": [1e3 ,-0]}";
    for written in [
        format!("{{\"name\": \"f\", \"arguments\": {arguments}}}"),
        format!("{{ \"id\": {{\"arguments\": 1}}, \"p\\u0061rameters\" :\n{arguments} , \"name\": \"f\" }}"),
        format!("{{\"more\": 7, \"parameters\":{arguments},\"name\":\"f\"}}"),
    ] {
        let between_marks = format!("<tool_call>\n{written}\n</tool_call>");
        let hermes = told(wanted(Thoughts::No, Some(CallFormat::Hermes)), &between_marks);
        assert_eq!(hermes.2, [call("f", arguments)], "{written}");
        let bare = told(wanted(Thoughts::No, Some(CallFormat::Llama3Json)), &format!("{written}; {written}"));
        assert_eq!(bare.2, [call("f", arguments), call("f", arguments)], "{written}");
        let list = told(opened_list(), &format!("[{written},{written}]"));
        assert_eq!(list.2, [call("f", arguments), call("f", arguments)], "{written}");
    }
}

#[test]
fn what_only_looks_like_a_call_stays_what_was_said() {
    let format = Some(CallFormat::Hermes);
    for text in [
        "a <tool_call>{\"name\": </tool_call> b",
        "a\n<tool_call>f()</tool_call>",
        "<tool_call>{\"arguments\": {}}</tool_call>",
        "<tool_call>\n{\"name\": \"f\", \"argu",
        "<tool_call>\n{\"name\": \"</tool_call> and",
        "<tool_call>\n{say \"</tool_call> and",
        "a < b <tool",
        " \n",
    ] {
        assert_eq!(told(wanted(Thoughts::No, format), text), (String::new(), text.into(), Vec::new()));
    }
    // Where nobody offered a function, nothing looks like a call.
    let text = "<tool_call>{\"name\": \"f\"}</tool_call>";
    assert_eq!(told(wanted(Thoughts::No, None), text), (String::new(), text.into(), Vec::new()));
}

#[test]
fn whoever_writes_about_calls_is_not_held_up() {
    let (mut parser, mut pieces) = (Parser::new(wanted(Thoughts::No, Some(CallFormat::Hermes))), Pieces::default());
    parser.push("It says <tool_call> o", &mut pieces);
    assert_eq!(pieces.content, "It says <tool_call> o");
    parser.push(" <tool_call>", &mut pieces);
    parser.push(&" ".repeat(SPACE_MAX), &mut pieces);
    assert_eq!(pieces.content, "It says <tool_call> o");
    parser.push(" b", &mut pieces);
    assert!(pieces.content.ends_with("  b"));
}

#[test]
fn white_space_without_end_is_read_once() {
    // A million pushes would take minutes if each looked at all of it again.
    for wanted in [
        wanted(Thoughts::IfOpened, None),
        wanted(Thoughts::No, Some(CallFormat::Hermes)),
        wanted(Thoughts::Opened, Some(CallFormat::Hermes)),
        wanted(Thoughts::No, Some(CallFormat::Mistral)),
    ] {
        let (mut parser, mut pieces) = (Parser::new(wanted), Pieces::default());
        parser.push("<t", &mut pieces);
        parser.push("h a", &mut pieces);
        for _ in 0..1_000_000 {
            parser.push(" \n", &mut pieces);
        }
        parser.push("b", &mut pieces);
        parser.finish(&mut pieces);
        let told = pieces.thoughts.len() + pieces.content.len();
        assert_eq!(told, "<th a".len() + 2_000_000 + 1);
    }
}

#[test]
fn marks_in_a_text_among_the_arguments_do_not_make_a_call_dear() {
    // Each of them from the call's beginning would take minutes.
    let marks = "</tool_call>\\\"".repeat(100_000);
    let text = format!("<tool_call>{{\"name\": \"f\", \"arguments\": {{\"a\": \"{marks}\"}}}}</tool_call>");
    let (mut parser, mut pieces) = (Parser::new(wanted(Thoughts::No, Some(CallFormat::Hermes))), Pieces::default());
    for piece in text.as_bytes().chunks(7) {
        parser.push(std::str::from_utf8(piece).unwrap(), &mut pieces);
    }
    assert!(pieces.calls.len() == 1 && pieces.calls[0].arguments.len() > marks.len());
    assert_eq!((&*pieces.content, parser.bytes_held()), ("", 0));
    let (mut parser, mut pieces) = (Parser::new(opened_list()), Pieces::default());
    let marks = "}]\\\"{[".repeat(100_000);
    let text = format!("[{{\"name\": \"f\", \"arguments\": {{\"a\": \"{marks}\"}}}}]");
    for piece in text.as_bytes().chunks(7) {
        parser.push(std::str::from_utf8(piece).unwrap(), &mut pieces);
    }
    assert!(pieces.calls.len() == 1 && pieces.calls[0].arguments.len() > marks.len());
    assert_eq!((&*pieces.content, parser.bytes_held()), ("", 0));
}

#[test]
fn an_answer_that_is_json_may_be_calls() {
    let read = |text: &str| told(wanted(Thoughts::No, Some(CallFormat::Llama3Json)), text);
    let made = vec![call("f", "{\"a\": 1}"), call("g", "{}")];
    assert_eq!(read("{\"name\": \"f\", \"parameters\": {\"a\": 1}}").2, made[..1]);
    let both = "\n{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": 1}}; \
                {\"name\": \"g\", \"arguments\": {}}\n";
    assert_eq!(read(both), (String::new(), String::new(), made));
    assert_eq!(read("{\"name\": \"f\", \"parameters\": null}").2, [call("f", "{}")]);
    for text in ["{\"a\": 1}", "{\"name\": \"Ada\", \"born\": 1815}", "{\"name\": \"f\"", "f: {\"name\": \"f\"}", " 7"]
    {
        assert_eq!(read(text), (String::new(), text.into(), Vec::new()));
    }
    let with_thoughts = wanted(Thoughts::IfOpened, Some(CallFormat::Llama3Json));
    let expected = ("a".into(), String::new(), vec![call("f", "{}")]);
    assert_eq!(told(with_thoughts, "<think>a</think>\n{\"name\": \"f\", \"parameters\": {}}"), expected);
}

#[test]
fn behind_a_mark_there_may_be_a_list_of_calls() {
    let read = |text: &str| told(wanted(Thoughts::IfOpened, Some(CallFormat::Mistral)), text);
    let made = [call("f", "{\"a\": \"}] [TOOL_CALLS]\\\"{\"}"), call("g", "{}")];
    let (f, g) =
        ("{\"name\": \"f\", \"arguments\": {\"a\": \"}] [TOOL_CALLS]\\\"{\"}}", "{\"name\": \"g\", \"id\": 1}");
    for (text, calls) in [
        (format!("[TOOL_CALLS] [{f}]"), 1),
        (format!("[TOOL_CALLS][{f}, {g}]\n"), 2),
        (format!(" [TOOL_CALLS]\n[\n {f} ,\n {g}\n]"), 2),
        (format!("[TOOL_CALLS][{f}][TOOL_CALLS][{g}]"), 2),
        // Not closed, as some models leave it.
        (format!("[TOOL_CALLS] [{f}"), 1),
        (format!("[TOOL_CALLS] [{f}, {g} "), 2),
    ] {
        assert_eq!(read(&text), (String::new(), String::new(), made[..calls].to_vec()), "{text}");
        let behind = text.trim_start().strip_prefix("[TOOL_CALLS]").unwrap();
        assert_eq!(told(opened_list(), behind).2, made[..calls], "{behind}");
    }
    let around = format!("<think>\nI call f.\n</think>\n\nOne moment.\n\n[TOOL_CALLS] [{f}] Done\n");
    assert_eq!(read(&around), ("I call f.".into(), "One moment. Done".into(), made[..1].to_vec()));
    // What is no call and what follows it.
    let cut = format!("[TOOL_CALLS] [{f}, {{\"name\": \"g");
    assert_eq!(read(&cut), (String::new(), ", {\"name\": \"g".into(), made[..1].to_vec()));
    for text in [
        "[TOOL_CALLS]",
        "[TOOL_CALLS] []",
        "[TOOL_CALLS] [7, {\"name\": \"f\"}]",
        "[TOOL_CALLS] {\"name\": \"f\"}",
        "[TOOL_CALLS] [{\"arguments\": {}}, {\"name\": \"f\"}]",
        "[TOOL_CALLS] [{\"name\": \"f\", \"argu",
        "[TOOL_CALLS]f{}",
        "[{\"name\": \"f\"}]",
        "a [TOOL_",
    ] {
        assert_eq!(read(text), (String::new(), text.into(), Vec::new()));
    }
    assert_eq!(told(opened_list(), " f[]"), (String::new(), " f[]".into(), Vec::new()));
}

#[test]
fn a_call_of_a_list_is_told_when_it_is_whole() {
    let (mut parser, mut pieces) = (Parser::new(opened_list()), Pieces::default());
    parser.push("[{\"name\": \"f\"}", &mut pieces);
    assert_eq!((pieces.calls.len(), parser.bytes_held()), (1, 0));
    parser.push(", {\"name\": \"g\"", &mut pieces);
    assert_eq!((pieces.calls.len(), parser.bytes_held()), (1, 14));
    parser.push("}]", &mut pieces);
    assert_eq!((pieces.calls.len(), parser.bytes_held()), (2, 0));
    // Nor is whoever writes of such lists held up.
    parser.push(" [TOOL_CALLS] o", &mut pieces);
    assert_eq!((&*pieces.content, parser.bytes_held()), (" [TOOL_CALLS] o", 0));
}

#[test]
fn no_more_calls_are_made_than_may_be() {
    let texts = [
        (CallFormat::Hermes, "<tool_call>{\"name\": \"f\"}</tool_call>".repeat(3)),
        (CallFormat::Mistral, "[TOOL_CALLS] [{\"name\": \"f\"}, {\"name\": \"g\"}, {\"name\": \"h\"}]".to_owned()),
    ];
    for (format, text) in texts {
        for (calls_max, made) in [(1, 1), (2, 2), (usize::MAX, 3)] {
            let wanted = Wanted { calls_max, ..wanted(Thoughts::No, Some(format)) };
            let (_, content, calls) = told(wanted, &text);
            assert_eq!((&*content, calls.len()), ("", made));
        }
    }
}

/// Text with every mark, whole and in parts.
fn any_text() -> impl Strategy<Value = String> {
    let part = prop_oneof![
        4 => prop::sample::select(vec!["<think>", "</think>", "<tool_call>", "</tool_call>", "[TOOL_CALLS] ["]),
        2 => prop::sample::select(vec!["<", "<thi", "</", "</tool_", "<tool_call", ">", "nk>", "call>"]),
        2 => prop::sample::select(vec!["[", "[TOOL", "_CALLS]", "[TOOL_CALLS]", ", ", "]", "}"]),
        2 => prop::sample::select(vec![
            "{\"name\": \"f\"}",
            "{\"name\": \"é\", \"arguments\": {\"a\": 1}}",
            "{\"name\": \"f\", \"arguments\": \"</tool_call>\"}",
            "{\"name\": \"",
            "{",
            "; ",
        ]),
        2 => prop::sample::select(vec!["\n", " ", "\n\n", "a", "é🙂", "a b"]),
    ];
    prop::collection::vec(part, 0..12).prop_map(|parts| parts.concat())
}

fn any_wanted() -> impl Strategy<Value = Wanted> {
    let thoughts = prop::sample::select(vec![Thoughts::No, Thoughts::IfOpened, Thoughts::Opened]);
    let formats = [CallFormat::Hermes, CallFormat::Llama3Json, CallFormat::Mistral].map(Some);
    let calls = prop::sample::select([&[None][..], &formats].concat());
    let calls_max = prop::sample::select(vec![1, usize::MAX]);
    let all = (thoughts, any::<bool>(), calls, any::<bool>(), calls_max);
    all.prop_map(|(thoughts, show_thoughts, calls, calls_opened, calls_max)| Wanted {
        thoughts,
        show_thoughts,
        calls,
        calls_opened,
        calls_max,
    })
}

proptest! {
    #[test]
    fn how_the_text_was_cut_does_not_show(wanted in any_wanted(), text in any_text()) {
        let expected = read(wanted, &text);
        let (mut parser, mut pieces) = (Parser::new(wanted), Pieces::default());
        for c in text.chars() {
            parser.push(c.encode_utf8(&mut [0; 4]), &mut pieces);
        }
        parser.finish(&mut pieces);
        prop_assert_eq!((pieces, parser.made_calls()), expected);
    }

    /// What stands between no marks is what was there, but for white space.
    #[test]
    fn nothing_is_lost(wanted in any_wanted(), text in any_text()) {
        let wanted = Wanted { show_thoughts: true, ..wanted };
        let (pieces, _) = read(wanted, &text);
        let letters = |text: &str| text.matches('a').count();
        let calls: usize = pieces.calls.iter().map(|call| letters(&call.arguments)).sum();
        let dropped = wanted.calls_max == 1;
        // The `a`s of `name` and `arguments` are not told.
        let inside: usize = ["\"name\"", "\"arguments\"", "tool_ca"].map(|key| text.matches(key).count()).iter().sum();
        let told = letters(&pieces.thoughts) + letters(&pieces.content) + calls;
        prop_assert!(told <= letters(&text) && (dropped || told + inside >= letters(&text)), "{:?}", pieces);
    }

    /// Another that is given as much of the text as was let out goes on where this one is: see `Output::replay`.
    #[test]
    fn an_answer_may_go_on_in_another_parser(wanted in any_wanted(), text in any_text()) {
        let (expected, made_calls) = read(wanted, &text);
        let (mut parser, mut pieces) = (Parser::new(wanted), Pieces::default());
        let cuts: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len(), text.len()]).collect();
        for (step, window) in cuts.windows(2).enumerate() {
            match step + 2 == cuts.len() {
                // The last one stands for the end.
                true => parser.finish(&mut pieces),
                false => parser.push(&text[window[0]..window[1]], &mut pieces),
            }
            let shown = window[1] - parser.bytes_held();
            let (mut other, mut again, mut rest) = (Parser::new(wanted), Pieces::default(), pieces.clone());
            other.push(&text[..shown], &mut again);
            other.finish(&mut again);
            other.push(&text[shown..], &mut rest);
            other.finish(&mut rest);
            prop_assert_eq!(&rest, &expected, "cut after {} of {:?}", shown, text);
            prop_assert_eq!(other.made_calls(), made_calls);
        }
    }
}
