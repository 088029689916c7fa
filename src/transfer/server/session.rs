//! One session, from its opening to its fence, in one task.

use std::collections::HashSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc::UnboundedReceiver;

use super::landing::Landing;
use super::loans::Loans;
use super::{Command, Peer, SessionEvent, Shared};
use crate::handoff::{MailboxWord, SessionId};
use crate::transfer::frame::{Frame, Loan, Violation};
use crate::transfer::handshake;
use crate::transfer::link::{FrameReader, Heart, LinkError};
use crate::transfer::outbound::{NoPayload, Outbound};
use crate::transfer::rdma::{Granted, Offer};
use crate::transfer::socket::Socket;

/// How the peer writes, and what is known about that.
pub(super) enum DataPath {
    /// Through this task, which checks each write.
    Tcp(Loans),
    /// By itself, or its device, into memory that its process has mapped.
    Mapped {
        /// Readable once the peer's process has ended.
        ended: AsyncFd<OwnedFd>,
        /// Loans the peer was asked to stop writing under.
        revoking: HashSet<Loan>,
    },
    /// By its adapter and ours.
    Rdma {
        /// What lets it.
        granted: Granted,
        /// What it has to know of that.
        offers: Vec<Offer>,
        /// Loans the peer was asked to stop writing under.
        revoking: HashSet<Loan>,
    },
}

impl DataPath {
    pub(super) fn mapped(ended: AsyncFd<OwnedFd>) -> Self {
        Self::Mapped { ended, revoking: HashSet::new() }
    }

    pub(super) fn rdma((granted, offers): (Granted, Vec<Offer>)) -> Self {
        Self::Rdma { granted, offers, revoking: HashSet::new() }
    }
}

/// How a session's conversation ended.
enum End {
    /// The peer unmapped the memory before it left.
    Unmapped,
    /// In any other way.
    Because(LinkError),
}

impl<E: Into<LinkError>> From<E> for End {
    fn from(error: E) -> Self {
        Self::Because(error.into())
    }
}

/// A session's state, owned by its task.
pub(super) struct ServerSession {
    shared: Arc<Shared>,
    id: SessionId,
    peer: Peer,
    socket: Socket,
    path: DataPath,
    reader: FrameReader,
    outbound: Outbound<NoPayload>,
    /// The data frame that is being received.
    landing: Option<Landing>,
}

impl ServerSession {
    pub(super) fn new(shared: Arc<Shared>, id: SessionId, socket: Socket, path: DataPath, peer: Peer) -> Self {
        let reader = FrameReader::new(shared.config.limits.message_bytes);
        Self { shared, id, peer, socket, path, reader, outbound: Outbound::new(), landing: None }
    }

    /// Serves the session, and reports when it is closed and when it is fenced.
    pub(super) async fn run(mut self, mut commands: UnboundedReceiver<Command>) {
        let (session, transport) = (self.id, self.peer.transport.name());
        tracing::info!(session = session.0, worker = %self.peer.worker, transport, "session opened");
        self.shared.config.metrics.sessions.with_label_values(&[transport]).inc();
        self.shared.emit(SessionEvent::Opened { session, peer: self.peer.clone() });
        let end = match self.serve(&mut commands).await {
            Ok(never) => match never {},
            Err(end) => end,
        };
        let mut unmapped = false;
        match end {
            End::Unmapped => unmapped = true,
            End::Because(reason) => {
                if matches!(reason, LinkError::Violation(_)) {
                    self.shared.config.metrics.refused.inc();
                }
                tracing::info!(session = session.0, worker = %self.peer.worker, transport, %reason, "session closed");
            }
        }
        let Self { shared, socket, path, mut reader, .. } = self;
        shared.emit(SessionEvent::Closed { session });
        let fenced = match path {
            // This task was the writer, and it has ended: no byte of the session will be read any more.
            DataPath::Tcp(_) => true,
            DataPath::Mapped { ended, .. } => {
                socket.end_writing();
                unmapped || wait_until_gone(&socket, &mut reader, &ended, &mut commands).await
            }
            DataPath::Rdma { granted, .. } => fence(granted, &mut commands).await,
        };
        drop(socket);
        shared.sessions().remove(&session);
        if fenced {
            tracing::info!(session = session.0, transport, "session fenced");
            shared.emit(SessionEvent::Fenced { session });
        }
    }

