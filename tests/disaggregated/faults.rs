//! What others' disaggregated servers got wrong, done to ours: processes killed and stopped at the worst moments,
//! clients that leave, jobs from elsewhere, services that go away. The answers stay what they are, and every page comes
//! back.

use std::{collections::BTreeSet, net::TcpStream, thread};

use engine::{
    cluster::{QueueDepth, Role, WorkerFilter},
    handoff::{HandoffId, Job, WorkerId},
};
use serde_json::{Value, json};

use crate::{
    cell::{
        self, Cell, SLOWLY, answer_to, ask, card, granted, handoffs, join, pages, prefills, prompt, registered,
        wait_until_idle,
    },
    program::Server,
    services,
};

/// Tokens of a prompt that takes a slow prefill worker more than a hundred steps.
const VERY_LONG: usize = 480;
const THRESHOLD: [&str; 2] = ["--max-local-prefill-length", "64"];

/// A server in one process, to compare with.
fn alone() -> Server {
    Server::start(&["--max-model-len", "1024", "--kv-blocks", "256"])
}

/// Runs `act` while a very long prompt is with a prefill worker, and returns the answer to it.
fn during_a_handoff(decode: &Server, act: impl FnOnce()) -> Value {
    let before = granted(decode);
    thread::scope(|scope| {
        let answer = scope.spawn(|| ask(decode, &prompt(VERY_LONG)));
        decode.wait_until("the prompt is claimed", |decode| granted(decode) > before);
        act();
        answer.join().unwrap()
    })
}

/// Sends a request for a very long prompt and does not wait for the answer.
fn leave_behind(decode: &Server) -> TcpStream {
    cell::leave_behind(decode, &prompt(VERY_LONG))
}

/// A prompt of so many tokens is answered by a worker as by a server in one process.
fn is_answered_as(alone: &Server, worker: &Server, length: usize) {
    assert_eq!(ask(worker, &prompt(length)), ask(alone, &prompt(length)), "a prompt of {length} tokens");
}

fn a_prefill_worker_is_killed(transport: &str) {
    let cell = Cell::start();
    let decode = cell.decode(&[&THRESHOLD[..], &["--transport", transport]].concat());
    let prefill = cell.prefill(&[&SLOWLY[..], &["--transport", transport]].concat());
    cell.wait_for_prefill_worker(&decode);
    let answer = during_a_handoff(&decode, || prefill.signal("KILL"));
    assert_eq!(answer, ask(&alone(), &prompt(VERY_LONG)));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    assert_eq!(handoffs(&decode, "fenced"), 1.0);
    wait_until_idle(&decode);
}

#[test]
fn a_prefill_worker_that_dies_while_it_writes_shared_memory_costs_a_pause() {
    a_prefill_worker_is_killed("shm");
}

#[test]
fn a_prefill_worker_that_dies_while_it_sends_pages_costs_a_pause() {
    a_prefill_worker_is_killed("tcp");
}

#[test]
fn a_prefill_worker_that_died_while_it_had_nothing_to_do_costs_less_than_its_lease() {
    let cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let alone = alone();
    // It has never opened a session: all that is known of it is its lease, and who asks for jobs.
    prefill.signal("KILL");
    // A job could still go to its connections before they are closed.
    prefill.wait();
    is_answered_as(&alone, &decode, 150);
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    let log = decode.log();
    let noticed = log.find("no prefill worker asks for jobs").unwrap_or_else(|| panic!("{log}"));
    assert!(log.find("a prefill worker has gone").is_none_or(|gone| gone > noticed), "{log}");
    // Another one is used as soon as it is there.
    let _another = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    is_answered_as(&alone, &decode, 200);
    assert_eq!(prefills(&decode, "remote"), 1.0, "{}", decode.log());
    wait_until_idle(&decode);
}

#[test]
fn a_prefill_worker_that_hangs_keeps_its_pages_until_it_wakes_and_its_late_writes_change_nothing() {
    let cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let prefill = cell.prefill(&SLOWLY);
    cell.wait_for_prefill_worker(&decode);
    let answer = during_a_handoff(&decode, || prefill.signal("STOP"));
    let alone = alone();
    assert_eq!(answer, ask(&alone, &prompt(VERY_LONG)));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    // It has the memory mapped, and may write to it when it wakes.
    assert!(pages(&decode, "quarantined") >= (VERY_LONG / 16) as f64);
    prefill.signal("CONT");
    wait_until_idle(&decode);
    for length in [70, 120, VERY_LONG] {
        assert_eq!(ask(&decode, &prompt(length)), ask(&alone, &prompt(length)), "a prompt of {length} tokens");
    }
}

