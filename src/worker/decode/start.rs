//! Starting a decode worker that lends its pages: its sessions, its mailbox, and what it follows of the cluster.

use std::{
    net::SocketAddr,
    sync::{Arc, OnceLock},
    time::Instant,
};

use anyhow::{Context, Result, bail};
use engine_kernels::{DeviceRegion, KvPages};
use tokio::sync::{mpsc, watch};

use super::{
    port::{ClusterPort, sink},
    staging::Staging,
    view::{NewJob, View, follow_limits, follow_queue, follow_workers, publish_jobs},
};
use crate::{
    cli::WorkerArgs,
    cluster::{Cluster, ModelKey, WorkerId},
    engine::{Engine, EngineHandle, LendingConfig, Post, inbox},
    handoff::{HandoffCosts, LenderTimeouts, Limits},
    telemetry::{Metrics, StagingMetrics},
    transfer::{self, Exported, Mailbox, Region, ServerConfig, SessionServer, Target, Transport},
    worker::{
        membership,
        model::Loaded,
        notice::{OnDevice, warn_of_staging_flag},
        ways::{NEEDS_DEVICE, Ways},
    },
};

/// Host memory for staged pages unless a flag says how much: room for several long prompts.
const STAGING_BYTES: usize = 2 << 30;

/// The tasks that keep a lending engine informed, until [`ClusterTasks::spawn`] sets them going, and what the worker is
/// to say of itself.
pub(super) struct ClusterTasks {
    key: ModelKey,
    limits: Limits,
    view: Arc<View>,
    jobs: mpsc::UnboundedReceiver<NewJob>,
    post: Post,
    /// Where prefill workers open sessions.
    pub(super) addresses: serde_json::Value,
    /// How they can move pages.
    pub(super) transports: Vec<String>,
    /// How they get into device memory, if that is where they are.
    pub(super) staging_notice: String,
}

/// Pages that can be lent, and how others get at them.
struct Lendable {
    /// What peers write to: the pages, or what stands in for them.
    region: Region,
    /// If the pages are in device memory.
    staging: Option<Staging>,
    /// The same pages, if other processes may open the device's memory.
    exported: Option<Exported>,
    /// What adapters write to, if there are any.
    target: Option<Target>,
    /// What there is to say of how pages get into device memory.
    notice: String,
}

impl Lendable {
    async fn of(
        pages: KvPages,
        mailbox: &Mailbox,
        cli: &WorkerArgs,
        ways: &Ways,
        metrics: &StagingMetrics,
    ) -> Result<Self> {
        match pages {
            KvPages::Host(_) if ways.needs_device() => bail!(NEEDS_DEVICE),
            KvPages::Host(region) => {
                warn_of_staging_flag(cli);
                let target = register(&region, mailbox, ways).await?;
                Ok(Self { region, staging: None, exported: None, target, notice: String::new() })
            }
            KvPages::Device(device) => Self::on_device(device, mailbox, cli, ways, metrics).await,
        }
    }

    async fn on_device(
        device: DeviceRegion,
        mailbox: &Mailbox,
        cli: &WorkerArgs,
        ways: &Ways,
        metrics: &StagingMetrics,
    ) -> Result<Self> {
        let exported = match ways.cuda_ipc.then(|| Exported::new(&device)).transpose() {
            Err(error) if ways.needs_device() => return Err(error).context("--transport cuda-ipc"),
            Err(error) => {
                tracing::warn!(%error, "pages do not come from devices of this host directly");
                None
            }
            Ok(exported) => exported,
        };
        let (pages, words) = (device.clone(), mailbox.clone());
        let (direct, rdma) = ways.reach(move |adapters| Target::on_device(adapters, &pages, &words)).await?;
        // Where no page comes through host memory, none is staged.
        let wished = cli.disagg.kv_staging_memory.unwrap_or(STAGING_BYTES);
        let bytes = if ways.need_staging(direct.is_some()) { wished } else { 0 };
        let mut staging = Staging::new(device, bytes, metrics.clone())?;
        if let Some(Ok(reached)) = rdma {
            staging = staging.reached(reached);
        }
        let region = staging.region().clone();
        let target = match direct {
            Some(target) => Some(target),
            None => register(&region, mailbox, ways).await?,
        };
        let (cuda_ipc, rdma) = (exported.is_some(), rdma.as_ref());
        let notice = OnDevice { ways, cuda_ipc, rdma, staged_in: region.shape(), when: "on their way to the device" };
        Ok(Self { region, staging: Some(staging), exported, target, notice: notice.announce() })
    }
}

/// Registers host memory with the adapters that are open, if any are.
async fn register(region: &Region, mailbox: &Mailbox, ways: &Ways) -> Result<Option<Target>> {
    let (region, mailbox) = (region.clone(), mailbox.clone());
    ways.register(move |adapters| Target::new(adapters, &region, &mailbox)).await
}

