//! What to say of the ways between workers, by their cards.

use std::collections::BTreeMap;

use super::{Area, Finding, Level, MISSED_RDMA, Wanted};
use crate::{
    cluster::{Role, WorkerCard},
    doctor::facts::Worker,
    transfer::SessionAddresses,
};

/// How pages would travel between two workers.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    CudaIpc,
    Shm,
    Rdma,
    Tcp,
    /// Not at all; why.
    None(String),
}

/// What to do where workers of one host do not meet on it.
const APART: &str = "run workers of one host as one user who sees one folder for their sockets, \
                     $XDG_RUNTIME_DIR/engine or else /tmp/engine-UID: in units User= without DynamicUser= and \
                     PrivateTmp=, in containers -v /run/engine:/run/engine -e XDG_RUNTIME_DIR=/run/engine; or say \
                     --transport tcp";

/// What the cards of every decode and prefill worker that meet say of how pages would travel between them.
pub(in crate::doctor) fn pairs(workers: &Option<Vec<Worker>>, wanted: Wanted) -> Vec<Finding> {
    let cards = || workers.iter().flatten().filter_map(|worker| worker.card.as_ref().ok());
    let of = |role| cards().filter(move |card| card.role == role);
    let mut ways: BTreeMap<(Way, bool), Vec<String>> = BTreeMap::new();
    for decode in of(Role::Decode) {
        for prefill in of(Role::Prefill).filter(|prefill| prefill.model_key == decode.model_key) {
            let pair = format!("{} → {}", prefill.address, decode.address);
            ways.entry((way(prefill, decode), are_apart(prefill, decode))).or_default().push(pair);
        }
    }
    ways.into_iter().map(|((way, apart), pairs)| finding(way, apart, &pairs, wanted)).collect()
}

fn finding(way: Way, apart: bool, pairs: &[String], wanted: Wanted) -> Finding {
    /// Pairs that are named; of a large cluster the rest is counted.
    const NAMED: usize = 8;
    let mut named = pairs[..pairs.len().min(NAMED)].join(", ");
    if pairs.len() > NAMED {
        named.push_str(&format!(" and {} more", pairs.len() - NAMED));
    }
    let found = |level, seen: String| Finding::new(Area::Cluster, "transport", level, seen);
    match way {
        Way::CudaIpc => {
            found(Level::Ok, format!("CUDA IPC, or shared memory if the devices do not reach each other: {named}"))
        }
        Way::Shm => found(Level::Ok, format!("shared memory: {named}")),
        Way::Rdma => found(Level::Ok, format!("RDMA: {named}")),
        Way::Tcp if wanted == Wanted::NoRdma => found(Level::Ok, format!("TCP, as wanted: {named}")),
        Way::Tcp if apart => {
            found(Level::Failure, format!("TCP, THE SLOWEST WAY, between workers of one host: {named}")).remedy(APART)
        }
        Way::Tcp => found(Level::Failure, format!("TCP, THE SLOWEST WAY: {named}")).remedy(MISSED_RDMA),
        Way::None(why) => found(Level::Failure, format!("no way for pages, {why}: {named}")).remedy(if apart {
            APART
        } else {
            "see --transport, --session-host and --advertise-host of these workers"
        }),
    }
}

/// Whether two workers of one host would share memory if they could find each other there. Of builds that do not say
/// what they see of it, the best is assumed.
fn are_apart(prefill: &WorkerCard, decode: &WorkerCard) -> bool {
    let share = |card: &WorkerCard| card.transports.iter().any(|name| name == "shm" || name == "cuda-ipc");
    let views = prefill.local.as_ref().zip(decode.local.as_ref());
    prefill.host_id == decode.host_id
        && [prefill, decode].into_iter().all(share)
        && views.is_some_and(|(prefill, decode)| !prefill.meets(decode))
}

/// As a prefill worker chooses.
fn way(prefill: &WorkerCard, decode: &WorkerCard) -> Way {
    let both = |name: &str| [prefill, decode].iter().all(|card| card.transports.iter().any(|other| other == name));
    let same_host = prefill.host_id == decode.host_id;
    let Ok(addresses) = serde_json::from_value::<SessionAddresses>(decode.session.clone()) else {
        return Way::None("because the decode worker's session addresses cannot be read".to_owned());
    };
    let together = same_host && !are_apart(prefill, decode);
    if together && both("cuda-ipc") && addresses.unix.is_some() && addresses.cuda.is_some() {
        return Way::CudaIpc;
    }
    if together && both("shm") && addresses.unix.is_some() {
        return Way::Shm;
    }
    let Some(tcp) = &addresses.tcp else {
        let why = if same_host { "as they do not share memory" } else { "as the decode worker serves its host alone" };
        return Way::None(why.to_owned());
    };
    if !same_host && is_loopback(tcp) {
        return Way::None(format!("as the decode worker takes sessions on {tcp}, of its own host"));
    }
    match (both("rdma"), both("tcp")) {
        (true, _) => Way::Rdma,
        (false, true) => Way::Tcp,
        (false, false) => Way::None("as they have no transport in common".to_owned()),
    }
}

