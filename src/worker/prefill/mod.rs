//! The prefill role: jobs from the queue, prompts through the engine, pages into decode workers' memory.

mod borrowing;
mod grant_exporter;
pub(super) mod measure;
mod status;
mod tasks;

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use engine_kernels::KvPages;
use tokio::sync::watch;

use self::{
    borrowing::{Borrowing, lock, settled},
    measure::Gauge,
    status::{Measure, Shown},
    tasks::{CONNECT_TIME_MAX, Tasks},
};
use super::{
    membership::{self, Particulars},
    model::{self, Purpose},
    notice::{OnDevice, warn_of_staging_flag},
    role, watchdog,
    ways::{NEEDS_DEVICE, Ways},
};
use crate::{
    cli::{KvDTypeArg, LoadFormatArg, WorkerArgs},
    cluster::{Needs, Role, WorkerCard, WorkerFilter, find_model, join},
    engine::Engine,
    handoff::{Borrower, BorrowerConfig, BorrowerEvent, BorrowerTimeouts, WorkerId},
    http::{self, ConnectionThreads, HttpToken, ServerConfig},
    process::{Ready, Signals},
    telemetry::Metrics,
    transfer::{Connector, ConnectorConfig, LocalPages, Source, StagingRing},
};

/// Host memory for staged pages unless a flag says how much: they stay there for as long as it takes to send them.
const STAGING_BYTES: usize = 256 << 20;

/// Loads the model and computes prompts of the cluster's decode workers until a signal comes. `ready` hears when it
/// begins to.
pub async fn run(mut cli: WorkerArgs, ready: impl FnOnce(Ready)) -> Result<()> {
    let mut signals = Signals::new()?;
    let bound = http::bind(&cli.host, cli.port()).await?;
    let cluster = join(cli.cluster.options(), Needs::EtcdAndNats).await?.needed_by("a prefill worker")?;
    let ways = Ways::of(&cli.disagg.transports)?.open().await?;
    let mut expected = None;
    if cli.engine.model.is_none() {
        let card = tokio::select! {
            card = find_model(&*cluster.discovery) => card?,
            code = signals.next() => std::process::exit(code),
        };
        take_model(&mut cli, &card)?;
        expected = Some(card.model_key);
    }
    let metrics = Metrics::new();
    let work = move || {
        let source = model::open(&cli.engine)?;
        let loaded = model::load(&cli.engine, &source, &Purpose::of(&cli))?;
        anyhow::Ok((loaded, source.name().to_owned(), cli))
    };
    let (loaded, name, cli) = role::load(&mut signals, work).await?;
    if expected.is_some_and(|expected| expected != loaded.key) {
        bail!("{name} is not the same model here as in the cluster: its files differ, or these builds do");
    }
    let (model, key) = (loaded.card(&cli.engine, vec![name.clone()]), loaded.key);
    metrics.set_model(&name, Role::Prefill, &loaded.device, key);
    let on_device = loaded.is_on_device();
    let (pages, rdma, staging_notice) = sendable(loaded.pages()?, &cli, &ways).await?;
    let transports = ways.names(on_device && ways.cuda_ipc, rdma.is_some());
    let connector = ConnectorConfig {
        tls: cli.disagg.transports.session_tls().client()?,
        token: membership::token(&cli),
        model_key: key.to_string(),
        timeout: CONNECT_TIME_MAX,
        cuda_ipc: on_device && ways.cuda_ipc,
        shm: ways.shm,
        rdma,
        tcp: ways.tcp,
        metrics: metrics.transfer.clone(),
    };
    let layers = pages.host().shape().layers;
    let connector = Connector::new(connector, pages).context("cannot start to copy pages")?;
    let config = BorrowerConfig {
        model_key: key.to_string(),
        block_size: loaded.config.block_size as u32,
        jobs_max: loaded.config.max_num_seqs,
        timeouts: BorrowerTimeouts::default(),
    };
    let engine = Engine::start(loaded.runner, loaded.config, metrics.engine.clone())?;
    watchdog::watch(&engine, cli.step_time_max(on_device));
    let (borrowing, notes) =
        Borrowing::new(Borrower::new(config), engine.clone(), layers, metrics.engine.handoffs.clone());

    let listener = bound.listen()?;
    let address = listener.local_addr()?;
    let sessions = serde_json::Value::Null;
    let worker = Particulars { role: Role::Prefill, address, model, key, sessions, transports, staging_notice };
    let lease = membership::register(&cluster, &cli, worker, &engine);
    let leaving = watch::Sender::new(false);
    let tasks = Tasks {
        borrowing: borrowing.clone(),
        connector,
        decode_workers: cluster.discovery.workers(WorkerFilter::of(key, Role::Decode)),
        cluster: cluster.clone(),
        key,
        lease: lease.id(),
        dead_jobs: metrics.engine.handoffs.dead_jobs.clone(),
    };
    tokio::spawn(tasks.clone().take_notes(notes));
    tokio::spawn(tasks::pull(tasks.clone(), leaving.subscribe()));
    ready(Ready { address, text: announcement(&name, address) });

    let shown = Shown {
        engine: engine.clone(),
        metrics,
        leaving: leaving.subscribe(),
        cluster_token: cli.cluster.cluster_token.as_deref().map(HttpToken::of),
        measure: measuring(&tasks, &cli, ways)?,
    };
    let drain = async {
        leaving.send_replace(true);
        lock(&borrowing).on(BorrowerEvent::Drain);
        // The lease is kept until no job is held: decode workers restart the handoffs of a worker whose lease has gone.
        tasks::emptied(&borrowing).await;
        lease.withdraw().await;
        // Otherwise jobs that are handed back would come to others only after a while, and those that are done as well.
        settled(&borrowing).await;
        cluster.queue.flush().await;
    };
    let server = ServerConfig {
        connections_max: cli.connections_max(engine.config().max_requests()),
        drain_timeout: cli.shutdown_timeout,
        threads: ConnectionThreads::default(),
    };
    status::serve(listener, shown, server, role::told_to_leave(signals, engine.clone()), drain).await;
    role::end(&engine).await
}

