//! A session at the prefill worker, in one task, from its opening to its end.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::Sender;

use bytes::Bytes;
use tokio::sync::mpsc::{self, UnboundedReceiver, UnboundedSender};
use tokio::sync::oneshot;

use super::copier::{Order, Standing, Work};
use super::payload::{Pages, frames};
use super::poster::Poster;
use super::reply::Reply;
use super::revoked::Revoked;
use super::writer::{Writer, order};
use crate::handoff::SessionId;
use crate::transfer::frame::{Frame, Loan, Violation};
use crate::transfer::link::{FrameReader, Heart, LinkError};
use crate::transfer::outbound::Outbound;
use crate::transfer::rdma::RdmaLane;
use crate::transfer::socket::Socket;
use crate::transfer::{Limits, Region, Transport, WriteError};

/// Messages that may wait to be taken from [`Session::receive`]; beyond it the session is closed.
pub(super) const MESSAGES_MAX: usize = 4096;

/// A prefill worker's session to a decode worker. Dropping it closes it: writes under way end, the memory is
/// unmapped, the connection between adapters gone.
pub struct Session {
    pub(super) writer: Writer,
    pub(super) messages: mpsc::Receiver<Bytes>,
}

impl Session {
    /// Which session this is, as the [`Connector`](super::Connector) counts them.
    pub fn id(&self) -> SessionId {
        self.writer.session()
    }

    /// How pages go.
    pub fn transport(&self) -> Transport {
        self.writer.transport()
    }

    /// For the engine thread, or whoever else writes.
    pub fn writer(&self) -> Writer {
        self.writer.clone()
    }

    /// Sends a message, in the order that [`Writer::send`] says; [`Writer::send_ahead`] keeps none.
    pub fn send(&self, message: Bytes) -> bool {
        self.writer.send(message)
    }

    /// The next message; `None` when the session has ended. Cancel safe.
    pub async fn receive(&mut self) -> Option<Bytes> {
        self.messages.recv().await
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // If its task has ended, it is closed already.
        let _ = self.writer.inner.commands.send(Command::Close);
    }
}

/// What a session's task is told.
pub(super) enum Command {
    /// Send a frame, before pages that are not begun.
    Send(Frame),
    /// Where there is no copier: write, complete or send.
    Work(Work),
    /// End.
    Close,
}

/// How pages go, and what is needed for it.
pub(super) enum DataPath {
    Tcp {
        local: Region,
        frame_bytes: usize,
        /// Who waits for the decode worker to have posted a word.
        completions: HashMap<Loan, Reply>,
        /// Loans that were taken back.
        revoked: Revoked,
    },
    /// By a copier, into memory that this process has mapped.
    Mapped {
        orders: Sender<Order>,
        standing: Arc<Standing>,
    },
    Rdma(Box<Poster<RdmaLane>>),
}

impl DataPath {
    /// Waits until something has happened that no socket tells of. Cancel safe.
    async fn event(&mut self) -> std::io::Result<()> {
        match self {
            Self::Rdma(poster) => poster.event().await,
            Self::Tcp { .. } | Self::Mapped { .. } => std::future::pending().await,
        }
    }

    pub(super) fn tcp(local: Region, frame_bytes: usize) -> Self {
        Self::Tcp { local, frame_bytes, completions: HashMap::new(), revoked: Revoked::default() }
    }
}

/// A session's state, owned by its task.
pub(super) struct ClientSession {
    pub(super) id: SessionId,
    pub(super) socket: Socket,
    pub(super) path: DataPath,
    pub(super) limits: Limits,
    pub(super) outbound: Outbound<Pages>,
    pub(super) messages: mpsc::Sender<Bytes>,
    /// To itself: what the copier answers with.
    pub(super) commands: UnboundedSender<Command>,
}

impl ClientSession {
    /// Serves the session to its end.
    pub(super) async fn run(mut self, mut commands: UnboundedReceiver<Command>) {
        let reason = match self.serve(&mut commands).await {
            Ok(never) => match never {},
            Err(reason) => reason,
        };
        tracing::info!(session = self.id.0, %reason, "session to a decode worker closed");
        // From here on writes fail; those that wait are told so as they are dropped.
        drop(commands);
        match self.path {
            DataPath::Tcp { .. } => {}
            DataPath::Rdma(poster) => {
                // The adapter is done with our pages before anybody hears that their writes have failed. That it
                // cannot be awaited any more if the process ends is no loss.
                let _ = tokio::task::spawn_blocking(move || poster.close()).await;
            }
            DataPath::Mapped { orders, standing } => {
                standing.close();
                let (unmapped, wait) = oneshot::channel();
                order(&orders, self.id, &standing, &self.commands, Work::Close(unmapped));
                if wait.await.is_ok() {
                    // Nothing in this process can write to the decode worker's pages any more. Told so, it has them
                    // back without waiting for our end; if it does not hear it, it waits.
                    self.outbound.push(&Frame::Unmapped);
                    let farewell = async {
                        while !self.outbound.is_empty() {
                            self.outbound.write_some(&self.socket).await?;
                        }
                        std::io::Result::Ok(())
                    };
                    let _ = tokio::time::timeout(self.limits.handshake, farewell).await;
                }
            }
        }
    }

