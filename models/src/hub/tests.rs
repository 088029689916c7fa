use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::mpsc;

use super::*;
use crate::{LoadFormat, ModelSource, OpenOptions};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
/// Where the branch was before.
const OLD_COMMIT: &str = "old";

/// A hub of one model, on a port of its own. Serves until the test ends, and reports the paths it was asked for. At the
/// old commit, the model has no files in folders.
struct FakeHub {
    endpoint: String,
    asked: mpsc::Receiver<String>,
}

impl FakeHub {
    /// `files` of `org/tiny`; with a `refusal`, every answer is that status.
    fn start(files: &[(&str, &str)], refusal: Option<u16>) -> Self {
        let files: HashMap<String, String> = files.iter().map(|&(name, text)| (name.into(), text.into())).collect();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let endpoint = format!("http://{}", listener.local_addr().unwrap());
        let (sender, asked) = mpsc::channel();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let _ = stream.ok().and_then(|stream| answer(stream, &files, refusal, &sender));
            }
        });
        Self { endpoint, asked }
    }

    fn hub(&self, home: &Path, more: &[(&str, &str)]) -> Hub {
        let mut vars: HashMap<_, _> = more.iter().copied().collect();
        vars.insert("HF_HOME", home.to_str().unwrap());
        vars.insert("HF_ENDPOINT", &self.endpoint);
        Hub::from_vars(|name| vars.get(name).map(|value| value.to_string()), false).unwrap()
    }
}

/// Reports the path of one request, and answers it as the hub does.
fn answer(
    mut stream: TcpStream,
    files: &HashMap<String, String>,
    refusal: Option<u16>,
    asked: &mpsc::Sender<String>,
) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let path = lines.next()?.ok()?.split(' ').nth(1)?.to_owned();
    let mut first_byte_only = false;
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        first_byte_only |= line.eq_ignore_ascii_case("range: bytes=0-0");
    }
    // First: who has the answer may look at once.
    let _ = asked.send(path.clone());
    let is_known = |revision: &&str| ["main", COMMIT, OLD_COMMIT].contains(revision);
    let listed = path.strip_prefix("/api/models/org/tiny/revision/").filter(is_known);
    let fetched = path.strip_prefix("/org/tiny/resolve/").and_then(|file| {
        let (commit, name) = file.split_once('/').filter(|(commit, _)| [COMMIT, OLD_COMMIT].contains(commit))?;
        Some((commit, name, files.get(name)?))
    });
    let (status, headers, body) = if let Some(status) = refusal {
        (status, String::new(), String::new())
    } else if let Some(revision) = listed {
        let commit = if revision == OLD_COMMIT { OLD_COMMIT } else { COMMIT };
        let names = files.keys().filter(|name| commit == COMMIT || !name.contains('/'));
        let siblings: Vec<_> = names.map(|name| serde_json::json!({"rfilename": name})).collect();
        (200, String::new(), serde_json::json!({"sha": commit, "siblings": siblings}).to_string())
    } else if let Some((commit, name, text)) = fetched {
        let body = if first_byte_only { &text[..1] } else { text };
        let range = format!("content-range: bytes 0-{}/{}\r\n", body.len() - 1, text.len());
        let etag = name.replace('/', "-");
        (206, format!("x-repo-commit: {commit}\r\netag: \"{etag}\"\r\n{range}"), body.to_owned())
    } else {
        (404, String::new(), String::new())
    };
    let len = body.len();
    write!(stream, "HTTP/1.1 {status} x\r\n{headers}content-length: {len}\r\nconnection: close\r\n\r\n{body}").ok()
}

const SHARDED: [(&str, &str); 8] = [
    ("config.json", "{}"),
    ("tokenizer.json", "{}"),
    ("tokenizer_config.json", "{}"),
    ("README.md", "not wanted"),
    ("pytorch_model.bin", "not wanted"),
    ("model.safetensors.index.json", r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}"#),
    ("model-1.safetensors", "one"),
    ("model-2.safetensors", "two"),
];

/// Whether it is a file that a model is made of.
fn is_wanted(name: &str) -> bool {
    name.ends_with(".json") || name.ends_with(".safetensors")
}

