use std::{sync::Arc, time::Duration};

use engine::cluster::{LoadReport, Loads, WorkerId, report_load};
use futures::StreamExt;
use tokio::sync::watch;

use crate::{nats_at, services, soon};

#[tokio::test(flavor = "multi_thread")]
async fn load_reports_reach_those_who_listen_again_after_a_restart() {
    let mut service = services::nats();
    let (worker, frontend) = (nats_at(&service.url(), "a").await, nats_at(&service.url(), "a").await);
    let stranger = nats_at(&service.url(), "b").await;
    let mut reports = frontend.reports();
    let (_lease, id) = watch::channel(Some(WorkerId(7)));
    let (_other_lease, other_id) = watch::channel(Some(WorkerId(8)));
    let report = LoadReport { running: 3, ..LoadReport::default() };
    tokio::spawn(report_load(Arc::new(worker), id, move || report));
    tokio::spawn(report_load(Arc::new(stranger), other_id, LoadReport::default));
    assert_eq!(soon("a report", reports.next()).await, Some((WorkerId(7), report)));
    service.restart();
    // Those that were under way when the connection broke do not count.
    while let Ok(Some(_)) = tokio::time::timeout(Duration::ZERO, reports.next()).await {}
    assert_eq!(soon("a report", reports.next()).await, Some((WorkerId(7), report)));
}
