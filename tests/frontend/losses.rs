//! Workers that are lost, and answers and requests that outlive them or wait for others.

use std::{
    net::TcpListener,
    sync::{
        Mutex,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
};

use super::{
    door::{ABORTED, ALIVE, DRAINING, Door, FULL, OTHER_ANSWER, OTHER_MODEL},
    served::NOTHING_FOLLOWS,
    *,
};

#[test]
fn a_worker_killed_mid_answer_shows_as_a_pause() {
    // The time is in a chat's prompt here, so only one kind can be compared between different answers.
    let request = streaming(COMPLETIONS);
    let expected = undisturbed(COMPLETIONS, &request);
    for steps in [1, 7, 25] {
        let (front, mut workers, _leases) = with_workers(3, slow);
        workers.iter().for_each(|worker| worker.gate.only(steps));
        let mut events = Events::open(front.address, COMPLETIONS, &request);
        events.next().unwrap();
        // The one that answers, and then the next.
        for _ in 0..2 {
            let holds = |worker: &Worker| worker.gate.holds();
            wait_until("one of them stands still", || workers.iter().any(holds));
            let at = workers.iter().position(holds).unwrap();
            workers.remove(at).kill();
        }
        workers[0].gate.open();
        assert_eq!(answer(&events.finish()), expected, "killed after {steps} steps");
    }
    let (front, mut workers, _leases) = with_workers(2, slow);
    // Its answer is not at its end when it dies.
    workers.iter().for_each(|worker| worker.gate.only(10));
    let mut events = Events::open(front.address, CHAT, &streaming(CHAT));
    (0..2).for_each(|_| drop(events.next().unwrap()));
    let at = workers.iter().position(busy).unwrap();
    workers.remove(at).kill();
    workers[0].gate.open();
    let chat = answer(&events.finish());
    assert_eq!((chat.choices[0].roles, chat.done, &chat.choices[0].finishes[..]), (1, 1, &[json!("length")][..]));
    assert_eq!(chat.usage[0]["completion_tokens"], 60);
    assert_eq!(front.counts("engine_frontend_migrations_total"), 1.0);
}

#[test]
fn an_answer_that_names_no_model_goes_on_though_another_model_has_come() {
    let (front, mut workers, _leases) = with_workers(2, slow);
    let other = Worker::start(Options { model: "n/2", ..Options::default() });
    // Its answer is not at its end when it dies.
    workers.iter().for_each(|worker| worker.gate.only(10));
    let mut request = streaming(COMPLETIONS);
    request.as_object_mut().unwrap().remove("model");
    let mut events = Events::open(front.address, COMPLETIONS, &request);
    (0..2).for_each(|_| drop(events.next().unwrap()));
    let _other = front.register(other.address, "n/2");
    front.wait_until_there_are(3);
    let at = workers.iter().position(busy).unwrap();
    workers.remove(at).kill();
    workers[0].gate.open();
    assert_eq!(answer(&events.finish()), undisturbed(COMPLETIONS, &request));
}

#[test]
fn a_worker_killed_before_it_said_anything_costs_nothing() {
    for stream in [true, false] {
        let (front, mut workers, _leases) = with_workers(2, Options::default);
        workers.iter().for_each(|worker| worker.gate.only(0));
        let mut request = streaming(COMPLETIONS);
        if !stream {
            request["stream"] = false.into();
            request.as_object_mut().unwrap().remove("stream_options");
        }
        let address = front.address;
        let asked = request.clone();
        let client = thread::spawn(move || client::post_bytes(address, COMPLETIONS, asked.to_string().as_bytes()));
        wait_until("one of them has it", || workers.iter().any(busy));
        let at = workers.iter().position(busy).unwrap();
        workers.remove(at).kill();
        workers[0].gate.open();
        let response = client.join().unwrap();
        assert_eq!(response.status, 200, "{}", response.text());
        let text = response.text();
        assert_eq!(text.contains("data: [DONE]"), stream);
        assert!(!text.contains("error"), "{text}");
        if !stream {
            assert_eq!(response.json()["usage"]["completion_tokens"], 120);
        }
    }
}

#[test]
fn with_all_workers_dead_the_client_hears_of_it() {
    let (front, mut workers, leases) = with_workers(2, slow);
    // The answer is not at its end when they die.
    workers.iter().for_each(|worker| worker.gate.only(10));
    let mut events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS));
    (0..2).for_each(|_| drop(events.next().unwrap()));
    workers.iter_mut().for_each(Worker::kill);
    let last = events.finish().pop().unwrap();
    assert_eq!(last["error"]["code"], "workers_lost", "{last}");
    assert_eq!(front.counts("engine_frontend_broken_total"), 1.0);
    // While their leases last they are tried in vain, then nobody is there.
    let (status, _, message) = front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a"})).error();
    assert_eq!(status, 503, "{message}");
    drop(leases);
    front.wait_until_there_are(0);
    let response = front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a"}));
    assert_eq!((response.status, response.says_when_to_come_back()), (503, true));
}