#[test]
fn a_client_that_leaves_while_its_prompt_is_queued_or_computed_frees_its_pages() {
    let cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let prefill = cell.prefill(&SLOWLY);
    cell.wait_for_prefill_worker(&decode);
    // Nobody takes the job: the pages are free as soon as the client has gone.
    prefill.signal("STOP");
    let connection = leave_behind(&decode);
    decode.wait_until("pages are lent", |decode| pages(decode, "lent") > 0.0);
    drop(connection);
    wait_until_idle(&decode);
    assert_eq!(handoffs(&decode, "expired"), 1.0);
    prefill.signal("CONT");
    cell.wait_for_prefill_worker(&decode);
    // The next one is being computed when its client leaves; the prefill worker stops.
    let connection = leave_behind(&decode);
    decode.wait_until("the prompt is claimed", |decode| granted(decode) == 1.0);
    drop(connection);
    wait_until_idle(&decode);
    assert_eq!(handoffs(&decode, "released"), 1.0);
    wait_until_idle(&prefill);
    assert!(pages(&prefill, "cached") < (VERY_LONG / 16) as f64, "it computed all of it");
}

#[test]
fn jobs_that_are_stale_or_cannot_be_read_harm_nobody() {
    let cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cluster = runtime.block_on(join(&cell));
    let card = runtime.block_on(card(&cluster, Role::Decode));
    let job = |handoff, addresses: &Value, decode| Job {
        handoff: HandoffId(handoff),
        decode: WorkerId(decode),
        model_key: card.model_key.to_string(),
        addresses: addresses.clone(),
        prompt_tokens: 500,
        traceparent: None,
    };
    let mut nowhere = card.session.clone();
    (nowhere["unix"], nowhere["tcp"]) = (json!("/no/such/socket"), json!("127.0.0.1:1"));
    nowhere["instance"] = json!("of another run");
    // All else about it may have stayed the same, and mean something else.
    let newer = String::from_utf8(job(5, &card.session, 5).encode()).unwrap();
    let newer = newer.replace(r#""schema":1,"#, r#""schema":99,"#).into_bytes();
    let poison = [
        // A job of an earlier life of this decode worker, and one of a worker that is no more.
        job(1, &card.session, 5).encode(),
        job(2, &nowhere, 6).encode(),
        job(3, &json!({"strange": true}), 7).encode(),
        // Of another schema, of another model, and none at all.
        newer,
        Job { model_key: "0".repeat(32), ..job(4, &card.session, 5) }.encode(),
        b"\xff\x00 not a job".to_vec(),
    ];
    for (number, payload) in poison.into_iter().enumerate() {
        decode.wait_until("it is on the queue", |_| {
            let id = format!("poison {number}");
            runtime.block_on(cluster.queue.publish(card.model_key, id, payload.clone().into())).is_ok()
        });
    }
    let alone = alone();
    for length in [150, 250] {
        is_answered_as(&alone, &decode, length);
    }
    assert_eq!(prefills(&decode, "remote"), 2.0);
    decode.wait_until("the queue is empty", |_| {
        runtime.block_on(cluster.queue.depth(card.model_key)).is_ok_and(|depth| depth.is_empty())
    });
    // What cannot be read, or is another model's, was given up and counted; what is stale was just done with.
    prefill.wait_until("dead jobs are counted", |prefill| prefill.metric("engine_dead_jobs_total") == 3.0);
    let given_up = |prefill: &Server| prefill.log().matches("gave up a prefill job").count();
    prefill.wait_until("it says so", |prefill| given_up(prefill) >= 3);
    assert_eq!(given_up(&prefill), 3, "{}", prefill.log());
    wait_until_idle(&decode);
}

#[test]
fn a_prefill_worker_that_drains_amid_a_handoff_finishes_it_and_leaves_nothing_on_the_queue() {
    let cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let prefill = cell.prefill(&SLOWLY);
    cell.wait_for_prefill_worker(&decode);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let cluster = runtime.block_on(join(&cell));
    let key = runtime.block_on(card(&cluster, Role::Decode)).model_key;
    let answer = during_a_handoff(&decode, || {
        prefill.wait_until("it computes", |prefill| prefill.metric("engine_running_requests") == 1.0);
        prefill.signal("TERM");
    });
    assert!(prefill.wait().success(), "{}", prefill.log());
    assert_eq!(answer, ask(&alone(), &prompt(VERY_LONG)));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (0.0, 1.0));
    // What was not acked would be there again, and nobody would take it.
    decode.wait_until("the queue is empty", |_| {
        runtime.block_on(cluster.queue.depth(key)).is_ok_and(|depth| depth == QueueDepth::default())
    });
    wait_until_idle(&decode);
}

