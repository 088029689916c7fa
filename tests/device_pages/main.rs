//! Decode and prefill workers whose pages are in device memory: real processes, etcd and NATS, and the engine with the
//! real CUDA driver's code in it. It takes a device, or the stand-in for libcuda that `scripts/check-device-pages.sh`
//! builds, under which work runs as late as it may. [`rdma`] takes RDMA devices besides, and so the guest of
//! `tests/rdma`.

#[path = "../cell/mod.rs"]
mod cell;
#[path = "../program/mod.rs"]
mod program;
mod rdma;
#[path = "../services/mod.rs"]
mod services;
#[path = "../support/mod.rs"]
mod support;

use std::thread;

use cell::{
    Cell, Model, SLOWLY, answer_to, granted, handoffs, pages, prefills, streamed, unless_in, wait_for_decode_workers,
    wait_until_idle,
};
use program::Server;
use serde_json::{Value, json};

const THRESHOLD: usize = 64;
/// Prompts above the threshold and below: on page borders and beside them, several chunks long.
const LENGTHS: [usize; 8] = [20, 64, 65, 66, 80, 81, 211, 420];
/// How far log-probabilities may be from each other. Rows of large steps and of small ones are added up in different
/// orders, and who prefills decides which a row is in; the rest is the same, so this is less than a wrong page makes.
const TOLERANCE: f64 = 1e-4;
/// On the device, unless they are given otherwise. Workers warm up with their largest steps before they take requests,
/// and an emulated device takes long for those of the default size.
const FLAGS: [(&str, &str); 3] = [("--device", "cuda:0"), ("--max-num-seqs", "8"), ("--max-num-batched-tokens", "256")];

/// A model that an emulated device is fast enough for.
fn cell() -> Cell {
    Cell::of(Model::made_up(2, 2, 1024))
}

fn decode(cell: &Cell, flags: &[&str]) -> Server {
    let threshold = THRESHOLD.to_string();
    cell.decode(&[&unless_in(flags, &FLAGS)[..], &["--max-local-prefill-length", &threshold], flags].concat())
}

fn prefill(cell: &Cell, flags: &[&str]) -> Server {
    cell.prefill(&[&unless_in(flags, &FLAGS)[..], flags].concat())
}

/// A server in one process, on the device too.
fn alone(cell: &Cell) -> Server {
    cell.model.alone_with(&unless_in(&[], &FLAGS))
}

