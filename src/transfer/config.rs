use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use super::{ClusterToken, Exported, ServerTls, Target, TransferMetrics};

/// What a session may use. The decode worker's hold for both sides; it states them when a session opens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Sessions at a time, those included that are closed and not yet fenced.
    pub sessions: usize,
    /// Connections at a time that have not proved who they are. When one more comes, the oldest of them is turned away.
    pub handshakes: usize,
    /// How long one may take for that.
    pub handshake: Duration,
    /// Bytes of one message.
    pub message_bytes: usize,
    /// Bytes of messages that wait to be sent on one session; beyond it the peer is taken for dead.
    pub queued_bytes: usize,
    /// Bytes of pages in one tcp frame. Messages and signs of life go between frames, so it bounds their delay.
    pub frame_bytes: usize,
    /// How often each side gives a sign of life.
    pub heartbeat: Duration,
    /// After so many heartbeats without one from the peer the session is closed. Counted, not timed: a process that was
    /// itself stopped, or whose clock jumped, does not blame its peers.
    pub missed_heartbeats: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            sessions: 1024,
            handshakes: 64,
            handshake: Duration::from_secs(5),
            message_bytes: 16 << 20,
            queued_bytes: 64 << 20,
            frame_bytes: 4 << 20,
            heartbeat: Duration::from_secs(1),
            missed_heartbeats: 10,
        }
    }
}

/// What a decode worker's [`SessionServer`](super::SessionServer) is started with.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// Where to listen for other hosts; `None` serves this host alone. Port 0 takes a free one.
    pub tcp: Option<SocketAddr>,
    /// Whether pages may come that way too, and not only what is said beside RDMA.
    pub tcp_pages: bool,
    /// Whether processes of this host may map the region.
    pub shm: bool,
    /// Pages in device memory that processes of this host may open, to write to them in place of the region.
    pub cuda: Option<Exported>,
    /// The mailbox and the region, or pages in device memory in its place, registered for other hosts' adapters.
    pub rdma: Option<Target>,
    /// Host name or address other workers reach `tcp` under; by default the address listened on.
    pub advertise: Option<String>,
    /// Folder for the unix socket, this user's alone ([`runtime_directory`](super::runtime_directory)); `None` serves
    /// tcp alone.
    pub unix: Option<PathBuf>,
    /// Encrypts what goes over TCP. Peers that do not want that are turned away.
    pub tls: Option<ServerTls>,
    /// Both sides must have the same.
    pub token: ClusterToken,
    /// Both sides must serve the same: digest of everything their pages depend on.
    pub model_key: String,
    /// What a session may use.
    pub limits: Limits,
    /// Where to count.
    pub metrics: TransferMetrics,
}