#[test]
fn what_no_worker_can_answer_is_asked_of_one() {
    let (front, _workers, _leases) = with_workers(2, slow);
    let request = json!({"model": "m", "prompt": "a", "seed": NOTHING_FOLLOWS, "max_tokens": 9, "ignore_eos": true});
    let response = front.post(COMPLETIONS, &request);
    assert_eq!((response.status, &response.json()["error"]["code"]), (500, &json!("no_possible_token")));
    let mut streamed = request;
    streamed["stream"] = true.into();
    let events = Events::open(front.address, COMPLETIONS, &streamed).finish();
    assert_eq!(events.last().unwrap()["error"]["code"], "no_possible_token", "{events:?}");
    for metric in ["engine_frontend_retries_total", "engine_frontend_migrations_total"] {
        assert_eq!(front.counts(metric), 0.0, "{metric}");
    }
}

#[test]
fn an_answer_waits_a_while_for_a_worker_to_come() {
    let front = Front::with(|config| config.patience = PATIENCE);
    let mut first = Worker::start(slow());
    let lease = front.register(first.address, "m");
    front.wait_until_there_are(1);
    // Its answer is not at its end when it dies.
    first.gate.only(10);
    let request = streaming(COMPLETIONS);
    let mut events = Events::open(front.address, COMPLETIONS, &request);
    (0..2).for_each(|_| drop(events.next().unwrap()));
    first.kill();
    drop(lease);
    front.wait_until_there_are(0);
    let second = Worker::start(Options::default());
    let _lease = front.register(second.address, "m");
    assert_eq!(answer(&events.finish()), undisturbed(COMPLETIONS, &request));
}

