//! The decode worker's end: memory that sessions write to.

use std::sync::Arc;

use engine_kernels::DeviceRegion;
use serde::{Deserialize, Serialize};

use super::echo::Echo;
use super::queue_pair::{Endpoint, Peers, QueuePair};
use super::reach::{OnDevice, Use, reach};
use super::registered::{Access, Registered};
use super::source::SCRATCH;
use super::{Adapters, RdmaError, RdmaPort, Reached, Unreached};
use crate::transfer::{Mailbox, Region, RegionShape};

/// A decode worker's KV memory and mailbox, registered for prefill workers to write to. Clones are the same.
///
/// One key opens all of it. It opens nothing by itself: an adapter takes it only over a queue pair that this worker has
/// connected, to a peer that has proved that it belongs to the cluster, and until this worker ends it.
#[derive(Clone)]
pub struct Target {
    lanes: Arc<[TargetLane]>,
    shape: RegionShape,
    /// The KV memory is a device's, and the mailbox is not.
    apart: bool,
}

/// What there is of it for each adapter.
struct TargetLane {
    /// If the region is a device's. Dropped before the memory it is of.
    echo: Option<Echo>,
    region: Registered,
    mailbox: Registered,
    /// In memory of the same kind as the region: a read there follows what was written to pages.
    scratch: Registered,
}

/// One adapter's part of a session, as the prefill worker has to know it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(in super::super) struct Offer {
    pub(super) endpoint: Endpoint,
    pub(super) region_address: u64,
    pub(super) region_key: u32,
    pub(super) mailbox_address: u64,
    pub(super) mailbox_key: u32,
    pub(super) scratch_address: u64,
    pub(super) scratch_key: u32,
    /// Pages and mailbox are in the memory of different devices, to which writes take different ways.
    pub(super) apart: bool,
}

impl std::fmt::Debug for Target {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Target").field("lanes", &self.lanes.len()).field("apart", &self.apart).finish()
    }
}

impl Target {
    /// Registers `region` and `mailbox` with all `adapters`, for as long as the value or a session lives. Blocks for
    /// seconds if they are large.
    pub fn new(adapters: &Adapters, region: &Region, mailbox: &Mailbox) -> Result<Self, RdmaError> {
        let lane = |adapter| {
            let scratch = Region::private(SCRATCH).map_err(RdmaError::Scratch)?;
            Ok(TargetLane {
                region: Registered::new(adapter, region, Access::Written)?,
                mailbox: Registered::new(adapter, mailbox.region(), Access::Written)?,
                scratch: Registered::new(adapter, &scratch, Access::WrittenAndRead)?,
                echo: None,
            })
        };
        let lanes = adapters.0.iter().map(lane).collect::<Result<_, RdmaError>>()?;
        Ok(Self { lanes, shape: region.shape(), apart: false })
    }

    /// The same of pages in device memory, to which the adapters write there, and how. The mailbox stays in host
    /// memory. An error if an adapter does not reach the device's memory, or its driver has something against it.
    pub fn on_device(
        adapters: &Adapters,
        pages: &DeviceRegion,
        mailbox: &Mailbox,
    ) -> Result<(Self, Reached), Unreached> {
        let (lanes, reached) = reach(adapters, pages, Use::Written)?;
        let lane = |OnDevice { pages, spare, echo }: OnDevice| {
            let mailbox = Registered::new(&pages.adapter, mailbox.region(), Access::Written)?;
            Ok(TargetLane { region: pages, mailbox, scratch: spare, echo: Some(echo) })
        };
        let lanes = lanes.into_iter().map(lane).collect::<Result<_, RdmaError>>()?;
        Ok((Self { lanes, shape: pages.shape(), apart: true }, reached))
    }

    /// Of the KV memory.
    pub(in super::super) fn shape(&self) -> RegionShape {
        self.shape
    }

    /// Of all its lanes.
    pub(super) fn echoes(&self) -> impl Iterator<Item = Option<&Echo>> {
        self.lanes.iter().map(|lane| lane.echo.as_ref())
    }

    /// The ports it can be reached through.
    pub fn ports(&self) -> Vec<RdmaPort> {
        self.lanes.iter().map(|lane| RdmaPort::of(&lane.region.adapter.choice)).collect()
    }

    /// Connects queue pairs to those of a prefill worker, the first ones if it has fewer than there are adapters. From
    /// now on it may write. Blocks while the kernel finds the way.
    pub(in super::super) fn accept(&self, peers: &[Endpoint]) -> Result<(Granted, Vec<Offer>), RdmaError> {
        if peers.is_empty() || peers.len() > self.lanes.len() {
            return Err(RdmaError::Peer);
        }
        let mut granted = Granted { pairs: Vec::new(), memory: self.clone() };
        let mut offers = Vec::new();
        for (lane, peer) in self.lanes.iter().zip(peers) {
            // Nothing is ever posted to it.
            let pair = QueuePair::new(&lane.region.adapter, 1, 1)?;
            pair.connect(peer, Peers::Allowed)?;
            offers.push(Offer {
                endpoint: pair.endpoint(),
                region_address: lane.region.address(),
                region_key: lane.region.remote_key(),
                mailbox_address: lane.mailbox.address(),
                mailbox_key: lane.mailbox.remote_key(),
                scratch_address: lane.scratch.address(),
                scratch_key: lane.scratch.remote_key(),
                apart: self.apart,
            });
            granted.pairs.push(pair);
        }
        Ok((granted, offers))
    }
}

/// What lets one session write.
pub(in super::super) struct Granted {
    pairs: Vec<QueuePair>,
    /// Stays registered as long as somebody may write.
    memory: Target,
}

impl Granted {
    /// Takes it back: when this returns `Ok`, the adapters take nothing of the session any more, whatever its peer
    /// does. Blocks until then.
    pub(in super::super) fn end(self) -> Result<Ended, RdmaError> {
        // All of them, even if one cannot be ended.
        let lanes = self.pairs.len();
        let ended: Vec<_> = self.pairs.into_iter().map(QueuePair::fence).collect();
        ended.into_iter().collect::<Result<(), RdmaError>>()?;
        Ok(Ended { lanes, memory: self.memory })
    }
}

/// A session whose connections have ended.
#[must_use = "what its adapters had begun to write may still land"]
pub(in super::super) struct Ended {
    lanes: usize,
    memory: Target,
}

impl Ended {
    /// Returns when nothing of the session can land any more: what the adapters had begun to write to a device may
    /// still be on its way there. Blocks until then. After an error it may be tried again.
    pub(in super::super) fn settle(&self) -> Result<(), RdmaError> {
        self.memory.echoes().take(self.lanes).try_for_each(|echo| echo.map_or(Ok(()), Echo::follow))
    }
}
