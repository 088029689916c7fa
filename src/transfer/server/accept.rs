//! Listening, and finding out who is there.

use std::fs::File;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::loans::Loans;
use super::pending_handshakes::{PendingHandshakes, Place};
use super::session::{DataPath, ServerSession};
use super::{Admitted, Command, Peer, Shared};
use crate::handoff::{SessionId, WorkerId};
use crate::transfer::handshake::{self, HandshakeError, Hello, Welcome};
use crate::transfer::rdma::Offer;
use crate::transfer::socket::{PeerProcess, Socket};
use crate::transfer::tls::Tls;
use crate::transfer::{Exported, Refusal, ServerError, Target, Transport};

/// Before the next try when the system has no file left for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Where somebody knocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Door {
    /// Processes of this host, for sessions over shm and CUDA IPC.
    Unix,
    /// Others, for sessions over TCP, and those over RDMA, which need a connection to be agreed upon.
    Tcp,
}

impl Door {
    const fn name(self) -> &'static str {
        match self {
            Self::Unix => "unix",
            Self::Tcp => "tcp",
        }
    }
}

/// The tasks that accept connections, and where.
pub(super) struct Listening {
    pub(super) tasks: Vec<JoinHandle<()>>,
    pub(super) unix: Option<PathBuf>,
    pub(super) tcp: Option<String>,
}

/// Listens wherever the configuration says.
pub(super) async fn listen(shared: &Arc<Shared>) -> Result<Listening, ServerError> {
    let mut listening = Listening { tasks: Vec::new(), unix: None, tcp: None };
    let pending = Arc::new(PendingHandshakes::new(shared.config.limits.handshakes));
    if let Some(address) = shared.config.tcp {
        let failed = |source| ServerError::Tcp { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let host = shared.config.advertise.clone();
        listening.tcp = Some(host.map_or_else(|| bound.to_string(), |host| join_host(&host, bound)));
        let (shared, pending) = (shared.clone(), pending.clone());
        listening.tasks.push(tokio::spawn(async move {
            accept_all(&shared, &pending, Door::Tcp, async || {
                let (stream, _) = listener.accept().await?;
                Socket::tcp(stream)
            })
            .await;
        }));
    }
    if let Some(folder) = shared.config.unix.as_deref().filter(|_| shared.is_open_to_this_host()) {
        let failed = |source| ServerError::Unix { path: folder.to_path_buf(), source };
        remove_stale_sockets(folder);
        let (listener, path) = bind_unix(folder, &shared.instance).map_err(failed)?;
        listening.unix = Some(path);
        let (shared, pending) = (shared.clone(), pending.clone());
        listening.tasks.push(tokio::spawn(async move {
            accept_all(&shared, &pending, Door::Unix, async || {
                let (stream, _) = listener.accept().await?;
                Socket::new(UnixStream::into_std(stream)?)
            })
            .await;
        }));
    }
    if listening.tasks.is_empty() { Err(ServerError::Nowhere) } else { Ok(listening) }
}

/// `host:port`, with the brackets that an IPv6 address needs.
fn join_host(host: &str, bound: SocketAddr) -> String {
    match host.parse::<std::net::IpAddr>() {
        Ok(address) => SocketAddr::new(address, bound.port()).to_string(),
        Err(_) => format!("{host}:{}", bound.port()),
    }
}

/// Makes a unix socket that is found under its name only once it is listened on: [`remove_stale_sockets`] of another
/// worker that starts at the same time must not meet it before.
fn bind_unix(folder: &Path, instance: &str) -> io::Result<(UnixListener, PathBuf)> {
    let (hidden, path) = (folder.join(format!("{instance}.new")), folder.join(format!("{instance}.sock")));
    let listener = UnixListener::bind(&hidden)?;
    std::fs::rename(&hidden, &path)?;
    Ok((listener, path))
}

/// Removes the sockets of workers that were killed: those that nobody listens on.
fn remove_stale_sockets(folder: &Path) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        let is_socket = path.extension().is_some_and(|extension| extension == "sock");
        let connected = || std::os::unix::net::UnixStream::connect(&path);
        if is_socket && connected().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused) {
            // Another worker may have been faster.
            let _ = std::fs::remove_file(&path);
        }
    }
}

/// Accepts for ever.
async fn accept_all<A, F>(shared: &Arc<Shared>, pending: &PendingHandshakes, door: Door, accept: A)
where
    A: Fn() -> F,
    F: Future<Output = io::Result<Socket>>,
{
    loop {
        let socket = match accept().await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::warn!(%error, door = door.name(), "cannot accept a session");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (shared, place) = (shared.clone(), pending.begin());
        tokio::spawn(async move {
            let opening = open(&shared, socket, door, place);
            match tokio::time::timeout(shared.config.limits.handshake, opening).await {
                Ok(Ok((session, commands))) => session.run(commands).await,
                Ok(Err(HandshakeError::Silent)) => tracing::debug!(door = door.name(), "somebody looked in"),
                // Strangers could fill the log with no more than connections.
                Ok(Err(error @ HandshakeError::Crowded)) => {
                    shared.config.metrics.refused.inc();
                    tracing::debug!(%error, door = door.name(), "no session");
                }
                Ok(Err(error)) => {
                    shared.config.metrics.refused.inc();
                    tracing::warn!(%error, door = door.name(), "no session");
                }
                Err(_) => {
                    shared.config.metrics.refused.inc();
                    tracing::warn!(door = door.name(), "no session: the handshake took too long");
                }
            }
        });
    }
}

