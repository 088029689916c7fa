use std::sync::atomic::{AtomicBool, AtomicUsize};

use tokio::{task::yield_now, time::advance};

use super::*;
use crate::{
    cluster::{ModelKey, Role, tests::card},
    frontend::{
        dispatch::Attempts,
        fake::{bound, is_asked, request, say_ok},
    },
};

/// How long anything may take before a test gives up. Not a measurement: the machine may be very busy.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is known of a worker that serves connections side by side.
#[derive(Clone, Default)]
struct Served {
    connections: Arc<AtomicUsize>,
    /// It breaks a connection off over its next request.
    fails: Arc<AtomicBool>,
}

async fn served() -> (Arc<Worker>, Served) {
    let ((listener, worker), served) = (bound().await, Served::default());
    let serving = served.clone();
    tokio::spawn(async move {
        loop {
            let (mut stream, _) = listener.accept().await.unwrap();
            serving.connections.fetch_add(1, Ordering::Relaxed);
            let fails = serving.fails.clone();
            tokio::spawn(async move {
                while is_asked(&mut stream).await && !fails.load(Ordering::Relaxed) {
                    say_ok(&mut stream).await;
                }
            });
        }
    });
    (worker, served)
}

#[tokio::test]
async fn a_connection_is_kept_for_its_own_thread() {
    let (worker, Served { connections, .. }) = served().await;
    worker.probe().await;
    worker.probe().await;
    assert_eq!(connections.load(Ordering::Relaxed), 1, "the second went where the first had been");
    let elsewhere = worker.clone();
    let probe = move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(elsewhere.probe());
    };
    tokio::task::spawn_blocking(probe).await.unwrap();
    assert_eq!(connections.load(Ordering::Relaxed), 2);
    worker.probe().await;
    assert_eq!(connections.load(Ordering::Relaxed), 2, "this thread's is still there");
    assert!(!worker.is_silent());
}

#[tokio::test]
async fn a_worker_is_avoided_after_one_failed_probe_and_silent_after_two_in_a_row() {
    let (worker, Served { fails, .. }) = served().await;
    for (answers, avoided, silent) in [
        (false, true, false),
        (true, false, false),
        (false, true, false),
        (false, true, true),
        (false, true, true),
        (true, false, false),
    ] {
        fails.store(!answers, Ordering::Relaxed);
        worker.probe().await;
        assert_eq!((worker.is_avoided(), worker.is_silent()), (avoided, silent));
    }
}

#[tokio::test]
async fn a_worker_that_was_replaced_stays_avoided_whoever_answers_there() {
    let (worker, _served) = served().await;
    Attempts::default().lost(&worker, &LostError::Replaced).unwrap();
    worker.probe().await;
    assert!(worker.is_avoided());
    assert!(!worker.is_silent());
}

#[tokio::test]
async fn what_the_frontend_itself_lacks_says_nothing_of_a_worker() {
    let (_, worker) = bound().await;
    let failed = |errno: Errno| LostError::connecting(io::Error::from(errno), "10.0.0.7:8000");
    for errno in [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL] {
        for _ in 0..PROBES_FAILED_MIN {
            worker.heed(Err(failed(errno)));
        }
        assert_eq!((worker.is_avoided(), worker.is_silent()), (false, false), "{errno}");
    }
    // Of a name, it may be the last of several addresses that there is no way to.
    assert!(LostError::connecting(io::Error::from(Errno::ADDRNOTAVAIL), "worker-7:8000").blames_worker());
    worker.heed(Err(failed(Errno::CONNREFUSED)));
    assert!(worker.is_avoided());
    // Nor does it take back what is known.
    worker.heed(Err(failed(Errno::MFILE)));
    assert!(worker.is_avoided());
}

/// Returns when the poller has heard that of so many `kept` connections all but the `first` few are closed.
async fn hears_of_the_end(worker: &Worker, first: usize, kept: usize) {
    assert_eq!(worker.idle().len(), kept);
    let heard = async {
        while !worker.idle().iter().skip(first).all(|kept| kept.connection.is_closed()) {
            yield_now().await;
        }
    };
    timeout(PATIENCE, heard).await.expect("the poller hears of it");
}

#[tokio::test]
async fn with_a_kept_connection_go_those_that_are_closed_too_and_no_others() {
    let (listener, worker) = bound().await;
    let answer = async || {
        let (mut stream, _) = listener.accept().await.unwrap();
        assert!(is_asked(&mut stream).await);
        say_ok(&mut stream).await;
        stream
    };
    let (mut streams, mut exchanges) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (stream, exchange) = tokio::join!(answer(), worker.send(&request));
        let mut exchange = exchange.unwrap();
        assert_eq!(exchange.collect().await.unwrap(), "ok");
        streams.push(stream);
        exchanges.push(exchange);
    }
    exchanges.into_iter().for_each(|exchange| worker.keep(exchange));
    // The one that is used next, and the one before it.
    streams.truncate(1);
    hears_of_the_end(&worker, 1, 3).await;
    let (_stream, exchange) = tokio::join!(answer(), worker.send(&request));
    assert!(exchange.is_ok());
    let kept = worker.idle();
    assert_eq!(kept.len(), 1);
    assert!(!kept[0].connection.is_closed());
}

