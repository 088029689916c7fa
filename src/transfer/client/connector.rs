//! Opening a session: which way to a decode worker, in which order, and what for.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use engine_kernels::DeviceRegion;
use engine_kernels::cuda::{DriverError, IpcHandle};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;

use super::copier::{self, Order, PeerMapping, PeerMemory, Standing, Work};
use super::poster::Poster;
use super::session::{ClientSession, DataPath, MESSAGES_MAX, Session};
use super::silent::Silent;
use super::stager::{self, Task};
use super::writer::{Inner, PageSource, Writer, order};
use crate::handoff::{SessionId, WorkerId};
use crate::transfer::frame::Frame;
use crate::transfer::handshake::{self, Hello, VERSION, Welcome};
use crate::transfer::outbound::Outbound;
use crate::transfer::rdma::RdmaLane;
use crate::transfer::socket::Socket;
use crate::transfer::tls::Tls;
use crate::transfer::{
    ClientTls, ClusterToken, ConnectError, Limits, LocalPages, Mailbox, RdmaError, Refusal, Region, RegionShape,
    SessionAddresses, Source, TransferMetrics, Transport, host_identity,
};

/// What a prefill worker's [`Connector`] is made with.
#[derive(Debug, Clone)]
pub struct ConnectorConfig {
    /// Encrypts what goes over TCP. With it, decode workers that do not encrypt are not talked to.
    pub tls: Option<ClientTls>,
    /// Both sides must have the same.
    pub token: ClusterToken,
    /// Both sides must serve the same: digest of everything their pages depend on.
    pub model_key: String,
    /// How long opening a session may take.
    pub timeout: Duration,
    /// Whether this worker's device writes to device memory of workers of the same host.
    pub cuda_ipc: bool,
    /// Whether memory is shared with workers of the same host.
    pub shm: bool,
    /// The pages, registered for adapters to read: where they are, or in host memory ([`LocalPages::host`]).
    pub rdma: Option<Source>,
    /// Whether pages may go over TCP where there is nothing better.
    pub tcp: bool,
    /// Where to count.
    pub metrics: TransferMetrics,
}

/// Opens a prefill worker's sessions, and owns the threads that copy pages for them. Cheap to clone.
#[derive(Clone)]
pub struct Connector {
    shared: Arc<Shared>,
}

struct Shared {
    config: ConnectorConfig,
    host: String,
    /// What is sent from, or staged in.
    region: Region,
    orders: Sender<Order>,
    device: Option<DeviceSide>,
    next_session: AtomicU64,
    silent: Silent,
}

/// What there is to it if the pages are in device memory.
struct DeviceSide {
    pages: DeviceRegion,
    /// To the copier that waits for the device.
    orders: Sender<Order>,
    /// To the stager.
    tasks: Sender<Task>,
    /// To its like that leaves pages where they are, if adapters read them there.
    tasks_in_place: Option<Sender<Task>>,
}

impl Connector {
    /// What pages are read from. Starts the copying threads.
    pub fn new(config: ConnectorConfig, pages: impl Into<LocalPages>) -> io::Result<Self> {
        let pages = pages.into();
        let in_place = config.rdma.as_ref().is_some_and(|source| source.reached().is_some());
        let device = match &pages {
            LocalPages::Host(_) => None,
            LocalPages::Device(ring) => Some(DeviceSide {
                pages: ring.pages.clone(),
                orders: copier::start()?,
                tasks: stager::start(ring.clone())?,
                tasks_in_place: in_place.then(stager::start_in_place).transpose()?,
            }),
        };
        let (region, orders, host) = (pages.host().clone(), copier::start()?, host_identity()?);
        let (next_session, silent) = (AtomicU64::new(1), Silent::default());
        Ok(Self { shared: Arc::new(Shared { config, host, region, orders, device, next_session, silent }) })
    }

