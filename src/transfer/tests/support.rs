//! A decode worker and a prefill worker small enough for a test.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::sync::oneshot;

use crate::handoff::{Epoch, MailboxSlot, SessionId, WorkerId};
use crate::transfer::handshake::{Hello, VERSION};
use crate::transfer::{
    ClusterToken, Connector, ConnectorConfig, Limits, Mailbox, PageCopy, Region, RegionShape, ServerConfig, Session,
    SessionAddresses, SessionEvent, SessionServer, TransferMetrics, Transport, WriteError, Writer,
};

/// How long anything may take before a test gives up. Not a measurement: the machine may be very busy.
pub(in crate::transfer) const PATIENCE: Duration = Duration::from_secs(60);

pub(in crate::transfer) const SHAPE: RegionShape = RegionShape { layers: 3, pages: 64, page_bytes: 4096 };
pub(in crate::transfer) const SLOTS: u32 = 8;

/// What a prefill worker says first, for tests that are the prefill worker themselves.
pub(in crate::transfer) fn hello(to: &SessionAddresses, transport: Transport) -> Hello {
    Hello {
        version: VERSION,
        nonce: [9; 32],
        instance: to.instance.clone(),
        worker: 1,
        model_key: "model".into(),
        transport,
        layers: SHAPE.layers as u64,
        page_bytes: SHAPE.page_bytes as u64,
        rdma: Vec::new(),
    }
}

/// Waits for something that will happen.
pub(in crate::transfer) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it happens")
}

/// A decode worker: memory, mailbox, server, and what the server reported.
pub(in crate::transfer) struct Decode {
    pub(in crate::transfer) region: Region,
    pub(in crate::transfer) mailbox: Mailbox,
    pub(in crate::transfer) server: SessionServer,
    pub(in crate::transfer) metrics: TransferMetrics,
    pub(in crate::transfer) folder: tempfile::TempDir,
    events: UnboundedReceiver<SessionEvent>,
}

/// What tests change of a server's configuration.
pub(in crate::transfer) fn server_config(unix: PathBuf) -> ServerConfig {
    ServerConfig {
        tcp: Some(([127, 0, 0, 1], 0).into()),
        tcp_pages: true,
        shm: true,
        cuda: None,
        rdma: None,
        advertise: None,
        unix: Some(unix),
        tls: None,
        token: ClusterToken::new("tea"),
        model_key: "model".into(),
        // Patient, because tests share a busy machine; those about stalls are not.
        limits: Limits { missed_heartbeats: 120, handshake: PATIENCE, ..Limits::default() },
        metrics: TransferMetrics::default(),
    }
}

impl Decode {
    pub(in crate::transfer) async fn start() -> Self {
        Self::start_with(|_| ()).await
    }

    pub(in crate::transfer) async fn start_with(change: impl FnOnce(&mut ServerConfig)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut config = server_config(folder.path().to_path_buf());
        change(&mut config);
        let (region, mailbox) = (Region::shared(SHAPE).unwrap(), Mailbox::new(SLOTS).unwrap());
        let (sender, events) = mpsc::unbounded_channel();
        let metrics = config.metrics.clone();
        let sink = Arc::new(move |event| drop(sender.send(event)));
        let server = SessionServer::start(config, region.clone(), mailbox.clone(), sink).await.unwrap();
        Self { region, mailbox, server, metrics, folder, events }
    }

    /// The next event.
    pub(in crate::transfer) async fn event(&mut self) -> SessionEvent {
        soon(self.events.recv()).await.expect("the server lives")
    }

    /// Events that have happened and were not looked at.
    pub(in crate::transfer) fn no_event(&mut self) -> bool {
        self.events.try_recv().is_err()
    }

    /// The next event is a session's opening.
    pub(in crate::transfer) async fn opened(&mut self) -> SessionId {
        match self.event().await {
            SessionEvent::Opened { session, .. } => session,
            other => panic!("no session: {other:?}"),
        }
    }

    /// The next event is a message.
    pub(in crate::transfer) async fn message(&mut self) -> Bytes {
        match self.event().await {
            SessionEvent::Message { message, .. } => message,
            other => panic!("no message: {other:?}"),
        }
    }

    /// The session's last two events come next.
    pub(in crate::transfer) async fn ended(&mut self, session: SessionId) {
        assert_eq!(self.event().await, SessionEvent::Closed { session });
        assert_eq!(self.event().await, SessionEvent::Fenced { session });
    }