fn ask(server: &Server, prompt: &[u32]) -> Value {
    answer_to(server, &json!({"prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 3, "ignore_eos": true}))
}

/// The same text and tokens, and log-probabilities as near as they have to be.
fn is_alike(one: &Value, other: &Value) -> bool {
    match (one, other) {
        (Value::Number(one), Value::Number(other)) => {
            (one.as_f64().unwrap() - other.as_f64().unwrap()).abs() <= TOLERANCE
        }
        (Value::Array(one), Value::Array(other)) => {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| is_alike(one, other))
        }
        (Value::Object(one), Value::Object(other)) => {
            let same = |(key, value): (&String, &Value)| other.get(key).is_some_and(|other| is_alike(value, other));
            one.len() == other.len() && one.iter().all(same)
        }
        _ => one == other,
    }
}

/// Has a cluster answer all prompts, whose pages go over `transport`.
fn answers_over(cell: &Cell, transport: &str, flags: [&[&str]; 2]) -> Vec<Value> {
    let over = ["--transport", transport];
    let decode = decode(cell, &[&over, flags[0]].concat());
    let prefill = prefill(cell, &[&over, &["--max-num-batched-tokens", "128"], flags[1]].concat());
    cell.wait_for_prefill_worker(&decode);
    let answers = (0..).zip(LENGTHS).map(|(number, length)| ask(&decode, &cell.prompt(number, length))).collect();
    let long = LENGTHS.iter().filter(|&&length| length > THRESHOLD).count() as f64;
    assert_eq!(prefills(&decode, "remote"), long, "{}\n{}", decode.log(), prefill.log());
    assert_eq!(handoffs(&decode, "completed"), long);
    assert!(prefill.metric(&format!("engine_transfer_bytes_total{{transport=\"{transport}\"}}")) > 0.0);
    wait_until_idle(&decode);
    wait_until_idle(&prefill);
    answers
}

#[test]
#[ignore = "needs a CUDA device or a stand-in: make device-pages"]
fn answers_equal_those_of_one_process_however_pages_leave_a_device_and_reach_another() {
    let cell = cell();
    let one = alone(&cell);
    let expected: Vec<Value> =
        (0..).zip(LENGTHS).map(|(number, length)| ask(&one, &cell.prompt(number, length))).collect();
    drop(one);
    let direct = answers_over(&cell, "cuda-ipc", [&[], &[]]);
    for (answer, expected) in direct.iter().zip(&expected) {
        assert!(is_alike(answer, expected), "{answer:#} is not {expected:#}");
    }
    // With so little room to stage pages in that a prompt's do not fit at once, and that they are used again.
    let little: [&[&str]; 2] = [&["--kv-staging-memory", "448KiB"], &["--kv-staging-memory", "64KiB"]];
    for transport in ["shm", "tcp"] {
        assert_eq!(answers_over(&cell, transport, little), direct, "{transport}");
    }
}

#[test]
#[ignore = "needs a CUDA device or a stand-in: make device-pages"]
fn the_best_way_between_devices_of_a_host_is_chosen_and_what_is_staged_is_said() {
    let cell = cell();
    let decode = decode(&cell, &[]);
    let prefill = prefill(&cell, &[]);
    cell.wait_for_prefill_worker(&decode);
    ask(&decode, &cell.prompt(1, 200));
    assert_eq!(prefills(&decode, "remote"), 1.0);
    assert!(prefill.metric("engine_transfer_bytes_total{transport=\"cuda-ipc\"}") > 0.0);
    for worker in [&decode, &prefill] {
        assert!(worker.log().contains("pages are staged"), "{}", worker.log());
    }
}

#[test]
#[ignore = "needs the stand-in for libcuda: make device-pages"]
fn a_prefill_worker_has_its_memory_and_its_kernels_before_a_job_comes() {
    let mut cell = cell();
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("calls");
    let calls = || std::fs::read_to_string(&log).unwrap_or_default();
    let decode = decode(&cell, &[]);
    cell.set_environment(&[&format!("STANDIN_LOG={}", log.display())]);
    let prefill = prefill(&cell, &["--max-num-batched-tokens", "128"]);
    cell.wait_for_prefill_worker(&decode);
    assert!(prefill.log().contains("made room for steps of 128 tokens"), "{}", prefill.log());
    let before = calls();
    assert!(before.contains("allocated"), "{before}");
    for (number, length) in (0..).zip(LENGTHS) {
        ask(&decode, &cell.prompt(number, length));
    }
    assert!(prefills(&decode, "remote") > 0.0);
    assert_eq!(&calls()[before.len()..], "");
    assert!(!before.contains("loaded late"), "{before}");
}

/// Has a prompt handed off to a prefill worker under these variables, which is returned.
fn handed_off_under(variables: &[&str], over: &str) -> Server {
    let mut cell = cell();
    let decode = decode(&cell, &[]);
    cell.set_environment(variables);
    let prefill = prefill(&cell, &[]);
    cell.wait_for_prefill_worker(&decode);
    let answer = ask(&decode, &cell.prompt(1, 200));
    assert_eq!(prefills(&decode, "remote"), 1.0, "{}", prefill.log());
    let written = format!("engine_transfer_bytes_total{{transport=\"{over}\"}}");
    assert!(prefill.metric(&written) > 0.0, "{}", prefill.log());
    assert!(is_alike(&answer, &ask(&alone(&cell), &cell.prompt(1, 200))));
    wait_until_idle(&decode);
    prefill
}

#[test]
#[ignore = "needs the stand-in for libcuda: make device-pages"]
fn where_processes_share_a_device_by_mps_pages_are_staged() {
    let prefill = handed_off_under(&["STANDIN_MPS=yes"], "shm");
    assert!(prefill.log().contains("share this device by MPS"), "{}", prefill.log());
}

#[test]
#[ignore = "needs the stand-in for libcuda: make device-pages"]
fn pages_go_to_a_device_that_the_prefill_worker_does_not_see() {
    handed_off_under(&["STANDIN_DEVICE=other"], "cuda-ipc");
}

#[test]
#[ignore = "needs the stand-in for libcuda: make device-pages"]
fn what_cannot_be_given_back_fails_nobody_s_call() {
    handed_off_under(&["STANDIN_REFUSES=destroy"], "cuda-ipc");
}

#[test]
#[ignore = "needs a CUDA device or a stand-in: make device-pages"]
fn a_prompt_whose_pages_find_no_room_to_be_staged_in_is_prefilled_here() {
    let cell = cell();
    // A page of both layers is 16 KiB, and holds 16 tokens.
    let decode = decode(&cell, &["--transport", "shm", "--kv-staging-memory", "128KiB"]);
    let _prefill = prefill(&cell, &["--transport", "shm"]);
    cell.wait_for_prefill_worker(&decode);
    ask(&decode, &cell.prompt(1, 300));
    ask(&decode, &cell.prompt(2, 100));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 1.0), "{}", decode.log());
    assert_eq!(handoffs(&decode, "expired"), 0.0, "it never could, so nobody was asked");
    assert!(decode.log().contains("see --kv-staging-memory"), "{}", decode.log());
    wait_until_idle(&decode);
}

