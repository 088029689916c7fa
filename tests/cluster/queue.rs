use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use engine::cluster::{Consumer, Delivery, ModelKey, Nats, NatsOptions, Queue, QueueDepth, QueueError};
use tokio::time::timeout;

use crate::{
    ACK_WAIT, key, nats_at,
    services::{self, Proxy},
    soon,
};

/// Longer than any call of the queue may take, far shorter than for ever.
const BOUND: Duration = Duration::from_secs(30);

async fn next(consumer: &mut Consumer) -> Delivery {
    soon("a job", consumer.next()).await.unwrap()
}

/// Publishes until it works: what a decode worker does with its next requests.
pub(crate) async fn publish(nats: &Nats, key: ModelKey, id: &str) {
    soon("a publish to work", async {
        while nats.publish(key, id.into(), Bytes::from(id.to_owned())).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await;
}

pub(crate) async fn wait_for_depth(nats: &Nats, key: ModelKey, depth: QueueDepth) {
    soon(&format!("{depth:?}"), async {
        while nats.depth(key).await != Ok(depth) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_reaches_one_worker_of_its_model_and_namespace() {
    let service = services::nats();
    let (decode, prefill) = (nats_at(&service.url(), "a").await, nats_at(&service.url(), "a").await);
    let elsewhere = nats_at(&service.url(), "b").await;
    let mut consumer = prefill.consume(key("m"));
    let mut others = [prefill.consume(key("n")), elsewhere.consume(key("m"))];
    publish(&decode, key("m"), "1").await;
    let job = next(&mut consumer).await;
    assert_eq!((&job.payload()[..], job.attempt()), (&b"1"[..], 1));
    wait_for_depth(&decode, key("m"), QueueDepth { delivered: 1, ..QueueDepth::default() }).await;
    job.ack().await.unwrap();
    wait_for_depth(&decode, key("m"), QueueDepth::default()).await;
    // Whatever went astray would come before what is meant for them.
    publish(&decode, key("n"), "2").await;
    publish(&elsewhere, key("m"), "3").await;
    for (other, expected) in others.iter_mut().zip(["2", "3"]) {
        assert_eq!(next(other).await.payload(), expected);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn jobs_wait_for_a_worker_and_are_counted() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    for id in ["1", "2", "2", "3"] {
        publish(&nats, key("m"), id).await;
    }
    wait_for_depth(&nats, key("m"), QueueDepth { waiting: 3, ..QueueDepth::default() }).await;
    let mut consumer = nats.consume(key("m"));
    for id in ["1", "2", "3"] {
        let job = next(&mut consumer).await;
        assert_eq!(job.payload(), id, "one id is one job, and they come in order");
        job.ack().await.unwrap();
    }
    wait_for_depth(&nats, key("m"), QueueDepth::default()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_wait_for_a_job_are_counted_until_they_die() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    let asking = |asking| QueueDepth { asking, ..QueueDepth::default() };
    let workers = [(); 2].map(|()| {
        let (runtime, url) = (tokio::runtime::Runtime::new().unwrap(), service.url());
        runtime.spawn(async move { nats_at(&url, "a").await.consume(key("m")).next().await });
        runtime
    });
    wait_for_depth(&nats, key("m"), asking(2)).await;
    for (worker, left) in workers.into_iter().zip([1, 0]) {
        worker.shutdown_background();
        wait_for_depth(&nats, key("m"), asking(left)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_job_is_taken_before_somebody_wants_one() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    let mut idle = nats.consume(key("m"));
    let mut willing = nats.consume(key("m"));
    for id in ["1", "2", "3"] {
        publish(&nats, key("m"), id).await;
    }
    for id in ["1", "2", "3"] {
        let job = next(&mut willing).await;
        assert_eq!(job.payload(), id);
        job.ack().await.unwrap();
    }
    publish(&nats, key("m"), "4").await;
    next(&mut idle).await.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_job_of_a_worker_that_dies_goes_to_another() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    publish(&nats, key("m"), "1").await;
    let dying = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let url = service.url();
    dying
        .spawn(async move {
            let job = next(&mut nats_at(&url, "a").await.consume(key("m"))).await;
            // As in a process that is killed, nothing is given back.
            std::mem::forget(job);
        })
        .await
        .unwrap();
    dying.shutdown_background();
    let job = next(&mut nats.consume(key("m"))).await;
    assert_eq!(job.attempt(), 2);
    job.ack().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_somebody_is_at_is_not_given_to_another() {
    let service = services::nats();
    // Longer than a busy machine may keep a sign.
    let ack_wait = 5 * ACK_WAIT;
    let options = NatsOptions { ack_wait, ..NatsOptions::new(vec![service.url()]) };
    let nats = Nats::new(options, "a").await.unwrap();
    publish(&nats, key("m"), "1").await;
    let job = next(&mut nats.consume(key("m"))).await;
    let mut other = nats.consume(key("m"));
    // Several times as long as a job may go without a sign of life.
    let mut signs = tokio::time::interval(ack_wait / 10);
    for _ in 0..25 {
        tokio::select! {
            _ = signs.tick() => job.in_progress().await.unwrap(),
            stolen = other.next() => panic!("{stolen:?}"),
        }
    }
    job.ack().await.unwrap();
    publish(&nats, key("m"), "2").await;
    assert_eq!(next(&mut other).await.payload(), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_given_back_comes_again_after_its_delay_and_a_dropped_one_at_once() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    let mut consumer = nats.consume(key("m"));
    publish(&nats, key("m"), "1").await;
    let started = std::time::Instant::now();
    next(&mut consumer).await.nak(Duration::from_millis(300)).await.unwrap();
    // Or its decode worker would take it for gone.
    wait_for_depth(&nats, key("m"), QueueDepth { delivered: 1, ..QueueDepth::default() }).await;
    let job = next(&mut consumer).await;
    assert!(started.elapsed() >= Duration::from_millis(300));
    assert_eq!(job.attempt(), 2);
    drop(job);
    assert_eq!(next(&mut consumer).await.attempt(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_nobody_survives_is_given_up() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    let mut consumer = nats.consume(key("m"));
    publish(&nats, key("m"), "poison").await;
    for attempt in 1..=5 {
        let job = next(&mut consumer).await;
        assert_eq!(job.attempt(), attempt);
        drop(job);
    }
    publish(&nats, key("m"), "fine").await;
    let job = next(&mut consumer).await;
    assert_eq!(job.payload(), "fine");
    job.ack().await.unwrap();
    // The consumer buries it when it comes up for the sixth time.
    let wanted = tokio::spawn(async move { consumer.next().await.map(drop) });
    soon("the job to be given up", async {
        while nats.dead_jobs() == 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
    wait_for_depth(&nats, key("m"), QueueDepth { asking: 1, ..QueueDepth::default() }).await;
    assert!(!wanted.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_read_is_buried_and_the_next_one_comes() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    let mut consumer = nats.consume(key("m"));
    publish(&nats, key("m"), "schema 99").await;
    publish(&nats, key("m"), "fine").await;
    next(&mut consumer).await.bury("it has schema 99").await.unwrap();
    assert_eq!(nats.dead_jobs(), 1);
    assert_eq!(next(&mut consumer).await.payload(), "fine");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_cannot_be_buried_now_is_counted_when_it_is() {
    let mut service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    let mut consumer = nats.consume(key("m"));
    publish(&nats, key("m"), "schema 99").await;
    let job = next(&mut consumer).await;
    service.kill();
    // Before it is noticed, the client would keep what it is given, and say it later.
    let unnoticed = async { while !matches!(nats.depth(key("m")).await, Err(QueueError::Unavailable(_))) {} };
    soon("the connection to be missed", unnoticed).await;
    job.bury("it has schema 99").await.unwrap_err();
    assert_eq!(nats.dead_jobs(), 0, "it will come again");
    service.restart();
    next(&mut consumer).await.bury("it has schema 99").await.unwrap();
    assert_eq!(nats.dead_jobs(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_consumer_had_asked_for_goes_back_when_it_is_dropped() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    let mut leaving = nats.consume(key("m"));
    assert!(timeout(Duration::from_millis(200), leaving.next()).await.is_err());
    drop(leaving);
    publish(&nats, key("m"), "1").await;
    let job = next(&mut nats.consume(key("m"))).await;
    assert_eq!(job.payload(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_server_publishing_fails_at_once_and_jobs_survive_its_restart() {
    let mut service = services::nats();
    let nats = Arc::new(nats_at(&service.url(), "a").await);
    publish(&nats, key("m"), "before").await;
    let mut consumer = nats.consume(key("m"));
    let held = next(&mut consumer).await;
    service.kill();
    for id in 0..100 {
        let refused = timeout(BOUND, nats.publish(key("m"), format!("lost {id}"), Bytes::new())).await;
        refused.expect("it does not hang").unwrap_err();
    }
    assert!(timeout(BOUND, nats.depth(key("m"))).await.expect("it does not hang").is_err());
    assert!(timeout(BOUND, held.ack()).await.expect("it does not hang").is_err());
    service.restart();
    publish(&nats, key("m"), "after").await;
    // The acknowledgement was lost with the connection: the first job comes again. One that was being published when
    // the connection broke may come as well, in spite of the error.
    let mut missing = vec!["before", "after"];
    while !missing.is_empty() {
        let job = next(&mut consumer).await;
        missing.retain(|id| job.payload() != id);
        job.ack().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_lost_its_storage_gets_its_stream_back() {
    let mut service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    publish(&nats, key("m"), "1").await;
    let mut consumer = nats.consume(key("m"));
    next(&mut consumer).await.ack().await.unwrap();
    let waiting = tokio::spawn(async move {
        let job = next(&mut consumer).await;
        let payload = job.payload().clone();
        job.ack().await.unwrap();
        payload
    });
    service.restart_empty();
    publish(&nats, key("m"), "2").await;
    assert_eq!(soon("the consumer", waiting).await.unwrap(), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_freezes_is_an_error_in_time_and_used_again_when_it_goes_on() {
    let service = services::nats();
    let nats = nats_at(&service.url(), "a").await;
    publish(&nats, key("m"), "1").await;
    service.signal("STOP");
    let frozen = timeout(BOUND, nats.publish(key("m"), "2".into(), Bytes::new())).await.expect("it does not hang");
    assert!(frozen.is_err());
    service.signal("CONT");
    publish(&nats, key("m"), "3").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_takes_no_longer_than_one_answer_may_however_many_it_takes() {
    let service = services::nats();
    // Makes the stream, for which the other has to ask before it publishes.
    publish(&nats_at(&service.url(), "a").await, key("m"), "1").await;
    let proxy = Proxy::to(service.address).await;
    let nats = nats_at(&format!("nats://{}", proxy.address), "a").await;
    soon("a connection", nats.server()).await.unwrap();
    // Each of the two answers comes in time.
    proxy.slow_down(Duration::from_millis(1500));
    let published = timeout(BOUND, nats.publish(key("m"), "2".into(), Bytes::new())).await.expect("it does not hang");
    assert!(matches!(published, Err(QueueError::Timeout(_))), "{published:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_yet_is_used_when_it_comes() {
    let mut service = services::nats();
    service.kill();
    let nats = nats_at(&service.url(), "a").await;
    let mut consumer = nats.consume(key("m"));
    let error = timeout(BOUND, nats.publish(key("m"), "1".into(), Bytes::new())).await.expect("it does not hang");
    assert!(matches!(error, Err(QueueError::Unavailable(_))), "{error:?}");
    service.restart();
    publish(&nats, key("m"), "2").await;
    assert_eq!(next(&mut consumer).await.payload(), "2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_a_refusal() {
    let directory = tempfile::tempdir().unwrap();
    let config = directory.path().join("nats.conf");
    std::fs::write(&config, "jetstream { max_file_store: 64KB }").unwrap();
    let service = services::nats_with(&["-c", config.to_str().unwrap()]);
    let nats = nats_at(&service.url(), "a").await;
    publish(&nats, key("m"), "small").await;
    let job = Bytes::from(vec![b'x'; 20_000]);
    let mut refused = None;
    for id in 0..8 {
        let published = timeout(BOUND, nats.publish(key("m"), id.to_string(), job.clone())).await;
        if let Err(error) = published.expect("it does not hang") {
            refused = Some(error);
        }
    }
    assert!(matches!(refused, Some(QueueError::Refused(_))), "{refused:?}");
    // Room again when jobs are done.
    let mut consumer = nats.consume(key("m"));
    for _ in 0..2 {
        next(&mut consumer).await.ack().await.unwrap();
    }
    publish(&nats, key("m"), "small again").await;
}
