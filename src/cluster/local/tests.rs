use std::time::Duration;

use super::*;
use crate::cluster::{Role, card::tests::card};

fn key(name: &str) -> ModelKey {
    ModelKey::of(name.as_bytes())
}

#[tokio::test]
async fn watchers_see_those_they_asked_for_come_and_go() {
    let local = Local::new();
    let mut prefill = local.workers(WorkerFilter::of(key("a"), Role::Prefill));
    let mut all = local.workers(WorkerFilter::default());
    assert!(all.borrow_and_update().is_empty());
    let lease = local.register(card(Role::Prefill, key("a"), "h:1"));
    let other = local.register(card(Role::Prefill, key("b"), "h:2"));
    let decode = local.register(card(Role::Decode, key("a"), "h:3"));
    let ids = [&lease, &other, &decode].map(|lease| lease.id().borrow().unwrap());
    assert_eq!(all.borrow_and_update().keys().copied().collect::<Vec<_>>(), ids);
    assert_eq!(prefill.borrow_and_update().keys().copied().collect::<Vec<_>>(), ids[..1]);
    lease.withdraw().await;
    assert!(prefill.borrow_and_update().is_empty());
    drop(other);
    all.wait_for(|workers| workers.len() == 1).await.unwrap();
}

#[tokio::test]
async fn a_lease_that_is_gone_closes_its_watch() {
    let local = Local::new();
    let lease = local.register(card(Role::Decode, key("a"), "h:1"));
    let mut id = lease.id();
    lease.withdraw().await;
    assert!(id.changed().await.is_err());
}

#[tokio::test]
async fn configuration_reaches_those_who_watched_before_and_after() {
    let local = Local::new();
    let mut before = local.config(key("a"));
    local.set_config(key("a"), Some(Bytes::from_static(b"{}")));
    assert_eq!(before.borrow_and_update().as_deref(), Some(b"{}".as_slice()));
    assert_eq!(local.config(key("a")).borrow().as_deref(), Some(b"{}".as_slice()));
    assert!(local.config(key("b")).borrow().is_none());
}

#[tokio::test]
async fn a_job_goes_to_one_consumer_and_is_gone_when_acknowledged() {
    let local = Local::new();
    let mut first = local.consume(key("a"));
    let mut other_model = local.consume(key("b"));
    local.publish(key("a"), "1".into(), Bytes::from_static(b"job")).await.unwrap();
    let job = first.next().await.unwrap();
    assert_eq!((&job.payload()[..], job.attempt()), (&b"job"[..], 1));
    assert_eq!(local.depth(key("a")).await.unwrap(), QueueDepth { waiting: 0, delivered: 1, asking: 0 });
    job.ack().await.unwrap();
    assert_eq!(local.depth(key("a")).await.unwrap(), QueueDepth::default());
    assert!(other_model.next().now_or_never().is_none());
}

#[tokio::test]
async fn consumers_that_wait_for_a_job_are_counted() {
    let local = Local::new();
    let mut consumer = local.consume(key("a"));
    assert!(local.depth(key("a")).await.unwrap().is_deserted(), "it has not asked");
    let asking = tokio::spawn(async move { (consumer.next().await, consumer) });
    tokio::task::yield_now().await;
    tokio::task::yield_now().await;
    assert_eq!(local.depth(key("a")).await.unwrap(), QueueDepth { waiting: 0, delivered: 0, asking: 1 });
    local.publish(key("a"), "1".into(), Bytes::new()).await.unwrap();
    let (job, consumer) = asking.await.unwrap();
    assert_eq!(local.depth(key("a")).await.unwrap(), QueueDepth { waiting: 0, delivered: 1, asking: 0 });
    job.unwrap().ack().await.unwrap();
    let mut leaving = consumer;
    assert!(leaving.next().now_or_never().is_none());
    tokio::task::yield_now().await;
    drop(leaving);
    tokio::task::yield_now().await;
    assert!(local.depth(key("a")).await.unwrap().is_deserted());
}

#[tokio::test]
async fn a_job_that_was_dropped_is_delivered_again_and_given_up_in_the_end() {
    let local = Local::new();
    let mut consumer = local.consume(key("a"));
    local.publish(key("a"), "1".into(), Bytes::new()).await.unwrap();
    for attempt in 1..=DELIVERIES_MAX {
        assert_eq!(local.dead_jobs(), 0);
        let job = consumer.next().await.unwrap();
        assert_eq!(job.attempt(), attempt);
        drop(job);
    }
    assert_eq!(local.dead_jobs(), 1);
    assert_eq!(local.depth(key("a")).await.unwrap(), QueueDepth::default());
}

#[tokio::test]
async fn one_id_is_one_job() {
    let local = Local::new();
    for _ in 0..3 {
        local.publish(key("a"), "same".into(), Bytes::new()).await.unwrap();
    }
    assert_eq!(local.depth(key("a")).await.unwrap().waiting, 1);
}

#[tokio::test]
async fn a_job_given_back_with_a_delay_comes_after_it() {
    let local = Local::new();
    let mut consumer = local.consume(key("a"));
    local.publish(key("a"), "1".into(), Bytes::new()).await.unwrap();
    let started = tokio::time::Instant::now();
    consumer.next().await.unwrap().nak(Duration::from_millis(30)).await.unwrap();
    assert_eq!(consumer.next().await.unwrap().attempt(), 2);
    assert!(started.elapsed() >= Duration::from_millis(30));
}

#[tokio::test]
async fn a_call_that_was_abandoned_loses_no_job() {
    let local = Local::new();
    let mut consumer = local.consume(key("a"));
    assert!(consumer.next().now_or_never().is_none());
    local.publish(key("a"), "1".into(), Bytes::new()).await.unwrap();
    assert!(consumer.next().await.is_some());
    assert!(consumer.next().now_or_never().is_none());
    local.publish(key("a"), "2".into(), Bytes::new()).await.unwrap();
    drop(consumer);
    assert!(local.consume(key("a")).next().await.is_some());
}

#[tokio::test]
async fn a_buried_job_is_counted_and_never_comes_back() {
    let local = Local::new();
    let mut consumer = local.consume(key("a"));
    local.publish(key("a"), "1".into(), Bytes::new()).await.unwrap();
    consumer.next().await.unwrap().bury("it has schema 99").await.unwrap();
    assert_eq!(local.dead_jobs(), 1);
    assert!(consumer.next().now_or_never().is_none());
}

#[tokio::test]
async fn load_reports_reach_everybody_who_watches() {
    let local = Local::new();
    let mut watchers = [local.reports(), local.reports()];
    let report = LoadReport { running: 2, ..LoadReport::default() };
    local.report(WorkerId(7), &report);
    for watcher in &mut watchers {
        assert_eq!(watcher.next().await, Some((WorkerId(7), report)));
    }
}
