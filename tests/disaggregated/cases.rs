//! Unusual requests and unusual clusters, with models that take next to no time.

use std::{
    process::Command,
    thread,
    time::{Duration, Instant},
};

use engine::cluster::{Role, WorkerFilter};
use serde_json::json;

use crate::{
    cell::{
        Cell, Model, answer_to, ask, card, granted, handoffs, join, leave_behind, prefills, registered, sum,
        wait_for_decode_workers, wait_until_idle,
    },
    program::Server,
    services::{self, Certificates},
};

const THRESHOLD: [&str; 2] = ["--max-local-prefill-length", "64"];

fn small() -> Model {
    Model::made_up(2, 2, 2048)
}

#[test]
fn two_models_in_one_cluster_keep_apart() {
    let cell = Cell::of(small());
    let other = Model::made_up(1, 2, 2048);
    let models = [(&cell.model, "first"), (&other, "second")];
    let decodes =
        models.map(|(model, name)| cell.decode_of(model, &[&["--served-model-name", name][..], &THRESHOLD].concat()));
    let others = models.map(|(model, _)| cell.prefill(&model.flags()));
    let frontend = cell.frontend(&[]);
    wait_for_decode_workers(&frontend, 2);
    decodes.iter().for_each(|decode| cell.wait_for_prefill_worker(decode));
    assert!(decodes.iter().all(|decode| decode.metric("engine_prefill_workers") == 1.0));

    let listed = frontend.get("/v1/models").json();
    let listed: Vec<_> = listed["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect();
    assert_eq!(listed, ["first", "second"]);
    let prompt = cell.prompt(1, 300);
    let question =
        |name: &str| json!({"model": name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 3});
    let answers = models.map(|(_, name)| answer_to(&frontend, &question(name)));
    assert_ne!(answers[0], answers[1]);
    for ((model, _), answer) in models.iter().zip(&answers) {
        assert_eq!(answer_to(&model.alone(), &question("demo")), *answer);
    }
    for (decode, prefill) in decodes.iter().zip(&others) {
        assert_eq!((prefills(decode, "remote"), prefills(decode, "local")), (1.0, 0.0));
        wait_until_idle(prefill);
        assert_eq!(prefill.metric("engine_handoff_seconds_count{phase=\"compute\"}"), 1.0);
    }
    let nameless = json!({"prompt": cell.prompt(1, 300), "max_tokens": 1});
    assert_eq!(frontend.post("/v1/completions", &nameless).status, 400, "which of them?");
    assert_eq!(frontend.post("/v1/completions", &question("third")).status, 404);
}

#[test]
fn a_prefill_worker_is_asked_how_it_is_as_any_other() {
    let cell = Cell::of(small());
    let prefill = cell.prefill(&cell.model.flags());
    for path in ["/health", "/v1/health", "/ping", "/health/live", "/health/ready", "/version"] {
        assert_eq!(prefill.get(path).status, 200, "{path}");
    }
    let (status, _, message) = prefill.post("/v1/completions", &json!({"prompt": "Hi"})).error();
    assert!(status == 404 && message.contains("decode workers"), "{message}");
    assert_eq!(prefill.post("/metrics", &json!({})).error().0, 405);
}

#[test]
fn a_worker_that_is_to_use_a_device_that_is_not_there_says_so_before_it_loads_a_model() {
    let cell = Cell::of(small());
    let [etcd, nats] = cell.services();
    let model = cell.model.flags();
    for role in [&[][..], &["--is-prefill-worker"]] {
        let services = ["--etcd", &etcd, "--nats", &nats, "--port", "0", "--rdma-device", "no_such_device"];
        let output =
            Command::new(env!("CARGO_BIN_EXE_engine")).args(&model).args(role).args(services).output().unwrap();
        let (text, log) = (String::from_utf8_lossy(&output.stderr), String::from_utf8_lossy(&output.stdout));
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("RDMA was asked for: ") && text.contains("no RDMA device"), "{text}");
        assert!(!format!("{text}{log}").contains("parameters"), "a model was loaded before");
    }
}

