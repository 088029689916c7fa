//! The prefill role: jobs from the queue, prompts through the engine, pages into decode workers' memory.

mod courier;
mod desk;
pub(super) mod measure;
mod status;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use engine_kernels::KvPages;
use prometheus::IntCounter;
use serde::Deserialize;
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};

use self::{
    desk::{Desk, Note, SharedDesk},
    measure::Gauge,
    status::{Measure, Shown},
};
use super::{
    membership::{self, Particulars},
    model::{self, Purpose},
    notice::{OnDevice, warn_of_staging_flag},
    role, watchdog,
    ways::{NEEDS_DEVICE, Ways},
};
use crate::{
    api::{self, ConnectionThreads, HttpToken, ServerConfig},
    cli::{KvDTypeArg, LoadFormatArg, WorkerArgs},
    cluster::{Cluster, ModelKey, Needs, Role, WorkerCard, WorkerFilter, WorkerSet, find_model, join},
    engine::Engine,
    handoff::{Borrower, BorrowerConfig, BorrowerEvent, BorrowerTimeouts, ToPrefill, WorkerId},
    process::{Ready, Signals},
    telemetry::Metrics,
    transfer::{ConnectError, Connector, ConnectorConfig, LocalPages, SessionAddresses, Source, StagingRing},
};

/// How long opening a session may take.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// Host memory for staged pages unless a flag says how much: they stay there for as long as it takes to send them.
const STAGING_BYTES: usize = 256 << 20;
/// Between two looks at handoffs that take too long.
const TICK: Duration = Duration::from_millis(100);

