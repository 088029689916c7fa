//! Writes and messages of a session, from any thread.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;
use std::time::Instant;

use bytes::Bytes;
use engine_kernels::DeviceRegion;
use tokio::sync::mpsc::UnboundedSender;

use super::copier::{Order, Standing, Work};
use super::reply::Reply;
use super::session::Command;
use super::stager::Task;
use crate::handoff::{Epoch, MailboxSlot, MailboxWord, SessionId};
use crate::transfer::frame::Frame;
use crate::transfer::runs::{coalesce, in_order};
use crate::transfer::{PageCopy, RegionShape, TransferMetrics, Transport, WriteError};

/// Writes pages, completions and messages, in the order of the calls. Never blocks: the work is done elsewhere, and
/// `done` is called, from there, when it is. Clones write to the same session.
#[derive(Clone)]
pub struct Writer {
    pub(super) inner: Arc<Inner>,
}

pub(super) struct Inner {
    pub(super) session: SessionId,
    pub(super) local: RegionShape,
    pub(super) remote: RegionShape,
    pub(super) slots: u32,
    pub(super) message_bytes_max: usize,
    pub(super) commands: UnboundedSender<Command>,
    pub(super) transport: Transport,
    pub(super) copier: Option<(Sender<Order>, Arc<Standing>)>,
    pub(super) source: PageSource,
    pub(super) metrics: TransferMetrics,
}

/// Where pages are read.
pub(super) enum PageSource {
    /// In host memory, which is sent from.
    Host,
    /// In device memory, which the copier reads.
    Device(DeviceRegion),
    /// In device memory, from which a thread hands them over when they are computed: staged in host memory, or where
    /// they are.
    Awaited(DeviceRegion, Sender<Task>),
}

impl Writer {
    /// Which session this is, as the [`Connector`](super::Connector) counts them.
    pub fn session(&self) -> SessionId {
        self.inner.session
    }

    /// How pages go.
    pub fn transport(&self) -> Transport {
        self.inner.transport
    }

    /// Writes pages under a loan. The `remote` pages must be among those lent, and each `(layer, remote)` written once
    /// under it: what goes over adapters is in no order but before the loan's last word. Until `done` is called, the
    /// `local` pages must not change; after it, they are not read any more. Pages in device memory are those that what
    /// was enqueued by now computes. `done` is told since when they are computed: from this call, or from a moment
    /// between it and the transfer.
    pub fn write(
        &self,
        slot: MailboxSlot,
        epoch: Epoch,
        copies: Vec<PageCopy>,
        done: impl FnOnce(Result<Instant, WriteError>) + Send + 'static,
    ) {
        let reply = Reply::new(done);
        if slot.0 >= self.inner.slots {
            return reply.send(Err(WriteError::OutOfRange));
        }
        let Inner { local, remote, source, metrics, .. } = &*self.inner;
        let (loan, bytes) = ((slot, epoch), copies.len() * local.page_bytes);
        let counted = |reply: Reply| reply.counted(bytes, self.transport(), metrics);
        if let PageSource::Awaited(pages, _) = source {
            return match in_order(copies, *local, *remote) {
                Ok(copies) if copies.is_empty() => reply.send(Ok(())),
                Ok(copies) => {
                    let (session, ready, reply) = (self.inner.clone(), pages.mark(), counted(reply));
                    self.task(Task::Write { session, loan, copies, ready, reply });
                }
                Err(error) => reply.send(Err(error)),
            };
        }
        match coalesce(copies, *local, *remote) {
            Ok(runs) if runs.is_empty() => reply.send(Ok(())),
            Ok(runs) => {
                let ready = match source {
                    PageSource::Device(pages) => Some(pages.mark()),
                    PageSource::Host | PageSource::Awaited(..) => None,
                };
                self.inner.submit(Work::Write(loan, runs, ready, counted(reply)));
            }
            Err(error) => reply.send(Err(error)),
        }
    }

    /// Ends a loan with its last word, after everything written before. `done` says that the word is in the mailbox:
    /// the decode worker will find it.
    pub fn complete(
        &self,
        slot: MailboxSlot,
        epoch: Epoch,
        word: MailboxWord,
        done: impl FnOnce(Result<(), WriteError>) + Send + 'static,
    ) {
        let reply = Reply::new(|result| done(result.map(drop)));
        if slot.0 >= self.inner.slots || word.status_of(epoch).is_none() {
            return reply.send(Err(WriteError::OutOfRange));
        }
        let loan = (slot, epoch);
        match &self.inner.source {
            // Behind the pages that it has yet to hand over; and it knows of those that could not be.
            PageSource::Awaited(..) => self.task(Task::Complete { session: self.inner.clone(), loan, word, reply }),
            PageSource::Host | PageSource::Device(_) => self.inner.submit(Work::Complete(loan, word, reply)),
        }
    }

    /// Sends a message, after everything written before but for pages in device memory that are yet to be computed or
    /// staged: who says of a loan that nothing more is written under it waits for the answers of its writes. False if
    /// it is larger than the decode worker takes, or the session has ended.
    pub fn send(&self, message: Bytes) -> bool {
        if !self.takes(&message) {
            return false;
        }
        let frame = Frame::Message(message);
        match &self.inner.copier {
            // Acquired, so that what the copier sent for this session is before it. No pages go through the socket then.
            Some((_, standing)) if standing.queued.load(Ordering::Acquire) == 0 => {
                self.inner.commands.send(Command::Send(frame)).is_ok()
            }
            _ => {
                self.inner.submit(Work::Send(frame));
                true
            }
        }
    }

    /// Sends a message that says nothing of what was written, as signs of life and claims do: past whatever pages and
    /// words are still to go, which may be many seconds' worth. Those sent so keep their order among each other. False
    /// as from [`Writer::send`].
    pub fn send_ahead(&self, message: Bytes) -> bool {
        self.takes(&message) && self.inner.commands.send(Command::Send(Frame::Message(message))).is_ok()
    }

    fn takes(&self, message: &Bytes) -> bool {
        message.len() <= self.inner.message_bytes_max && !self.inner.commands.is_closed()
    }

    fn task(&self, task: Task) {
        if let PageSource::Awaited(_, tasks) = &self.inner.source {
            // The thread ends only when nobody is left who could send to it.
            let _ = tasks.send(task);
        }
    }
}

impl Inner {
    /// Hands work to the copier, or if there is none to the session's task. If that is gone, dropping the work says so.
    pub(super) fn submit(&self, work: Work) {
        match &self.copier {
            Some((orders, standing)) => order(orders, self.session, standing, &self.commands, work),
            None => drop(self.commands.send(Command::Work(work))),
        }
    }
}

/// Gives the copier something to do.
pub(super) fn order(
    orders: &Sender<Order>,
    session: SessionId,
    standing: &Arc<Standing>,
    commands: &UnboundedSender<Command>,
    work: Work,
) {
    standing.queued.fetch_add(1, Ordering::Relaxed);
    let order = Order { session, standing: standing.clone(), commands: commands.clone(), work };
    // The copier ends only when nobody is left who could send to it.
    let _ = orders.send(order);
}