    async fn serve(
        &mut self,
        commands: &mut UnboundedReceiver<Command>,
    ) -> Result<std::convert::Infallible, LinkError> {
        let mut heart = Heart::new(&self.limits);
        let mut reader = FrameReader::new(self.limits.message_bytes);
        loop {
            tokio::select! {
                biased;
                command = commands.recv() => match command {
                    Some(Command::Send(frame)) => {
                        self.check_backlog()?;
                        self.outbound.push_ahead(&frame);
                    }
                    Some(Command::Work(work)) => self.work(work)?,
                    Some(Command::Close) | None => return Err(LinkError::Closed),
                },
                beat = heart.beat() => {
                    beat?;
                    if self.outbound.is_empty() {
                        self.outbound.push(&Frame::Ping);
                    }
                }
                frame = reader.step(&self.socket) => {
                    heart.heard();
                    if let Some(frame) = frame? {
                        self.frame(frame)?;
                    }
                }
                written = self.outbound.write_some(&self.socket), if !self.outbound.is_empty() => {
                    for pages in written? {
                        pages.reply.into_iter().for_each(|reply| reply.send(Ok(())));
                    }
                }
                event = self.path.event() => {
                    event?;
                    self.post()?;
                }
            }
        }
    }

    fn send(&mut self, frame: &Frame) -> Result<(), LinkError> {
        self.check_backlog()?;
        self.outbound.push(frame);
        Ok(())
    }

    fn check_backlog(&self) -> Result<(), LinkError> {
        if self.outbound.bytes() > self.limits.queued_bytes { Err(LinkError::Backlog) } else { Ok(()) }
    }

    /// Over RDMA, posts what there is room for, and sends what its turn has come for.
    fn post(&mut self) -> Result<(), LinkError> {
        if let DataPath::Rdma(poster) = &mut self.path {
            let mut frames = Vec::new();
            poster.advance(&mut frames)?;
            frames.iter().try_for_each(|frame| self.send(frame))?;
        }
        Ok(())
    }

    /// Work that is not a copier's.
    fn work(&mut self, work: Work) -> Result<(), LinkError> {
        let (local, frame_bytes, completions, revoked) = match &mut self.path {
            DataPath::Tcp { local, frame_bytes, completions, revoked } => (local, frame_bytes, completions, revoked),
            DataPath::Rdma(poster) => {
                match work {
                    Work::Write(loan, runs, _, reply) => poster.write(loan, runs, reply),
                    Work::Complete(loan, word, reply) => poster.complete(loan, word, reply),
                    Work::Send(frame) => poster.send(frame),
                    Work::Open(_) | Work::Close(_) => {}
                }
                return self.post();
            }
            DataPath::Mapped { .. } => return Ok(()),
        };
        match work {
            Work::Write(loan, _, _, reply) | Work::Complete(loan, _, reply) if revoked.holds(loan) => {
                reply.send(Err(WriteError::Revoked));
            }
            Work::Write(loan, runs, _, reply) => {
                for (runs, pages) in frames(runs, local, *frame_bytes, reply) {
                    self.outbound.push_data(loan, runs, pages);
                }
            }
            Work::Complete(loan, word, reply) => {
                completions.insert(loan, reply);
                self.outbound.push(&Frame::Complete(loan, word));
            }
            Work::Send(frame) => self.send(&frame)?,
            Work::Open(_) | Work::Close(_) => {}
        }
        Ok(())
    }

    /// Does what the decode worker wants.
    fn frame(&mut self, frame: Frame) -> Result<(), LinkError> {
        match (frame, &mut self.path) {
            (Frame::Ping, _) => {}
            (Frame::Message(message), _) => {
                self.messages.try_send(message).map_err(|_| LinkError::Backlog)?;
            }
            (Frame::Completed(loan, accepted), DataPath::Tcp { completions, .. }) => {
                let reply = completions.remove(&loan).ok_or(Violation::NoSuchLoan)?;
                reply.send(if accepted { Ok(()) } else { Err(WriteError::Revoked) });
            }
            (Frame::Revoke(loan), DataPath::Tcp { revoked, .. }) => {
                revoked.add(loan);
                for pages in self.outbound.withdraw(loan) {
                    pages.reply.into_iter().for_each(|reply| reply.send(Err(WriteError::Revoked)));
                }
                // Behind whatever of the loan could not be withdrawn any more.
                self.outbound.push(&Frame::Stopped(loan));
            }
            (Frame::Revoke(loan), DataPath::Mapped { orders, standing }) => {
                standing.revoke(loan);
                // Through the copier, which has dropped or done all it had for the loan when it gets there.
                order(orders, self.id, standing, &self.commands, Work::Send(Frame::Stopped(loan)));
            }
            (Frame::Revoke(loan), DataPath::Rdma(poster)) => {
                poster.revoke(loan);
                self.post()?;
            }
            (Frame::Completed(..), DataPath::Mapped { .. } | DataPath::Rdma(_))
            | (Frame::Data(..) | Frame::Complete(..) | Frame::Stopped(_) | Frame::Unmapped, _) => {
                return Err(Violation::Direction.into());
            }
        }
        Ok(())
    }
}