/// Loads the model and computes prompts of the cluster's decode workers until a signal comes. `ready` hears when it
/// begins to.
pub async fn run(mut cli: WorkerArgs, ready: impl FnOnce(Ready)) -> Result<()> {
    let mut signals = Signals::new()?;
    let bound = api::bind(&cli.host, cli.port()).await?;
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
    let (desk, notes) = Desk::new(Borrower::new(config), engine.clone(), layers, metrics.engine.handoffs.clone());

    let listener = bound.listen()?;
    let address = listener.local_addr()?;
    let sessions = serde_json::Value::Null;
    let worker = Particulars { role: Role::Prefill, address, model, key, sessions, transports, staging_notice };
    let lease = membership::register(&cluster, &cli, worker, &engine);
    let leaving = watch::Sender::new(false);
    let shop = Shop {
        desk: desk.clone(),
        connector,
        decode_workers: cluster.discovery.workers(WorkerFilter::of(key, Role::Decode)),
        cluster: cluster.clone(),
        key,
        lease: lease.id(),
        dead_jobs: metrics.engine.handoffs.dead_jobs.clone(),
    };
    tokio::spawn(shop.clone().take_notes(notes));
    tokio::spawn(pull(shop.clone(), leaving.subscribe()));
    ready(Ready { address, text: announcement(&name, address) });

    let shown = Shown {
        engine: engine.clone(),
        metrics,
        leaving: leaving.subscribe(),
        cluster_token: cli.cluster.cluster_token.as_deref().map(HttpToken::of),
        measure: measuring(&shop, &cli, ways)?,
    };
    let drain = async {
        leaving.send_replace(true);
        desk::on(&desk, BorrowerEvent::Drain);
        // The lease is kept until no job is held: decode workers restart the handoffs of a worker whose lease has gone.
        emptied(&desk).await;
        lease.withdraw().await;
        // Otherwise jobs that are handed back would come to others only after a while, and those that are done as well.
        desk::settled(&desk).await;
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
fn measuring(shop: &Shop, cli: &WorkerArgs, ways: Ways) -> Result<Measure> {
    let gauge = Gauge::new(ways, &cli.disagg.transports, cli.cluster.cluster_token.as_deref())?;
    let (workers, own) = (shop.decode_workers.clone(), shop.lease.clone());
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

/// What the tasks of a prefill worker share.
#[derive(Clone)]
struct Shop {
    desk: SharedDesk,
    connector: Connector,
    /// Those that are alive.
    decode_workers: watch::Receiver<Arc<WorkerSet>>,
    cluster: Cluster,
    key: ModelKey,
    lease: watch::Receiver<Option<WorkerId>>,
    dead_jobs: IntCounter,
}

/// Takes jobs off the queue while there is room for them.
async fn pull(shop: Shop, mut leaving: watch::Receiver<bool>) {
    let mut jobs = shop.cluster.queue.consume(shop.key);
    let mut alive = shop.decode_workers.clone();
    let bell = desk::lock(&shop.desk).room_bell();
    let pulling = async {
        loop {
            while !desk::lock(&shop.desk).has_room() {
                bell.notified().await;
            }
            let rest = desk::lock(&shop.desk).rest(&alive.borrow_and_update());
            if !rest.is_zero() {
                // Whoever comes may be within reach.
                let _ = timeout(rest, alive.changed()).await;
            }
            let Some(job) = jobs.next().await else { return };
            desk::deliver(&shop.desk, job);
        }
    };
    tokio::select! {
        () = pulling => {}
        _ = leaving.wait_for(|&leaving| leaving) => {}
    }
}

impl Shop {
    /// Takes in what the writers and the engine say, and looks at the clock.
    async fn take_notes(self, mut notes: mpsc::UnboundedReceiver<Note>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                note = notes.recv() => match note {
                    Some(Note::Connect { decode, addresses }) => {
                        tokio::spawn(self.clone().session(decode, addresses));
                    }
                    Some(note) => desk::take(&self.desk, note),
                    None => return,
                },
                _ = ticks.tick() => {
                    desk::on(&self.desk, BorrowerEvent::Tick);
                    let dead = self.cluster.queue.dead_jobs();
                    self.dead_jobs.inc_by(dead.saturating_sub(self.dead_jobs.get()));
                }
            }
        }
    }

    /// Opens a session and listens to it until it ends.
    async fn session(self, decode: WorkerId, addresses: serde_json::Value) {
        let own = self.lease.borrow().unwrap_or(WorkerId::UNREGISTERED);
        let (opened, tried, pause) = match SessionAddresses::deserialize(&addresses) {
            Ok(addresses) => {
                let opened = self.connector.connect(&addresses, own).await;
                let tried = !matches!(opened, Err(ConnectError::Silent));
                (opened.map_err(|error| error.to_string()), tried, self.connector.pause(&addresses))
            }
            Err(error) => (Err(format!("the job's addresses cannot be read: {error}")), false, Duration::ZERO),
        };
        let mut session = match opened {
            Ok(session) => session,
            Err(error) => {
                let known = self.decode_workers.borrow().clone();
                let alive = is_listed(&known, decode, &addresses);
                tracing::warn!(worker = %decode, %error, alive, "no session to a decode worker");
                // That it is missing says nothing before the set is known; then the job comes again, until it was tried
                // enough.
                let gone = !alive && !known.is_empty();
                if tried && !gone {
                    desk::lock(&self.desk).miss(decode);
                }
                return desk::on(&self.desk, BorrowerEvent::ConnectFailed { decode, gone, pause });
            }
        };
        let id = session.id();
        desk::connected(&self.desk, decode, &session);
        let outlived = self.outlived(decode);
        tokio::pin!(outlived);
        loop {
            let message = tokio::select! {
                message = session.receive() => message,
                () = &mut outlived => {
                    tracing::info!(worker = %decode, "its lease has gone: its session is of no more use");
                    break;
                }
            };
            let Some(message) = message else { break };
            match ToPrefill::decode(&message) {
                Ok(message) => desk::on(&self.desk, BorrowerEvent::Message { session: id, message }),
                Err(error) => {
                    tracing::warn!(worker = %decode, %error, "a decode worker is left");
                    break;
                }
            }
        }
        tracing::info!(worker = %decode, "the session to a decode worker ended");
        // The writer stops first: what is said to be over must be.
        drop(session);
        desk::disconnected(&self.desk, id);
    }

    /// Returns when a decode worker's lease has gone and no job of it is left. If it lives on it does so under another
    /// lease, and later jobs open a session by that name.
    async fn outlived(&self, decode: WorkerId) {
        let mut alive = self.decode_workers.clone();
        // One that is not known yet may be soon.
        let _ = timeout(CONNECT_TIME_MAX, alive.wait_for(|alive| alive.contains_key(&decode))).await;
        // While nobody is known, that says nothing of any.
        let gone = alive.wait_for(|alive| !alive.is_empty() && !alive.contains_key(&decode)).await.is_ok();
        if !gone {
            // Nobody looks any more.
            return std::future::pending().await;
        }
        while desk::lock(&self.desk).holds_of(decode) {
            sleep(TICK).await;
        }
    }
}

/// Whether a job's decode worker is alive: under the lease that the job names, or where it takes sessions, if it has
/// lost that lease and is back under another.
fn is_listed(workers: &WorkerSet, decode: WorkerId, addresses: &serde_json::Value) -> bool {
    let instance = SessionAddresses::instance_of(addresses);
    let is_back = |card: &Arc<WorkerCard>| SessionAddresses::instance_of(&card.session) == instance;
    workers.contains_key(&decode) || (instance.is_some() && workers.values().any(is_back))
}

/// Returns when no job is held any more.
async fn emptied(desk: &SharedDesk) {
    let bell = desk::lock(desk).room_bell();
    while desk::lock(desk).held() > 0 {
        // The bell may have rung for the one who pulls.
        let _ = timeout(TICK, bell.notified()).await;
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::cluster::tests::card;

    #[test]
    fn a_decode_worker_that_is_back_under_another_lease_is_known_by_where_it_takes_sessions() {
        let at = |instance: &str| json!({ "instance": instance });
        let carded =
            |session| Arc::new(WorkerCard { session, ..card(Role::Decode, ModelKey::of(b"m"), "10.0.0.1:8000") });
        let workers = WorkerSet::from([(WorkerId(2), carded(at("one"))), (WorkerId(3), carded(Value::Null))]);
        for (lease, addresses, expected) in
            [(2, at("another"), true), (1, at("one"), true), (1, at("another"), false), (1, Value::Null, false)]
        {
            assert_eq!(is_listed(&workers, WorkerId(lease), &addresses), expected, "{lease} {addresses}");
        }
    }
}
