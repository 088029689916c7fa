//! Pages in device memory, as sessions see them.

use std::io;
use std::sync::Arc;

use engine_kernels::cuda::{DeviceId, DriverError, IpcHandle};
use engine_kernels::{DeviceRegion, LockedRegion};

use super::{Region, RegionShape};

/// A decode worker's pages in device memory, for processes of this host to open. Clones are the same.
///
/// Whoever has the handle can write anywhere there until its process ends or lets go by itself, as over shared memory;
/// it is given to peers of this user alone that have proved the cluster token.
#[derive(Debug, Clone)]
pub struct Exported {
    pages: DeviceRegion,
    handle: IpcHandle,
}

impl Exported {
    /// An error where the driver does not export memory.
    pub fn new(pages: &DeviceRegion) -> Result<Self, DriverError> {
        Ok(Self { handle: pages.export()?, pages: pages.clone() })
    }

    /// The device they are on.
    pub fn device(&self) -> DeviceId {
        self.pages.device()
    }

    pub(super) fn shape(&self) -> RegionShape {
        self.pages.shape()
    }

    pub(super) fn handle(&self) -> &IpcHandle {
        &self.handle
    }
}

/// A prefill worker's pages, to be read.
#[derive(Debug, Clone)]
pub enum LocalPages {
    /// In host memory.
    Host(Region),
    /// In device memory, with room to stage them in.
    Device(StagingRing),
}

impl LocalPages {
    /// Host memory that they are sent from, by whatever cannot read them where they are.
    pub fn host(&self) -> &Region {
        match self {
            Self::Host(region) => region,
            Self::Device(ring) => &ring.region,
        }
    }
}

impl From<Region> for LocalPages {
    fn from(region: Region) -> Self {
        Self::Host(region)
    }
}

/// Host memory through which a prefill worker's pages leave its device: each layer has a few pages of the same shape,
/// which are used in turn. Clones are the same memory.
#[derive(Debug, Clone)]
pub struct StagingRing {
    pub(super) pages: DeviceRegion,
    pub(super) region: Region,
    /// Kept locked, if that was to be had.
    _locked: Option<Arc<LockedRegion>>,
}

impl StagingRing {
    /// Room for pages of about `bytes`, and for one of each layer at least.
    pub fn new(pages: DeviceRegion, bytes: usize) -> io::Result<Self> {
        let shape = pages.shape();
        let room = bytes / (shape.layers * shape.page_bytes).max(1);
        let region = Region::private(RegionShape { pages: room.clamp(1, shape.pages.max(1)), ..shape })?;
        let locked = lock_for_device(&pages, &region);
        Ok(Self { pages, region, _locked: locked.map(Arc::new) })
    }
}

/// Locks host memory for a device's copies, or says that they will be slower.
pub(crate) fn lock_for_device(pages: &DeviceRegion, region: &Region) -> Option<LockedRegion> {
    let locked = pages.lock(region);
    if let Err(error) = &locked {
        tracing::warn!(%error, "host memory that pages are staged in is not locked: copies take longer");
    }
    locked.ok()
}