    /// Opens a session to the decode worker at `addresses`, as the worker `own`; served by a task of the tokio runtime
    /// this is called in. Of the ways that are allowed the first that leads there: if it runs on this host and its unix
    /// socket can be reached from here, CUDA IPC if both have a device and ours can write to theirs, else shm; RDMA if
    /// both have adapters that reach each other; TCP, which is counted and logged. One that did not answer is left
    /// alone for a while: until then the next calls fail at once.
    pub async fn connect(&self, addresses: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let Shared { config, silent, .. } = &*self.shared;
        if !self.pause(addresses).is_zero() {
            return Err(ConnectError::Silent);
        }
        let opening = tokio::time::timeout(config.timeout, self.connect_somehow(addresses, own));
        let opened = opening.await.unwrap_or(Err(ConnectError::TimedOut));
        match &opened {
            Err(error) if is_silence(error) => silent.insert(&addresses.instance),
            _ => silent.remove(&addresses.instance),
        }
        opened
    }

    /// For how much longer a decode worker is left alone that did not answer.
    pub fn pause(&self, addresses: &SessionAddresses) -> Duration {
        self.shared.silent.pause(&addresses.instance)
    }

    async fn connect_somehow(&self, addresses: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let config = &self.shared.config;
        let unix = addresses.unix.as_deref().filter(|_| addresses.host == self.shared.host);
        if let Some(path) = unix.filter(|_| config.cuda_ipc) {
            match self.connect_device(path, addresses, own).await {
                Err(error) if self.has_other_ways() && (is_about_device(&error) || is_elsewhere(&error)) => {
                    if addresses.cuda.is_some() && self.shared.device.is_some() {
                        tracing::warn!(path = %path.display(), %error, "pages are staged to a device of this host");
                    }
                }
                decided => return decided,
            }
        }
        if let Some(path) = unix.filter(|_| config.shm) {
            match self.connect_shm(path, addresses, own).await {
                Err(error) if is_elsewhere(&error) => {
                    tracing::warn!(path = %path.display(), %error, "no shared memory with a worker of this host");
                }
                decided => return decided,
            }
        }
        let Some(address) = &addresses.tcp else { return Err(ConnectError::NoAddress) };
        let without_rdma = match self.source_for(addresses) {
            Ok(source) => match self.try_rdma(source, address, addresses, own).await {
                Err(error) if config.tcp && is_about_rdma(&error) => {
                    tracing::warn!(%address, %error, "no RDMA with a decode worker");
                    "it was tried"
                }
                decided => return decided,
            },
            Err(reason) => reason,
        };
        if !config.tcp {
            return Err(ConnectError::NoWay(without_rdma));
        }
        let session = self.connect_tcp(address, addresses, own).await?;
        config.metrics.fallbacks.inc();
        tracing::warn!(session = session.id().0, %address, %without_rdma, "pages go over TCP, the slowest way");
        Ok(session)
    }