#[test]
fn a_request_that_comes_just_after_the_last_worker_went_waits_for_it_to_come_back() {
    let front = Front::with(|config| config.patience = PATIENCE);
    let worker = Worker::start(Options::default());
    let lease = front.register(worker.address, "m");
    front.wait_until_there_are(1);
    // As when etcd stood still for longer than a lease.
    drop(lease);
    front.wait_until_there_are(0);
    let response = thread::scope(|scope| {
        let asked = scope.spawn(|| front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a", "max_tokens": 1})));
        wait_until("it has come", || front.counts("engine_frontend_requests_in_flight") == 1.0);
        let _lease = front.register(worker.address, "m");
        asked.join().unwrap()
    });
    assert_eq!(response.status, 200, "{}", response.text());
}

#[test]
fn a_request_that_waited_for_workers_to_come_back_is_not_for_the_first_of_them_to_refuse() {
    let front = Front::with(|config| config.patience = PATIENCE);
    let (gone, worker) = (Door::start(|| OTHER_MODEL), Worker::start(Options::default()));
    // As many as refuse any other request for good.
    let full: Vec<_> = (0..3).map(|_| Door::start(|| FULL)).collect();
    let _gone = front.register(gone.address, "m");
    front.wait_until_there_are(1);
    let response = thread::scope(|scope| {
        let asked = scope.spawn(|| front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a", "max_tokens": 1})));
        wait_until("it waits", || gone.asked() > 1);
        let _first: Vec<_> = full.iter().map(|full| front.register(full.address, "m")).collect();
        wait_until("it was refused", || full.iter().all(|full| full.asked() > 0));
        let _lease = front.register(worker.address, "m");
        asked.join().unwrap()
    });
    assert_eq!(response.status, 200, "{}", response.text());
}

/// A request is answered, though the worker that answers it comes only once the request `waits`.
fn waits_for_a_worker_that_comes(front: &Front, waits: impl Fn() -> bool) {
    let response = thread::scope(|scope| {
        let asked = scope.spawn(|| front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a", "max_tokens": 1})));
        wait_until("it waits", || waits() || asked.is_finished());
        let worker = Worker::start(Options::default());
        let _lease = front.register(worker.address, "m");
        asked.join().unwrap()
    });
    assert_eq!(response.status, 200, "{}", response.text());
}

#[test]
fn a_request_that_finds_one_worker_dead_and_one_leaving_waits_for_another() {
    let front = Front::with(|config| config.patience = PATIENCE);
    let (mut dead, leaving) = (Worker::start(Options::default()), Door::start(|| DRAINING));
    let _leases = [dead.address, leaving.address].map(|address| front.register(address, "m"));
    front.wait_until_there_are(2);
    dead.kill();
    waits_for_a_worker_that_comes(&front, || leaving.asked() > 1);
}

#[test]
fn a_request_that_finds_only_workers_that_leave_waits_for_another() {
    let front = Front::with(|config| config.patience = PATIENCE);
    // As if their leases could not be given back.
    let leaving = [(); 2].map(|()| Door::start(|| DRAINING));
    let _leases = leaving.each_ref().map(|door| front.register(door.address, "m"));
    front.wait_until_there_are(2);
    waits_for_a_worker_that_comes(&front, || leaving.iter().map(Door::asked).sum::<usize>() > 2);
    // If nobody comes, it hears what they say.
    let front = Front::start();
    let _lease = front.register(leaving[0].address, "m");
    front.wait_until_there_are(1);
    let response = front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a"}));
    assert_eq!((response.status, response.text().trim()), (503, "{}"));
}

#[test]
fn a_request_that_makes_engines_fail_does_not_go_through_the_cluster() {
    let front = Front::with(|config| config.patience = PATIENCE);
    let failing: Vec<_> = (0..6).map(|_| Door::start(|| ABORTED)).collect();
    let _leases: Vec<_> = failing.iter().map(|door| front.register(door.address, "m")).collect();
    front.wait_until_there_are(6);
    let request = json!({"model": "m", "prompt": "a", "max_tokens": 1});
    let response = front.post(COMPLETIONS, &request);
    assert_eq!((response.status, response.json()["error"]["code"].as_str()), (502, Some("workers_lost")));
    assert_eq!(failing.iter().map(Door::asked).sum::<usize>(), 3);
    // Where others are, one that failed costs nothing.
    let front = Front::start();
    let _failing = front.register(failing[0].address, "m");
    let worker = Worker::start(Options::default());
    let _lease = front.register(worker.address, "m");
    front.wait_until_there_are(2);
    for _ in 0..10 {
        assert_eq!(front.post(COMPLETIONS, &request).status, 200);
    }
}

#[test]
fn however_many_workers_leave_a_request_is_for_the_one_that_stays() {
    let front = Front::start();
    let leaving: Vec<_> = (0..6).map(|_| Door::start(|| DRAINING)).collect();
    let _leases: Vec<_> = leaving.iter().map(|door| front.register(door.address, "m")).collect();
    let worker = Worker::start(Options::default());
    let _lease = front.register(worker.address, "m");
    front.wait_until_there_are(7);
    for i in 0..10 {
        let request = json!({"model": "m", "prompt": format!("{i} a"), "max_tokens": 1});
        let response = front.post(COMPLETIONS, &request);
        assert_eq!(response.status, 200, "{}", response.text());
    }
    assert!(leaving.iter().any(|door| door.asked() > 0));
}

#[test]
fn a_worker_that_is_there_under_several_leases_refuses_once_and_is_lost_once() {
    for says in [FULL, ""] {
        let (front, bad) = (Front::start(), Door::start(move || says));
        // As many as would end a request, and again as many, so that most requests come to three of them first.
        let _leases_of_bad: Vec<_> = (0..6).map(|_| front.register(bad.address, "m")).collect();
        let worker = Worker::start(Options::default());
        let _lease = front.register(worker.address, "m");
        front.wait_until_there_are(7);
        for i in 0..40 {
            let request = json!({"model": "m", "prompt": format!("{i} a"), "max_tokens": 1});
            let response = front.post(COMPLETIONS, &request);
            assert_eq!(response.status, 200, "{}", response.text());
        }
        assert!(bad.asked() > 0);
    }
}

#[test]
fn a_request_that_finds_the_last_worker_dead_waits_for_another_before_its_lease_has_run_out() {
    let front = Front::with(|config| config.patience = PATIENCE);
    let mut first = Worker::start(Options::default());
    let _dead = front.register(first.address, "m");
    front.wait_until_there_are(1);
    first.kill();
    waits_for_a_worker_that_comes(&front, || front.counts("engine_frontend_requests_in_flight") == 1.0);
}

#[test]
fn a_model_whose_last_worker_went_is_waited_for_while_others_are_served() {
    let front = Front::with(|config| config.patience = PATIENCE);
    let (one, two) = (Worker::start(Options::default()), Worker::start(Options { model: "n/2", ..Options::default() }));
    let lease = front.register(one.address, "m");
    let _other = front.register(two.address, "n/2");
    front.wait_until_there_are(2);
    drop(lease);
    front.wait_until_there_are(1);
    let ask = |model: &str| front.post(COMPLETIONS, &json!({"model": model, "prompt": "a", "max_tokens": 1}));
    assert_eq!((ask("n/2").status, ask("x").status), (200, 404));
    let response = thread::scope(|scope| {
        let asked = scope.spawn(|| ask("m"));
        wait_until("it has come", || front.counts("engine_frontend_requests_in_flight") == 1.0);
        let _lease = front.register(one.address, "m");
        asked.join().unwrap()
    });
    assert_eq!(response.status, 200, "{}", response.text());
}

#[test]
fn a_model_that_does_not_come_back_in_time_is_not_one_that_does_not_exist() {
    // It went a moment ago, and the request has no time to wait for it.
    let front = Front::with(|config| {
        config.patience = PATIENCE;
        config.request_timeout = Duration::from_millis(200);
    });
    let other = Worker::start(Options { model: "n/2", ..Options::default() });
    let _other = front.register(other.address, "n/2");
    let lease = front.register(Door::start(|| FULL).address, "m");
    front.wait_until_there_are(2);
    drop(lease);
    front.wait_until_there_are(1);
    let request = json!({"model": "m", "prompt": "a"});
    let response = front.post(COMPLETIONS, &request);
    assert_eq!((response.status, &response.json()["error"]["code"]), (503, &json!("no_workers")));
    // Its worker dies over the request, after longer than anybody would have waited.
    let front = Front::with(|config| config.patience = Duration::from_millis(1));
    let (end, ended) = mpsc::channel::<()>();
    let ended = Mutex::new(ended);
    let worker = Door::start(move || ended.lock().unwrap().recv().map_or("", |()| ""));
    let _other = front.register(other.address, "n/2");
    let lease = front.register(worker.address, "m");
    front.wait_until_there_are(2);
    let response = thread::scope(|scope| {
        let asked = scope.spawn(|| front.post(COMPLETIONS, &request));
        wait_until("the worker has it", || worker.asked() == 1);
        drop(lease);
        front.wait_until_there_are(1);
        drop(end);
        asked.join().unwrap()
    });
    assert_eq!((response.status, &response.json()["error"]["code"]), (502, &json!("workers_lost")));
}

#[test]
fn a_prompt_that_kills_its_workers_does_not_go_through_the_cluster_for_their_signs_of_life() {
    let front = Front::with(|config| config.request_timeout = Duration::from_secs(20));
    let workers: Vec<_> = (0..5).map(|_| Door::start(|| ALIVE)).collect();
    let _leases: Vec<_> = workers.iter().map(|worker| front.register(worker.address, "m")).collect();
    front.wait_until_there_are(5);
    let events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS)).finish();
    assert_eq!(events.last().unwrap()["error"]["code"], "workers_lost", "{events:?}");
    assert_eq!(workers.iter().map(Door::asked).sum::<usize>(), 3);
}

#[test]
fn a_worker_lost_before_its_answers_head_counts_as_one_lost_after_it_does() {
    let front = Front::with(|config| config.request_timeout = Duration::from_secs(20));
    let is_first = Arc::new(AtomicBool::new(true));
    let door = || {
        let is_first = is_first.clone();
        Door::start(move || if is_first.swap(false, Ordering::SeqCst) { "" } else { ALIVE })
    };
    let workers: Vec<_> = (0..5).map(|_| door()).collect();
    let _leases: Vec<_> = workers.iter().map(|worker| front.register(worker.address, "m")).collect();
    front.wait_until_there_are(5);
    let events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS)).finish();
    assert_eq!(events.last().unwrap()["error"]["code"], "workers_lost", "{events:?}");
    assert_eq!(workers.iter().map(Door::asked).sum::<usize>(), 3);
}

