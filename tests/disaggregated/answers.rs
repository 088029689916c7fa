//! Long prompts are computed elsewhere, and nobody can tell from the answers.

use serde_json::json;

use crate::{
    cell::{self, Cell, LONG, SHORT, answer_to, ask, prefills, prompt},
    program::Server,
};

/// Prompts of many lengths: on page borders and beside them, below the threshold and above, several chunks long.
const LENGTHS: &[usize] = &[5, 31, 32, 33, 48, 63, 64, 65, 66, 81, 200, 420];

fn answers_equal_those_of_one_process(transport: &str) {
    let cell = Cell::start();
    let decode = cell.decode(&["--transport", transport, "--max-local-prefill-length", "64"]);
    let _prefill = cell.prefill(&["--transport", transport, "--max-num-batched-tokens", "128"]);
    cell.wait_for_prefill_worker(&decode);
    let alone = Server::start(&["--max-model-len", "1024", "--kv-blocks", "256"]);
    for &length in LENGTHS {
        let prompt = prompt(length);
        assert_eq!(ask(&decode, &prompt), ask(&alone, &prompt), "a prompt of {length} tokens");
    }
    let long = LENGTHS.iter().filter(|&&length| length > 64).count() as f64;
    assert_eq!(decode.metric("engine_prefills_total{where=\"remote\"}"), long);
    assert_eq!(decode.metric("engine_prefills_total{where=\"local\"}"), LENGTHS.len() as f64 - long);
    assert_eq!(decode.metric("engine_handoffs_total{outcome=\"completed\"}"), long);
    cell::wait_until_idle(&decode);
}

#[test]
fn answers_equal_those_of_one_process_over_shared_memory() {
    answers_equal_those_of_one_process("shm");
}

#[test]
fn answers_equal_those_of_one_process_over_tcp() {
    answers_equal_those_of_one_process("tcp");
}

#[test]
fn an_answer_to_a_prompt_prefilled_elsewhere_fits_its_grammar() {
    let cell = Cell::start();
    let decode = cell.decode(&["--max-local-prefill-length", "64"]);
    let _prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let question = json!({
        "prompt": prompt(LONG), "max_tokens": 40, "temperature": 1, "seed": 4, "logprobs": 2,
        "structured_outputs": {"regex": "[a-z]{3,6} [0-9]{2}"},
    });
    let answer = answer_to(&decode, &question);
    assert_eq!(decode.metric("engine_prefills_total{where=\"remote\"}"), 1.0);
    assert_eq!(answer["finish_reason"], "stop", "{answer}");
    assert_eq!(answer_to(&Server::start(&["--max-model-len", "1024", "--kv-blocks", "256"]), &question), answer);
}

#[test]
fn a_prompt_found_in_the_cache_is_not_handed_off_and_one_found_in_part_lacks_no_page() {
    let cell = Cell::start();
    let decode = cell.decode(&["--max-local-prefill-length", "64"]);
    let prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let first = ask(&decode, &prompt(LONG));
    assert_eq!(ask(&decode, &prompt(LONG)), first);
    assert_eq!(decode.metric("engine_prefills_total{where=\"remote\"}"), 1.0);
    // Found up to a page's border, which the rest does not begin at.
    let longer = prompt(LONG + 129);
    let answer = ask(&decode, &longer);
    assert_eq!(decode.metric("engine_prefills_total{where=\"remote\"}"), 2.0);
    assert!(decode.metric("engine_prefix_hit_tokens_total") >= 2.0 * (LONG as f64 - 16.0));
    // The prefill worker found the same in its own cache.
    cell::wait_until_idle(&prefill);
    assert!(prefill.metric("engine_kv_pages{state=\"cached\"}") >= (LONG / 16) as f64);
    let alone = Server::start(&["--max-model-len", "1024", "--kv-blocks", "256"]);
    assert_eq!(ask(&alone, &longer), answer);
}