#[test]
#[ignore = "needs a CUDA device or a stand-in: make device-pages"]
fn workers_on_a_cpu_and_on_a_device_never_pair() {
    let cell = cell();
    let decode = decode(&cell, &[]);
    let flags = [&cell.model.flags()[..], &["--device", "cpu"]].concat();
    let prefill = cell.prefill(&flags);
    prefill.wait_until("it has joined", |prefill| prefill.log().contains("registered"));
    ask(&decode, &cell.prompt(1, 200));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    assert_eq!(decode.metric("engine_prefill_workers"), 0.0);
}

/// Stops a prefill worker that is writing, and kills it when the decode worker has given up on it.
fn a_prefill_worker_is_stopped_and_killed(transport: &str) {
    let cell = cell();
    let over = ["--transport", transport];
    let decode = decode(&cell, &over);
    let prefill = prefill(&cell, &[&over[..], &SLOWLY].concat());
    cell.wait_for_prefill_worker(&decode);
    let prompt = cell.prompt(1, 480);
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| ask(&decode, &prompt));
        let written = format!("engine_transfer_bytes_total{{transport=\"{transport}\"}}");
        prefill.wait_until("it writes", |prefill| prefill.get("/metrics").text().contains(&written));
        prefill.signal("STOP");
        answer.join().unwrap()
    });
    assert_eq!(granted(&decode), 1.0);
    // The request went on without; its pages are nobody's as long as somebody may write there.
    assert!(pages(&decode, "quarantined") > 0.0 && handoffs(&decode, "fenced") == 0.0, "{}", decode.log());
    prefill.signal("KILL");
    wait_until_idle(&decode);
    assert_eq!(handoffs(&decode, "fenced"), 1.0);
    assert!(is_alike(&answer, &ask(&alone(&cell), &prompt)));
    // What it leaves behind is as good as new.
    drop(prefill);
    let next = self::prefill(&cell, &over);
    next.wait_until("it has joined", |next| next.log().contains("registered"));
    cell.wait_for_prefill_worker(&decode);
    ask(&decode, &cell.prompt(2, 300));
    assert_eq!(prefills(&decode, "remote"), 1.0);
    wait_until_idle(&decode);
}

#[test]
#[ignore = "needs a CUDA device or a stand-in: make device-pages"]
fn pages_that_a_stopped_worker_s_device_may_write_to_are_nobody_s_until_its_death_is_certain() {
    a_prefill_worker_is_stopped_and_killed("cuda-ipc");
}

#[test]
#[ignore = "needs a CUDA device or a stand-in: make device-pages"]
fn staged_pages_that_a_stopped_worker_may_write_to_are_nobody_s_until_its_death_is_certain() {
    a_prefill_worker_is_stopped_and_killed("shm");
}

#[test]
#[ignore = "needs a CUDA device or a stand-in: make device-pages"]
fn a_prefill_worker_that_is_killed_while_its_device_writes_costs_a_pause() {
    let cell = cell();
    let over = ["--transport", "cuda-ipc"];
    let decode = decode(&cell, &over);
    let prefill = prefill(&cell, &[&over[..], &SLOWLY].concat());
    cell.wait_for_prefill_worker(&decode);
    let prompt = cell.prompt(1, 480);
    let answer = thread::scope(|scope| {
        let answer = scope.spawn(|| ask(&decode, &prompt));
        let written = "engine_transfer_bytes_total{transport=\"cuda-ipc\"}";
        prefill.wait_until("it writes", |prefill| prefill.get("/metrics").text().contains(written));
        prefill.signal("KILL");
        answer.join().unwrap()
    });
    assert!(is_alike(&answer, &ask(&alone(&cell), &prompt)));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    assert_eq!(handoffs(&decode, "fenced"), 1.0);
    wait_until_idle(&decode);
}

#[test]
#[ignore = "needs a CUDA device or a stand-in: make device-pages"]
fn the_same_prompt_again_is_found_in_the_cache_that_pages_were_brought_to() {
    let cell = cell();
    for transport in ["cuda-ipc", "shm"] {
        let over = ["--transport", transport];
        let (decode, prefill) = (decode(&cell, &over), prefill(&cell, &over));
        cell.wait_for_prefill_worker(&decode);
        let (prompt, longer) = (cell.prompt(1, 250), cell.prompt(1, 390));
        let first = ask(&decode, &prompt);
        // Not bit for bit: what follows the last full page is computed in one piece now, and was a token by itself.
        assert!(is_alike(&ask(&decode, &prompt), &first), "{transport}");
        assert_eq!(prefills(&decode, "remote"), 1.0);
        // Found up to a page's border on both sides, which the rest does not begin at.
        let answer = ask(&decode, &longer);
        assert_eq!(prefills(&decode, "remote"), 2.0);
        assert!(is_alike(&answer, &ask(&alone(&cell), &longer)), "{transport}");
        wait_until_idle(&decode);
        wait_until_idle(&prefill);
    }
}