    /// What to write to a decode worker from over RDMA, or why it cannot be tried.
    fn source_for(&self, to: &SessionAddresses) -> Result<&Source, &'static str> {
        let Some(source) = &self.shared.config.rdma else { return Err("this worker uses no adapter") };
        let Some(theirs) = to.rdma.first() else { return Err("the decode worker uses no adapter") };
        let ours = source.links().next();
        if ours == Some(theirs.link) { Ok(source) } else { Err("one worker is on InfiniBand, the other on Ethernet") }
    }

    /// Where TCP will do too, an adapter that hears nothing is not waited for until there is no time left for that.
    async fn try_rdma(
        &self,
        source: &Source,
        address: &str,
        to: &SessionAddresses,
        own: WorkerId,
    ) -> Result<Session, ConnectError> {
        let ConnectorConfig { tcp, timeout, .. } = self.shared.config;
        let patience = if tcp { timeout / 2 } else { timeout };
        let connected = tokio::time::timeout(patience, self.connect_rdma(source, address, to, own)).await;
        connected.unwrap_or_else(|_| Err(RdmaError::Unreachable(io::ErrorKind::TimedOut.into()).into()))
    }

    /// The connection is TCP's; what is written does not go over it.
    async fn connect_rdma(
        &self,
        source: &Source,
        address: &str,
        to: &SessionAddresses,
        own: WorkerId,
    ) -> Result<Session, ConnectError> {
        let socket = self.open_tcp(address, to).await?;
        let (source, lanes) = (source.clone(), to.rdma.len());
        let opening = blocking(move || source.open(lanes)).await?;
        let hello = Hello { rdma: opening.endpoints(), ..self.hello(to, own, Transport::Rdma) };
        let (welcome, _) = handshake::connect(&socket, &self.shared.config.token, &hello).await?;
        let offers = welcome.rdma.clone();
        let lanes = blocking(move || opening.connect(&offers)).await?;
        let in_place = self.shared.device.as_ref().filter(|device| device.tasks_in_place.is_some());
        let local = in_place.map_or(self.shared.region.shape(), |device| device.pages.shape());
        let mut poster = Poster::new(lanes, local, self.remote_shape(&welcome));
        if let Err(error) = poster.prove().await {
            drop(tokio::task::spawn_blocking(move || poster.close()));
            return Err(RdmaError::Unreachable(error).into());
        }
        Ok(self.start(socket, &welcome, own, Way::Rdma(Box::new(poster))))
    }

    /// Whether anything but CUDA IPC is allowed.
    fn has_other_ways(&self) -> bool {
        let config = &self.shared.config;
        config.shm || config.tcp || config.rdma.is_some()
    }

    /// From device to device.
    async fn connect_device(&self, path: &Path, to: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let no = |why: &str| ConnectError::Device(why.to_owned());
        let Some(DeviceSide { pages, .. }) = &self.shared.device else {
            return Err(no("this worker's pages are not in device memory"));
        };
        let device = to.cuda.as_ref().ok_or_else(|| no("it lets nobody open any"))?;
        let device = device.parse().map_err(|()| no("it has no device that could be told"))?;
        if !pages.reaches(device) {
            return Err(no("this worker's device cannot write to that one"));
        }
        let socket = self.prove_on(path, &self.hello(to, own, Transport::CudaIpc)).await?;
        let (this, pages) = (self.clone(), pages.clone());
        to_the_end(async move {
            let (welcome, files) = handshake::welcomed(&socket, Transport::CudaIpc).await?;
            let opening = async {
                let handle = welcome.device.as_deref().and_then(|handle| handle.try_into().ok()).map(IpcHandle);
                let (Some(handle), Ok([mailbox])) = (handle, <[_; 1]>::try_from(files)) else {
                    return Err(ConnectError::Protocol("a welcome without its handle and its file".into()));
                };
                let mailbox = Mailbox::open(mailbox, welcome.slots)?;
                let shape = this.remote_shape(&welcome);
                let opening = tokio::task::spawn_blocking(move || {
                    let local = pages.copies()?;
                    Ok::<_, DriverError>(PeerMapping::Device { local, remote: pages.open(&handle, shape)? })
                });
                let opened = opening.await.map_err(io::Error::other)?;
                let pages = opened.map_err(|error| ConnectError::Device(error.to_string()))?;
                Ok(PeerMemory { pages, mailbox })
            };
            let memory = or_unmapped(&socket, opening.await).await?;
            Ok(this.start(socket, &welcome, own, Way::Device(memory)))
        })
        .await
    }

    async fn connect_shm(&self, path: &Path, to: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let socket = self.prove_on(path, &self.hello(to, own, Transport::Shm)).await?;
        let this = self.clone();
        to_the_end(async move {
            let (welcome, files) = handshake::welcomed(&socket, Transport::Shm).await?;
            let open = || {
                let Ok([region, mailbox]) = <[_; 2]>::try_from(files) else {
                    return Err(ConnectError::Protocol("a welcome without its two files".into()));
                };
                let remote = Region::open(region, this.remote_shape(&welcome))?;
                let pages = PeerMapping::Host { local: this.shared.region.clone(), remote };
                Ok(PeerMemory { pages, mailbox: Mailbox::open(mailbox, welcome.slots)? })
            };
            let memory = or_unmapped(&socket, open()).await?;
            Ok(this.start(socket, &welcome, own, Way::Shm(memory)))
        })
        .await
    }

    /// A connection to a decode worker of this host that has our proof.
    async fn prove_on(&self, path: &Path, hello: &Hello) -> Result<Socket, ConnectError> {
        let socket = Socket::new(UnixStream::connect(path).await?.into_std()?)?;
        handshake::prove(&socket, &self.shared.config.token, hello).await?;
        Ok(socket)
    }

    async fn connect_tcp(&self, address: &str, to: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let socket = self.open_tcp(address, to).await?;
        let hello = self.hello(to, own, Transport::Tcp);
        let (welcome, _) = handshake::connect(&socket, &self.shared.config.token, &hello).await?;
        Ok(self.start(socket, &welcome, own, Way::Tcp))
    }

    /// A TCP connection, encrypted if that is agreed.
    async fn open_tcp(&self, address: &str, to: &SessionAddresses) -> Result<Socket, ConnectError> {
        let tls = match &self.shared.config.tls {
            Some(_) if !to.tls => return Err(ConnectError::Plain),
            None if to.tls => return Err(ConnectError::Encrypted),
            agreed => agreed,
        };
        let mut socket = Socket::tcp(TcpStream::connect(address).await?)?;
        if let Some(tls) = tls {
            socket = socket.encrypted(Tls::client(tls, host_of(address))?).await?;
        }
        Ok(socket)
    }

    fn hello(&self, to: &SessionAddresses, own: WorkerId, transport: Transport) -> Hello {
        let shape = self.shared.region.shape();
        Hello {
            version: VERSION,
            nonce: rand::random(),
            instance: to.instance.clone(),
            worker: own.0,
            model_key: self.shared.config.model_key.clone(),
            transport,
            layers: shape.layers as u64,
            page_bytes: shape.page_bytes as u64,
            rdma: Vec::new(),
        }
    }

    /// The decode worker has our layers and page size, or it would have refused.
    fn remote_shape(&self, welcome: &Welcome) -> RegionShape {
        RegionShape { pages: welcome.pages as usize, ..self.shared.region.shape() }
    }

    /// Starts the task of a session that both sides agreed on.
    fn start(&self, socket: Socket, welcome: &Welcome, own: WorkerId, way: Way) -> Session {
        let Shared { config, region, orders, device, .. } = &*self.shared;
        let id = SessionId(self.shared.next_session.fetch_add(1, Ordering::Relaxed));
        let (commands, received) = mpsc::unbounded_channel();
        let (message_sender, messages) = mpsc::channel(MESSAGES_MAX);
        let mut copier = None;
        let mut mapped = |orders: &Sender<Order>, memory| {
            let standing = Arc::new(Standing::default());
            order(orders, id, &standing, &commands, Work::Open(memory));
            copier = Some((orders.clone(), standing.clone()));
            DataPath::Mapped { orders: orders.clone(), standing }
        };
        let source = match (&way, device) {
            (_, None) => PageSource::Host,
            (Way::Device(_), Some(device)) => PageSource::Device(device.pages.clone()),
            (Way::Rdma(_), Some(DeviceSide { pages, tasks_in_place: Some(tasks), .. }))
            | (_, Some(DeviceSide { pages, tasks, .. })) => PageSource::Awaited(pages.clone(), tasks.clone()),
        };
        let (transport, path) = match way {
            Way::Device(memory) => {
                let orders = device.as_ref().map_or(orders, |device| &device.orders);
                (Transport::CudaIpc, mapped(orders, memory))
            }
            Way::Shm(memory) => (Transport::Shm, mapped(orders, memory)),
            Way::Rdma(poster) => (Transport::Rdma, DataPath::Rdma(poster)),
            Way::Tcp => (Transport::Tcp, DataPath::tcp(region.clone(), welcome.frame_bytes as usize)),
        };
        let inner = Inner {
            session: id,
            local: device.as_ref().map_or_else(|| region.shape(), |device| device.pages.shape()),
            remote: self.remote_shape(welcome),
            slots: welcome.slots,
            message_bytes_max: welcome.message_bytes as usize,
            commands: commands.clone(),
            transport,
            copier,
            source,
            metrics: config.metrics.clone(),
        };
        let writer = Writer { inner: Arc::new(inner) };
        config.metrics.sessions.with_label_values(&[writer.transport().name()]).inc();
        let transport = writer.transport().name();
        tracing::info!(session = id.0, own = %own, transport, "session to a decode worker opened");
        let limits = Limits {
            message_bytes: welcome.message_bytes as usize,
            queued_bytes: usize::try_from(welcome.queued_bytes).unwrap_or(usize::MAX),
            heartbeat: Duration::from_millis(u64::from(welcome.heartbeat_ms.max(1))),
            missed_heartbeats: welcome.missed_heartbeats,
            ..Limits::default()
        };
        let outbound = Outbound::new();
        let task = ClientSession { id, socket, path, limits, outbound, messages: message_sender, commands };
        tokio::spawn(task.run(received));
        Session { writer, messages }
    }
}

