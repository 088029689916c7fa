//! A completion queue and the file descriptor that it wakes its reader by.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use ibverbs_sys as sys;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::RdmaError;
use super::adapter::{Adapter, failed};

/// Completions taken from the queue at a time.
const POLLED_MAX: usize = 16;

/// Where a queue pair says what it has done, and wakes whoever waits for that.
pub(super) struct Completions {
    queue: NonNull<sys::ibv_cq>,
    channel: NonNull<sys::ibv_comp_channel>,
    /// The channel's descriptor, watched by tokio once somebody waits.
    events: Option<AsyncFd<OwnedFd>>,
    adapter: Arc<Adapter>,
}

// SAFETY: verbs' objects may be used from any thread.
unsafe impl Send for Completions {}
// SAFETY: as above; what may not happen twice at a time takes `&mut self`.
unsafe impl Sync for Completions {}

impl Completions {
    /// With room for `entries`.
    pub(super) fn new(adapter: &Arc<Adapter>, entries: u32) -> Result<Self, RdmaError> {
        let verbs = adapter.verbs;
        // SAFETY: the context is open.
        let channel = unsafe { (verbs.create_comp_channel)(adapter.context.as_ptr()) };
        let channel = NonNull::new(channel)
            .ok_or_else(|| adapter.error("make a completion channel", io::Error::last_os_error()))?;
        // SAFETY: context and channel are open, and outlive the queue.
        let queue =
            unsafe { (verbs.create_cq)(adapter.context.as_ptr(), entries as i32, null_mut(), channel.as_ptr(), 0) };
        let Some(queue) = NonNull::new(queue) else {
            let error = io::Error::last_os_error();
            // SAFETY: nothing was made of it.
            unsafe { (verbs.destroy_comp_channel)(channel.as_ptr()) };
            return Err(adapter.error("make a completion queue", error));
        };
        Ok(Self { queue, channel, events: None, adapter: adapter.clone() })
    }

    pub(super) fn queue(&self) -> *mut sys::ibv_cq {
        self.queue.as_ptr()
    }

    /// The number of the last request that is complete, if one has become so; all before it are. An error is the end of
    /// the connection.
    pub(super) fn poll(&mut self) -> io::Result<Option<u64>> {
        let mut last = None;
        loop {
            let mut polled = [sys::ibv_wc::default(); POLLED_MAX];
            // SAFETY: the queue lives, and is that of a live context, which has the operation.
            let poll = unsafe { (*(*self.queue.as_ptr()).context).ops.poll_cq };
            let poll = poll.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
            // SAFETY: there is room for as many as are asked for, and `&mut self`.
            let count = unsafe { poll(self.queue.as_ptr(), POLLED_MAX as i32, polled.as_mut_ptr()) };
            let Ok(count) = usize::try_from(count) else { return Err(failed(-count)) };
            for completion in &polled[..count] {
                if let Some((status, vendor)) = completion.error() {
                    let text =
                        format!("a request failed: {} (status {status}, vendor's code {vendor})", meaning(status));
                    return Err(io::Error::other(text));
                }
                last = Some(completion.wr_id());
            }
            if count < POLLED_MAX {
                return Ok(last);
            }
        }
    }

    /// Asks to be woken at the next completion. One that is already there wakes nobody, so poll afterwards.
    pub(super) fn arm(&mut self) -> io::Result<()> {
        // SAFETY: the queue lives, and is that of a live context.
        let arm = unsafe { (*(*self.queue.as_ptr()).context).ops.req_notify_cq };
        let arm = arm.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
        // SAFETY: as above.
        let result = unsafe { arm(self.queue.as_ptr(), 0) };
        if result == 0 { Ok(()) } else { Err(failed(result)) }
    }

    /// Waits until a completion has come since [`Completions::arm`]. Needs tokio's context.
    pub(super) fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.events.is_none() {
            match self.watch() {
                Ok(events) => self.events = Some(events),
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        loop {
            let Some(events) = &self.events else { return Poll::Pending };
            let mut ready = ready!(events.poll_read_ready(context))?;
            let (mut queue, mut cookie) = (null_mut(), null_mut());
            // SAFETY: the channel lives; its descriptor does not block.
            let result =
                unsafe { (self.adapter.verbs.get_cq_event)(self.channel.as_ptr(), &raw mut queue, &raw mut cookie) };
            if result == 0 {
                // SAFETY: one event was taken, of the only queue that the channel has.
                unsafe { (self.adapter.verbs.ack_cq_events)(self.queue.as_ptr(), 1) };
                return Poll::Ready(Ok(()));
            }
            match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::WouldBlock => ready.clear_ready(),
                error => return Poll::Ready(Err(error)),
            }
        }
    }

    fn watch(&self) -> io::Result<AsyncFd<OwnedFd>> {
        // SAFETY: the channel lives, and with it the descriptor.
        let fd = unsafe { BorrowedFd::borrow_raw(self.channel.as_ref().fd) }.try_clone_to_owned()?;
        // Which holds for the channel's own number too.
        rustix::io::ioctl_fionbio(&fd, true)?;
        // SAFETY: an owned descriptor stays open and the same as long as the `AsyncFd` owns it; none is taken out of it.
        let watched = unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) };
        Ok(watched?)
    }
}

impl Drop for Completions {
    fn drop(&mut self) {
        // SAFETY: the queue pair is gone, and every event that was taken was acknowledged; each is destroyed once.
        unsafe {
            (self.adapter.verbs.destroy_cq)(self.queue.as_ptr());
            (self.adapter.verbs.destroy_comp_channel)(self.channel.as_ptr());
        }
    }
}

/// What a status means, in words that lead somewhere.
fn meaning(status: sys::ibv_wc_status::Type) -> &'static str {
    use sys::ibv_wc_status as status_of;
    match status {
        status_of::IBV_WC_RETRY_EXC_ERR => "the peer's adapter does not answer, at least not to packets of this size",
        status_of::IBV_WC_REM_ACCESS_ERR => "the peer's adapter refused the address or the key",
        status_of::IBV_WC_REM_INV_REQ_ERR => "the peer's adapter refused the request",
        status_of::IBV_WC_REM_OP_ERR => "the peer's adapter could not perform it",
        status_of::IBV_WC_WR_FLUSH_ERR => "the connection had ended",
        status_of::IBV_WC_LOC_PROT_ERR => "the memory is not registered",
        status_of::IBV_WC_LOC_LEN_ERR => "it is larger than the adapter takes",
        _ => "the adapter says no more",
    }
}