#[test]
fn without_nats_prompts_are_computed_here_until_it_is_back() {
    let mut cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let _prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let alone = alone();
    let check = |length| is_answered_as(&alone, &decode, length);
    check(150);
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (0.0, 1.0));
    cell.nats.kill();
    check(160);
    check(170);
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (2.0, 1.0));
    cell.nats.restart();
    cell.wait_for_prefill_worker(&decode);
    decode.wait_until("prompts go elsewhere again", |decode| {
        let length = 180 + prefills(decode, "local") as usize;
        is_answered_as(&alone, decode, length);
        prefills(decode, "remote") == 2.0
    });
    wait_until_idle(&decode);
}

#[test]
fn without_etcd_prefill_workers_that_are_known_go_on() {
    let mut cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let _prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let alone = alone();
    let check = |length| is_answered_as(&alone, &decode, length);
    check(150);
    cell.etcd.kill();
    check(160);
    cell.etcd.restart();
    check(170);
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (0.0, 3.0));
    wait_until_idle(&decode);
}

#[test]
fn a_decode_worker_that_dies_leaves_its_prefill_worker_to_the_others() {
    let cell = Cell::start();
    let first = cell.decode(&THRESHOLD);
    let prefill = cell.prefill(&SLOWLY);
    cell.wait_for_prefill_worker(&first);
    let _connections = [leave_behind(&first), leave_behind(&first)];
    first.wait_until("a prompt is claimed", |first| granted(first) >= 1.0);
    first.signal("KILL");
    let second = cell.decode(&THRESHOLD);
    cell.wait_for_prefill_worker(&second);
    is_answered_as(&alone(), &second, 150);
    assert_eq!(prefills(&second, "remote"), 1.0);
    wait_until_idle(&second);
    wait_until_idle(&prefill);
}

#[test]
fn workers_that_both_restart_at_once_under_their_old_addresses_find_each_other_again() {
    let cell = Cell::start();
    let ports = [(); 3].map(|()| services::free_port().to_string());
    let decode = || {
        let addresses = ["--transport", "tcp", "--port", &ports[0], "--session-port", &ports[1]];
        cell.decode(&[&THRESHOLD[..], &addresses].concat())
    };
    let prefill = |flags: &[&str]| cell.prefill(&[&["--transport", "tcp", "--port", &ports[2]], flags].concat());
    let (first_decode, first_prefill) = (decode(), prefill(&SLOWLY));
    cell.wait_for_prefill_worker(&first_decode);
    let _connection = leave_behind(&first_decode);
    first_decode.wait_until("a prompt is claimed", |decode| granted(decode) >= 1.0);
    for worker in [&first_decode, &first_prefill] {
        worker.signal("KILL");
    }
    for worker in [&first_decode, &first_prefill] {
        worker.wait();
    }
    // What the cluster knows of the old ones has not run out yet.
    let (decode, prefill) = (decode(), prefill(&[]));
    cell.wait_for_prefill_worker(&decode);
    is_answered_as(&alone(), &decode, VERY_LONG);
    assert_eq!(prefills(&decode, "remote"), 1.0);
    wait_until_idle(&decode);
    wait_until_idle(&prefill);
}

