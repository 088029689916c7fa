//! Measuring how fast pages reach a decode worker, from where a prefill worker is or would be.
//!
//! It opens a session as a prefill worker does, over the way that would be chosen, and asks for pages that nobody
//! needs. The decode worker lends them under a slot and an epoch like any others, fences the session if they have not
//! come back within ten seconds, and reads nothing of them. So a cluster can be measured while it serves.

use std::{os::unix::fs::FileExt, sync::mpsc, time::Instant};

use serde::{Deserialize, Serialize};
use tokio::time::{Duration, timeout};

use crate::{
    cli::TransportArgs,
    cluster::{ModelCard, WorkerCard},
    handoff::{MailboxWord, MessageError, Status, ToDecode, ToPrefill, WorkerId},
    transfer::{
        ClientTls, ClusterToken, ConnectError, Connector, ConnectorConfig, PageCopy, Region, RegionShape, Session,
        SessionAddresses, Source, TransferMetrics, Transport, WriteError,
    },
    worker::Ways,
};

/// Bytes of a round, if they fit the pages that are lent: enough to hide how a transfer begins.
const ROUND_BYTES: usize = 64 << 20;
/// Rounds that are counted, after one that is not: it meets untouched memory.
const ROUNDS: usize = 9;
/// How long one may take.
const ROUND_TIME_MAX: Duration = Duration::from_secs(10);

/// What was measured between two workers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// How pages went.
    pub transport: Transport,
    /// Bytes of a round.
    pub bytes: usize,
    /// 10⁹ bytes a second, the median of all rounds.
    pub gigabytes_per_second: f64,
    /// Of the slowest round.
    pub gigabytes_per_second_min: f64,
    /// Of the fastest.
    pub gigabytes_per_second_max: f64,
}