#[test]
fn pages_go_to_whoever_has_the_cluster_s_token_and_a_certificate_and_to_no_stranger() {
    let certificates = Certificates::new();
    let cell = Cell::of(small());
    let [ca, cert, key] = ["ca.pem", "leaf.pem", "leaf.key"].map(|name| certificates.path(name));
    let shown = ["--session-ca", &ca, "--session-cert", &cert, "--session-key", &key];
    // What is encrypted.
    let tcp = ["--transport", "tcp"];
    let (token, other) = (["--cluster-token", "tea"], ["--cluster-token", "coffee"]);
    // However many jobs the strangers leave behind.
    let always = ["--disagg-policy", "always"];
    let decode = cell.decode(&[&always[..], &tcp, &shown, &token].concat());
    // One without the token, and one that knows the authority and shows nothing.
    for (number, flags) in [[&shown[..], &other].concat(), [&shown[..2], &token].concat()].iter().enumerate() {
        let stranger = cell.prefill(&[&tcp[..], flags].concat());
        cell.wait_for_prefill_worker(&decode);
        let answered = thread::scope(|scope| {
            let asking = scope.spawn(|| ask(&decode, &cell.prompt(number, 300)));
            stranger.wait_until("it is turned away", |it| it.log().contains("no session to a decode worker"));
            stranger.signal("TERM");
            asking.join().is_ok()
        });
        assert!(answered && stranger.wait().success(), "{}", stranger.log());
        assert_eq!((prefills(&decode, "remote"), prefills(&decode, "local")), (0.0, number as f64 + 1.0));
        decode.wait_until("it has gone", |decode| decode.metric("engine_prefill_workers") == 0.0);
    }
    // And one that was told everything by its environment.
    let [etcd, nats] = cell.services();
    let variables = [format!("ETCD_ENDPOINTS={etcd}"), format!("NATS_SERVER={nats}")];
    let environment = ["env", &variables[0], &variables[1], "ENGINE_CLUSTER_TOKEN=tea"];
    let friend =
        Server::start_under(&environment, &[&["--is-prefill-worker", "--kv-blocks", "256"], &tcp[..], &shown].concat());
    cell.wait_for_prefill_worker(&decode);
    ask(&decode, &cell.prompt(9, 300));
    assert_eq!(prefills(&decode, "remote"), 1.0, "{}", friend.log());
}

#[test]
fn a_worker_that_reaches_no_decode_worker_leaves_jobs_to_those_that_do() {
    let cell = Cell::of(small());
    let token = ["--cluster-token", "tea"];
    let decode = cell.decode(&[&["--disagg-policy", "always"][..], &token].concat());
    let stranger = cell.prefill(&["--cluster-token", "coffee"]);
    cell.wait_for_prefill_worker(&decode);
    let friend = thread::scope(|scope| {
        let asking = scope.spawn(|| ask(&decode, &cell.prompt(1, 300)));
        stranger.wait_until("it is turned away", |it| it.log().contains("no session to a decode worker"));
        // Not to wait for anything: asking all the time, it would soon have had the job too often. Resting it has it
        // for the fifth time after 15 s.
        thread::sleep(Duration::from_secs(4));
        let friend = cell.prefill(&token);
        asking.join().unwrap();
        friend
    });
    assert_eq!((prefills(&decode, "remote"), prefills(&decode, "local")), (1.0, 0.0), "{}", stranger.log());
    for worker in [&stranger, &friend] {
        assert_eq!(worker.metric("engine_dead_jobs_total"), 0.0);
    }
}

#[test]
fn a_decode_worker_that_leaves_takes_its_socket_with_it() {
    let cell = Cell::of(small());
    let [etcd, nats] = cell.services();
    let folder = tempfile::tempdir().unwrap();
    let variable = format!("XDG_RUNTIME_DIR={}", folder.path().display());
    let flags = [&cell.model.flags()[..], &["--etcd", &etcd, "--nats", &nats, "--transport", "shm"]].concat();
    let decode = Server::start_under(&["env", &variable], &flags);
    let sockets = || std::fs::read_dir(folder.path().join("engine")).unwrap().count();
    assert_eq!(sockets(), 1);
    decode.signal("TERM");
    assert!(decode.wait().success(), "{}", decode.log());
    assert_eq!(sockets(), 0);
}

