//! A worker's place in the cluster: what it says of itself, and how busy it is.

use std::{fs, net::SocketAddr, os::unix::fs::MetadataExt};

use tokio::sync::watch;

use crate::{
    cli::WorkerArgs,
    cluster::{
        CARD_SCHEMA, Cluster, Lease, LoadReport, LocalView, ModelCard, ModelKey, Role, WorkerCard, WorkerId,
        advertised_host, host_id, report_load,
    },
    engine::EngineHandle,
    transfer::{self, ClusterToken},
};

/// What there is to say of a worker.
pub(super) struct Particulars {
    pub(super) role: Role,
    /// Where its HTTP server listens.
    pub(super) address: SocketAddr,
    pub(super) model: ModelCard,
    pub(super) key: ModelKey,
    /// Where it takes sessions; null if it takes none.
    pub(super) sessions: serde_json::Value,
    pub(super) transports: Vec<String>,
    /// How pages get into device memory or out of it, staged or not, if that is where they are.
    pub(super) staging_notice: String,
}

/// Registers a worker, and tells how busy its engine is for as long as it is registered: that of a decode worker,
/// because frontends place by it. Jobs find prefill workers by themselves.
pub(super) fn register(cluster: &Cluster, cli: &WorkerArgs, worker: Particulars, engine: &EngineHandle) -> Lease {
    let Particulars { role, address, model, key, sessions, transports, staging_notice } = worker;
    let card = WorkerCard {
        schema: CARD_SCHEMA,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        role,
        address: format!("{}:{}", host(cli, address), address.port()),
        session: sessions,
        transports,
        staging: staging_notice,
        host_id: host_id(),
        local: local_view(),
        model,
        model_key: key,
    };
    tracing::info!(%role, address = %card.address, model_key = %key, "joining the cluster");
    let lease = cluster.discovery.register(card);
    if role == Role::Decode {
        tokio::spawn(report(cluster.clone(), lease.id(), engine.clone()));
    }
    lease
}

/// As whom this process looks for others' sockets on this host, and where; `None` where that cannot be told.
pub(super) fn local_view() -> Option<LocalView> {
    let folder = transfer::runtime_directory().ok()?;
    let found = fs::metadata(&folder).ok()?;
    let mounts = fs::read_link("/proc/self/ns/mnt").ok()?;
    Some(LocalView {
        // The folder is this user's, or it would not be one.
        user: found.uid(),
        mounts: mounts.display().to_string(),
        folder: format!("{} ({}:{})", folder.display(), found.dev(), found.ino()),
    })
}

/// The host under which others reach what listens on `address`.
pub(super) fn host(cli: &WorkerArgs, address: SocketAddr) -> String {
    let etcd = cli.cluster.etcd.first().map(String::as_str);
    advertised_host(cli.advertise_host.as_deref(), address.ip(), etcd)
}

/// The secret of the cluster; without one, the empty one.
pub(super) fn token(cli: &WorkerArgs) -> ClusterToken {
    ClusterToken::new(cli.cluster.cluster_token.as_deref().unwrap_or_default())
}

async fn report(cluster: Cluster, lease: watch::Receiver<Option<WorkerId>>, engine: EngineHandle) {
    let sample = move || {
        let load = engine.snapshot();
        let narrow = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
        LoadReport {
            running: narrow(load.running),
            waiting: narrow(load.waiting),
            prompt_tokens: load.pending_tokens as u64,
            cached_tokens: load.computed_tokens as u64,
            pages_free: narrow(load.pages_free + load.pages_cached),
            pages: narrow(engine.config().blocks),
        }
    };
    report_load(cluster.loads, lease, sample).await;
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::cli::Invocation;

    /// A worker's command line.
    pub(in crate::worker) fn worker(flags: &[&str]) -> WorkerArgs {
        match Invocation::try_parse_from([&["engine", "--model", "m"], flags].concat()) {
            Ok(Invocation::Decode(worker) | Invocation::Prefill(worker)) => worker,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn workers_of_one_user_who_see_one_folder_meet() {
        let view = local_view().unwrap();
        assert!(view.meets(&local_view().unwrap()));
        assert!(view.meets(&LocalView { mounts: "another".into(), ..view.clone() }));
    }

    #[test]
    fn a_worker_is_reached_where_it_says_or_else_where_it_listens() {
        let here = "10.1.2.3:7".parse().unwrap();
        assert_eq!(host(&worker(&["--advertise-host", "worker-7"]), here), "worker-7");
        assert_eq!(host(&worker(&[]), here), "10.1.2.3");
    }
}