/// Why nothing was measured.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// What was asked for of RDMA cannot be had here.
    #[error("{0}")]
    Rdma(String),
    /// Pages go in no other way.
    #[error(
        "pages go from device to device alone here (--transport cuda-ipc), which is not measured: only ways out of \
             host memory are"
    )]
    Device,
    /// There is no session.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It ended.
    #[error("the decode worker ended the session; see its log, and that it is of this version")]
    Closed,
    /// The decode worker has nothing to lend.
    #[error("the decode worker has no pages to spare, or is being measured by somebody else; try again later")]
    NoPages,
    /// What it said cannot be read.
    #[error("the decode worker is of another version: {0}")]
    Message(#[from] MessageError),
    /// It said something else.
    #[error("the decode worker is of another version, which is not measured")]
    Unexpected,
    /// A write was refused.
    #[error("a write failed: {0}")]
    Write(#[from] WriteError),
    /// The memory to send from.
    #[error("cannot prepare pages to send: {0}")]
    Memory(#[from] std::io::Error),
    /// It took too long.
    #[error("no answer within {ROUND_TIME_MAX:?}")]
    TimedOut,
}

/// Measures ways to decode workers, as a prefill worker or in place of one.
#[derive(Clone)]
pub struct Gauge {
    ways: Ways,
    tls: Option<ClientTls>,
    token: ClusterToken,
}

impl Gauge {
    /// Measures the way that a worker with these flags would choose, of `ways`, which are open.
    pub fn new(ways: Ways, args: &TransportArgs, cluster_token: Option<&str>) -> anyhow::Result<Self> {
        Ok(Self {
            ways,
            tls: args.session_tls().client()?,
            token: ClusterToken::new(cluster_token.unwrap_or_default()),
        })
    }

    /// Measures how fast pages get to the decode worker of this card, over a session of its own as the worker `own`.
    pub async fn measure(&self, decode: &WorkerCard, own: WorkerId) -> Result<Measured, MeasureError> {
        let addresses: SessionAddresses =
            serde_json::from_value(decode.session.clone()).map_err(|_| MeasureError::Unexpected)?;
        let ModelCard { layers, page_bytes, .. } = decode.model;
        if layers * page_bytes == 0 {
            return Err(MeasureError::Unexpected);
        }
        if self.ways.needs_device() {
            return Err(MeasureError::Device);
        }
        let region = tokio::task::spawn_blocking(move || pages_to_send(layers, page_bytes));
        let region = region.await.map_err(|_| MeasureError::Closed)??;
        let pages = region.clone();
        let rdma = self.ways.register(move |adapters| Source::new(adapters, &pages)).await;
        let config = ConnectorConfig {
            tls: self.tls.clone(),
            token: self.token.clone(),
            model_key: decode.model_key.to_string(),
            timeout: ROUND_TIME_MAX,
            // What is measured is sent from host memory.
            cuda_ipc: false,
            shm: self.ways.shm,
            rdma: rdma.map_err(|error| MeasureError::Rdma(format!("{error:#}")))?,
            tcp: self.ways.tcp,
            metrics: TransferMetrics::default(),
        };
        let shape = region.shape();
        let mut session = Connector::new(config, region)?.connect(&addresses, own).await?;
        let (mut speeds, mut bytes) = (Vec::new(), 0);
        for round in 0..=ROUNDS {
            let moved = timeout(ROUND_TIME_MAX, one_round(&mut session, shape)).await;
            let (moved, seconds) = moved.map_err(|_| MeasureError::TimedOut)??;
            if round > 0 {
                bytes = moved;
                speeds.push(moved as f64 / 1e9 / seconds);
            }
        }
        speeds.sort_by(f64::total_cmp);
        Ok(Measured {
            transport: session.transport(),
            bytes,
            gigabytes_per_second: speeds[ROUNDS / 2],
            gigabytes_per_second_min: speeds[0],
            gigabytes_per_second_max: speeds[ROUNDS - 1],
        })
    }
}

/// Pages to send, like those of a decode worker whose model has so many layers, each with pages of so many bytes.
/// Written to once, so that there is memory behind them.
fn pages_to_send(layers: usize, page_bytes: usize) -> std::io::Result<Region> {
    let pages = (ROUND_BYTES / (layers * page_bytes)).max(1);
    let region = Region::private(RegionShape { layers, pages, page_bytes })?;
    // Through the system, as writing to an address is nothing that safe code can do.
    let memory = std::fs::File::options().write(true).open("/proc/self/mem")?;
    let filling = vec![0xa5; page_bytes];
    for page in 0..layers * pages {
        memory.write_all_at(&filling, region.base() as u64 + (page * page_bytes) as u64)?;
    }
    Ok(region)
}

/// Bytes and seconds of one loan, from its first page to its word.
async fn one_round(session: &mut Session, shape: RegionShape) -> Result<(usize, f64), MeasureError> {
    let wish = ToDecode::Measure { pages: u32::try_from(shape.pages).unwrap_or(u32::MAX) };
    session.send(wish.encode().into());
    let answer = session.receive().await.ok_or(MeasureError::Closed)?;
    let (slot, epoch, lent) = match ToPrefill::decode(&answer)? {
        ToPrefill::Scratch { slot, epoch, pages } => (slot, epoch, pages),
        ToPrefill::NoScratch => return Err(MeasureError::NoPages),
        _ => return Err(MeasureError::Unexpected),
    };
    let pages = lent.len().min(shape.pages);
    let writer = session.writer();
    let writing = tokio::task::spawn_blocking(move || {
        let (done, wait) = mpsc::channel::<Result<(), WriteError>>();
        let started = Instant::now();
        for layer in 0..shape.layers as u32 {
            let copies = (0..).zip(&lent[..pages]).map(|(local, &remote)| PageCopy { layer, local, remote });
            writer.write(slot, epoch, copies.collect(), |_| ());
        }
        writer.complete(slot, epoch, MailboxWord::new(epoch, Status::Done), move |result| {
            // Nobody waits any more only if the measurement was given up.
            let _ = done.send(result);
        });
        // A writer that is dropped without an answer belongs to a session that has ended.
        wait.recv().unwrap_or(Err(WriteError::Closed)).map(|()| started.elapsed().as_secs_f64())
    });
    let seconds = writing.await.map_err(|_| MeasureError::Closed)??;
    Ok((pages * shape.layers * shape.page_bytes, seconds))
}