#[tokio::test]
async fn a_worker_that_dies_over_a_request_is_told_from_one_that_was_gone_before_it() {
    for dies_over_it in [true, false] {
        let (listener, worker) = bound().await;
        let serving = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(is_asked(&mut stream).await);
            // From now on nobody gets a new connection.
            drop(listener);
            say_ok(&mut stream).await;
            if dies_over_it {
                assert!(is_asked(&mut stream).await);
            }
        });
        worker.probe().await;
        if !dies_over_it {
            serving.await.unwrap();
            hears_of_the_end(&worker, 0, 1).await;
        }
        let error = worker.send(&request).await.err().unwrap();
        assert_eq!(matches!(error, LostError::Broken(_)), dies_over_it, "{error}");
        assert_eq!(matches!(error, LostError::Connect(_)), !dies_over_it, "{error}");
    }
}

#[test]
fn a_worker_that_never_had_a_request_is_not_lost_over_it() {
    let cut = || BrokenError::Io(io::ErrorKind::UnexpectedEof.into());
    assert!(matches!(LostError::sending(BrokenError::Unsent, None), LostError::Connect(_)));
    assert!(matches!(LostError::sending(BrokenError::Unsent, Some(cut())), LostError::Broken(BrokenError::Io(_))));
    assert!(matches!(LostError::sending(cut(), None), LostError::Broken(BrokenError::Io(_))));
}

#[tokio::test]
async fn a_kept_connection_that_its_worker_has_closed_is_replaced() {
    let (listener, worker) = bound().await;
    let serving = tokio::spawn(async move {
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            assert!(is_asked(&mut stream).await);
            say_ok(&mut stream).await;
        }
    });
    for _ in 0..2 {
        let mut exchange = worker.send(&request).await.unwrap();
        assert_eq!(exchange.collect().await.unwrap(), "ok");
        worker.keep(exchange);
    }
    serving.await.unwrap();
}

#[test]
fn a_run_of_a_worker_has_the_same_number_under_any_lease_and_its_successor_another() {
    let run = |instance: &str, address: &str| {
        let mut card = card(Role::Decode, ModelKey::of(b"model"), address);
        card.session["instance"] = instance.into();
        Arc::new(card)
    };
    let instance = |lease, card: &Arc<WorkerCard>| Worker::new(WorkerId(lease), card.clone()).instance;
    let first = run("i", "127.0.0.1:1");
    assert_eq!(instance(1, &first), instance(2, &first));
    assert_ne!(instance(1, &first), instance(1, &run("j", "127.0.0.1:1")), "its cache is another");
    let unnamed = |address| Arc::new(card(Role::Decode, ModelKey::of(b"model"), address));
    assert_eq!(instance(1, &unnamed("127.0.0.1:1")), instance(2, &unnamed("127.0.0.1:1")));
    assert_ne!(instance(1, &unnamed("127.0.0.1:1")), instance(1, &unnamed("127.0.0.1:2")));
}

#[tokio::test]
async fn a_worker_has_something_to_do_as_long_as_anything_is_asked_of_it() {
    let (_, worker) = bound().await;
    let mut unread = worker.book(0);
    assert_eq!(worker.load(), 1);
    let mut booking = worker.book(1000);
    for tokens in [100, 0, 0] {
        booking.reduce(tokens);
        unread.reduce(tokens);
        assert_eq!(worker.load(), tokens.max(1) + 1);
    }
    drop((unread, booking));
    assert_eq!(worker.load(), 0);
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_after_a_report_is_added_to_it() {
    let worker = Worker::new(WorkerId(1), Arc::new(card(Role::Decode, ModelKey::of(b"model"), "127.0.0.1:1")));
    let before = worker.book(100);
    worker.note(&LoadReport { prompt_tokens: 1000, ..LoadReport::default() });
    assert_eq!(worker.load(), 1000);
    let after = worker.book(10);
    assert_eq!(worker.load(), 1010);
    drop(before);
    assert_eq!(worker.load(), 1000, "until it says otherwise");
    let much = worker.book(5000);
    assert_eq!(worker.load(), 1000 + 5010 - 100);
    worker.note(&LoadReport::default());
    assert_eq!(worker.load(), 5010);
    advance(REPORT_TIME_MAX).await;
    drop((after, much));
    assert_eq!(worker.load(), 0);
}

#[tokio::test]
async fn any_load_may_be_told() {
    let (_, worker) = bound().await;
    let report = LoadReport { running: u32::MAX, waiting: u32::MAX, prompt_tokens: u64::MAX, ..LoadReport::default() };
    worker.note(&report);
    let _booking = worker.book(1);
    assert_eq!(worker.load(), u64::MAX);
}
