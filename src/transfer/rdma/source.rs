use std::sync::Arc;

use engine_kernels::DeviceRegion;

use super::lane::{RdmaLane, queue_size};
use super::queue_pair::{Endpoint, Peers, QueuePair};
use super::reach::{OnDevice, Use, reach};
use super::registered::{Access, Registered};
use super::target::Offer;
use super::{Adapters, Link, RdmaError, Reached, Unreached};
use crate::transfer::{Region, RegionShape};

/// Memory that holds nothing: what adapters write and read to see whether the other is there. As large as the largest
/// packet, and as what is spare in device memory, which is the same there.
pub(super) const SCRATCH: RegionShape = RegionShape { layers: 1, pages: 1, page_bytes: DeviceRegion::SPARE_BYTES };

/// A prefill worker's KV memory, registered for its adapters to read. Clones are the same.
#[derive(Clone)]
pub struct Source {
    lanes: Arc<[Arc<SourceLane>]>,
    /// If it is in a device's memory, which all adapters reach.
    reached: Option<Reached>,
}

/// What there is of it for each adapter.
pub(super) struct SourceLane {
    pub(super) region: Registered,
    /// In memory of the same kind.
    pub(super) scratch: Registered,
}

impl std::fmt::Debug for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Source").field("lanes", &self.lanes.len()).field("reached", &self.reached).finish()
    }
}

impl Source {
    /// Registers `region` with all `adapters`, for as long as the value or a session lives. Blocks for seconds if it is
    /// large.
    pub fn new(adapters: &Adapters, region: &Region) -> Result<Self, RdmaError> {
        let lane = |adapter| {
            let scratch = Region::private(SCRATCH).map_err(RdmaError::Scratch)?;
            Ok(Arc::new(SourceLane {
                region: Registered::new(adapter, region, Access::Own)?,
                scratch: Registered::new(adapter, &scratch, Access::Own)?,
            }))
        };
        Ok(Self { lanes: adapters.0.iter().map(lane).collect::<Result<_, RdmaError>>()?, reached: None })
    }

    /// The same of pages in device memory, which the adapters read there, and how. An error if one of them does not
    /// reach it, or the device's driver has something against it.
    pub fn on_device(adapters: &Adapters, pages: &DeviceRegion) -> Result<(Self, Reached), Unreached> {
        let (lanes, reached) = reach(adapters, pages, Use::Read)?;
        let lane = |OnDevice { pages, spare, .. }| Arc::new(SourceLane { region: pages, scratch: spare });
        Ok((Self { lanes: lanes.into_iter().map(lane).collect(), reached: Some(reached) }, reached))
    }

    /// How adapters reach the pages, if they are in device memory.
    pub fn reached(&self) -> Option<Reached> {
        self.reached
    }

    /// What its ports are plugged into, which has to be the same at the other end.
    pub(in super::super) fn links(&self) -> impl Iterator<Item = Link> {
        self.lanes.iter().map(|lane| lane.region.adapter.choice.link)
    }

    /// Queue pairs for a session that uses the first `lanes` adapters.
    pub(in super::super) fn open(&self, lanes: usize) -> Result<Opening, RdmaError> {
        let pair = |lane: &Arc<SourceLane>| {
            let (requests, pieces) = queue_size(lane);
            Ok((QueuePair::new(&lane.region.adapter, requests, pieces)?, lane.clone()))
        };
        Ok(Opening(self.lanes.iter().take(lanes).map(pair).collect::<Result<_, RdmaError>>()?))
    }
}

/// Queue pairs that are not connected yet.
pub(in super::super) struct Opening(Vec<(QueuePair, Arc<SourceLane>)>);

impl Opening {
    /// For the decode worker.
    pub(in super::super) fn endpoints(&self) -> Vec<Endpoint> {
        self.0.iter().map(|(pair, _)| pair.endpoint()).collect()
    }

    /// Connects them to what the decode worker offers. Blocks while the kernel finds the way.
    pub(in super::super) fn connect(self, offers: &[Offer]) -> Result<Vec<RdmaLane>, RdmaError> {
        if offers.len() != self.0.len() {
            return Err(RdmaError::Peer);
        }
        let connect = |((mut pair, lane), offer): ((QueuePair, Arc<SourceLane>), &Offer)| {
            pair.connect(&offer.endpoint, Peers::Refused)?;
            let armed = pair.completions().arm();
            armed.map_err(|source| lane.region.adapter.error("report completions", source))?;
            Ok(RdmaLane::new(pair, lane, offer.clone()))
        };
        self.0.into_iter().zip(offers).map(connect).collect()
    }
}