/// The model's directory with weights in it, whatever the files say.
fn snapshot(hub: &Hub, revision: &str) -> Result<PathBuf, ModelError> {
    hub.snapshot("org/tiny", revision, true, |_| Ok(())).map(|(directory, ())| directory)
}

#[test]
fn a_model_is_fetched_once_and_then_found_offline() {
    let home = tempfile::tempdir().unwrap();
    let server = FakeHub::start(&SHARDED, None);
    let directory = snapshot(&server.hub(home.path(), &[]), "main").unwrap();
    let mut names: Vec<_> =
        std::fs::read_dir(&directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    let mut wanted: Vec<_> = SHARDED.iter().map(|(name, _)| *name).filter(|name| is_wanted(name)).collect();
    wanted.sort();
    assert_eq!(names, wanted);
    assert_eq!(std::fs::read_to_string(directory.join("model-2.safetensors")).unwrap(), "two");
    assert!(server.asked.try_iter().count() > 0);

    for settings in [&[][..], &[("HF_HUB_OFFLINE", "1")]] {
        let hub = server.hub(home.path(), settings);
        assert_eq!(snapshot(&hub, "main").unwrap(), directory);
        assert_eq!(snapshot(&hub, COMMIT).unwrap(), directory);
    }
    assert_eq!(server.asked.try_iter().count(), 0, "a cached model must not be asked for");

    // A shard or the tokenizer short (other programs fetch single files), the copy counts no more.
    for file in ["model-2.safetensors", "tokenizer.json"] {
        std::fs::remove_file(directory.join(file)).unwrap();
        let offline = server.hub(home.path(), &[("HF_HUB_OFFLINE", "true")]);
        let error = snapshot(&offline, "main").unwrap_err();
        assert!(error.to_string().contains("HF_HUB_OFFLINE is set"), "{error}");
        snapshot(&server.hub(home.path(), &[]), "main").unwrap();
    }
}

#[test]
fn templates_are_fetched_beside_the_weights() {
    let home = tempfile::tempdir().unwrap();
    let templates = [("chat_template.jinja", "own"), ("additional_chat_templates/tool_use.jinja", "tools")];
    let server = FakeHub::start(&[&SHARDED[..], &templates[..]].concat(), None);
    let directory = snapshot(&server.hub(home.path(), &[]), "main").unwrap();
    for (name, text) in templates {
        assert_eq!(std::fs::read_to_string(directory.join(name)).unwrap(), text);
    }
}

/// A cache that another program, which has no use for the tokenizer's configuration, has filled.
fn filled_in_part(home: &Path) -> PathBuf {
    let model = home.join("hub/models--org--tiny");
    let directory = model.join("snapshots").join(COMMIT);
    std::fs::create_dir_all(&directory).unwrap();
    std::fs::create_dir(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), COMMIT).unwrap();
    for (name, text) in SHARDED.iter().filter(|(name, _)| is_wanted(name) && *name != "tokenizer_config.json") {
        std::fs::write(directory.join(name), text).unwrap();
    }
    directory
}

#[test]
fn what_another_program_has_not_fetched_is_fetched_and_nothing_else() {
    let home = tempfile::tempdir().unwrap();
    let directory = filled_in_part(home.path());
    let server = FakeHub::start(&SHARDED, None);
    assert_eq!(snapshot(&server.hub(home.path(), &[("HF_HUB_OFFLINE", "1")]), "main").unwrap(), directory);
    assert_eq!(server.asked.try_iter().count(), 0);
    assert_eq!(snapshot(&server.hub(home.path(), &[]), "main").unwrap(), directory);
    assert!(directory.join("tokenizer_config.json").exists());
    // At the commit it has, wherever the branch is.
    let asked: Vec<_> = server.asked.try_iter().collect();
    let wanted = [format!("/revision/{COMMIT}"), "/tokenizer_config.json".into()];
    assert!(asked.iter().all(|path| wanted.iter().any(|end| path.ends_with(end))), "{asked:?}");
}