/// A server in one process, on a stand-in that is told something, with these flags besides.
fn alone_under(variable: &str, model: &Model, flags: &[&str]) -> Server {
    let limits = ["--served-model-name", "demo", "--standalone", "--kv-blocks", "64"];
    Server::start_under(&["env", variable], &[&model.flags()[..], &limits, &unless_in(&[], &FLAGS), flags].concat())
}

#[test]
#[ignore = "needs the stand-in for libcuda: make device-pages"]
fn a_worker_whose_device_cannot_record_steps_says_so_once_and_answers_all_the_same() {
    let model = Model::made_up(2, 2, 512);
    let mut answers = Vec::new();
    for refused in ["nothing", "begin", "amid", "instantiate", "upload"] {
        let server = alone_under(&format!("STANDIN_REFUSES={refused}"), &model, &[]);
        answers.push((1..4).map(|number| ask(&server, &model.prompt(number, 30))).collect::<Vec<_>>());
        let said = server.log().matches("could not be recorded").count();
        assert_eq!(said, usize::from(refused != "nothing"), "{refused}: {}", server.log());
        assert_eq!(server.log().contains("no step was recorded"), refused != "nothing", "{refused}: {}", server.log());
    }
    assert!(answers.iter().all(|others| *others == answers[0]), "{answers:#?}");
    let eager = alone_under("STANDIN_REFUSES=nothing", &model, &["--enforce-eager"]);
    assert!(!eager.log().contains("recorded"), "{}", eager.log());
    assert_eq!((1..4).map(|number| ask(&eager, &model.prompt(number, 30))).collect::<Vec<_>>(), answers[0]);
}

#[test]
#[ignore = "needs the stand-in for libcuda: make device-pages"]
fn a_device_that_the_driver_compiles_the_kernels_for_is_said_to_take_minutes() {
    let model = Model::made_up(2, 2, 512);
    for (capability, compiles) in [("9", false), ("10", true), ("12", true)] {
        let server = alone_under(&format!("STANDIN_CAPABILITY={capability}"), &model, &[]);
        assert_eq!(server.log().contains("the driver compiles the kernels"), compiles, "{}", server.log());
        ask(&server, &model.prompt(1, 30));
    }
}

#[test]
#[ignore = "needs the stand-in for libcuda: make device-pages"]
fn a_worker_asks_its_device_for_no_times() {
    let folder = tempfile::tempdir().unwrap();
    let log = folder.path().join("calls");
    let model = Model::made_up(2, 2, 512);
    let server = alone_under(&format!("STANDIN_LOG={}", log.display()), &model, &[]);
    ask(&server, &model.prompt(1, 30));
    let calls = std::fs::read_to_string(&log).unwrap();
    assert!(calls.contains("allocated") && !calls.contains("event with a time"), "{calls}");
}

#[test]
#[ignore = "needs the stand-in for libcuda: make device-pages"]
fn a_worker_whose_device_hangs_ends_and_its_answer_goes_on_elsewhere() {
    let mut cell = cell();
    let folder = tempfile::tempdir().unwrap();
    let hangs = folder.path().join("hangs");
    cell.set_environment(&[&format!("STANDIN_HANGS={}", hangs.display())]);
    let hanging = decode(&cell, &["--step-timeout", "2"]);
    let frontend = cell.frontend(&["--worker-patience", "120"]);
    wait_for_decode_workers(&frontend, 1);
    let request = streamed(&cell.prompt(1, 30), 60);
    let mut events = frontend.stream("/v1/completions", &request);
    (0..3).for_each(|_| drop(events.next().expect("it begins")));
    std::fs::write(&hangs, "").unwrap();
    cell.set_environment(&[]);
    let other = decode(&cell, &[]);
    hanging.wait_until("it says why it ends", |hanging| hanging.log().contains("the device must hang"));
    assert_eq!(hanging.wait().code(), Some(1), "{}", hanging.log());
    let text = |events: &[Value]| -> String {
        events.iter().filter_map(|event| event["choices"][0]["text"].as_str()).collect()
    };
    let whole = text(&other.stream("/v1/completions", &request).finish());
    assert_eq!(text(&events.finish()), whole);
    assert_eq!(frontend.metric("engine_frontend_migrations_total"), 1.0, "{}", frontend.log());
}