#[test]
fn a_prompt_is_found_by_requests_with_its_salt_alone_wherever_it_was_prefilled() {
    let cell = Cell::start();
    // The second has nothing in its cache, so what is found is the prefill worker's.
    let decodes = [(); 2].map(|()| cell.decode(&["--max-local-prefill-length", "64"]));
    let prefill = cell.prefill(&[]);
    decodes.iter().for_each(|decode| cell.wait_for_prefill_worker(decode));
    let kept = || {
        cell::wait_until_idle(&prefill);
        cell::pages(&prefill, "cached")
    };
    let ask = |decode: &Server, salt: Option<&str>| {
        let request = json!({"prompt": prompt(LONG), "max_tokens": 8, "temperature": 0, "cache_salt": salt});
        decode.answer("/v1/completions", &request)["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap()
    };
    let pages = (LONG / 16) as f64;
    for (salts, salt) in [Some("of one tenant"), Some("of another"), None].into_iter().enumerate() {
        assert_eq!(ask(&decodes[0], salt), 0);
        assert!(ask(&decodes[0], salt) >= LONG as u64 - 16, "found where it was asked before");
        assert_eq!(kept(), pages * (salts + 1) as f64, "the prefill worker computed it anew");
    }
    assert_eq!([Some("of one tenant"), None].map(|salt| ask(&decodes[1], salt)), [0; 2]);
    assert_eq!(prefills(&decodes[1], "remote"), 2.0);
    assert_eq!(kept(), 3.0 * pages, "the prefill worker found it");
}

#[test]
fn without_prefix_caching_no_worker_keeps_what_was_prefilled() {
    let cell = Cell::start();
    let decode = cell.decode(&["--max-local-prefill-length", "64", "--no-prefix-caching"]);
    let prefill = cell.prefill(&["--no-prefix-caching"]);
    cell.wait_for_prefill_worker(&decode);
    let first = ask(&decode, &prompt(LONG));
    assert_eq!(ask(&decode, &prompt(LONG)), first);
    assert_eq!(prefills(&decode, "remote"), 2.0);
    assert_eq!(decode.metric("engine_prefix_hit_tokens_total"), 0.0);
    for server in [&decode, &prefill] {
        cell::wait_until_idle(server);
        assert_eq!(cell::pages(server, "cached"), 0.0);
    }
}

#[test]
fn keys_and_values_of_eight_bits_are_handed_off_to_a_worker_that_takes_their_type_from_the_cluster() {
    let cell = Cell::start();
    let decode = cell.decode(&["--max-local-prefill-length", "64", "--kv-cache-dtype", "fp8"]);
    let _prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let answer = ask(&decode, &prompt(LONG));
    assert_eq!(decode.metric("engine_prefills_total{where=\"remote\"}"), 1.0);
    let alone = ["--max-model-len", "1024", "--kv-blocks", "256", "--kv-cache-dtype"];
    assert_eq!(ask(&Server::start(&[&alone[..], &["fp8"]].concat()), &prompt(LONG)), answer);
    // The flag does something: log-probabilities are others.
    assert_ne!(ask(&Server::start(&[&alone[..], &["f16"]].concat()), &prompt(LONG)), answer);
}

#[test]
fn workers_say_in_their_metrics_what_model_they_are_for() {
    let cell = Cell::start();
    let decode = cell.decode(&[]);
    let prefill = cell.prefill(&[]);
    let info = |worker: &Server| {
        let text = worker.get("/metrics").text();
        let line = text.lines().find(|line| line.starts_with("engine_model_info{")).unwrap_or_else(|| panic!("{text}"));
        ["model", "role", "device", "model_key"].map(|label| {
            let (_, value) = line.split_once(&format!("{label}=\"")).unwrap();
            value.split('"').next().unwrap().to_owned()
        })
    };
    let [model, role, device, key] = info(&decode);
    assert_eq!([&*model, &*role, &*device], ["demo", "decode", "cpu"]);
    let [_, role, _, same] = info(&prefill);
    assert_eq!((&*role, same), ("prefill", key));
}

#[test]
fn short_prompts_are_computed_here_and_without_a_prefill_worker_all_are() {
    let cell = Cell::start();
    let decode = cell.decode(&["--max-local-prefill-length", "64"]);
    ask(&decode, &prompt(SHORT));
    ask(&decode, &prompt(LONG));
    assert_eq!(decode.metric("engine_prefills_total{where=\"local\"}"), 2.0);
    assert_eq!(decode.metric("engine_prefills_total{where=\"remote\"}"), 0.0);
}

#[test]
fn a_prefill_worker_that_drains_finishes_and_leaves() {
    let cell = Cell::start();
    let decode = cell.decode(&["--max-local-prefill-length", "64"]);
    let prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    ask(&decode, &prompt(LONG));
    prefill.signal("TERM");
    assert!(prefill.wait().success(), "{}", prefill.log());
    ask(&decode, &prompt(LONG + 200));
    let done = |decode: &Server, place: &str| decode.metric(&format!("engine_prefills_total{{where=\"{place}\"}}"));
    assert_eq!((done(&decode, "remote"), done(&decode, "local")), (1.0, 1.0));
    cell::wait_until_idle(&decode);
}
