//! A thread that copies pages into other processes' memory: itself over shm, or by a device over CUDA IPC. There is one
//! for either, so that none waits for what the other is waiting for.
//!
//! It does what it is told strictly in order, so a completion follows the data it completes, and it alone holds the
//! mappings of peers' memory: once it has dropped one, nothing in this process can write there.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use engine_kernels::cuda::DriverError;
use engine_kernels::{PageCopies, PageRun, PeerPages};
use tokio::sync::{mpsc as async_mpsc, oneshot};

use super::reply::Reply;
use super::revoked::Revoked;
use super::session::Command;
use super::stager::Ready;
use crate::handoff::{MailboxWord, SessionId};
use crate::transfer::copy::copy_streaming;
use crate::transfer::frame::{Frame, Loan};
use crate::transfer::runs::RunCopy;
use crate::transfer::{Mailbox, Region, WriteError};

/// Bytes copied between two looks at whether the loan still stands.
const CHUNK_BYTES: usize = 1 << 20;

/// What a session and its copier know in common.
#[derive(Default)]
pub(super) struct Standing {
    /// The session is over: copy nothing more.
    closed: AtomicBool,
    /// Copies were enqueued of which nobody knows whether they are over.
    unsettled: AtomicBool,
    /// Loans that were taken back.
    revoked: Mutex<Revoked>,
    /// Operations of the session that the copier has yet to do.
    pub(super) queued: AtomicUsize,
}

impl Standing {
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
    }

    pub(super) fn revoke(&self, loan: Loan) {
        self.revoked().add(loan);
    }

    /// Whether writing under the loan is still wanted.
    pub(super) fn check(&self, loan: Loan) -> Result<(), WriteError> {
        if self.closed.load(Ordering::Relaxed) {
            return Err(WriteError::Closed);
        }
        if self.revoked().holds(loan) { Err(WriteError::Revoked) } else { Ok(()) }
    }

    fn revoked(&self) -> MutexGuard<'_, Revoked> {
        // Nothing is left half done in it by a panic.
        self.revoked.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Another process' memory, and what goes there.
pub(super) struct PeerMemory {
    pub(super) pages: PeerMapping,
    pub(super) mailbox: Mailbox,
}

/// Pages of this process, and another's of the same shape that they are copied to.
pub(super) enum PeerMapping {
    /// By the copying thread.
    Host { local: Region, remote: Region },
    /// By the device, on a stream of the session's own.
    Device { local: PageCopies, remote: PeerPages },
}

/// Something to do for a session.
pub(super) enum Work {
    /// Begin: from now on there is memory to write to.
    Open(PeerMemory),
    /// Copy pages: those of a device when it has computed them.
    Write(Loan, Vec<RunCopy>, Option<Ready>, Reply),
    /// Post a loan's last word.
    Complete(Loan, MailboxWord, Reply),
    /// Send a frame, after everything before it is done.
    Send(Frame),
    /// End: unmap the memory, then say so. If it cannot be unmapped, nothing is said.
    Close(oneshot::Sender<()>),
}

/// The work, and whose it is.
pub(super) struct Order {
    pub(super) session: SessionId,
    pub(super) standing: Arc<Standing>,
    pub(super) commands: async_mpsc::UnboundedSender<Command>,
    pub(super) work: Work,
}

/// Starts the thread; it ends when nobody can send it orders any more.
pub(super) fn start() -> io::Result<Sender<Order>> {
    let (orders, queue) = mpsc::channel();
    thread::Builder::new().name("engine-copier".into()).spawn(move || copy_all(&queue))?;
    Ok(orders)
}