#[test]
fn what_a_model_is_known_not_to_have_is_asked_for_once() {
    let home = tempfile::tempdir().unwrap();
    let directory = filled_in_part(home.path());
    let files = SHARDED.into_iter().filter(|(name, _)| *name != "tokenizer_config.json");
    let server = FakeHub::start(&files.collect::<Vec<_>>(), None);
    let hub = server.hub(home.path(), &[]);
    assert_eq!(snapshot(&hub, "main").unwrap(), directory);
    assert!(server.asked.try_iter().count() > 0);
    for revision in ["main", COMMIT] {
        assert_eq!(snapshot(&hub, revision).unwrap(), directory);
    }
    assert_eq!(server.asked.try_iter().count(), 0);
}

#[test]
fn a_template_that_a_copy_lacks_is_fetched() {
    let home = tempfile::tempdir().unwrap();
    let directory = filled_in_part(home.path());
    let server = FakeHub::start(&[&SHARDED[..], &[("chat_template.jinja", "own")]].concat(), None);
    let hub = server.hub(home.path(), &[]);
    // Where it is in the tokenizer's configuration, none is lacking.
    std::fs::write(directory.join("tokenizer_config.json"), r#"{"chat_template": "inside"}"#).unwrap();
    snapshot(&hub, "main").unwrap();
    assert_eq!(server.asked.try_iter().count(), 0);
    std::fs::write(directory.join("tokenizer_config.json"), r#"{"chat_template": null}"#).unwrap();
    snapshot(&hub, "main").unwrap();
    assert_eq!(std::fs::read_to_string(directory.join("chat_template.jinja")).unwrap(), "own");
}

#[test]
fn a_copy_that_can_be_used_does_not_wait_for_a_server_that_is_silent() {
    let home = tempfile::tempdir().unwrap();
    let directory = filled_in_part(home.path());
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", silent.local_addr().unwrap());
    let vars = HashMap::from([("HF_HOME", home.path().to_str().unwrap()), ("HF_ENDPOINT", &endpoint)]);
    let hub = Hub::from_vars(|name| vars.get(name).map(|value| value.to_string()), false).unwrap();
    let hub = Hub { patience: Duration::ZERO, ..hub };
    assert_eq!(snapshot(&hub, "main").unwrap(), directory);
    // It is asked all the same.
    silent.accept().unwrap();
}

#[test]
fn a_copy_that_cannot_be_completed_is_used_as_it_is() {
    for refusal in [401, 404, 500] {
        let home = tempfile::tempdir().unwrap();
        let directory = filled_in_part(home.path());
        let server = FakeHub::start(&SHARDED, Some(refusal));
        assert_eq!(snapshot(&server.hub(home.path(), &[]), "main").unwrap(), directory);
        assert!(server.asked.try_iter().count() > 0, "it must be tried");
    }
    // A cache that is not to be written to.
    let home = tempfile::tempdir().unwrap();
    let directory = filled_in_part(home.path());
    std::fs::write(home.path().join("hub/.locks"), "").unwrap();
    let server = FakeHub::start(&SHARDED, None);
    assert_eq!(snapshot(&server.hub(home.path(), &[]), "main").unwrap(), directory);
}

#[test]
fn a_model_that_two_want_at_once_is_fetched_for_both() {
    let home = tempfile::tempdir().unwrap();
    let server = FakeHub::start(&SHARDED, None);
    let hub = server.hub(home.path(), &[]);
    let fetch = || snapshot(&hub, "main").unwrap();
    let (one, other) = std::thread::scope(|scope| {
        let other = scope.spawn(fetch);
        (fetch(), other.join().unwrap())
    });
    assert_eq!(one, other);
    // Its size, and then what is in it.
    assert_eq!(server.asked.try_iter().filter(|path| path.ends_with("/config.json")).count(), 2);
}

#[test]
fn a_branch_that_has_moved_on_is_not_mixed_with_what_is_cached() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("hub/models--org--tiny");
    for (file, text) in [("refs/main", "old"), ("snapshots/old/config.json", "{}")] {
        std::fs::create_dir_all(model.join(file).parent().unwrap()).unwrap();
        std::fs::write(model.join(file), text).unwrap();
    }
    let server = FakeHub::start(&SHARDED, None);
    let hub = server.hub(home.path(), &[]);
    let directory = snapshot(&hub, "main").unwrap();
    assert_eq!(directory, model.join("snapshots").join(COMMIT));
    assert!(directory.join("config.json").exists() && directory.join("model-1.safetensors").exists());
    assert_eq!(hub.cached("org/tiny", "main", true), Some(directory));
}

#[test]
fn made_up_weights_are_not_fetched() {
    let home = tempfile::tempdir().unwrap();
    let server = FakeHub::start(&SHARDED, None);
    server.hub(home.path(), &[]).snapshot("org/tiny", "main", false, |_| Ok(())).unwrap();
    assert!(server.asked.try_iter().all(|path| !path.contains("safetensors")));
}

#[test]
fn a_model_that_is_not_supported_is_refused_before_its_weights_are_fetched() {
    let quantised = r#"{"architectures": ["LlamaForCausalLM"], "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 48, "max_position_embeddings": 64,
        "quantization_config": {"quant_method": "gptq"}}"#;
    let experts = r#"{"architectures": ["Qwen3MoeForCausalLM"]}"#;
    for (config, tokenizer, expected) in [
        (experts, "tokenizer.json", "`Qwen3MoeForCausalLM`"),
        // Another form of its tokenizer would not help.
        (experts, "tekken.json", "`Qwen3MoeForCausalLM`"),
        (quantised, "tokenizer.json", "`gptq`"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let files = SHARDED.map(|(name, text)| match name {
            "config.json" => (name, config),
            "tokenizer.json" => (tokenizer, text),
            _ => (name, text),
        });
        let server = FakeHub::start(&files, None);
        let hub = server.hub(home.path(), &[]);
        let error = ModelSource::open_from_hub(&hub, "org/tiny", &OpenOptions::default()).err().unwrap().to_string();
        assert!(error.contains(expected), "{error}");
        let asked: Vec<_> = server.asked.try_iter().collect();
        assert!(asked.iter().any(|path| path.ends_with("/config.json")), "{asked:?}");
        assert!(asked.iter().all(|path| !path.contains("safetensors")), "{asked:?}");
    }
}

#[test]
fn a_model_without_a_tokenizer_that_is_read_is_refused_before_its_weights_are_fetched() {
    let home = tempfile::tempdir().unwrap();
    let files = SHARDED.map(|(name, text)| (if name == "tokenizer.json" { "tekken.json" } else { name }, text));
    let server = FakeHub::start(&files, None);
    let error = snapshot(&server.hub(home.path(), &[]), "main").unwrap_err().to_string();
    assert!(error.contains("`org/tiny` has no tokenizer.json") && error.contains("GGUF"), "{error}");
    let asked: Vec<_> = server.asked.try_iter().collect();
    assert!(asked.iter().all(|path| !path.contains("safetensors")), "{asked:?}");
}

const QUANTISED: [(&str, &str); 5] = [
    ("README.md", "not wanted"),
    ("m-Q8_0.gguf", "not wanted"),
    ("m-Q4_0.gguf", "some text"),
    ("BF16/m-BF16-00001-of-00002.gguf", "one"),
    ("BF16/m-BF16-00002-of-00002.gguf", "two"),
];

#[test]
fn a_gguf_file_is_fetched_once_by_its_quantisation_and_then_found_offline() {
    let home = tempfile::tempdir().unwrap();
    let server = FakeHub::start(&QUANTISED, None);
    let model = home.path().join("hub/models--org--tiny/snapshots").join(COMMIT);
    for (quantization, file) in [("q4_0", "m-Q4_0.gguf"), ("bf16", "BF16/m-BF16-00001-of-00002.gguf")] {
        let offline = server.hub(home.path(), &[("HF_HUB_OFFLINE", "1")]);
        let error = offline.gguf("org/tiny", "main", quantization).unwrap_err().to_string();
        let way_out = format!("`hf download org/tiny --include '*{quantization}*'`");
        assert!(error.contains("HF_HUB_OFFLINE is set") && error.contains(&way_out), "{error}");
        assert_eq!(server.hub(home.path(), &[]).gguf("org/tiny", "main", quantization).unwrap(), model.join(file));
        assert!(server.asked.try_iter().all(|path| !path.contains("Q8_0")));
        for hub in [server.hub(home.path(), &[]), offline] {
            assert_eq!(hub.gguf("org/tiny", "main", quantization).unwrap(), model.join(file));
            assert_eq!(hub.gguf("org/tiny", COMMIT, quantization).unwrap(), model.join(file));
        }
        assert_eq!(server.asked.try_iter().count(), 0, "a cached file must not be asked for");
    }
    let second = model.join("BF16/m-BF16-00002-of-00002.gguf");
    assert_eq!(std::fs::read_to_string(&second).unwrap(), "two");

    // Without one of its parts it is fetched again, and offline it is not there.
    std::fs::remove_file(&second).unwrap();
    assert!(server.hub(home.path(), &[("HF_HUB_OFFLINE", "1")]).gguf("org/tiny", "main", "bf16").is_err());
    server.hub(home.path(), &[]).gguf("org/tiny", "main", "bf16").unwrap();
    assert!(second.exists());
}

#[test]
fn another_quantisation_is_fetched_beside_the_first_though_the_branch_has_moved_on() {
    let home = tempfile::tempdir().unwrap();
    let model = home.path().join("hub/models--org--tiny");
    let old = model.join("snapshots").join(OLD_COMMIT);
    std::fs::create_dir_all(&old).unwrap();
    std::fs::create_dir(model.join("refs")).unwrap();
    std::fs::write(model.join("refs/main"), OLD_COMMIT).unwrap();
    std::fs::write(old.join("m-Q4_0.gguf"), "some text").unwrap();
    let server = FakeHub::start(&QUANTISED, None);
    let hub = server.hub(home.path(), &[]);
    assert_eq!(hub.gguf("org/tiny", "main", "q8_0").unwrap(), old.join("m-Q8_0.gguf"));
    let offline = server.hub(home.path(), &[("HF_HUB_OFFLINE", "1")]);
    for (quantization, file) in [("q4_0", "m-Q4_0.gguf"), ("q8_0", "m-Q8_0.gguf")] {
        assert_eq!(offline.gguf("org/tiny", "main", quantization).unwrap(), old.join(file));
    }

    // One that the commit does not have, or whose commit is gone, is the branch's.
    let new = model.join("snapshots").join(COMMIT);
    assert_eq!(hub.gguf("org/tiny", "main", "bf16").unwrap(), new.join("BF16/m-BF16-00001-of-00002.gguf"));
    std::fs::write(model.join("refs/main"), "gone").unwrap();
    assert_eq!(hub.gguf("org/tiny", "main", "q8_0").unwrap(), new.join("m-Q8_0.gguf"));
}

#[test]
fn a_quantisation_that_none_or_several_have_is_an_error_that_lists_them() {
    let home = tempfile::tempdir().unwrap();
    let server = FakeHub::start(&QUANTISED, None);
    let hub = server.hub(home.path(), &[]);
    let error = |hub: &Hub, quantization| hub.gguf("org/tiny", "main", quantization).unwrap_err().to_string();
    let none = error(&hub, "q2_k");
    assert!(none.contains("it has BF16/m-BF16-00001-of-00002.gguf, m-Q4_0.gguf, m-Q8_0.gguf"), "{none}");
    let several = error(&hub, "m");
    assert!(several.contains("several GGUF files") && several.contains("m-Q4_0.gguf, m-Q8_0.gguf"), "{several}");
    assert!(server.asked.try_iter().all(|path| !path.contains("/resolve/")));
    for quantization in ["q4_0", "q8_0"] {
        hub.gguf("org/tiny", "main", quantization).unwrap();
    }
    let offline = error(&server.hub(home.path(), &[("HF_HUB_OFFLINE", "1")]), "m");
    assert!(offline.contains("(m-Q4_0.gguf, m-Q8_0.gguf)"), "{offline}");
}

#[test]
fn a_gguf_file_of_the_hub_is_opened_as_one() {
    let home = tempfile::tempdir().unwrap();
    let server = FakeHub::start(&QUANTISED, None);
    let hub = server.hub(home.path(), &[]);
    let error = |options: &OpenOptions| {
        ModelSource::open_gguf_from_hub(&hub, "org/tiny", "Q4_0", options).err().unwrap().to_string()
    };
    let dummy = error(&OpenOptions { load_format: LoadFormat::Dummy, ..OpenOptions::default() });
    assert!(dummy.contains("org/tiny:Q4_0: load format `dummy`"), "{dummy}");
    assert_eq!(server.asked.try_iter().count(), 0);
    let text = error(&OpenOptions::default());
    assert!(text.contains("m-Q4_0.gguf") && text.contains("not a GGUF file"), "{text}");
}

#[test]
fn refusals_say_what_to_do() {
    let home = tempfile::tempdir().unwrap();
    let error = |status, settings: &[(&str, &str)]| {
        let server = FakeHub::start(&[], Some(status));
        snapshot(&server.hub(home.path(), settings), "main").unwrap_err().to_string()
    };
    assert!(error(401, &[]).contains("set HF_TOKEN"));
    assert!(error(401, &[("HF_TOKEN", "t")]).contains("accept its terms"));
    assert!(error(403, &[]).contains("accept its terms"));
    assert!(error(404, &[]).contains("check the id and --revision"));
    assert!(error(500, &[]).contains("cannot be reached"));

    let server = FakeHub::start(&[("config.json", "{}"), ("m.Q4_0.gguf", "x")], None);
    let error = snapshot(&server.hub(home.path(), &[]), "main").unwrap_err().to_string();
    assert!(error.contains("`org/tiny:QUANT`") && error.contains("(m.Q4_0.gguf)"), "{error}");
}

#[test]
fn no_network_is_an_error_that_names_the_ways_out() {
    let home = tempfile::tempdir().unwrap();
    // A port nobody listens on: bound, then released.
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let vars = HashMap::from([("HF_HOME", home.path().to_str().unwrap()), ("HF_ENDPOINT", &endpoint)]);
    let hub = Hub::from_vars(|name| vars.get(name).map(|value| value.to_string()), false).unwrap();
    let error = snapshot(&hub, "main").unwrap_err().to_string();
    for expected in [
        "`org/tiny`",
        &endpoint,
        "cannot be reached",
        "`hf download org/tiny`",
        "HF_ENDPOINT",
        "a proxy that inspects TLS",
    ] {
        assert!(error.contains(expected), "{error}");
    }
    let error = hub.gguf("org/tiny", "main", "Q4_0").unwrap_err().to_string();
    assert!(error.contains("`hf download org/tiny --include '*Q4_0*'`"), "{error}");
}

#[test]
fn settings_are_read_as_huggingface_hub_reads_them() {
    let hub = |vars: &[(&str, &str)]| {
        let vars: HashMap<_, _> = vars.iter().copied().collect();
        Hub::from_vars(|name| vars.get(name).map(|value| value.to_string()), false)
    };
    assert_eq!(hub(&[("HOME", "/h")]).unwrap().cache, Path::new("/h/.cache/huggingface/hub"));
    assert_eq!(hub(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]).unwrap().cache, Path::new("/x/huggingface/hub"));
    assert_eq!(hub(&[("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]).unwrap().cache, Path::new("/c"));
    assert_eq!(hub(&[("HF_HOME", "/f"), ("HF_ENDPOINT", "http://m/")]).unwrap().endpoint, "http://m");
    assert!(hub(&[("HF_HOME", "/f"), ("HF_ENDPOINT", "m.example")]).is_err());
    assert!(hub(&[]).is_err());
    assert!(snapshot(&hub(&[("HF_HOME", "/f")]).unwrap(), "../x").is_err());
}

#[test]
fn ids_are_told_from_paths() {
    for id in ["Qwen/Qwen3-0.6B", "HuggingFaceTB/SmolLM2-135M-Instruct", "a/b_c.d"] {
        assert_eq!(parse_id(id), Some((id, None)));
        assert_eq!(parse_id(&format!("{id}:UD-Q4_K_XL")), Some((id, Some("UD-Q4_K_XL"))));
    }
    for path in
        ["./a/b", "/a/b", "a", "a/b/c", "../b", "a/..", "a/b:", "a/b:c:d", "a/b:c/d", "~/b", "a/", "/b", "a/b c"]
    {
        assert_eq!(parse_id(path), None, "{path}");
    }
}
