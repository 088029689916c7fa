use bytes::Bytes;
use engine::cluster::{
    ClusterOptions, EtcdOptions, Joined, LocalServices, NatsOptions, Needs, Role, WorkerFilter, join,
};

use crate::{
    card, granted, key,
    services::{self, free_port},
    soon,
};

#[tokio::test(flavor = "multi_thread")]
async fn services_of_this_machine_are_recognised_by_what_they_say() {
    let (etcd, nats) = (services::etcd(), services::nats());
    let (etcd, nats) = (etcd.address.to_string(), nats.address.to_string());
    let nothing = format!("127.0.0.1:{}", free_port());
    // On a busy machine they may take longer to say it than a probe waits.
    let found = async |etcd: &str, nats: &str, expected: LocalServices| {
        soon(&format!("{expected:?}"), async { while LocalServices::probe(etcd, nats).await != expected {} }).await;
    };
    found(&nothing, &nothing, LocalServices { etcd: false, nats: false, jetstream: false }).await;
    found(&nothing, &nats, LocalServices { etcd: false, nats: true, jetstream: true }).await;
    // It is no NATS, however often it is asked.
    found(&etcd, &etcd, LocalServices { etcd: true, nats: false, jetstream: false }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_processes_that_name_the_same_services_meet_even_if_those_come_later() {
    let (mut etcd, mut nats) = (services::etcd(), services::nats());
    etcd.kill();
    nats.kill();
    let options = ClusterOptions {
        namespace: "a".into(),
        etcd: EtcdOptions::new(vec![etcd.url()]),
        nats: NatsOptions::new(vec![nats.url()]),
    };
    let joined = [join(options.clone(), Needs::EtcdAndNats).await, join(options, Needs::EtcdAndNats).await];
    let [decode, prefill] = joined.map(|joined| match joined {
        Ok(Joined::Member(cluster)) => cluster,
        other => panic!("{other:?}"),
    });
    let mut seen = decode.discovery.workers(WorkerFilter::of(key("m"), Role::Prefill));
    let lease = prefill.discovery.register(card(Role::Prefill, "m", "h:1"));
    let mut jobs = prefill.queue.consume(key("m"));
    etcd.restart();
    nats.restart();
    let id = granted(&lease, None).await;
    soon("the prefill worker", seen.wait_for(|workers| workers.contains_key(&id))).await.unwrap();
    soon("the queue", async {
        while decode.queue.publish(key("m"), "1".into(), Bytes::new()).await.is_err() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(soon("the job", jobs.next()).await.is_some());
}