    /// Opens a session of `prefill`.
    pub(in crate::transfer) async fn session(&mut self, prefill: &Prefill) -> (SessionId, Session) {
        let session = soon(prefill.connector.connect(self.server.addresses(), WorkerId(7))).await.unwrap();
        (self.opened().await, session)
    }

    /// The bytes of a page. For pages that nobody writes to.
    pub(in crate::transfer) fn page(&self, layer: usize, page: u32) -> Vec<u8> {
        read(&self.region, layer, page)
    }
}

/// A prefill worker: memory full of a pattern, and a connector.
pub(in crate::transfer) struct Prefill {
    pub(in crate::transfer) connector: Connector,
    pub(in crate::transfer) metrics: TransferMetrics,
}

pub(in crate::transfer) fn connector_config(transport: Transport) -> ConnectorConfig {
    ConnectorConfig {
        tls: None,
        token: ClusterToken::new("tea"),
        model_key: "model".into(),
        timeout: PATIENCE,
        cuda_ipc: transport == Transport::CudaIpc,
        shm: transport == Transport::Shm,
        rdma: None,
        tcp: true,
        metrics: TransferMetrics::default(),
    }
}

impl Prefill {
    pub(in crate::transfer) fn new(transport: Transport) -> Self {
        Self::new_with(SHAPE, connector_config(transport))
    }

    pub(in crate::transfer) fn new_with(shape: RegionShape, config: ConnectorConfig) -> Self {
        let region = Region::private(shape).unwrap();
        for layer in 0..shape.layers {
            for page in 0..shape.pages {
                fill(&region, layer, page as u32, pattern(layer, page as u32));
            }
        }
        let metrics = config.metrics.clone();
        Self { connector: Connector::new(config, region).unwrap(), metrics }
    }
}

/// What the prefill worker's page is full of.
pub(in crate::transfer) fn pattern(layer: usize, page: u32) -> u8 {
    1 + (layer as u8 * 71).wrapping_add(page as u8 * 3) % 251
}

/// Whether every byte is the prefill worker's of that page.
pub(in crate::transfer) fn holds(bytes: &[u8], layer: usize, page: u32) -> bool {
    bytes.iter().all(|&byte| byte == pattern(layer, page))
}

fn fill(region: &Region, layer: usize, page: u32, byte: u8) {
    // SAFETY: nobody else has the region yet.
    unsafe { region.pages(layer, page as usize, 1).write_bytes(byte, region.shape().page_bytes) };
}

fn read(region: &Region, layer: usize, page: u32) -> Vec<u8> {
    let length = region.shape().page_bytes;
    // SAFETY: the page lies in the region, and bytes have no invalid values. A test that looks while somebody writes
    // sees a mixture of old and new, which is what it looks for.
    unsafe { std::slice::from_raw_parts(region.pages(layer, page as usize, 1), length) }.to_vec()
}

/// All layers of some pages: `(local, remote)`.
pub(in crate::transfer) fn all_layers(pages: &[(u32, u32)]) -> Vec<PageCopy> {
    let layers = 0..SHAPE.layers as u32;
    layers.flat_map(|layer| pages.iter().map(move |&(local, remote)| PageCopy { layer, local, remote })).collect()
}

pub(in crate::transfer) fn epoch(number: u32) -> Epoch {
    Epoch::new(number).unwrap()
}

/// Writes and waits for the report.
pub(in crate::transfer) async fn write(
    writer: &Writer,
    slot: MailboxSlot,
    epoch: Epoch,
    copies: Vec<PageCopy>,
) -> Result<(), WriteError> {
    let (done, wait) = oneshot::channel();
    writer.write(slot, epoch, copies, |result| done.send(result.map(drop)).expect("the test waits"));
    soon(wait).await.expect("every write is reported")
}

/// Completes and waits for the report.
pub(in crate::transfer) async fn complete(
    writer: &Writer,
    slot: MailboxSlot,
    epoch: Epoch,
    status: crate::handoff::Status,
) -> Result<(), WriteError> {
    let (done, wait) = oneshot::channel();
    writer.complete(slot, epoch, crate::handoff::MailboxWord::new(epoch, status), |result| {
        done.send(result).expect("the test waits")
    });
    soon(wait).await.expect("every completion is reported")
}