/// A prompt whose tokens would not fit a message of the queue.
fn a_very_long_prompt(length: usize, cell: &Cell) {
    let batch = ["--max-num-batched-tokens", "4096"];
    let decode = cell.decode(&[&THRESHOLD[..], &batch].concat());
    let _prefill = cell.prefill(&batch);
    cell.wait_for_prefill_worker(&decode);
    let prompt = cell.prompt(2, length);
    let answer = ask(&decode, &prompt);
    assert_eq!((prefills(&decode, "remote"), prefills(&decode, "local")), (1.0, 0.0));
    assert_eq!(answer, ask(&cell.alone(), &prompt));
    wait_until_idle(&decode);
}

#[test]
fn a_prompt_longer_than_the_queue_s_messages_is_handed_off() {
    // As 200,000 tokens are to the million bytes that NATS allows by default, so are these to 4 KiB.
    let nats = services::nats_with_config("max_payload: 4096");
    let cell = Cell::with_nats(nats, Model::made_up(1, 1, 8192));
    a_very_long_prompt(6000, &cell);
}

#[test]
#[ignore = "takes minutes: `make soak`"]
fn a_prompt_of_200_000_tokens_is_handed_off() {
    a_very_long_prompt(200_000, &Cell::of(Model::made_up(1, 1, 1 << 18)));
}

#[test]
fn two_hundred_long_prompts_at_the_start_are_all_answered() {
    let cell = Cell::of(small());
    let frontend = cell.frontend(&[]);
    let decodes = [(); 3].map(|()| cell.decode(&THRESHOLD));
    wait_for_decode_workers(&frontend, decodes.len());
    let prompts: Vec<_> = (0..200).map(|number| cell.prompt(number, 100 + 2 * number)).collect();
    let (answers, prefill_workers) = thread::scope(|scope| {
        let asking: Vec<_> = prompts.iter().map(|prompt| scope.spawn(|| ask(&frontend, prompt))).collect();
        // They come when everything is waiting.
        let workers = [(); 3].map(|()| cell.prefill(&[]));
        (asking.into_iter().map(|asking| asking.join().unwrap()).collect::<Vec<_>>(), workers)
    });
    let alone = cell.alone();
    for (prompt, answer) in prompts.iter().zip(&answers) {
        assert_eq!(*answer, ask(&alone, prompt), "a prompt of {} tokens", prompt.len());
    }
    let prefilled = |place: &str| sum(&decodes, &format!("engine_prefills_total{{where=\"{place}\"}}"));
    assert!(prefilled("remote") + prefilled("local") >= 200.0);
    decodes.iter().chain(&prefill_workers).for_each(wait_until_idle);
    // And the way is open.
    for decode in &decodes {
        cell.wait_for_prefill_workers(decode, 3);
        decode.wait_until("the queue is empty", |decode| decode.metric("engine_prefill_queue_depth") == 0.0);
    }
    let before = prefilled("remote");
    ask(&frontend, &cell.prompt(1000, 500));
    assert_eq!(prefilled("remote"), before + 1.0);
}

#[test]
fn a_queue_that_nobody_works_on_grows_to_its_limit_and_no_further() {
    let cell = Cell::of(small());
    let decode = cell.decode(&[&THRESHOLD[..], &["--max-prefill-queue-size", "2"]].concat());
    let prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cluster = runtime.block_on(join(&cell));
    let key = runtime.block_on(card(&cluster, Role::Decode)).model_key;
    prefill.signal("STOP");
    let prompts: Vec<_> = (0..40).map(|number| cell.prompt(number, 80 + number)).collect();
    let answers: Vec<_> = thread::scope(|scope| {
        let asking: Vec<_> = prompts.iter().map(|prompt| scope.spawn(|| ask(&decode, prompt))).collect();
        decode.wait_until("most are computed here", |decode| {
            let Ok(depth) = runtime.block_on(cluster.queue.depth(key)) else { return false };
            // Two wait, one may be with the worker that hangs, and some on their way while the queue is looked at.
            assert!(depth.waiting + depth.delivered < 10, "{depth:?}");
            prefills(decode, "local") > 30.0
        });
        prefill.signal("CONT");
        asking.into_iter().map(|asking| asking.join().unwrap()).collect()
    });
    let alone = cell.alone();
    for (prompt, answer) in prompts.iter().zip(&answers) {
        assert_eq!(*answer, ask(&alone, prompt), "a prompt of {} tokens", prompt.len());
    }
    wait_until_idle(&decode);
}