    /// Serves until it ends, for whatever reason.
    async fn serve(&mut self, commands: &mut UnboundedReceiver<Command>) -> Result<std::convert::Infallible, End> {
        let offers = match &self.path {
            DataPath::Tcp(_) | DataPath::Mapped { .. } => Vec::new(),
            DataPath::Rdma { offers, .. } => offers.clone(),
        };
        let files = self.shared.files(self.peer.transport);
        let limits = self.shared.config.limits;
        let welcome = handshake::welcome(&self.socket, self.shared.welcome(self.peer.transport, offers), &files);
        match tokio::time::timeout(limits.handshake, welcome).await {
            Ok(sent) => sent?,
            Err(_) => return Err(LinkError::Stalled.into()),
        }
        let mut heart = Heart::new(&limits);
        loop {
            // In this order, so that a loan that is taken back is seen before the next read, and a peer that never
            // stops sending still gets answers and signs of life.
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(command) => self.command(command)?,
                    None => return Err(LinkError::Closed.into()),
                },
                beat = heart.beat() => {
                    beat?;
                    if self.outbound.is_empty() {
                        self.outbound.push(&Frame::Ping);
                    }
                }
                written = self.outbound.write_some(&self.socket), if !self.outbound.is_empty() => drop(written?),
                received = receive(&mut self.reader, &mut self.landing, &self.socket) => {
                    heart.heard();
                    if let Some(frame) = received? {
                        self.frame(frame)?;
                    }
                }
            }
        }
    }

    /// Does what the engine wants.
    fn command(&mut self, command: Command) -> Result<(), End> {
        let limits = &self.shared.config.limits;
        match command {
            Command::Send(message) if message.len() > limits.message_bytes => {
                return Err(LinkError::MessageTooLong(message.len()).into());
            }
            Command::Send(message) => {
                if self.outbound.bytes() + message.len() > limits.queued_bytes {
                    return Err(LinkError::Backlog.into());
                }
                self.outbound.push(&Frame::Message(message));
            }
            Command::Lend(loan, pages) => {
                if let DataPath::Tcp(loans) = &mut self.path {
                    loans.lend(loan, &pages);
                }
            }
            Command::Revoke(loan) => self.revoke(loan),
            Command::Forget(loan) => {
                if let DataPath::Tcp(loans) = &mut self.path {
                    // Whoever has given a loan back begins no frame of it any more, or breaks the protocol.
                    if let Some(landing) = &mut self.landing {
                        landing.revoke(loan);
                    }
                    loans.forget(loan);
                }
            }
            Command::Fence => return Err(LinkError::Closed.into()),
        }
        Ok(())
    }

    fn revoke(&mut self, loan: Loan) {
        match &mut self.path {
            DataPath::Tcp(loans) => {
                // The only reader of the socket is this task, and it is here: what it reads from now on goes elsewhere.
                if let Some(landing) = &mut self.landing {
                    landing.revoke(loan);
                }
                if loans.revoke(loan) {
                    self.outbound.push(&Frame::Revoke(loan));
                }
                self.revoked(loan);
            }
            DataPath::Mapped { revoking, .. } | DataPath::Rdma { revoking, .. } => {
                if revoking.insert(loan) {
                    self.outbound.push(&Frame::Revoke(loan));
                }
            }
        }
    }

    fn revoked(&self, (slot, epoch): Loan) {
        self.shared.emit(SessionEvent::Revoked { session: self.id, slot, epoch });
    }

    /// Does what the peer wants, if it may.
    fn frame(&mut self, frame: Frame) -> Result<(), End> {
        match (frame, &mut self.path) {
            (Frame::Ping, _) => {}
            (Frame::Message(message), _) => self.shared.emit(SessionEvent::Message { session: self.id, message }),
            (Frame::Data(loan, runs), DataPath::Tcp(loans)) => {
                let region = &self.shared.region;
                let admission = loans.admit(loan, &runs, region.shape(), self.shared.frame_bytes())?;
                self.landing = Some(Landing::new(loan, runs, admission, region.clone()));
            }
            (Frame::Complete(loan, word), DataPath::Tcp(loans)) => {
                if word.status_of(loan.1).is_none() {
                    return Err(Violation::WrongWord.into());
                }
                let accepted = loans.complete(loan)?;
                if accepted {
                    self.post(loan, word);
                }
                self.outbound.push(&Frame::Completed(loan, accepted));
            }
            (Frame::Stopped(loan), DataPath::Tcp(loans)) => loans.stopped(loan)?,
            (Frame::Stopped(loan), DataPath::Mapped { revoking, .. } | DataPath::Rdma { revoking, .. }) => {
                if !revoking.remove(&loan) {
                    return Err(Violation::NoSuchLoan.into());
                }
                self.revoked(loan);
            }
            (Frame::Unmapped, DataPath::Mapped { .. }) => return Err(End::Unmapped),
            (Frame::Data(..) | Frame::Complete(..), DataPath::Mapped { .. } | DataPath::Rdma { .. })
            | (Frame::Unmapped, DataPath::Tcp(_) | DataPath::Rdma { .. })
            | (Frame::Completed(..) | Frame::Revoke(_), _) => return Err(Violation::Direction.into()),
        }
        Ok(())
    }

    /// Writes the completion word for a peer that cannot. All data frames of the loan came before it on the same
    /// connection, and this thread of control has read them into their pages; the post releases that to the thread that
    /// loads the word.
    fn post(&self, loan: Loan, word: MailboxWord) {
        self.shared.mailbox.post(loan.0, word);
    }
}

