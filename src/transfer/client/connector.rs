use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;

use super::copier::{self, Order, PeerMemory, Standing, Work};
use super::poster::Poster;
use super::session::{ClientSession, MESSAGES_MAX, Path, Session};
use super::writer::{Inner, Writer, order};
use crate::handoff::{SessionId, WorkerId};
use crate::transfer::handshake::{self, Hello, VERSION, Welcome};
use crate::transfer::outbound::Outbound;
use crate::transfer::rdma::RdmaLane;
use crate::transfer::socket::Socket;
use crate::transfer::tls::Tls;
use crate::transfer::{
    ClientTls, ClusterToken, ConnectError, Limits, Mailbox, RdmaError, Refusal, Region, RegionShape, SessionAddresses,
    Source, TransferMetrics, Transport, host_identity,
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
    /// Whether memory is shared with workers of the same host.
    pub shm: bool,
    /// The pages, registered for adapters to read.
    pub rdma: Option<Source>,
    /// Whether pages may go over TCP where there is nothing better.
    pub tcp: bool,
    /// Where to count.
    pub metrics: TransferMetrics,
}

/// Opens a prefill worker's sessions, and owns the thread that copies pages for those over shm. Cheap to clone.
#[derive(Clone)]
pub struct Connector {
    shared: Arc<Shared>,
}

struct Shared {
    config: ConnectorConfig,
    host: String,
    region: Region,
    orders: Sender<Order>,
    next_session: AtomicU64,
}

impl Connector {
    /// Pages are read from `region`. Starts the copying thread.
    pub fn new(config: ConnectorConfig, region: Region) -> io::Result<Self> {
        let orders = copier::start(region.clone())?;
        let host = host_identity()?;
        let next_session = AtomicU64::new(1);
        Ok(Self { shared: Arc::new(Shared { config, host, region, orders, next_session }) })
    }

    /// Opens a session to the decode worker at `addresses`, as the worker `own`; served by a task of the tokio runtime
    /// this is called in. Of the ways that are allowed the first that leads there: shm if it runs on this host and its
    /// unix socket can be reached from here; RDMA if both have adapters that reach each other; TCP, which is counted
    /// and logged.
    pub async fn connect(&self, addresses: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let opening = self.connect_somehow(addresses, own);
        tokio::time::timeout(self.shared.config.timeout, opening).await.map_err(|_| ConnectError::TimedOut)?
    }

    async fn connect_somehow(&self, addresses: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let config = &self.shared.config;
        let unix = addresses.unix.as_deref().filter(|_| addresses.host == self.shared.host);
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
        let mut poster = Poster::new(lanes, self.shared.region.shape(), self.remote_shape(&welcome));
        if let Err(error) = poster.prove().await {
            drop(tokio::task::spawn_blocking(move || poster.close()));
            return Err(RdmaError::Unreachable(error).into());
        }
        Ok(self.start(socket, &welcome, own, Way::Rdma(Box::new(poster))))
    }

    async fn connect_shm(
        &self,
        path: &FilePath,
        to: &SessionAddresses,
        own: WorkerId,
    ) -> Result<Session, ConnectError> {
        let socket = Socket::new(UnixStream::connect(path).await?.into_std()?)?;
        let hello = self.hello(to, own, Transport::Shm);
        let (welcome, files) = handshake::connect(&socket, &self.shared.config.token, &hello).await?;
        let Ok([region, mailbox]) = <[_; 2]>::try_from(files) else {
            return Err(ConnectError::Protocol("a welcome without its two files".into()));
        };
        let memory = PeerMemory {
            region: Region::open(region, self.remote_shape(&welcome))?,
            mailbox: Mailbox::open(mailbox, welcome.slots)?,
        };
        Ok(self.start(socket, &welcome, own, Way::Shm(memory)))
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
        let Shared { config, region, orders, .. } = &*self.shared;
        let id = SessionId(self.shared.next_session.fetch_add(1, Ordering::Relaxed));
        let (commands, received) = mpsc::unbounded_channel();
        let (message_sender, messages) = mpsc::channel(MESSAGES_MAX);
        let mut copier = None;
        let (transport, path) = match way {
            Way::Shm(memory) => {
                let standing = Arc::new(Standing::default());
                order(orders, id, &standing, &commands, Work::Open(memory));
                copier = Some((orders.clone(), standing.clone()));
                (Transport::Shm, Path::Shm { orders: orders.clone(), standing })
            }
            Way::Rdma(poster) => (Transport::Rdma, Path::Rdma(poster)),
            Way::Tcp => (Transport::Tcp, Path::tcp(region.clone(), welcome.frame_bytes as usize)),
        };
        let inner = Inner {
            session: id,
            local: region.shape(),
            remote: self.remote_shape(welcome),
            slots: welcome.slots,
            message_bytes_max: welcome.message_bytes as usize,
            commands: commands.clone(),
            transport,
            copier,
            metrics: config.metrics.clone(),
        };
        let writer = Writer { inner: Arc::new(inner) };
        config.metrics.sessions.with_label_values(&[writer.transport().name()]).inc();
        let transport = writer.transport().name();
        tracing::info!(session = id.0, worker = %own, transport, "session to a decode worker opened");
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

/// Whether it is only RDMA that did not come about.
fn is_about_rdma(error: &ConnectError) -> bool {
    matches!(error, ConnectError::Rdma(_) | ConnectError::Refused(Refusal::Rdma(_) | Refusal::Transport(_)))
}

/// The host of `host:port`, without the brackets of an IPv6 address.
fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
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
