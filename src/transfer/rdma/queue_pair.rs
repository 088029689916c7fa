//! A queue pair, from its making to its end.

use std::ffi::c_int;
use std::io;
use std::mem::zeroed;
use std::ptr::{NonNull, null_mut};
use std::sync::Arc;

use ibverbs_sys as sys;
use ibverbs_sys::ibv_qp_attr_mask as Mask;
use serde::{Deserialize, Serialize};

use super::adapter::{Adapter, failed};
use super::completions::Completions;
use super::library::Verbs;
use super::{Link, RdmaError};

/// Reads that may be under way at a time; they only ask whether what was written is there.
const READS_MAX: u8 = 1;
/// `IBV_QPF_GRH_REQUIRED` of a port.
const GRH_REQUIRED: u8 = 1;
/// Hops that packets may take.
const HOPS_MAX: u8 = 64;
/// How long the adapter waits for an acknowledgement: 4.096 µs × 2^16, a quarter of a second; some take up to four
/// times as long.
const ACKNOWLEDGED_IN: u8 = 16;
/// How often it tries again, which makes two to eight seconds: longer than a link takes to come back, shorter than a
/// session takes to give up its peer. 7, the most, is for ever to some adapters, soft-RoCE among them.
const RETRIES: u8 = 6;
/// Bytes of a request that may stand in the request itself: a mailbox word.
pub(super) const INLINE_BYTES: u32 = 8;

/// What a pair lets its peer do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Peers {
    /// Nothing.
    Refused,
    /// Write and read what is registered for it.
    Allowed,
}

/// One end of a connection between two adapters, as the other end has to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct Endpoint {
    gid: [u8; 16],
    /// Address on an InfiniBand subnet.
    lid: u16,
    infiniband: bool,
    number: u32,
    /// The first packet's number.
    sequence: u32,
    /// `ibv_mtu`.
    mtu: u8,
}

/// A reliable connection's end (RC). What is posted to it is performed in order; what it lets its peer do ends with it.
pub(super) struct QueuePair {
    // Dropped before its completion queue.
    pair: Pair,
    sequence: u32,
    /// Of the port, when this was made.
    port: sys::ibv_port_attr,
    completions: Completions,
    adapter: Arc<Adapter>,
}

/// The pair itself, destroyed when dropped.
struct Pair {
    handle: NonNull<sys::ibv_qp>,
    verbs: &'static Verbs,
}

// SAFETY: verbs' objects may be used from any thread.
unsafe impl Send for Pair {}
// SAFETY: as above; what may not happen twice at a time takes the `QueuePair` by `&mut`.
unsafe impl Sync for Pair {}

impl QueuePair {
    /// A queue pair that is not connected, with room for `requests` that are posted and not complete, each of at most
    /// `pieces` pieces of memory.
    pub(super) fn new(adapter: &Arc<Adapter>, requests: u32, pieces: u32) -> Result<Self, RdmaError> {
        let port = adapter.port()?;
        let completions = Completions::new(adapter, requests)?;
        // SAFETY: numbers and pointers, for which zeroes are values.
        let mut wanted: sys::ibv_qp_init_attr = unsafe { zeroed() };
        wanted.send_cq = completions.queue();
        wanted.recv_cq = completions.queue();
        wanted.qp_type = sys::ibv_qp_type::IBV_QPT_RC;
        wanted.cap = sys::ibv_qp_cap {
            max_send_wr: requests,
            // Nothing is ever received: pages and words are written, and nobody is told.
            max_recv_wr: 1,
            max_send_sge: pieces,
            max_recv_sge: 1,
            max_inline_data: INLINE_BYTES,
        };
        // SAFETY: domain and completion queue are of the same open context, and outlive the pair in `self`.
        let pair = unsafe { (adapter.verbs.create_qp)(adapter.domain.as_ptr(), &raw mut wanted) };
        let handle =
            NonNull::new(pair).ok_or_else(|| adapter.error("make a queue pair", io::Error::last_os_error()))?;
        let pair = Pair { handle, verbs: adapter.verbs };
        // 24 bits; not 0, so that a peer that was not told it is noticed.
        let sequence = rand::random::<u32>() >> 8 | 1;
        Ok(Self { pair, sequence, port, completions, adapter: adapter.clone() })
    }

    /// For the peer.
    pub(super) fn endpoint(&self) -> Endpoint {
        let choice = &self.adapter.choice;
        Endpoint {
            gid: choice.gid,
            lid: self.port.lid,
            infiniband: choice.link == Link::InfiniBand,
            // SAFETY: the pair lives; its number never changes.
            number: unsafe { (*self.pair.handle.as_ptr()).qp_num },
            sequence: self.sequence,
            // One of five small numbers.
            mtu: self.port.active_mtu as u8,
        }
    }

