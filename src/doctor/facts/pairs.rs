//! Transfers between workers, made for the purpose.

use std::time::Duration;

use super::{Worker, http};
use crate::{
    cluster::{Role, WorkerCard},
    handoff::WorkerId,
    http::{CLUSTER_TOKEN_HEADER, HttpToken},
    transfer::SessionAddresses,
    worker::{Gauge, Measured},
};

/// How long measuring a pair may take.
const TIME_MAX: Duration = Duration::from_secs(60);

/// A way from one process into a decode worker, and how fast it was.
#[derive(Debug, Clone)]
pub(in crate::doctor) struct Pair {
    /// The prefill worker's address, or who was in its place.
    pub(in crate::doctor) from: String,
    /// The decode worker's.
    pub(in crate::doctor) to: String,
    /// What the decode worker's adapters can take, all together.
    pub(in crate::doctor) link_gbps: Option<f64>,
    pub(in crate::doctor) measured: Result<Measured, String>,
}

/// Has every prefill worker measure its way to every decode worker of its model, one after the other. To decode workers
/// without any prefill worker `gauge` measures from here.
pub(in crate::doctor) async fn measure_pairs(workers: &[Worker], token: Option<&str>, gauge: &Gauge) -> Vec<Pair> {
    let cards = || workers.iter().filter_map(|worker| Some((worker.lease, worker.card.as_ref().ok()?)));
    let of = |role| cards().filter(move |(_, card)| card.role == role);
    let mut pairs = Vec::new();
    for (lease, decode) in of(Role::Decode) {
        let addresses = serde_json::from_value::<SessionAddresses>(decode.session.clone());
        let link_gbps = addresses.as_ref().ok().map(|addresses| addresses.rdma.iter().map(|port| port.rate_gbps).sum());
        let pair =
            |from: &str, measured| Pair { from: from.to_owned(), to: decode.address.clone(), link_gbps, measured };
        let mut asked = false;
        for (_, prefill) in of(Role::Prefill).filter(|(_, prefill)| prefill.model_key == decode.model_key) {
            asked = true;
            pairs.push(pair(&prefill.address, ask(prefill, lease, token).await));
        }
        if !asked {
            let measured = gauge.measure(decode, WorkerId(rand::random())).await;
            pairs.push(pair("this host", measured.map_err(|error| error.to_string())));
        }
    }
    pairs
}

/// Has a prefill worker measure.
async fn ask(prefill: &WorkerCard, decode: WorkerId, token: Option<&str>) -> Result<Measured, String> {
    let shown = |token| format!("{CLUSTER_TOKEN_HEADER}: {}\r\n", HttpToken::of(token));
    let header = token.map(shown).unwrap_or_default();
    let answer = http::post(&prefill.address, &format!("/measure/{decode}"), &header, TIME_MAX).await?;
    match answer.status {
        200 => serde_json::from_str(&answer.body).map_err(|error| format!("an answer that cannot be read: {error}")),
        404 => Err("the prefill worker is of another version, which does not measure".to_owned()),
        _ => Err(answer.body.trim().to_owned()),
    }
}
