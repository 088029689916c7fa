use futures::{FutureExt, StreamExt};

use super::connection::Connection;
use crate::cluster::{LoadReport, LoadStream, WorkerId};

/// Sends a report if that can be done at once.
pub(super) fn report(connection: &Connection, namespace: &str, lease: WorkerId, report: &LoadReport) {
    // An old report is worth nothing: none is kept for a server that is away.
    if connection.check().is_err() {
        return;
    }
    // Numbers only: there is nothing that could fail.
    let json = serde_json::to_vec(report).unwrap_or_default();
    let subject = format!("{namespace}.load.{lease}");
    let _ = connection.client.publish(subject, json.into()).now_or_never();
}

/// Everybody's reports. The subscription outlives connections.
pub(super) fn reports(connection: &Connection, namespace: &str) -> LoadStream {
    let client = connection.client.clone();
    let subject = format!("{namespace}.load.*");
    let subscribed = async move {
        match client.subscribe(subject).await {
            Ok(reports) => reports.boxed(),
            Err(error) => {
                tracing::warn!("cannot listen to load reports: {error}");
                futures::stream::empty().boxed()
            }
        }
    };
    futures::stream::once(subscribed)
        .flatten()
        .filter_map(|message: async_nats::Message| async move {
            let lease = message.subject.rsplit('.').next()?.parse().ok()?;
            Some((lease, serde_json::from_slice(&message.payload).ok()?))
        })
        .boxed()
}