/// Makes a connection a session.
async fn open(
    shared: &Arc<Shared>,
    socket: Socket,
    door: Door,
    place: Place,
) -> Result<(ServerSession, mpsc::UnboundedReceiver<Command>), HandshakeError> {
    // With its proof it is no stranger any more, and leaves its place to others.
    let (socket, process, hello) = tokio::select! {
        proved = prove(shared, socket, door) => proved?,
        _ = place => return Err(HandshakeError::Crowded),
    };
    let path = match (process.and_then(|process| process.ended), &shared.config.rdma) {
        (Some(ended), _) => DataPath::mapped(ended),
        (None, Some(target)) if hello.transport == Transport::Rdma => {
            let (target, peers) = (target.clone(), hello.rdma.clone());
            let accepting = tokio::task::spawn_blocking(move || target.accept(&peers));
            match accepting.await.map_err(io::Error::other)? {
                Ok(accepted) => DataPath::rdma(accepted),
                Err(error) => return handshake::refuse(&socket, Refusal::Rdma(error.to_string())).await,
            }
        }
        (None, _) => DataPath::Tcp(Loans::default()),
    };
    let id = shared.new_session();
    let (sender, commands) = mpsc::unbounded_channel();
    if !shared.admit(id, Admitted { commands: sender, transport: hello.transport }) {
        return handshake::refuse(&socket, Refusal::Busy).await;
    }
    // From here on nothing can fail or be cancelled but in `run`, which reports the session's end and gives back its
    // place.
    let peer = Peer { worker: WorkerId(hello.worker), transport: hello.transport };
    Ok((ServerSession::new(shared.clone(), id, socket, path, peer), commands))
}

/// Finds out who has connected, and whether it is one of the cluster and of this model.
async fn prove(
    shared: &Shared,
    mut socket: Socket,
    door: Door,
) -> Result<(Socket, Option<PeerProcess>, Hello), HandshakeError> {
    if let (Door::Tcp, Some(tls)) = (door, &shared.config.tls) {
        socket = socket.encrypted(Tls::server(tls)?).await?;
    }
    let process = match door {
        Door::Unix => Some(socket.peer()?),
        Door::Tcp => None,
    };
    let hello = handshake::accept(&socket, &shared.config.token, |hello| {
        let shape = shared.region.shape();
        if let Some(process) = &process {
            if process.user != rustix::process::geteuid().as_raw() {
                return Err(Refusal::User);
            }
            if process.ended.is_none() {
                return Err(Refusal::NotShared);
            }
        }
        check(shared, hello, process.is_some(), shape.layers as u64, shape.page_bytes as u64)
    })
    .await?;
    Ok((socket, process, hello))
}

fn check(shared: &Shared, hello: &Hello, local: bool, layers: u64, page_bytes: u64) -> Result<(), Refusal> {
    if hello.instance != shared.instance {
        return Err(Refusal::Instance);
    }
    let taken = match hello.transport {
        Transport::CudaIpc => local && shared.config.cuda.is_some(),
        Transport::Shm => local && shared.config.shm && shared.region.file().is_some(),
        Transport::Rdma => !local && shared.config.rdma.is_some(),
        Transport::Tcp => !local && shared.config.tcp_pages,
    };
    if !taken {
        return Err(Refusal::Transport(hello.transport.name().to_owned()));
    }
    if hello.model_key != shared.config.model_key {
        return Err(Refusal::ModelKey);
    }
    if (hello.layers, hello.page_bytes) != (layers, page_bytes) {
        return Err(Refusal::Layout);
    }
    Ok(())
}

impl Shared {
    /// Makes room for a session, if there is.
    fn admit(&self, id: SessionId, admitted: Admitted) -> bool {
        let mut sessions = self.sessions();
        let room = sessions.len() < self.config.limits.sessions;
        if room {
            sessions.insert(id, admitted);
        }
        room
    }

    /// Whether processes of this host have another way to pages than others.
    fn is_open_to_this_host(&self) -> bool {
        let shared = self.config.shm && self.region.file().is_some();
        self.mailbox.file().is_some() && (shared || self.config.cuda.is_some())
    }

    /// What a peer maps.
    pub(super) fn files(&self, transport: Transport) -> Vec<&File> {
        let (region, mailbox) = (self.region.file(), self.mailbox.file());
        match transport {
            Transport::CudaIpc => mailbox.into_iter().collect(),
            Transport::Shm => region.into_iter().chain(mailbox).collect(),
            Transport::Rdma | Transport::Tcp => Vec::new(),
        }
    }

    pub(super) fn welcome(&self, transport: Transport, rdma: Vec<Offer>) -> Welcome {
        let exported = self.config.cuda.as_ref().filter(|_| transport == Transport::CudaIpc);
        let shape = match transport {
            Transport::CudaIpc => exported.map(Exported::shape),
            Transport::Rdma => self.config.rdma.as_ref().map(Target::shape),
            Transport::Shm | Transport::Tcp => None,
        };
        let limits = &self.config.limits;
        // Limits beyond 32 bits are as good as none.
        let small = |number: usize| u32::try_from(number).unwrap_or(u32::MAX);
        Welcome {
            pages: shape.unwrap_or(self.region.shape()).pages as u64,
            slots: self.mailbox.slots(),
            message_bytes: small(limits.message_bytes),
            queued_bytes: limits.queued_bytes as u64,
            frame_bytes: small(self.frame_bytes()),
            heartbeat_ms: small(limits.heartbeat.as_millis() as usize).max(1),
            missed_heartbeats: limits.missed_heartbeats,
            device: exported.map(|exported| exported.handle().0.to_vec()),
            rdma,
        }
    }

    /// A frame holds one page at least.
    pub(super) fn frame_bytes(&self) -> usize {
        self.config.limits.frame_bytes.max(self.region.shape().page_bytes)
    }
}