/// Reads a piece of whatever comes next, the pages of a data frame or a frame. Cancel safe.
async fn receive(
    reader: &mut FrameReader,
    landing: &mut Option<Landing>,
    socket: &Socket,
) -> Result<Option<Frame>, LinkError> {
    let Some(pages) = landing else { return reader.step(socket).await };
    if pages.step(socket).await? {
        *landing = None;
    }
    Ok(None)
}

/// Before what adapters had begun to write is waited for again, if that went wrong.
const SETTLE_PAUSE: [Duration; 2] = [Duration::from_millis(100), Duration::from_secs(10)];

/// Ends the connections between a peer's adapters and ours, which nothing of the peer's can outlive, and waits for what
/// is under way, for as long as that takes. False if that is not to be had, or the server is dropped before; its pages
/// then stay where they are.
async fn fence(granted: Granted, commands: &mut UnboundedReceiver<Command>) -> bool {
    let Some(ended) = blocking(move || granted.end()).await else { return false };
    let ended = match ended {
        Ok(ended) => Arc::new(ended),
        Err(error) => {
            tracing::error!(%error, "a session over RDMA cannot be fenced; the pages lent to it stay in quarantine");
            return false;
        }
    };
    let [mut pause, longest] = SETTLE_PAUSE;
    loop {
        let settling = ended.clone();
        match blocking(move || settling.settle()).await {
            None => return false,
            Some(Ok(())) => return true,
            Some(Err(error)) => {
                tracing::warn!(%error, "a session over RDMA is not fenced yet; its pages stay in quarantine");
            }
        }
        let dropped = async { while commands.recv().await.is_some() {} };
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            () = dropped => return false,
        }
        pause = longest.min(2 * pause);
    }
}

async fn blocking<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let acted = tokio::task::spawn_blocking(act).await;
    // The runtime is going, and the process with it, or else this is worth knowing.
    acted.inspect_err(|error| tracing::error!(%error, "a session over RDMA was not fenced")).ok()
}

/// Waits until a peer that shares the memory can write to it no more: it says that it has unmapped it, or its process
/// has ended. The end of its connection proves nothing. False if the server is dropped before.
async fn wait_until_gone(
    socket: &Socket,
    reader: &mut FrameReader,
    ended: &AsyncFd<OwnedFd>,
    commands: &mut UnboundedReceiver<Command>,
) -> bool {
    let mut readable = true;
    loop {
        tokio::select! {
            // An error of the poll says nothing about the process; then its pages stay where they are.
            Ok(_) = ended.readable() => return true,
            frame = reader.step(socket), if readable => match frame {
                Ok(Some(Frame::Unmapped)) => return true,
                Ok(_) => {}
                Err(_) => readable = false,
            },
            command = commands.recv() => if command.is_none() {
                return false;
            }
        }
    }
}