    /// Connects to `peer`, which may from now on do what `peers` says. Blocks while the kernel finds the way to it.
    pub(super) fn connect(&self, peer: &Endpoint, peers: Peers) -> Result<(), RdmaError> {
        let choice = &self.adapter.choice;
        if peer.infiniband != (choice.link == Link::InfiniBand) || !(1..=5).contains(&peer.mtu) {
            return Err(RdmaError::Peer);
        }
        self.modify(
            "initialise a queue pair",
            Mask::IBV_QP_PKEY_INDEX | Mask::IBV_QP_PORT | Mask::IBV_QP_ACCESS_FLAGS,
            |to| {
                to.qp_state = sys::ibv_qp_state::IBV_QPS_INIT;
                to.port_num = choice.port;
                to.qp_access_flags = match peers {
                    Peers::Refused => 0,
                    Peers::Allowed => {
                        sys::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0
                            | sys::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0
                    }
                };
            },
        )?;
        let way = Mask::IBV_QP_AV | Mask::IBV_QP_PATH_MTU | Mask::IBV_QP_DEST_QPN | Mask::IBV_QP_RQ_PSN;
        let mask = way | Mask::IBV_QP_MAX_DEST_RD_ATOMIC | Mask::IBV_QP_MIN_RNR_TIMER;
        self.modify("find a way to the peer's", mask, |to| {
            to.qp_state = sys::ibv_qp_state::IBV_QPS_RTR;
            to.path_mtu = self.port.active_mtu.min(sys::ibv_mtu::from(peer.mtu));
            to.dest_qp_num = peer.number;
            to.rq_psn = peer.sequence;
            to.max_dest_rd_atomic = READS_MAX;
            to.min_rnr_timer = 12;
            to.ah_attr.port_num = choice.port;
            to.ah_attr.dlid = peer.lid;
            // By its GID always on Ethernet, and where an InfiniBand port takes nothing else.
            to.ah_attr.is_global = u8::from(!peer.infiniband || self.port.flags & GRH_REQUIRED != 0);
            to.ah_attr.grh.dgid = sys::ibv_gid { raw: peer.gid };
            to.ah_attr.grh.sgid_index = choice.gid_index;
            to.ah_attr.grh.hop_limit = HOPS_MAX;
        })?;
        let patience = Mask::IBV_QP_TIMEOUT | Mask::IBV_QP_RETRY_CNT | Mask::IBV_QP_RNR_RETRY;
        self.modify("send", patience | Mask::IBV_QP_SQ_PSN | Mask::IBV_QP_MAX_QP_RD_ATOMIC, |to| {
            to.qp_state = sys::ibv_qp_state::IBV_QPS_RTS;
            to.sq_psn = self.sequence;
            to.timeout = ACKNOWLEDGED_IN;
            to.retry_cnt = RETRIES;
            to.rnr_retry = RETRIES;
            to.max_rd_atomic = READS_MAX;
        })
    }

    /// Ends the connection: once this has returned, the adapter refuses whatever the peer still sends, and what it had
    /// accepted is in memory. Blocks for as long as that takes.
    ///
    /// The error state alone refuses packets that come from then on. That a packet which was being worked on is done
    /// with too is what destroying the pair adds: adapters answer that command when nothing refers to the pair any
    /// more, and the answer comes to this processor behind what was written before it.
    ///
    /// An error says that the peer may still write, for ever.
    pub(super) fn fence(self) -> Result<(), RdmaError> {
        let ended = self.modify("end a connection", Mask(0), |to| to.qp_state = sys::ibv_qp_state::IBV_QPS_ERR);
        if let Err(error) = ended {
            // What counts is the end of the pair, which follows.
            tracing::debug!(%error, "a queue pair is destroyed as it is");
        }
        let Self { pair, completions, adapter, .. } = self;
        pair.destroy().map_err(|source| {
            // They are the pair's as long as it is there.
            std::mem::forget(completions);
            adapter.error("destroy a queue pair", source)
        })
    }

    /// What was posted, in the order in which it is done.
    pub(super) fn completions(&mut self) -> &mut Completions {
        &mut self.completions
    }

    /// Posts a chain of requests, with one doorbell.
    ///
    /// # Safety
    ///
    /// `first` starts a list whose requests, and the pieces they name, lie where they say until this returns; the
    /// memory that pieces lie in stays registered, and what is written from it unchanged, until the request is
    /// complete, or this pair is gone.
    pub(super) unsafe fn post(&mut self, first: *mut sys::ibv_send_wr) -> io::Result<()> {
        let mut refused = null_mut();
        // SAFETY: the context lives as long as the pair does.
        let post = unsafe { (*(*self.pair.handle.as_ptr()).context).ops.post_send };
        let post = post.ok_or_else(|| io::Error::from(io::ErrorKind::Unsupported))?;
        // SAFETY: the caller's promise, and `&mut self`.
        let result = unsafe { post(self.pair.handle.as_ptr(), first, &raw mut refused) };
        if result == 0 { Ok(()) } else { Err(failed(result)) }
    }

    fn modify(
        &self,
        action: &'static str,
        mask: Mask,
        set: impl FnOnce(&mut sys::ibv_qp_attr),
    ) -> Result<(), RdmaError> {
        // SAFETY: numbers, for which zeroes are values.
        let mut attributes: sys::ibv_qp_attr = unsafe { zeroed() };
        set(&mut attributes);
        let mask = (Mask::IBV_QP_STATE | mask).0 as c_int;
        // SAFETY: the pair lives, and the attributes are only read.
        let result = unsafe { (self.adapter.verbs.modify_qp)(self.pair.handle.as_ptr(), &raw mut attributes, mask) };
        if result == 0 { Ok(()) } else { Err(self.adapter.error(action, failed(result))) }
    }
}

impl Pair {
    fn destroy(self) -> io::Result<()> {
        // SAFETY: destroyed here, and not again when dropped, since it is not.
        let result = unsafe { (self.verbs.destroy_qp)(self.handle.as_ptr()) };
        std::mem::forget(self);
        if result == 0 { Ok(()) } else { Err(failed(result)) }
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let result = unsafe { (self.verbs.destroy_qp)(self.handle.as_ptr()) };
        if result != 0 {
            tracing::warn!(error = %failed(result), "a queue pair cannot be destroyed");
        }
    }
}
