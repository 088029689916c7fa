//! Requests of a session on one adapter: chained, posted, and counted as they complete.

use std::io;
use std::mem::zeroed;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use ibverbs_sys as sys;

use super::RdmaError;
use super::queue_pair::QueuePair;
use super::requests::{Piece, RequestLimits};
use super::source::{SCRATCH, SourceLane};
use super::target::Offer;
use crate::handoff::{MailboxSlot, MailboxWord};
use crate::transfer::mailbox::SLOT_BYTES;

/// Requests that are posted and not complete, at most, per connection: up to 64 MiB under way, several times what the
/// fastest links hold.
pub(super) const DEPTH: usize = 512;
/// Requests posted with one doorbell, at most.
pub(in super::super) const CHAIN_MAX: usize = 128;
/// One in so many requests reports that it is complete, and for all before it; the last of a chain always does.
const SIGNALLED_EVERY: usize = 64;
/// Bytes of one request, at most. A loan that is taken back waits for the requests under way.
const REQUEST_BYTES_MAX: usize = 128 << 10;
/// Pieces of memory in one request, at most: what keeps a send queue's entry within 192 bytes.
const PIECES_MAX: usize = 8;

/// One connection of a session, as whoever writes sees it: requests are added to a chain, the chain is posted, and
/// what is posted is complete at some time, in order. Numbers count requests from the first one added.
pub(in super::super) trait Lane {
    /// Whether a word goes to the memory of another device than pages do, and so by another way.
    fn is_apart(&self) -> bool;

    /// Requests that can be added.
    fn room(&self) -> usize;

    /// How large each may be.
    fn limits(&self) -> RequestLimits;

    /// Adds a write of `pieces` to `to`, both from the start of their region.
    fn write(&mut self, to: u64, pieces: &[Piece]);

    /// Adds the write of a mailbox word.
    fn word(&mut self, slot: MailboxSlot, word: MailboxWord);

    /// Adds a read of the memory that the peer has its pages in, for when all before it is complete. When it is
    /// complete too, what was written is not only accepted by the peer's adapter but in that memory, since the answer
    /// had to follow it through PCIe.
    fn read_back(&mut self);

    /// Adds a write and a read of what fills the largest packet, both of memory that is there for this.
    fn prove(&mut self);

    /// Posts what was added.
    fn ring(&mut self) -> io::Result<()>;

    /// Requests that were added so far.
    fn added(&self) -> u64;

    /// Requests that are complete. An error is the end of the connection.
    fn completed(&mut self) -> io::Result<u64>;

    /// Waits until more may be complete than [`Lane::completed`] last said.
    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Ends the connection. After an error what is under way may stay so for ever. Blocks.
    fn close(self) -> Result<(), RdmaError>;
}

/// A [`Lane`] through an adapter.
pub(in super::super) struct RdmaLane {
    // Dropped first: then nothing of it is under way any more.
    pair: QueuePair,
    source: Arc<SourceLane>,
    offer: Offer,
    /// Room for what was added and not posted, never beyond its first size: entries point into `pieces`.
    chain: Vec<sys::ibv_send_wr>,
    pieces: Vec<sys::ibv_sge>,
    limits: RequestLimits,
    depth: usize,
    added: u64,
    completed: u64,
}

// SAFETY: the pointers in `chain` lead into `pieces`, which moves with it, and are set anew each time it is posted.
unsafe impl Send for RdmaLane {}
// SAFETY: nothing is changed through `&self`.
unsafe impl Sync for RdmaLane {}

/// Requests of `source`'s adapter, and pieces of each: how large a queue to ask it for.
pub(super) fn queue_size(source: &SourceLane) -> (u32, u32) {
    let adapter = &source.region.adapter;
    (DEPTH.min(adapter.requests_max) as u32, PIECES_MAX.min(adapter.pieces_max) as u32)
}

impl RdmaLane {
    /// `pair` is connected to the pair in `offer`.
    pub(super) fn new(pair: QueuePair, source: Arc<SourceLane>, offer: Offer) -> Self {
        let (depth, pieces_max) = queue_size(&source);
        let bytes_max = REQUEST_BYTES_MAX.min(source.region.adapter.message_bytes_max);
        let limits = RequestLimits { bytes_max, pieces_max: pieces_max as usize };
        let (chain, pieces) = (Vec::with_capacity(CHAIN_MAX), Vec::with_capacity(CHAIN_MAX * limits.pieces_max));
        Self { pair, source, offer, chain, pieces, limits, depth: depth as usize, added: 0, completed: 0 }
    }

    /// Adds a request between the two scratch pages.
    pub(super) fn add_scratch(&mut self, opcode: sys::ibv_wr_opcode::Type, bytes: u32) {
        let scratch = &self.source.scratch;
        self.pieces.push(sys::ibv_sge { addr: scratch.address(), length: bytes, lkey: scratch.local_key() });
        self.add(opcode, self.offer.scratch_address, self.offer.scratch_key, 1);
    }