#[test]
fn clients_that_leave_about_when_their_handoffs_complete_leave_nothing_behind() {
    let cell = Cell::of(small());
    // However long the queue, as many jobs end here without their clients.
    let decode = cell.decode(&["--disagg-policy", "always"]);
    let prefill = cell.prefill(&["--threads", "1"]);
    cell.wait_for_prefill_worker(&decode);
    // How long it takes from the grant to the answer, to leave at all times in between and a little after.
    let claimed = |before| decode.wait_until("it is claimed", |decode| granted(decode) > before);
    let connection = leave_behind(&decode, &cell.prompt(0, 900));
    claimed(0.0);
    let since = Instant::now();
    decode.wait_until("it is there", |decode| prefills(decode, "remote") == 1.0);
    let whole = since.elapsed();
    drop(connection);
    for step in 1..=30 {
        let before = granted(&decode);
        let connection = leave_behind(&decode, &cell.prompt(step, 900));
        claimed(before);
        // Not to wait for anything: this is what is tried.
        thread::sleep(whole * step as u32 / 25);
        drop(connection);
    }
    wait_until_idle(&decode);
    wait_until_idle(&prefill);
    let prompt = cell.prompt(99, 900);
    assert_eq!(ask(&decode, &prompt), ask(&cell.alone(), &prompt));
    let ended = ["completed", "released", "failed", "fenced", "expired"].map(|outcome| handoffs(&decode, outcome));
    assert_eq!(ended.iter().sum::<f64>(), 32.0, "{ended:?}");
    assert_eq!(ended[2..], [0.0; 3], "nobody failed or died, and everything was claimed");
}

#[test]
fn a_lost_lease_costs_a_pause_and_its_worker_comes_back_under_another() {
    let cell = Cell::of(small());
    let decode = cell.decode(&THRESHOLD);
    let prefill = cell.prefill(&["--max-num-batched-tokens", "1", "--max-num-seqs", "1", "--threads", "1"]);
    let frontend = cell.frontend(&[]);
    wait_for_decode_workers(&frontend, 1);
    cell.wait_for_prefill_worker(&decode);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cluster = runtime.block_on(join(&cell));
    let lease = |role| {
        let one = registered(&cluster, WorkerFilter::role(role), |workers| workers.len() == 1);
        *runtime.block_on(one).keys().next().unwrap()
    };
    let revoke = |role| {
        let id = lease(role);
        runtime.block_on(async {
            let client = etcd_client::Client::connect([cell.etcd.url()], None).await.unwrap();
            client.lease_client().revoke(id.0 as i64).await.unwrap();
        });
        id
    };
    // The prefill worker's, while it computes: its request is prefilled here, and it gives the pages back.
    let prompt = cell.prompt(1, 1500);
    let before = granted(&decode);
    let (answer, old) = thread::scope(|scope| {
        let answer = scope.spawn(|| ask(&frontend, &prompt));
        decode.wait_until("the prompt is claimed", |decode| granted(decode) > before);
        let old = revoke(Role::Prefill);
        (answer.join().unwrap(), old)
    });
    let alone = cell.alone();
    assert_eq!(answer, ask(&alone, &prompt));
    assert_eq!((prefills(&decode, "remote"), prefills(&decode, "local")), (0.0, 1.0));
    assert_eq!(handoffs(&decode, "released"), 1.0);
    wait_until_idle(&decode);
    prefill.wait_until("it is back", |_| lease(Role::Prefill) != old);
    // The decode worker's: the frontend sees it go and come, and jobs carry its new name.
    let old = revoke(Role::Decode);
    prefill.wait_until("it is back", |_| lease(Role::Decode) != old);
    // Nothing will be said under the old name again.
    prefill.wait_until("its session is closed", |prefill| prefill.log().contains("its lease has gone"));
    frontend.wait_until("it knows the new lease", |frontend| frontend.log().matches("a decode worker ").count() >= 2);
    wait_for_decode_workers(&frontend, 1);
    cell.wait_for_prefill_worker(&decode);
    let prompt = cell.prompt(2, 300);
    assert_eq!(ask(&frontend, &prompt), ask(&alone, &prompt));
    assert_eq!(prefills(&decode, "remote"), 1.0);
    wait_until_idle(&decode);
}