/// What a session's pages go through.
enum Way {
    Device(PeerMemory),
    Shm(PeerMemory),
    Rdma(Box<Poster<RdmaLane>>),
    Tcp,
}

/// Runs what waits for adapters where it holds up nobody.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RdmaError> + Send + 'static,
) -> Result<T, ConnectError> {
    let ended = tokio::task::spawn_blocking(work).await;
    Ok(ended.map_err(|error| ConnectError::Io(io::Error::other(error)))??)
}

/// Opens a session to a decode worker that keeps a place for it until it hears that none of its memory is open here, or
/// this process ends. So it goes on when nobody waits for it any more: a session that nobody takes closes what was
/// opened, and says so.
async fn to_the_end(
    opening: impl Future<Output = Result<Session, ConnectError>> + Send + 'static,
) -> Result<Session, ConnectError> {
    tokio::spawn(opening).await.map_err(io::Error::other)?
}

/// Whether it is only RDMA that did not come about.
fn is_about_rdma(error: &ConnectError) -> bool {
    matches!(error, ConnectError::Rdma(_) | ConnectError::Refused(Refusal::Rdma(_) | Refusal::Transport(_)))
}

/// Whether it is only device memory that did not come about.
fn is_about_device(error: &ConnectError) -> bool {
    matches!(error, ConnectError::Device(_) | ConnectError::Refused(Refusal::Transport(_)))
}

