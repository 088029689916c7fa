//! The one that writes: a prefill worker without a model.

use std::os::unix::fs::FileExt;
use std::sync::mpsc;
use std::time::Instant;

use anyhow::{Context, Result, anyhow, ensure};
use tokio::runtime::Handle;

use super::{
    CONNECT_TIME_MAX, MODEL_KEY, Pages, ROUNDS_UNCOUNTED,
    receiver::{Answer, Ask, SLOT},
};
use crate::handoff::{Epoch, MailboxWord, Status, WorkerId};
use crate::transfer::{
    ClusterToken, Connector, ConnectorConfig, Region, Session, SessionAddresses, Source, TransferMetrics, Transport,
    WriteError,
};
use crate::worker::Ways;

/// A session to a [`Receiver`](super::Receiver), and pages to write.
pub struct Sender {
    session: Session,
    pages: Pages,
    epoch: Epoch,
    runtime: Handle,
}

impl Sender {
    /// Opens a session, over the best of `ways` that leads there.
    pub async fn connect(ways: &Ways, token: ClusterToken, pages: Pages, addresses: &SessionAddresses) -> Result<Self> {
        let region = filled(pages).context("cannot prepare pages")?;
        let sent = region.clone();
        let config = ConnectorConfig {
            tls: None,
            token,
            model_key: MODEL_KEY.to_owned(),
            timeout: CONNECT_TIME_MAX,
            cuda_ipc: false,
            shm: ways.shm,
            rdma: ways.register(move |adapters| Source::new(adapters, &sent)).await?,
            tcp: ways.tcp,
            metrics: TransferMetrics::default(),
        };
        let connector = Connector::new(config, region)?;
        // Its text says all that its source does.
        let session = connector.connect(addresses, WorkerId(1)).await.map_err(|error| anyhow!("{error}"))?;
        Ok(Self { session, pages, epoch: Epoch::FIRST, runtime: Handle::current() })
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

/// Memory of this process alone, in large pages where the system has them, as a prefill worker's is.
fn filled(pages: Pages) -> Result<Region> {
    let region = Region::private(pages.shape())?;
    // Through the system, as writing to an address is nothing that safe code can do.
    let memory = std::fs::File::options().write(true).open("/proc/self/mem")?;
    let mut page = vec![0; pages.page_bytes()];
    for number in 0..pages.shape().pages {
        Pages::fill(number as u32, &mut page);
        memory.write_all_at(&page, region.base() as u64 + (number * page.len()) as u64)?;
    }
    Ok(region)
}