    fn add(&mut self, opcode: sys::ibv_wr_opcode::Type, address: u64, key: u32, pieces: usize) {
        // SAFETY: numbers, pointers and unions of numbers, for which zeroes are values.
        let mut request: sys::ibv_send_wr = unsafe { zeroed() };
        self.added += 1;
        request.wr_id = self.added;
        request.opcode = opcode;
        request.num_sge = pieces as i32;
        request.wr.rdma.remote_addr = address;
        request.wr.rdma.rkey = key;
        self.chain.push(request);
    }
}

impl Lane for RdmaLane {
    fn is_apart(&self) -> bool {
        self.offer.apart
    }

    fn room(&self) -> usize {
        let under_way = (self.added - self.completed) as usize;
        (CHAIN_MAX - self.chain.len()).min(self.depth - under_way)
    }

    fn limits(&self) -> RequestLimits {
        self.limits
    }

    fn write(&mut self, to: u64, pieces: &[Piece]) {
        let (base, lkey) = (self.source.region.address(), self.source.region.local_key());
        self.pieces.extend(pieces.iter().map(|piece| sys::ibv_sge {
            addr: base + piece.offset,
            length: piece.bytes,
            lkey,
        }));
        let (address, key) = (self.offer.region_address + to, self.offer.region_key);
        self.add(sys::ibv_wr_opcode::IBV_WR_RDMA_WRITE, address, key, pieces.len());
    }

    fn word(&mut self, slot: MailboxSlot, word: MailboxWord) {
        let address = self.offer.mailbox_address + u64::from(slot.0) * SLOT_BYTES as u64;
        // Inline: the address stands for the word itself until it is posted, which copies it.
        self.pieces.push(sys::ibv_sge { addr: word.raw(), length: 8, lkey: 0 });
        self.add(sys::ibv_wr_opcode::IBV_WR_RDMA_WRITE, address, self.offer.mailbox_key, 1);
        if let Some(request) = self.chain.last_mut() {
            request.send_flags |= sys::ibv_send_flags::IBV_SEND_INLINE.0;
        }
    }

    fn read_back(&mut self) {
        self.add_scratch(sys::ibv_wr_opcode::IBV_WR_RDMA_READ, 8);
    }

    fn prove(&mut self) {
        for opcode in [sys::ibv_wr_opcode::IBV_WR_RDMA_WRITE, sys::ibv_wr_opcode::IBV_WR_RDMA_READ] {
            self.add_scratch(opcode, SCRATCH.page_bytes as u32);
        }
    }

    fn ring(&mut self) -> io::Result<()> {
        let Some(last) = self.chain.len().checked_sub(1) else { return Ok(()) };
        let (inline, signalled) = (sys::ibv_send_flags::IBV_SEND_INLINE.0, sys::ibv_send_flags::IBV_SEND_SIGNALED.0);
        let mut words = [0u64; CHAIN_MAX];
        let mut piece = 0;
        let (requests, pieces) = (self.chain.as_mut_ptr(), self.pieces.as_mut_ptr());
        for (i, word) in words.iter_mut().enumerate().take(last + 1) {
            // SAFETY: within the chain, which nothing else refers to here.
            let request = unsafe { &mut *requests.add(i) };
            // SAFETY: each request has as many pieces as were pushed for it, in the same order.
            request.sg_list = unsafe { pieces.add(piece) };
            if request.send_flags & inline != 0 {
                // SAFETY: the request's only piece.
                let piece = unsafe { &mut *request.sg_list };
                *word = piece.addr;
                piece.addr = (&raw const *word) as u64;
            }
            piece += request.num_sge as usize;
            if i == last || (i + 1) % SIGNALLED_EVERY == 0 {
                request.send_flags |= signalled;
            }
            // SAFETY: within the chain, whose last entry has no next.
            request.next = if i == last { std::ptr::null_mut() } else { unsafe { requests.add(i + 1) } };
        }
        // SAFETY: chain, pieces and words lie where they are until the call returns. Pieces lie in the source's region,
        // by the limits that were checked when they were made from pages, and in its scratch memory, both of which
        // `self.source` keeps registered; pages are kept as they are until their write is reported done, which waits
        // for the requests' completion or the end of the pair.
        let posted = unsafe { self.pair.post(requests) };
        self.chain.clear();
        self.pieces.clear();
        posted
    }

    fn added(&self) -> u64 {
        self.added
    }

    fn completed(&mut self) -> io::Result<u64> {
        if let Some(last) = self.pair.completions().poll()? {
            self.completed = last;
        }
        Ok(self.completed)
    }

    fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let completions = self.pair.completions();
        ready!(completions.poll_event(context))?;
        Poll::Ready(completions.arm())
    }

    fn close(self) -> Result<(), RdmaError> {
        self.pair.fence()
    }
}