/// Whether nothing came back, which takes long to find out.
fn is_silence(error: &ConnectError) -> bool {
    match error {
        ConnectError::TimedOut => true,
        ConnectError::Io(error) | ConnectError::Rdma(RdmaError::Unreachable(error)) => {
            matches!(error.kind(), io::ErrorKind::TimedOut | io::ErrorKind::HostUnreachable)
        }
        _ => false,
    }
}

/// The host of `host:port`, without the brackets of an IPv6 address.
fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}

/// What was opened of a decode worker's memory. If it was not, nothing is, and the decode worker hears so: it need not
/// wait for this process's end to take back the session.
async fn or_unmapped<T>(socket: &Socket, opened: Result<T, ConnectError>) -> Result<T, ConnectError> {
    if opened.is_err() {
        // If it cannot be said, it waits.
        let _ = socket.write_all(&Frame::Unmapped.encode()).await;
    }
    opened
}

/// Whether the unix socket led nowhere, or to somebody else, so that TCP may still lead to the worker.
fn is_elsewhere(error: &ConnectError) -> bool {
    matches!(
        error,
        ConnectError::Io(_)
            | ConnectError::Protocol(_)
            | ConnectError::Refused(Refusal::Instance | Refusal::User | Refusal::NotShared)
    )
}