fn is_loopback(address: &str) -> bool {
    let ip = address.parse::<std::net::SocketAddr>().map(|address| address.ip());
    ip.map_or_else(|_| address.starts_with("localhost:"), |ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::{super::workers::tests::worker, *};
    use crate::cluster::LocalView;

    fn decode(host: &str, tcp: Option<&str>, transports: &[&str]) -> Worker {
        let mut worker = worker(Role::Decode, "m", "d:1");
        let card = worker.card.as_mut().unwrap();
        card.host_id = host.into();
        card.transports = transports.iter().map(ToString::to_string).collect();
        card.session = serde_json::json!({ "host": host, "instance": "i", "unix": "/run/engine/i.sock", "tcp": tcp });
        worker
    }

    fn prefill(host: &str, transports: &[&str]) -> Worker {
        let mut worker = worker(Role::Prefill, "m", "p:1");
        let card = worker.card.as_mut().unwrap();
        card.host_id = host.into();
        card.transports = transports.iter().map(ToString::to_string).collect();
        worker
    }

    fn only(prefill: Worker, decode: Worker, wanted: Wanted) -> Finding {
        let mut findings = pairs(&Some(vec![prefill, decode]), wanted);
        assert_eq!(findings.len(), 1);
        findings.remove(0)
    }

    #[test]
    fn workers_of_one_host_share_memory() {
        let finding = only(prefill("a", &["shm", "tcp"]), decode("a", Some("d:2"), &["shm", "tcp"]), Wanted::Rdma);
        assert_eq!((finding.level, finding.seen.as_str()), (Level::Ok, "shared memory: p:1 → d:1"));
    }

    #[test]
    fn workers_of_one_host_who_do_not_meet_there_share_nothing() {
        let view = |user, mounts: &str, folder: &str| {
            Some(LocalView { user, mounts: mounts.to_owned(), folder: folder.to_owned() })
        };
        let found = |views: [Option<LocalView>; 2], tcp| {
            let [mut prefill, mut decode] = [prefill("a", &["shm", "tcp"]), decode("a", tcp, &["shm", "tcp"])];
            for (worker, view) in [&mut prefill, &mut decode].into_iter().zip(views) {
                worker.card.as_mut().unwrap().local = view;
            }
            only(prefill, decode, Wanted::Any)
        };
        let here = || view(1, "host", "/run");
        for apart in [view(1, "container", "/tmp"), view(2, "host", "/run")] {
            let finding = found([here(), apart.clone()], Some("d:2"));
            assert_eq!(finding.level, Level::Failure);
            assert!(finding.seen.contains("TCP, THE SLOWEST WAY, between workers of one host"), "{}", finding.seen);
            assert!(finding.remedy.unwrap().contains("$XDG_RUNTIME_DIR/engine"));
            let finding = found([here(), apart], None);
            assert_eq!(finding.level, Level::Failure);
            assert!(finding.remedy.unwrap().contains("$XDG_RUNTIME_DIR/engine"));
        }
        for other in [view(1, "container", "/run"), view(1, "host", "/tmp"), None] {
            assert_eq!(found([here(), other], Some("d:2")).seen, "shared memory: p:1 → d:1");
        }
    }

    #[test]
    fn devices_of_one_host_write_to_each_other() {
        let all = ["cuda-ipc", "shm", "tcp"];
        let mut on_device = decode("a", Some("d:2"), &all);
        on_device.card.as_mut().unwrap().session["cuda"] = "GPU-00".into();
        let finding = only(prefill("a", &all), on_device, Wanted::Rdma);
        assert!(finding.level == Level::Ok && finding.seen.starts_with("CUDA IPC"), "{}", finding.seen);
    }

    #[test]
    fn tcp_between_hosts_is_a_loud_failure_unless_it_is_wanted() {
        let pair = || (prefill("a", &["shm", "rdma", "tcp"]), decode("b", Some("d:2"), &["shm", "tcp"]));
        let (prefill, decode) = pair();
        let finding = only(prefill, decode, Wanted::Any);
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.seen.contains("TCP, THE SLOWEST WAY"));
        let (prefill, decode) = pair();
        assert_eq!(only(prefill, decode, Wanted::NoRdma).level, Level::Ok);
    }

    #[test]
    fn adapters_on_both_hosts_mean_rdma() {
        let both = ["shm", "rdma", "tcp"];
        let finding = only(prefill("a", &both), decode("b", Some("10.0.0.2:7"), &both), Wanted::Any);
        assert_eq!((finding.level, finding.seen.as_str()), (Level::Ok, "RDMA: p:1 → d:1"));
    }

    #[test]
    fn sessions_on_a_loopback_address_reach_nobody_elsewhere() {
        let both = ["shm", "rdma", "tcp"];
        let finding = only(prefill("a", &both), decode("b", Some("127.0.0.1:7"), &both), Wanted::NoRdma);
        assert_eq!(finding.level, Level::Failure);
        assert!(finding.seen.contains("of its own host"), "{}", finding.seen);
    }

    #[test]
    fn workers_without_a_common_transport_are_a_failure() {
        let finding = only(prefill("a", &["shm"]), decode("b", None, &["shm"]), Wanted::Any);
        assert_eq!(finding.level, Level::Failure);
    }

    #[test]
    fn pairs_of_different_models_are_none() {
        let other = worker(Role::Prefill, "n", "p:1");
        assert!(pairs(&Some(vec![other, decode("a", None, &["shm"])]), Wanted::Any).is_empty());
    }
}
