//! The one that is written to: a decode worker without a model.

use std::{
    net::IpAddr,
    sync::{Arc, mpsc},
    thread,
};

use anyhow::{Context, Result};
use engine_kernels::{KvPages, KvRegion, RegionShape};
use serde::{Deserialize, Serialize};

use super::{MODEL_KEY, Pages, Place, memory::Readback};
use crate::{
    handoff::{Epoch, MailboxSlot, SessionId},
    transfer::{
        ClusterToken, Exported, Limits, Mailbox, ServerConfig, SessionAddresses, SessionEvent, SessionServer, Target,
        TransferMetrics, runtime_directory,
    },
    worker::Ways,
};

/// The loan there is, again and again under another epoch.
pub(super) const SLOT: MailboxSlot = MailboxSlot(0);

/// "Lend me the first pages, as many as this, under this epoch."
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Ask {
    pub(super) epoch: Epoch,
    /// 0: only say whether the last round arrived.
    pub(super) pages: u32,
    /// Look at every byte of the last round, and at the gaps; else at how each page ends. Reading everything leaves the
    /// caches in another state than writing it does.
    pub(super) whole: bool,
}

/// "They are; and what you wrote before has arrived", or what has not.
pub(super) type Answer = Result<(), String>;

/// Pages, and a session server that lends them. Dropping it closes all sessions.
pub struct Receiver {
    server: Arc<SessionServer>,
}

/// A round that was lent.
#[derive(Clone, Copy)]
struct Round {
    epoch: Epoch,
    pages: usize,
}

impl Receiver {
    /// Starts to lend, from tasks of the tokio runtime this is called in, and a thread that checks what arrives.
    /// Sessions are taken on `address`, and for processes of this host through a unix socket; pages come over `ways`,
    /// or to a device's memory over CUDA IPC.
    pub async fn start(address: IpAddr, ways: &Ways, token: ClusterToken, place: &Place, pages: Pages) -> Result<Self> {
        let lent = place.lent(pages)?;
        let mailbox = Mailbox::new(1).context("cannot make a mailbox")?;
        let (region, cuda) = match &lent {
            KvPages::Host(region) => (region.clone(), None),
            // Sessions want host memory too, for ways that are not measured here.
            KvPages::Device(device) => {
                (KvRegion::shared(RegionShape { pages: 1, ..device.shape() })?, Some(Exported::new(device)?))
            }
        };
        let to_host = cuda.is_none();
        let (registered, words) = (region.clone(), mailbox.clone());
        let config = ServerConfig {
            tcp: Some((address, 0).into()),
            tcp_pages: ways.tcp && to_host,
            shm: ways.shm && to_host,
            rdma: match to_host {
                true => ways.register(move |adapters| Target::new(adapters, &registered, &words)).await?,
                false => None,
            },
            advertise: None,
            unix: (ways.shm || cuda.is_some())
                .then(runtime_directory)
                .transpose()
                .context("no folder for a unix socket")?,
            cuda,
            tls: None,
            token,
            model_key: MODEL_KEY.to_owned(),
            limits: Limits::default(),
            metrics: TransferMetrics::default(),
        };
        let (sender, questions) = mpsc::channel::<(SessionId, Ask)>();
        let sink = move |event| {
            if let SessionEvent::Message { session, message } = event
                && let Ok(ask) = postcard::from_bytes(&message)
            {
                // Nobody answers once the receiver is being dropped.
                let _ = sender.send((session, ask));
            }
        };
        let server = Arc::new(SessionServer::start(config, region, mailbox, Arc::new(sink)).await?);
        let mut checker = Checker::new(&lent, pages)?;
        let answering = Arc::downgrade(&server);
        thread::Builder::new().name("transfer-bench".into()).spawn(move || {
            while let Ok((session, ask)) = questions.recv() {
                let Some(server) = answering.upgrade() else { return };
                let answer: Answer = checker.check(ask.whole);
                let count = (ask.pages as usize).min(pages.count());
                if count > 0 {
                    let lent: Vec<u32> = (0..count).map(|index| pages.remote(index)).collect();
                    server.lend(session, SLOT, ask.epoch, lent.into());
                    checker.last = Some(Round { epoch: ask.epoch, pages: count });
                }
                server.send(session, postcard::to_stdvec(&answer).unwrap_or_default().into());
            }
        })?;
        Ok(Self { server })
    }

    /// Where sessions are opened.
    pub fn addresses(&self) -> &SessionAddresses {
        self.server.addresses()
    }
}

/// Looks whether what was written is what should have been.
struct Checker {
    lent: Readback,
    pages: Pages,
    last: Option<Round>,
    buffer: Vec<u8>,
}

impl Checker {
    fn new(lent: &KvPages, pages: Pages) -> Result<Self> {
        Ok(Self { lent: Readback::new(lent)?, pages, last: None, buffer: vec![0; pages.page_bytes()] })
    }

    /// Whether the last round's pages arrived, and nothing beside them.
    fn check(&mut self, whole: bool) -> Answer {
        let Some(Round { epoch, pages }) = self.last.take() else { return Ok(()) };
        let from = if whole { 0 } else { self.buffer.len() - Pages::WORD_BYTES };
        for index in 0..pages {
            let page = self.pages.remote(index);
            if !self.pages.arrived(index, epoch.get(), from, self.read(page, from)?) {
                return Err(format!("page {index} of round {} did not arrive whole", epoch.get()));
            }
            if whole && self.read(page + 1, 0)?.iter().any(|&byte| byte != 0) {
                return Err(format!("round {} wrote beside page {index}", epoch.get()));
            }
        }
        Ok(())
    }

    /// A page from a byte on.
    fn read(&mut self, page: u32, from: usize) -> Result<&[u8], String> {
        let bytes = &mut self.buffer[from..];
        self.lent.read(page, from, bytes).map_err(|error| format!("the pages cannot be read back: {error:#}"))?;
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    /// Pages of a round as a sender would have left them, but for what `spoil` does.
    fn checked(whole: bool, spoil: impl FnOnce(&std::fs::File)) -> Answer {
        let pages = Pages::new(2, 64).unwrap();
        let region = KvRegion::shared(pages.shape()).unwrap();
        let file = region.file().unwrap();
        for copy in pages.copies(2, 1) {
            let mut page = [0; 64];
            Pages::fill(copy.local, &mut page);
            file.write_all_at(&page, u64::from(copy.remote) * 64).unwrap();
        }
        spoil(file);
        let last = Some(Round { epoch: Epoch::FIRST, pages: 2 });
        Checker { last, ..Checker::new(&region.into(), pages).unwrap() }.check(whole)
    }

    #[test]
    fn what_did_not_arrive_or_landed_beside_is_found() {
        assert_eq!(Epoch::FIRST.get(), 1, "the round that the pages above are of");
        assert_eq!(checked(true, |_| ()), Ok(()));
        assert_eq!(checked(false, |_| ()), Ok(()));
        let end = |file: &std::fs::File| file.write_all_at(&[0; 8], 2 * 64 + 56).unwrap();
        assert!(checked(false, end).unwrap_err().contains("page 1"));
        let middle = |file: &std::fs::File| file.write_all_at(&[0; 8], 8).unwrap();
        assert!(checked(true, middle).unwrap_err().contains("page 0"));
        let gap = |file: &std::fs::File| file.write_all_at(&[1], 64).unwrap();
        assert!(checked(true, gap).unwrap_err().contains("beside page 0"));
    }
}