/// What pages are sent from: where they are, or where they are staged; what adapters read, if there are any; and what
/// there is to say of pages in device memory.
async fn sendable(pages: KvPages, cli: &WorkerArgs, ways: &Ways) -> Result<(LocalPages, Option<Source>, String)> {
    let device = match pages {
        KvPages::Host(_) if ways.needs_device() => bail!(NEEDS_DEVICE),
        KvPages::Host(region) => {
            warn_of_staging_flag(cli);
            let sent = region.clone();
            let source = ways.register(move |adapters| Source::new(adapters, &sent)).await?;
            return Ok((region.into(), source, String::new()));
        }
        KvPages::Device(device) => device,
    };
    let pages = device.clone();
    let (direct, rdma) = ways.reach(move |adapters| Source::on_device(adapters, &pages)).await?;
    let wished = cli.disagg.kv_staging_memory.unwrap_or(STAGING_BYTES);
    let ring = StagingRing::new(device, if ways.need_staging(direct.is_some()) { wished } else { 0 });
    let pages = LocalPages::Device(ring.context("cannot reserve memory to stage pages in")?);
    let staged = pages.host().clone();
    let notice = OnDevice {
        ways,
        cuda_ipc: ways.cuda_ipc,
        rdma: rdma.as_ref(),
        staged_in: staged.shape(),
        when: "on their way from the device",
    };
    let notice = notice.announce();
    let source = match direct {
        Some(source) => Some(source),
        None => ways.register(move |adapters| Source::new(adapters, &staged)).await?,
    };
    Ok((pages, source, notice))
}

/// Measures ways to decode workers for whoever asks: how this worker's pages would go, if they are in host memory.
fn measuring(tasks: &Tasks, cli: &WorkerArgs, ways: Ways) -> Result<Measure> {
    let gauge = Gauge::new(ways, &cli.disagg.transports, cli.cluster.cluster_token.as_deref())?;
    let (workers, own) = (tasks.decode_workers.clone(), tasks.lease.clone());
    Ok(Box::new(move |lease| {
        let (gauge, decode) = (gauge.clone(), workers.borrow().get(&lease).cloned());
        let own = own.borrow().unwrap_or(WorkerId::UNREGISTERED);
        let measuring = async move {
            let decode = decode.ok_or_else(|| format!("there is no decode worker {lease} of this model"))?;
            gauge.measure(&decode, own).await.map_err(|error| error.to_string())
        };
        Box::pin(measuring)
    }))
}

/// What is done, and where to look at it.
fn announcement(name: &str, address: SocketAddr) -> String {
    format!(
        "engine {} prefills {name} for the cluster's decode workers; its metrics and health are on http://{address}\n",
        env!("CARGO_PKG_VERSION"),
    )
}

/// Takes from a decode worker's card what makes the same model of it.
fn take_model(cli: &mut WorkerArgs, card: &WorkerCard) -> Result<()> {
    let model = &card.model;
    let unknown = |what: &str, value: &str| anyhow::anyhow!("the cluster's model has the unknown {what} {value}");
    cli.engine.load_format =
        LoadFormatArg::from_str(&model.load_format, true).map_err(|_| unknown("load format", &model.load_format))?;
    cli.engine.kv_cache_dtype =
        KvDTypeArg::from_str(&model.kv_cache_dtype, true).map_err(|_| unknown("type", &model.kv_cache_dtype))?;
    cli.engine.block_size = Some(model.block_size);
    cli.engine.revision.clone_from(&model.revision);
    tracing::info!(model = %model.source, "taking the cluster's model");
    cli.engine.model = Some(model.source.clone());
    Ok(())
}
