//! The one that writes: a prefill worker without a model.

use std::{sync::mpsc, time::Instant};

use anyhow::{Context, Result, anyhow, ensure};
use engine_kernels::KvPages;
use tokio::runtime::Handle;

use super::{
    CONNECT_TIME_MAX, MODEL_KEY, Pages, Place, ROUNDS_UNCOUNTED,
    memory::Yardstick,
    receiver::{Answer, Ask, SLOT},
};
use crate::{
    handoff::{Epoch, MailboxWord, Status, WorkerId},
    transfer::{
        ClusterToken, Connector, ConnectorConfig, LocalPages, Session, SessionAddresses, Source, StagingRing,
        TransferMetrics, Transport, WriteError,
    },
    worker::Ways,
};

/// A session to a [`Receiver`](super::Receiver), and pages to write.
pub struct Sender {
    session: Session,
    pages: Pages,
    epoch: Epoch,
    runtime: Handle,
    yardstick: Option<Yardstick>,
}

impl Sender {
    /// Opens a session, over the best of `ways` that leads there; out of a device's memory over CUDA IPC.
    pub async fn connect(
        ways: &Ways,
        token: ClusterToken,
        place: &Place,
        pages: Pages,
        addresses: &SessionAddresses,
    ) -> Result<Self> {
        let (rdma, local) = match place.filled(pages).context("cannot prepare pages")? {
            KvPages::Host(region) => {
                let sent = region.clone();
                (ways.register(move |adapters| Source::new(adapters, &sent)).await?, LocalPages::Host(region))
            }
            // Nothing is staged.
            KvPages::Device(device) => (None, LocalPages::Device(StagingRing::new(device, 0)?)),
        };
        let to_host = matches!(local, LocalPages::Host(_));
        let config = ConnectorConfig {
            tls: None,
            token,
            model_key: MODEL_KEY.to_owned(),
            timeout: CONNECT_TIME_MAX,
            cuda_ipc: !to_host,
            shm: ways.shm && to_host,
            rdma,
            tcp: ways.tcp && to_host,
            metrics: TransferMetrics::default(),
        };
        let connector = Connector::new(config, local)?;
        // Its text says all that its source does.
        let session = connector.connect(addresses, WorkerId(1)).await.map_err(|error| anyhow!("{error}"))?;
        let yardstick = place.yardstick(pages)?;
        Ok(Self { session, pages, epoch: Epoch::FIRST, runtime: Handle::current(), yardstick })
    }

    /// How pages go.
    pub fn transport(&self) -> Transport {
        self.session.transport()
    }

    /// Writes the first `count` pages and the word behind them; the seconds that took. An error if those of the round
    /// before did not arrive. Blocks: not to be called from a task.
    pub fn round(&mut self, count: usize) -> Result<f64> {
        self.ask(count as u32)?;
        let (epoch, writer) = (self.epoch, self.session.writer());
        self.epoch = epoch.next();
        let copies = self.pages.copies(count, epoch.get());
        let (done, wait) = mpsc::channel::<Result<(), WriteError>>();
        let started = Instant::now();
        writer.write(SLOT, epoch, copies, |_| ());
        writer.complete(SLOT, epoch, MailboxWord::new(epoch, Status::Done), move |result| {
            // Nobody waits any more only if the measurement was given up.
            let _ = done.send(result);
        });
        wait.recv()??;
        Ok(started.elapsed().as_secs_f64())
    }

    /// The seconds that one copy of all pages takes within the device, if they are on one.
    pub fn copy(&self) -> Result<Option<f64>> {
        let Some(yardstick) = &self.yardstick else { return Ok(None) };
        let started = Instant::now();
        yardstick.copy()?;
        Ok(Some(started.elapsed().as_secs_f64()))
    }

    /// Whether what the last round wrote has arrived.
    pub fn finish(&mut self) -> Result<()> {
        self.ask(0)
    }

    fn ask(&mut self, pages: u32) -> Result<()> {
        let whole = pages == 0 || self.epoch.get() as usize <= ROUNDS_UNCOUNTED + 1;
        let ask = postcard::to_stdvec(&Ask { epoch: self.epoch, pages, whole })?;
        ensure!(self.session.send(ask.into()), "the session has ended");
        let answer = self.runtime.block_on(self.session.receive()).context("the session has ended")?;
        let answer: Answer = postcard::from_bytes(&answer)?;
        answer.map_err(|error| anyhow!("{error}"))
    }
}
