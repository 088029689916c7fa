//! Reading one's own memory through an adapter, to know that what it wrote has landed.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use engine_kernels::DeviceRegion;
use ibverbs_sys::ibv_wr_opcode as Opcode;

use super::RdmaError;
use super::lane::{Lane, RdmaLane};
use super::queue_pair::{Peers, QueuePair};
use super::reach::Unreached;
use super::registered::{Access, Registered};
use super::source::{SCRATCH, SourceLane};
use super::target::Offer;
use crate::transfer::Region;

/// How long an adapter may take to read its own host's memory. It takes microseconds.
const TIME_MAX: Duration = Duration::from_secs(5);
/// Requests posted at a time, at most.
const REQUESTS: u32 = 2;

/// A connection of an adapter with itself, over which it reads memory of its own host. What the adapter had written
/// there before, in however many connections, is there when the read is complete, as its answer had to follow it
/// through PCIe. The end of a connection says so of the host's memory, since it is told by a write to the same; of a
/// device's it says no more than that nothing else will be written.
pub(super) struct Echo {
    /// What is read goes here.
    source: Arc<SourceLane>,
    /// The same memory.
    scratch: Region,
    /// What is read: an address and its key.
    memory: (u64, u32),
    connection: Mutex<Connection>,
}

struct Connection {
    /// None after an error, or an answer that did not come in time: whatever may still be under way ends with it.
    lane: Option<RdmaLane>,
    /// Reads that were answered so far.
    answered: u64,
}

impl Echo {
    /// Of some of the `memory`, of which peers may read as much as scratch memory has, and which is to outlive this. An
    /// error if the adapter does not reach itself.
    pub(super) fn new(memory: &Registered) -> Result<Self, RdmaError> {
        let scratch = Region::private(SCRATCH).map_err(RdmaError::Scratch)?;
        let register = || Registered::new(&memory.adapter, &scratch, Access::Own);
        let source = Arc::new(SourceLane { region: register()?, scratch: register()? });
        let connection = Mutex::new(Connection { lane: None, answered: 0 });
        let echo = Self { source, scratch, memory: (memory.address(), memory.remote_key()), connection };
        echo.follow()?;
        Ok(echo)
    }

    fn connect(&self) -> Result<RdmaLane, RdmaError> {
        let pair = QueuePair::new(&self.source.region.adapter, REQUESTS, 1)?;
        let endpoint = pair.endpoint();
        pair.connect(&endpoint, Peers::Allowed)?;
        // Nothing but scratch memory is ever asked for.
        let offer = Offer {
            endpoint,
            region_address: 0,
            region_key: 0,
            mailbox_address: 0,
            mailbox_key: 0,
            scratch_address: self.memory.0,
            scratch_key: self.memory.1,
            apart: false,
        };
        Ok(RdmaLane::new(pair, self.source.clone(), offer))
    }

    /// Returns when all that the adapter had written to the memory is there. Blocks. After an error nobody knows; the
    /// next call tries it over a new connection.
    pub(super) fn follow(&self) -> Result<(), RdmaError> {
        self.perform(RdmaLane::read_back)
    }

    /// Whether the adapter reads what the device has written.
    pub(super) fn reads_what_is_there(&self, device: &DeviceRegion) -> Result<bool, Unreached> {
        let written = Region::private(SCRATCH).map_err(RdmaError::Scratch)?;
        fill(&written);
        device.fill_spare(&written)?;
        self.perform(|lane| lane.add_scratch(Opcode::IBV_WR_RDMA_READ, SCRATCH.page_bytes as u32))?;
        Ok(bytes(&self.scratch) == bytes(&written))
    }

    /// Whether the device reads what the adapter has written.
    pub(super) fn writes_what_is_there(&self, device: &DeviceRegion, flush: bool) -> Result<bool, Unreached> {
        fill(&self.scratch);
        self.perform(|lane| {
            lane.add_scratch(Opcode::IBV_WR_RDMA_WRITE, SCRATCH.page_bytes as u32);
            // As before any word.
            lane.read_back();
        })?;
        if flush {
            device.flush()?;
        }
        let read = Region::private(SCRATCH).map_err(RdmaError::Scratch)?;
        device.read_spare(&read)?;
        Ok(bytes(&self.scratch) == bytes(&read))
    }

    /// Does what is added, over a new connection if there is none.
    fn perform(&self, add: impl FnOnce(&mut RdmaLane)) -> Result<(), RdmaError> {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lane = match connection.lane.take() {
            Some(lane) => lane,
            None => self.connect()?,
        };
        add(&mut lane);
        settle(&mut lane).map_err(|source| self.source.region.adapter.error("read its own host's memory", source))?;
        *connection = Connection { lane: Some(lane), answered: connection.answered + 1 };
        Ok(())
    }

    #[cfg(test)]
    pub(super) fn answered(&self) -> u64 {
        self.connection.lock().unwrap().answered
    }

    /// Ends the connection as an error does that nobody has heard of yet.
    #[cfg(test)]
    pub(super) fn break_down(&self) {
        let mut connection = self.connection.lock().unwrap();
        let lane = connection.lane.as_mut().unwrap();
        lane.write(0, &[super::Piece { offset: 0, bytes: 8 }]);
        assert!(settle(lane).is_err(), "there is nothing to write to");
    }
}

/// Fills scratch memory with what was nowhere before.
fn fill(scratch: &Region) {
    let random: [u8; SCRATCH.page_bytes] = rand::random();
    // SAFETY: it is as large; nothing is under way to it or from it.
    unsafe { scratch.base().copy_from_nonoverlapping(random.as_ptr(), random.len()) };
}

fn bytes(scratch: &Region) -> Vec<u8> {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(scratch.base(), SCRATCH.page_bytes) }.to_vec()
}

/// Waits until all that was added is complete.
fn settle(lane: &mut RdmaLane) -> io::Result<()> {
    lane.ring()?;
    let started = Instant::now();
    while lane.completed()? < lane.added() {
        if started.elapsed() > TIME_MAX {
            // The lane is not used again.
            return Err(io::ErrorKind::TimedOut.into());
        }
        std::thread::yield_now();
    }
    Ok(())
}
