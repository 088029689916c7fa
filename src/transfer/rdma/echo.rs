use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::RdmaError;
use super::lane::{Lane, RdmaLane};
use super::queue_pair::{Peers, QueuePair};
use super::registered::{Access, Registered};
use super::source::{SCRATCH, SourceLane};
use super::target::Offer;
use crate::transfer::Region;

/// How long an adapter may take to read its own host's memory. It takes microseconds.
const TIME_MAX: Duration = Duration::from_secs(5);

/// A connection of an adapter with itself, over which it reads memory of its own host. What the adapter had written there
/// before, in however many connections, is there when the read is complete, as its answer had to follow it through PCIe.
/// The end of a connection says so of the host's memory, since it is told by a write to the same; of a device's it says
/// no more than that nothing else will be written.
pub(super) struct Echo(Mutex<RdmaLane>);

impl Echo {
    /// Of some of the `memory`, of which peers may read as much as scratch memory has. An error if the adapter does not
    /// reach itself.
    pub(super) fn new(memory: &Registered) -> Result<Self, RdmaError> {
        let adapter = &memory.adapter;
        let scratch = || {
            let region = Region::private(SCRATCH).map_err(RdmaError::Scratch)?;
            Registered::new(adapter, &region, Access::Own)
        };
        let source = Arc::new(SourceLane { region: scratch()?, scratch: scratch()? });
        let pair = QueuePair::new(adapter, 1, 1)?;
        let endpoint = pair.endpoint();
        pair.connect(&endpoint, Peers::Allowed)?;
        // Nothing but scratch memory is ever asked for.
        let offer = Offer {
            endpoint,
            region_address: 0,
            region_key: 0,
            mailbox_address: 0,
            mailbox_key: 0,
            scratch_address: memory.address(),
            scratch_key: memory.remote_key(),
            apart: false,
        };
        let echo = Self(Mutex::new(RdmaLane::new(pair, source, offer)));
        echo.follow().map_err(|source| adapter.error("read its own host's memory", source))?;
        Ok(echo)
    }

    /// Returns when all that the adapter had written to the memory is there. Blocks.
    pub(super) fn follow(&self) -> io::Result<()> {
        // After an error it fails for good, whoever left it so.
        let mut lane = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lane.read_back();
        lane.ring()?;
        let started = Instant::now();
        while lane.completed()? < lane.added() {
            if started.elapsed() > TIME_MAX {
                return Err(io::ErrorKind::TimedOut.into());
            }
            std::thread::yield_now();
        }
        Ok(())
    }
}