#[test]
fn full_workers_are_asked_to_continue_an_answer_ever_less_often() {
    // Rounds at 0, 0.19, 0.56, 1.31 and 2.81 s at the earliest, and one as patience ends.
    const ROUNDS_MAX: usize = 6;
    let front = Front::with(|config| config.patience = Duration::from_secs(3));
    let mut first = Worker::start(slow());
    let lease = front.register(first.address, "m");
    front.wait_until_there_are(1);
    // Its answer is not at its end when it dies.
    first.gate.only(10);
    let mut events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS));
    (0..2).for_each(|_| drop(events.next().unwrap()));
    let full = [(); 2].map(|()| Door::start(|| FULL));
    let _leases_of_full: Vec<_> = full.iter().map(|full| front.register(full.address, "m")).collect();
    front.wait_until_there_are(3);
    // Nobody else is asked: a worker that is about to be gone may be lost once more, which would end the answer.
    drop(lease);
    front.wait_until_there_are(2);
    first.kill();
    assert_eq!(events.finish().pop().unwrap()["error"]["code"], "workers_lost");
    for full in full {
        assert!((1..=ROUNDS_MAX).contains(&full.asked()), "{} times", full.asked());
    }
    assert_eq!(front.counts("engine_frontend_retries_total"), 0.0, "the client had something");
}

