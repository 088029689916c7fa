use std::{sync::Arc, time::Duration};

use engine::cluster::{Discovery, Etcd, EtcdOptions, Role, WorkerFilter, WorkerId, WorkerSet};
use etcd_client::Client;
use tokio::sync::watch;

use crate::{
    PATIENCE, SHORT_LEASE, card, etcd_at, forgetful_etcd_at, granted, key,
    services::{self, Proxy},
    soon,
};

/// Waits until the set is exactly `ids`.
async fn wait_for(workers: &mut watch::Receiver<Arc<WorkerSet>>, ids: &[WorkerId]) {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    let reached = workers.wait_for(|workers| workers.keys().copied().collect::<Vec<_>>() == ids);
    let what = format!("the workers to be {ids:?}");
    soon(&what, reached).await.unwrap();
}

async fn client(url: &str) -> Client {
    Client::connect([url], None).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_are_seen_by_those_who_asked_for_them_and_gone_at_once_when_they_withdraw() {
    let service = services::etcd();
    let (here, there) = (etcd_at(&service.url(), "a"), etcd_at(&service.url(), "a"));
    let other_namespace = etcd_at(&service.url(), "b");
    let decode = here.register(card(Role::Decode, "m", "h:1"));
    let prefill = here.register(card(Role::Prefill, "m", "h:2"));
    let other_model = here.register(card(Role::Prefill, "n", "h:3"));
    let elsewhere = other_namespace.register(card(Role::Prefill, "m", "h:4"));
    let [decode_id, prefill_id, other_id] =
        [granted(&decode, None).await, granted(&prefill, None).await, granted(&other_model, None).await];
    granted(&elsewhere, None).await;

    let mut pair = there.workers(WorkerFilter::of(key("m"), Role::Prefill));
    let mut all_prefill = there.workers(WorkerFilter::role(Role::Prefill));
    let mut all = there.workers(WorkerFilter::default());
    wait_for(&mut pair, &[prefill_id]).await;
    wait_for(&mut all_prefill, &[prefill_id, other_id]).await;
    wait_for(&mut all, &[decode_id, prefill_id, other_id]).await;
    assert_eq!(*pair.borrow()[&prefill_id], card(Role::Prefill, "m", "h:2"));

    prefill.withdraw().await;
    wait_for(&mut pair, &[]).await;
    drop(other_model);
    wait_for(&mut all, &[decode_id]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_is_gone_when_its_lease_is_over() {
    let service = services::etcd();
    let watcher = forgetful_etcd_at(&service.url(), "a");
    let mut workers = watcher.workers(WorkerFilter::default());
    let worker = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let url = service.url();
    let id = worker
        .spawn(async move {
            let lease = forgetful_etcd_at(&url, "a").register(card(Role::Decode, "m", "h:1"));
            let id = granted(&lease, None).await;
            // As in a process that is killed, nothing is withdrawn.
            std::mem::forget(lease);
            id
        })
        .await
        .unwrap();
    wait_for(&mut workers, &[id]).await;
    worker.shutdown_background();
    wait_for(&mut workers, &[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_and_restarting_etcd_changes_nothing_for_those_who_live() {
    let mut service = services::etcd();
    let etcd = etcd_at(&service.url(), "a");
    let mut workers = etcd.workers(WorkerFilter::default());
    let lease = etcd.register(card(Role::Decode, "m", "h:1"));
    let id = granted(&lease, None).await;
    wait_for(&mut workers, &[id]).await;

    service.kill();
    // A worker that comes while etcd is away registers when it is back.
    let late = etcd.register(card(Role::Prefill, "m", "h:2"));
    assert!(late.id().borrow().is_none());
    service.restart();
    let late_id = granted(&late, None).await;
    let live = |workers: &WorkerSet, address: &str| workers.values().filter(|card| card.address == address).count();
    let both = workers.wait_for(|workers| live(workers, "h:1") == 1 && live(workers, "h:2") == 1);
    soon("both workers", both).await.unwrap();
    assert!(workers.borrow().contains_key(&late_id));
    // Whichever lease the first one holds now is the one that is seen.
    let id = lease.id().borrow().unwrap();
    wait_for(&mut workers, &[id, late_id]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_etcd_is_away_for_longer_than_a_lease_nobody_is_forgotten() {
    let mut service = services::etcd();
    let etcd = forgetful_etcd_at(&service.url(), "a");
    let mut workers = etcd.workers(WorkerFilter::default());
    let lease = etcd.register(card(Role::Decode, "m", "h:1"));
    let id = granted(&lease, None).await;
    wait_for(&mut workers, &[id]).await;
    service.kill();
    // Time has to pass here: that is the fault.
    tokio::time::sleep(3 * SHORT_LEASE).await;
    assert!(workers.borrow().contains_key(&id));
    service.restart();
    let another = etcd.register(card(Role::Decode, "m", "h:2"));
    let another_id = granted(&another, None).await;
    soon("the new worker", workers.wait_for(|workers| workers.contains_key(&another_id))).await.unwrap();
    let present = |workers: &Arc<WorkerSet>| workers.values().any(|card| card.address == "h:1");
    soon("the old worker", workers.wait_for(present)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lost_lease_is_granted_anew_under_another_id() {
    let service = services::etcd();
    let etcd = etcd_at(&service.url(), "a");
    let mut workers = etcd.workers(WorkerFilter::default());
    let lease = etcd.register(card(Role::Decode, "m", "h:1"));
    let old = granted(&lease, None).await;
    wait_for(&mut workers, &[old]).await;
    client(&service.url()).await.lease_client().revoke(old.0 as i64).await.unwrap();
    let new = granted(&lease, Some(old)).await;
    assert_ne!(old, new);
    wait_for(&mut workers, &[new]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_behind_a_compaction_is_found_out_by_reading_all_again() {
    let service = services::etcd();
    let proxy = Proxy::to(service.address).await;
    let direct = etcd_at(&service.url(), "a");
    // It would keep whoever is missing from the data of another etcd for two leases: longer than this test waits.
    let options = EtcdOptions { lease_ttl: PATIENCE, ..EtcdOptions::new(vec![format!("http://{}", proxy.address)]) };
    let cut_off = Etcd::new(options, "a").unwrap();
    let goes = direct.register(card(Role::Decode, "m", "h:1"));
    let stays = direct.register(card(Role::Decode, "m", "h:2"));
    let (gone_id, stays_id) = (granted(&goes, None).await, granted(&stays, None).await);
    let mut workers = cut_off.workers(WorkerFilter::default());
    wait_for(&mut workers, &[gone_id, stays_id]).await;

    proxy.cut();
    goes.withdraw().await;
    let comes = direct.register(card(Role::Decode, "m", "h:3"));
    let comes_id = granted(&comes, None).await;
    let mut client = client(&service.url()).await;
    let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
    client.compact(revision, None).await.unwrap();
    assert!(workers.borrow().contains_key(&gone_id), "who is cut off keeps what it knew");
    proxy.mend();
    wait_for(&mut workers, &[stays_id, comes_id]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happened_during_a_short_cut_is_watched_from_where_it_ended() {
    let service = services::etcd();
    let proxy = Proxy::to(service.address).await;
    let direct = etcd_at(&service.url(), "a");
    let cut_off = etcd_at(&format!("http://{}", proxy.address), "a");
    let goes = direct.register(card(Role::Decode, "m", "h:1"));
    let gone_id = granted(&goes, None).await;
    let mut workers = cut_off.workers(WorkerFilter::default());
    wait_for(&mut workers, &[gone_id]).await;
    proxy.cut();
    goes.withdraw().await;
    let comes = direct.register(card(Role::Decode, "m", "h:3"));
    let comes_id = granted(&comes, None).await;
    proxy.mend();
    wait_for(&mut workers, &[comes_id]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_lost_its_data_takes_away_nobody_and_everybody_registers_again() {
    let mut service = services::etcd();
    let etcd = etcd_at(&service.url(), "a");
    let mut workers = etcd.workers(WorkerFilter::default());
    let lease = etcd.register(card(Role::Decode, "m", "h:1"));
    let old = granted(&lease, None).await;
    wait_for(&mut workers, &[old]).await;
    let mut seen = workers.clone();
    let never_empty = tokio::spawn(async move {
        while seen.changed().await.is_ok() {
            assert!(!seen.borrow_and_update().is_empty(), "the worker was forgotten");
        }
    });
    service.restart_empty();
    let new = granted(&lease, Some(old)).await;
    wait_for(&mut workers, &[new]).await;
    assert!(!never_empty.is_finished());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_lost_its_data_is_noticed_though_it_has_counted_as_far_again() {
    let mut service = services::etcd();
    let proxy = Proxy::to(service.address).await;
    let direct = etcd_at(&service.url(), "a");
    let mut workers = forgetful_etcd_at(&format!("http://{}", proxy.address), "a").workers(WorkerFilter::default());
    let lease = direct.register(card(Role::Decode, "m", "h:1"));
    let old = granted(&lease, None).await;
    // One that will not come back.
    let gone = WorkerId(7);
    let path = format!("/engine/a/workers/{}/decode/{gone}", key("m"));
    client(&service.url()).await.put(path, card(Role::Decode, "m", "h:2").to_json(), None).await.unwrap();
    wait_for(&mut workers, &[gone, old]).await;
    proxy.cut();
    service.restart_empty();
    let new = granted(&lease, Some(old)).await;
    let mut admin = client(&service.url()).await;
    for _ in 0..20 {
        admin.put("x", "", None).await.unwrap();
    }
    proxy.mend();
    wait_for(&mut workers, &[new]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_lost_its_data_and_is_away_before_anybody_could_register_takes_away_nobody() {
    // Long enough for what happens until etcd is away, on a busy machine.
    const LEASE: Duration = Duration::from_secs(5);
    let mut service = services::etcd();
    let options = EtcdOptions { lease_ttl: LEASE, ..EtcdOptions::new(vec![service.url()]) };
    let mut workers = Etcd::new(options, "a").unwrap().workers(WorkerFilter::default());
    let (old, new) = (WorkerId(7), WorkerId(8));
    let put = async |url: &str, id: WorkerId, address: &str| {
        let path = format!("/engine/a/workers/{}/decode/{id}", key("m"));
        let card = card(Role::Decode, "m", address).to_json();
        client(url).await.put(path, card, None).await
    };
    put(&service.url(), old, "h:1").await.unwrap();
    wait_for(&mut workers, &[old]).await;
    service.restart_empty();
    let url = service.url();
    soon("etcd", async { while put(&url, new, "h:2").await.is_err() {} }).await;
    // The new, empty store has been read.
    wait_for(&mut workers, &[old, new]).await;
    service.kill();
    // Time has to pass here: that is the fault.
    tokio::time::sleep(3 * LEASE).await;
    assert!(workers.borrow().contains_key(&old));
}

#[tokio::test(flavor = "multi_thread")]
async fn configuration_is_followed_and_survives_the_loss_of_etcds_data() {
    let mut service = services::etcd();
    let etcd = etcd_at(&service.url(), "a");
    let mut config = etcd.config(key("m"));
    let other = etcd.config(key("n"));
    let path = format!("/engine/a/config/{}", key("m"));
    let wait = async |config: &mut watch::Receiver<Option<bytes::Bytes>>, value: Option<&str>| {
        let reached = config.wait_for(|config| config.as_deref() == value.map(str::as_bytes));
        soon(&format!("the configuration to be {value:?}"), reached).await.unwrap();
    };
    let mut admin = client(&service.url()).await;
    admin.put(path.as_str(), "{\"policy\":\"never\"}", None).await.unwrap();
    wait(&mut config, Some("{\"policy\":\"never\"}")).await;
    admin.delete(path.as_str(), None).await.unwrap();
    wait(&mut config, None).await;
    admin.put(path.as_str(), "{}", None).await.unwrap();
    wait(&mut config, Some("{}")).await;
    service.restart_empty();
    let mut admin = client(&service.url()).await;
    soon("etcd", async { while admin.put("x", "", None).await.is_err() {} }).await;
    // Something that comes after the new, empty store has been read.
    let lease = etcd.register(card(Role::Decode, "m", "h:1"));
    granted(&lease, None).await;
    assert_eq!(config.borrow().as_deref(), Some(b"{}".as_slice()));
    soon("etcd", async { while admin.put(path.as_str(), "{\"a\":1}", None).await.is_err() {} }).await;
    wait(&mut config, Some("{\"a\":1}")).await;
    assert!(other.borrow().is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_etcd_that_freezes_is_noticed_and_waited_for() {
    let service = services::etcd();
    let etcd = forgetful_etcd_at(&service.url(), "a");
    let mut workers = etcd.workers(WorkerFilter::default());
    let first = etcd.register(card(Role::Decode, "m", "h:1"));
    let first_id = granted(&first, None).await;
    wait_for(&mut workers, &[first_id]).await;
    service.signal("STOP");
    let second = etcd.register(card(Role::Decode, "m", "h:2"));
    tokio::time::sleep(2 * SHORT_LEASE).await;
    assert!(workers.borrow().contains_key(&first_id));
    service.signal("CONT");
    let second_id = granted(&second, None).await;
    soon("both", workers.wait_for(|workers| workers.contains_key(&second_id) && workers.len() == 2)).await.unwrap();
}
