//! The decode worker's end of sessions.

mod accept;
mod landing;
mod loans;
mod pending_handshakes;
mod session;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use bytes::Bytes;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::JoinHandle;

use super::frame::Loan;
use super::{Mailbox, Region, ServerConfig, ServerError, SessionAddresses, Target, Transport};
use crate::handoff::{Epoch, MailboxSlot, SessionId, WorkerId};

/// Who opened a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// The prefill worker's incarnation.
    pub worker: WorkerId,
    /// How it moves pages.
    pub transport: Transport,
}

/// What happens on sessions, in the order in which it happens on each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SessionEvent {
    /// A prefill worker is there.
    Opened {
        /// Never used before by this server.
        session: SessionId,
        /// Who it is.
        peer: Peer,
    },
    /// It says something.
    Message {
        /// Which.
        session: SessionId,
        /// What, as given to [`Writer::send`](super::Writer::send).
        message: Bytes,
    },
    /// The answer to [`SessionServer::revoke`]: nothing written under this loan can land any more. Over tcp it comes at
    /// once; otherwise when the peer has stopped, which a peer that hangs does not.
    Revoked {
        /// Which.
        session: SessionId,
        /// The loan's slot.
        slot: MailboxSlot,
        /// The loan's epoch.
        epoch: Epoch,
    },
    /// The session is over: no message will come, and none will go. Over shm and CUDA IPC the peer may still write.
    Closed {
        /// Which.
        session: SessionId,
    },
    /// No write of this session can ever land again. The last event of a session.
    Fenced {
        /// Which.
        session: SessionId,
    },
}

/// Takes events. It is called from the tasks that serve the sessions, so it must not block.
pub type Sink = Arc<dyn Fn(SessionEvent) + Send + Sync>;

/// What the engine tells a session's task.
enum Command {
    Send(Bytes),
    Lend(Loan, Arc<[u32]>),
    Revoke(Loan),
    Forget(Loan),
    Fence,
}

/// A session that has its place.
struct Admitted {
    commands: UnboundedSender<Command>,
    transport: Transport,
}

/// Takes sessions from prefill workers, and keeps them to what was lent to them. Dropping it closes them all.
pub struct SessionServer {
    shared: Arc<Shared>,
    addresses: SessionAddresses,
    listeners: Vec<JoinHandle<()>>,
    socket: Option<PathBuf>,
}

/// What the server's handle and its tasks share.
struct Shared {
    config: ServerConfig,
    instance: String,
    region: Region,
    mailbox: Mailbox,
    sink: Sink,
    /// Closed sessions that are not fenced are still in it.
    sessions: Mutex<HashMap<SessionId, Admitted>>,
    next_session: AtomicU64,
}

impl Shared {
    fn sessions(&self) -> MutexGuard<'_, HashMap<SessionId, Admitted>> {
        // Nothing is left half done in it by a panic.
        self.sessions.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn new_session(&self) -> SessionId {
        SessionId(self.next_session.fetch_add(1, Ordering::Relaxed))
    }

    fn emit(&self, event: SessionEvent) {
        (self.sink)(event);
    }
}

impl SessionServer {
    /// Listens, and serves from tasks of the tokio runtime it is called in. Pages of `region` are written by peers; who
    /// else touches one while it is lent breaks the contract. Peers over CUDA IPC write to the pages that the
    /// configuration exports, and over RDMA to those that it has registered, and to none of `region` if these are
    /// others; what is lent to them are numbers of those.
    pub async fn start(
        config: ServerConfig,
        region: Region,
        mailbox: Mailbox,
        sink: Sink,
    ) -> Result<Self, ServerError> {
        let host = super::host_identity().map_err(ServerError::Host)?;
        let instance = format!("{:032x}", rand::random::<u128>());
        let shared = Arc::new(Shared {
            config,
            instance: instance.clone(),
            region,
            mailbox,
            sink,
            sessions: Mutex::default(),
            next_session: AtomicU64::new(1),
        });
        let accept::Listening { tasks, unix, tcp } = accept::listen(&shared).await?;
        let tls = shared.config.tls.is_some();
        let cuda = shared.config.cuda.as_ref().filter(|_| unix.is_some()).map(|exported| exported.device().to_string());
        // They are reached through the connection.
        let rdma = shared.config.rdma.as_ref().filter(|_| tcp.is_some()).map(Target::ports).unwrap_or_default();
        let addresses = SessionAddresses { host, instance, unix: unix.clone(), cuda, tcp, tls, rdma };
        Ok(Self { shared, addresses, listeners: tasks, socket: unix })
    }

    /// Where it listens: for the worker's card.
    pub fn addresses(&self) -> &SessionAddresses {
        &self.addresses
    }

    /// How the peer of a session that is not fenced moves pages.
    pub fn transport(&self, session: SessionId) -> Option<Transport> {
        self.shared.sessions().get(&session).map(|admitted| admitted.transport)
    }

    /// Sends a message. One that is larger than the limit, or more than wait for a peer that does not take them, end
    /// the session. To a session that has ended, nothing is sent.
    pub fn send(&self, session: SessionId, message: Bytes) {
        self.command(session, Command::Send(message));
    }

    /// Lends pages to a session, which may from now on write to them and end the loan with a word in `slot`. To be
    /// called before the message that tells the peer. Panics if the mailbox has no such slot.
    pub fn lend(&self, session: SessionId, slot: MailboxSlot, epoch: Epoch, pages: Arc<[u32]>) {
        assert!(slot.0 < self.shared.mailbox.slots(), "a slot beyond the mailbox");
        self.command(session, Command::Lend((slot, epoch), pages));
    }

    /// Takes a loan back. [`SessionEvent::Revoked`] or [`SessionEvent::Fenced`] follows.
    pub fn revoke(&self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        self.command(session, Command::Revoke((slot, epoch)));
    }

    /// Strikes a loan off the record that its peer has given back by itself. Nothing follows; if the peer writes under
    /// it after all, over tcp its session ends.
    pub fn forget(&self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        self.command(session, Command::Forget((slot, epoch)));
    }

    /// Closes a session. [`SessionEvent::Fenced`] follows at once over tcp and RDMA, and otherwise when the peer has
    /// unmapped the memory or has ended.
    pub fn fence(&self, session: SessionId) {
        self.command(session, Command::Fence);
    }

    fn command(&self, session: SessionId, command: Command) {
        if let Some(admitted) = self.shared.sessions().get(&session) {
            // The task may have ended this moment; then its last events are on their way.
            let _ = admitted.commands.send(command);
        }
    }
}

impl Drop for SessionServer {
    fn drop(&mut self) {
        for listener in &self.listeners {
            listener.abort();
        }
        // Each task ends when its commands do.
        self.shared.sessions().clear();
        if let Some(socket) = &self.socket {
            // If it is gone, all is well.
            let _ = std::fs::remove_file(socket);
        }
    }
}