#[test]
fn an_answer_waits_for_a_full_worker_though_others_will_never_continue_it() {
    let front = Front::with(|config| config.patience = Duration::from_secs(3));
    let mut first = Worker::start(slow());
    let lease = front.register(first.address, "m");
    front.wait_until_there_are(1);
    // Its answer is not at its end when it dies.
    first.gate.only(10);
    let mut events = Events::open(front.address, COMPLETIONS, &streaming(COMPLETIONS));
    (0..2).for_each(|_| drop(events.next().unwrap()));
    let full = Door::start(|| FULL);
    // So many that one of them is asked last, most likely.
    let others: Vec<_> = (0..7).map(|_| Door::start(|| OTHER_ANSWER)).collect();
    let _leases: Vec<_> = others.iter().chain([&full]).map(|door| front.register(door.address, "m")).collect();
    front.wait_until_there_are(9);
    // Nobody else is asked.
    drop(lease);
    front.wait_until_there_are(8);
    first.kill();
    assert_eq!(events.finish().pop().unwrap()["error"]["code"], "workers_lost");
    assert!(full.asked() > 1, "{} times", full.asked());
}

#[test]
fn a_full_worker_says_more_than_one_that_leaves_whichever_is_asked_last() {
    let front = Front::with(|config| {
        config.patience = PATIENCE;
        config.request_timeout = Duration::from_secs(20);
    });
    let mut dead = Worker::start(Options::default());
    let (leaving, full) = (Door::start(|| DRAINING), Door::start(|| FULL));
    // For the one that is dead alone, requests would wait.
    let _leases = [dead.address, leaving.address, full.address].map(|address| front.register(address, "m"));
    front.wait_until_there_are(3);
    dead.kill();
    for _ in 0..10 {
        let response = front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a", "max_tokens": 1}));
        assert_eq!(response.status, 429, "{}", response.text());
    }
}

#[test]
fn a_worker_that_cannot_be_reached_is_avoided() {
    let (front, _workers, _leases) = with_workers(1, Options::default);
    // An address that refuses.
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let _lease = front.register(nobody, "m");
    front.wait_until_there_are(2);
    for _ in 0..20 {
        assert_eq!(front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a", "max_tokens": 1})).status, 200);
    }
    assert!(front.counts("engine_frontend_retries_total") <= 2.0, "it was tried again and again");
}

#[test]
fn a_worker_that_falls_silent_is_left() {
    let (front, _workers, _leases) = with_workers(1, Options::default);
    // Takes connections and never answers, as a stopped process does.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let _lease = front.register(silent.local_addr().unwrap(), "m");
    front.wait_until_there_are(2);
    wait_until("one came back from the silent one", || {
        assert_eq!(front.post(COMPLETIONS, &json!({"model": "m", "prompt": "a", "max_tokens": 2})).status, 200);
        front.counts("engine_frontend_retries_total") >= 1.0
    });
}
