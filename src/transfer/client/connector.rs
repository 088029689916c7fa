use std::io;
use std::path::Path as FilePath;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use tokio::net::{TcpStream, UnixStream};
use tokio::sync::mpsc;

use super::copier::{self, Order, PeerMemory, Standing, Work};
use super::session::{ClientSession, MESSAGES_MAX, Path, Session};
use super::writer::{Inner, Writer, order};
use crate::handoff::{SessionId, WorkerId};
use crate::transfer::handshake::{self, Hello, VERSION, Welcome};
use crate::transfer::outbound::Outbound;
use crate::transfer::socket::Socket;
use crate::transfer::tls::Tls;
use crate::transfer::{
    ClientTls, ClusterToken, ConnectError, Limits, Mailbox, Refusal, Region, RegionShape, SessionAddresses,
    TransferMetrics, Transport, host_identity,
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
    /// Never shm, even on one host: for tests and measurements of tcp.
    pub tcp_only: bool,
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
    /// this is called in. Over shm if it runs on this host and its unix socket can be reached from here, else over tcp,
    /// which is counted and logged.
    pub async fn connect(&self, addresses: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let opening = async {
            let unix = addresses.unix.as_deref().filter(|_| addresses.host == self.shared.host);
            if let Some(path) = unix.filter(|_| !self.shared.config.tcp_only) {
                match self.connect_shm(path, addresses, own).await {
                    Err(error) if is_elsewhere(&error) => {
                        tracing::warn!(path = %path.display(), %error, "no shared memory with a worker of this host");
                    }
                    decided => return decided,
                }
            }
            let Some(address) = &addresses.tcp else { return Err(ConnectError::NoAddress) };
            let session = self.connect_tcp(address, addresses, own).await?;
            self.shared.config.metrics.fallbacks.inc();
            tracing::warn!(session = session.id().0, %address, "pages go over TCP, the slowest way");
            Ok(session)
        };
        tokio::time::timeout(self.shared.config.timeout, opening).await.map_err(|_| ConnectError::TimedOut)?
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
        Ok(self.start(socket, &welcome, own, Some(memory)))
    }

    async fn connect_tcp(&self, address: &str, to: &SessionAddresses, own: WorkerId) -> Result<Session, ConnectError> {
        let tls = match &self.shared.config.tls {
            Some(_) if !to.tls => return Err(ConnectError::Plain),
            None if to.tls => return Err(ConnectError::Encrypted),
            agreed => agreed,
        };
        let mut socket = Socket::tcp(TcpStream::connect(address).await?)?;
        if let Some(tls) = tls {
            socket = socket.encrypted(Tls::client(tls, host_of(address))?).await?;
        }
        let hello = self.hello(to, own, Transport::Tcp);
        let (welcome, _) = handshake::connect(&socket, &self.shared.config.token, &hello).await?;
        Ok(self.start(socket, &welcome, own, None))
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
        }
    }

    /// The decode worker has our layers and page size, or it would have refused.
    fn remote_shape(&self, welcome: &Welcome) -> RegionShape {
        RegionShape { pages: welcome.pages as usize, ..self.shared.region.shape() }
    }

    /// Starts the task of a session that both sides agreed on.
    fn start(&self, socket: Socket, welcome: &Welcome, own: WorkerId, memory: Option<PeerMemory>) -> Session {
        let Shared { config, region, orders, .. } = &*self.shared;
        let id = SessionId(self.shared.next_session.fetch_add(1, Ordering::Relaxed));
        let (commands, received) = mpsc::unbounded_channel();
        let (message_sender, messages) = mpsc::channel(MESSAGES_MAX);
        let mut copier = None;
        let path = match memory {
            Some(memory) => {
                let standing = Arc::new(Standing::default());
                order(orders, id, &standing, &commands, Work::Open(memory));
                copier = Some((orders.clone(), standing.clone()));
                Path::Shm { orders: orders.clone(), standing }
            }
            None => Path::tcp(region.clone(), welcome.frame_bytes as usize),
        };
        let inner = Inner {
            session: id,
            local: region.shape(),
            remote: self.remote_shape(welcome),
            slots: welcome.slots,
            message_bytes_max: welcome.message_bytes as usize,
            commands: commands.clone(),
            copier,
            metrics: config.metrics.clone(),
        };
        let writer = Writer { inner: Arc::new(inner) };
        config.metrics.sessions.with_label_values(&[writer.transport().name()]).inc();
        tracing::info!(session = id.0, worker = %own, transport = writer.transport().name(), "session to a decode worker opened");
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