fn copy_all(queue: &Receiver<Order>) {
    let mut peers: HashMap<SessionId, PeerMemory> = HashMap::new();
    for Order { session, standing, commands, work } in queue {
        match work {
            Work::Open(memory) => drop(peers.insert(session, memory)),
            Work::Write(loan, runs, ready, mut reply) => {
                let written = match peers.get(&session) {
                    Some(peer) => write(&peer.pages, &runs, ready, &mut reply, || standing.check(loan)),
                    None => Ok(Err(WriteError::Closed)),
                };
                match written {
                    Ok(written) => {
                        if written == Err(WriteError::Device) {
                            // Nothing more under it, the word least of all.
                            standing.revoke(loan);
                        }
                        reply.send(written);
                    }
                    Err(Unsettled) => {
                        // The device may write to the peer's pages at any time. So nobody is told that this write is
                        // over, nor that the memory is unmapped, which it is not: this process's end is the fence.
                        std::mem::forget((reply, peers.remove(&session)));
                        standing.unsettled.store(true, Ordering::Relaxed);
                        standing.close();
                        let _ = commands.send(Command::Close);
                    }
                }
            }
            Work::Complete(loan, word, reply) => {
                let peer = peers.get(&session).ok_or(WriteError::Closed);
                // All data was stored by this thread, before this in program order; or by the device, in copies that
                // this thread has waited for. What a device has done by then is done for everybody: the other process's
                // device, which is the same or the one whose memory it is, reads what was written there in whatever it
                // is told to do after the word was seen.
                let post = |peer: &PeerMemory| standing.check(loan).map(|()| peer.mailbox.post(loan.0, word));
                reply.send(peer.and_then(post));
            }
            // If the session's task has ended, there is nobody to send it to.
            Work::Send(_) if standing.unsettled.load(Ordering::Relaxed) => {}
            Work::Send(frame) => drop(commands.send(Command::Send(frame))),
            Work::Close(unmapped) => {
                let settled = !standing.unsettled.load(Ordering::Relaxed);
                if settled && peers.remove(&session).is_none_or(|memory| memory.pages.unmap()) {
                    // The task waits for this, unless the whole process is ending.
                    let _ = unmapped.send(());
                }
            }
        }
        // Released, so that a thread that finds nothing queued and sends by itself comes after what was sent from here.
        standing.queued.fetch_sub(1, Ordering::Release);
    }
}

impl PeerMapping {
    /// Whether nothing of this process can write there any more.
    fn unmap(self) -> bool {
        match self {
            Self::Host { .. } => true,
            Self::Device { remote, local } => {
                let closed = remote.close();
                drop(local);
                if let Err(error) = &closed {
                    tracing::error!(%error, "a decode worker's device memory stays open until this process ends");
                }
                closed.is_ok()
            }
        }
    }
}

/// Copies may be under way, and nobody can tell when they are over.
struct Unsettled;

/// Copies pages, as long as they are wanted.
fn write(
    pages: &PeerMapping,
    runs: &[RunCopy],
    ready: Option<Ready>,
    reply: &mut Reply,
    wanted: impl Fn() -> Result<(), WriteError>,
) -> Result<Result<(), WriteError>, Unsettled> {
    match pages {
        PeerMapping::Host { local, remote } => Ok(write_here(local, remote, runs, wanted)),
        PeerMapping::Device { local, remote } => write_by_device(local, remote, runs, ready, reply, wanted),
    }
}

fn write_here(
    local: &Region,
    remote: &Region,
    runs: &[RunCopy],
    wanted: impl Fn() -> Result<(), WriteError>,
) -> Result<(), WriteError> {
    let page_bytes = local.shape().page_bytes;
    for run in runs {
        let bytes = run.count as usize * page_bytes;
        let source = local.pages(run.layer as usize, run.local as usize, run.count as usize);
        let target = remote.pages(run.layer as usize, run.remote as usize, run.count as usize);
        for start in (0..bytes).step_by(CHUNK_BYTES) {
            wanted()?;
            let length = CHUNK_BYTES.min(bytes - start);
            // SAFETY: both ranges were checked to lie in their regions, which are mapped: `local` by this thread's
            // clone, `remote` because this thread alone drops it. The regions are different memory. The decode worker
            // lent these pages to this session and reads and reuses them only after the completion word, or once this
            // process has unmapped them or ended; our own pages are left alone until the write is reported done.
            unsafe { copy_streaming(source.add(start), target.add(start), length) };
        }
    }
    Ok(())
}

/// Returns when the copies are over, or says that it does not know: otherwise none is under way when this thread does
/// something else.
fn write_by_device(
    local: &PageCopies,
    remote: &PeerPages,
    runs: &[RunCopy],
    ready: Option<Ready>,
    reply: &mut Reply,
    wanted: impl Fn() -> Result<(), WriteError>,
) -> Result<Result<(), WriteError>, Unsettled> {
    let failed = |error: DriverError| {
        tracing::error!(%error, "pages cannot be copied to another process's device memory");
        WriteError::Device
    };
    let computed = || {
        wanted()?;
        if let Some(ready) = ready {
            ready.and_then(|mark| mark.wait()).map_err(failed)?;
            reply.computed();
        }
        wanted()
    };
    if let Err(error) = computed() {
        return Ok(Err(error));
    }
    let run = |run: &RunCopy| PageRun {
        layer: run.layer as usize,
        from: run.local as usize,
        to: run.remote as usize,
        count: run.count as usize,
    };
    let enqueued = local.copy(runs.iter().map(run), remote);
    if let Err(error) = local.finish() {
        tracing::error!(%error, "whether copies to another process's device memory are over cannot be told");
        return Err(Unsettled);
    }
    Ok(enqueued.map_err(failed))
}