/// Starts an engine that lends its pages to whoever opens a session.
pub(super) async fn start_lending(
    cli: &WorkerArgs,
    limits: Limits,
    loaded: Loaded,
    ways: &Ways,
    metrics: &Metrics,
) -> Result<(EngineHandle, ClusterTasks)> {
    let pages = loaded.pages()?;
    let Loaded { runner, config, key, .. } = loaded;
    // Loans in quarantine keep their words, beside those of the sequences that are away: as many again.
    let mailbox_slots = u32::try_from(2 * config.max_num_seqs).unwrap_or(u32::MAX);
    let mailbox = Mailbox::new(mailbox_slots).context("cannot make a mailbox")?;
    let pages = Lendable::of(pages, &mailbox, cli, ways, &metrics.engine.staging).await?;
    let Lendable { region, staging, exported, target, notice } = pages;
    let (post, inbox) = inbox();
    let sessions: Arc<OnceLock<SessionServer>> = Arc::default();
    let mut server = server_config(cli, ways, exported, key, metrics).await?;
    server.rdma = target;
    let cuda_ipc = server.unix.is_some() && server.cuda.is_some();
    let on = [
        (cuda_ipc, Transport::CudaIpc),
        (server.unix.is_some() && server.shm, Transport::Shm),
        (server.rdma.is_some(), Transport::Rdma),
        (server.tcp_pages, Transport::Tcp),
    ];
    let transports = on.iter().filter(|(on, _)| *on).map(|(_, transport)| transport.name().to_owned()).collect();
    let sink = sink(post.clone(), Arc::downgrade(&sessions));
    let server = SessionServer::start(server, region, mailbox.clone(), sink).await?;
    let addresses = serde_json::to_value(server.addresses())?;
    // It is the only one to set it.
    let _ = sessions.set(server);
    let view = View::new(limits, metrics.engine.handoffs.clone());
    let (new_jobs, jobs) = mpsc::unbounded_channel();
    let port = ClusterPort {
        sessions,
        mailbox,
        view: view.clone(),
        jobs: new_jobs,
        staging: staging.map(|staging| if cuda_ipc { staging.exported() } else { staging }),
        block_size: config.block_size,
        costs: HandoffCosts::default(),
        started: Instant::now(),
        leaving: 0,
        unclaimed: None,
    };
    let lending = LendingConfig { mailbox_slots, timeouts: LenderTimeouts::default() };
    let engine = Engine::start_lending(runner, config, metrics.engine.clone(), inbox, lending, Box::new(port))?;
    Ok((engine, ClusterTasks { key, limits, view, jobs, post, addresses, transports, staging_notice: notice }))
}

impl ClusterTasks {
    /// Follows the cluster, and puts jobs on its queue, for as long as the process lives.
    pub(super) fn spawn(self, cluster: &Cluster, lease: watch::Receiver<Option<WorkerId>>) {
        let Self { key, limits, view, jobs, post, addresses, .. } = self;
        tokio::spawn(follow_workers(cluster.clone(), key, view.clone(), post.clone()));
        tokio::spawn(follow_queue(cluster.clone(), key, view.clone(), post.clone()));
        tokio::spawn(follow_limits(cluster.clone(), key, view.clone(), limits, post.clone()));
        tokio::spawn(publish_jobs(cluster.clone(), key, jobs, lease, addresses, view, post));
    }
}

/// Where sessions are taken, as the command line says.
async fn server_config(
    cli: &WorkerArgs,
    ways: &Ways,
    cuda: Option<Exported>,
    key: ModelKey,
    metrics: &Metrics,
) -> Result<ServerConfig> {
    let mut tcp = None;
    // RDMA's sessions are opened there too.
    if ways.tcp || ways.rdma {
        let (host, port) = (cli.session_host(), cli.disagg.session_port);
        let found = tokio::net::lookup_host((host, port)).await;
        let mut found = found.with_context(|| format!("cannot resolve --session-host {host}"))?;
        tcp = Some(found.next().with_context(|| format!("--session-host {host} has no address"))?);
    }
    let mut unix = None;
    if ways.shm || cuda.is_some() {
        match transfer::runtime_directory() {
            Ok(folder) => unix = Some(folder),
            Err(error) if tcp.is_some() => tracing::warn!(%error, "no shared memory with workers of this host"),
            Err(error) => return Err(error).context("--transport shm and cuda-ipc need a folder for their socket"),
        }
    }
    Ok(ServerConfig {
        tcp,
        tcp_pages: ways.tcp,
        shm: ways.shm,
        cuda,
        rdma: None,
        advertise: tcp.map(|address: SocketAddr| membership::host(cli, address)),
        unix,
        tls: cli.disagg.transports.session_tls().server()?,
        token: membership::token(cli),
        model_key: key.to_string(),
        limits: transfer::Limits::default(),
        metrics: metrics.transfer.clone(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::worker::membership::tests::worker;

    #[tokio::test]
    async fn sessions_are_taken_where_the_flags_say() {
        let config = async |flags: &[&str]| {
            let cli = worker(&[&["--transport", "tcp", "--host", "127.0.0.2"], flags].concat());
            let ways = Ways::of(&cli.disagg.transports).unwrap();
            server_config(&cli, &ways, None, ModelKey::of(b"m"), &Metrics::new()).await.unwrap()
        };
        let told =
            config(&["--session-host", "127.0.0.3", "--session-port", "7", "--advertise-host", "worker-7"]).await;
        assert_eq!(told.tcp, Some("127.0.0.3:7".parse().unwrap()));
        assert_eq!(told.advertise.as_deref(), Some("worker-7"));
        let untold = config(&[]).await;
        assert_eq!(untold.tcp, Some("127.0.0.2:0".parse().unwrap()), "beside the requests");
        assert_eq!(untold.advertise.as_deref(), Some("127.0.0.2"));
    }
}