#[test]
fn a_burst_of_long_prompts_on_too_few_pages_is_answered() {
    let cell = Cell::start();
    let decode =
        cell.decode(&["--max-local-prefill-length", "32", "--max-prefill-queue-size", "8", "--kv-blocks", "64"]);
    let _prefills = [cell.prefill(&[]), cell.prefill(&[])];
    decode.wait_until("both are there", |decode| decode.metric("engine_prefill_workers") == 2.0);
    cell.wait_for_prefill_worker(&decode);
    let lengths: Vec<usize> = (0..8).map(|number| 40 + 18 * number).collect();
    // Together they fit, and their answers outgrow what is left when they come back: with those, no four fit at once.
    let ask = |server: &Server, length| {
        let question = json!({"prompt": prompt(length), "max_tokens": 200, "temperature": 0, "ignore_eos": true});
        answer_to(server, &question)
    };
    let answers: Vec<_> = thread::scope(|scope| {
        let (decode, ask) = (&decode, &ask);
        let asking: Vec<_> = lengths.iter().map(|&length| scope.spawn(move || ask(decode, length))).collect();
        asking.into_iter().map(|handle| handle.join().unwrap()).collect()
    });
    let alone = alone();
    for (&length, answer) in lengths.iter().zip(&answers) {
        assert_eq!(*answer, ask(&alone, length), "a prompt of {length} tokens");
    }
    assert!(prefills(&decode, "remote") > 0.0);
    assert!(decode.metric("engine_preemptions_total") > 0.0);
    wait_until_idle(&decode);
}

#[test]
fn a_prompt_that_no_prefill_worker_has_room_for_is_computed_here() {
    let cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    // The other is not asked, since it may be as small.
    let _prefill = [(); 2].map(|()| cell.prefill(&["--kv-blocks", "16"]));
    cell.wait_for_prefill_workers(&decode, 2);
    let alone = alone();
    for length in [280, 200] {
        is_answered_as(&alone, &decode, length);
    }
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 1.0));
    assert_eq!((handoffs(&decode, "failed"), handoffs(&decode, "released")), (1.0, 0.0));
    wait_until_idle(&decode);
}

#[test]
fn limits_in_etcd_hold_at_once_and_bad_ones_are_refused() {
    let cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let _prefill = cell.prefill(&[]);
    cell.wait_for_prefill_worker(&decode);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let put = |json: &str| {
        runtime.block_on(async {
            let key = card(&join(&cell).await, Role::Decode).await.model_key;
            let mut etcd = etcd_client::Client::connect([cell.etcd.url()], None).await.unwrap();
            etcd.put(format!("/engine/engine/config/{key}"), json, None).await.unwrap();
        });
    };
    ask(&decode, &prompt(150));
    assert_eq!(prefills(&decode, "remote"), 1.0);
    put(r#"{"policy": "never"}"#);
    decode.wait_until("it has heard", |decode| {
        decode.log().contains(r#"{"policy":"never","max_local_prefill_length":64,"#)
    });
    ask(&decode, &prompt(160));
    put(r#"{"policy": "sometimes"}"#);
    decode.wait_until("it has heard", |decode| decode.log().contains("the last good ones stay"));
    ask(&decode, &prompt(170));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (2.0, 1.0));
    put("{}");
    decode.wait_until("it has heard", |decode| decode.log().matches("have changed").count() == 2);
    ask(&decode, &prompt(180));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (2.0, 2.0));
}

#[test]
fn workers_whose_pages_differ_never_pair() {
    let cell = Cell::start();
    let decode = cell.decode(&THRESHOLD);
    let model = cell.model.flags();
    let differ = [["--block-size", "32"], ["--kv-cache-dtype", "bf16"]];
    let others = differ.map(|differ| cell.prefill(&[&model[..], &differ].concat()));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let keys = runtime.block_on(async {
        let cluster = join(&cell).await;
        let all = 1 + others.len();
        let workers = registered(&cluster, WorkerFilter::default(), |workers| workers.len() == all).await;
        workers.values().map(|card| card.model_key).collect::<BTreeSet<_>>()
    });
    assert_eq!(keys.len(), 3, "{keys:?}");
    ask(&decode, &prompt(150));
    assert_eq!((prefills(&decode, "local"), prefills(&decode, "remote")), (1.0, 0.0));
    assert_eq!(decode.metric("engine_prefill_workers"), 0.0);
    assert!(others.iter().all(|other| other.metric("engine_handoff_seconds_count{phase=\"compute\"}") == 0.0));
}
