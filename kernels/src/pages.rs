//! Where KV pages are, for whoever moves them between workers.

use std::sync::Arc;

use crate::cuda::{Address, CopyStream, DeviceId, DriverError, IpcHandle, Mark, Memory, Mover};
use crate::{KvRegion, RegionShape};

/// The pages of a cache: in host memory, which this process's threads read and write, and other processes too if it has
/// a file; or in a device's memory, which its copies read and write, and other processes' devices too if they are given
/// a handle. Either way they lie as their [`RegionShape`] says.
#[derive(Debug, Clone)]
pub enum KvPages {
    /// In host memory.
    Host(KvRegion),
    /// In device memory.
    Device(DeviceRegion),
}

impl KvPages {
    /// How many pages, and how large.
    pub fn shape(&self) -> RegionShape {
        match self {
            Self::Host(region) => region.shape(),
            Self::Device(region) => region.shape(),
        }
    }
}

impl From<KvRegion> for KvPages {
    fn from(region: KvRegion) -> Self {
        Self::Host(region)
    }
}

/// Pages of one layer that follow each other on both sides of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageRun {
    /// The layer, on both sides.
    pub layer: usize,
    /// First page to read.
    pub from: usize,
    /// First page to write.
    pub to: usize,
    /// Pages.
    pub count: usize,
}

/// All KV pages in a device's memory. Clones are the same memory, which stays allocated until the last of them is gone.
///
/// As with [`KvRegion`], it says where pages are, not who may touch them: whoever copies answers for it that nobody else
/// writes to the same page at the same time.
#[derive(Clone)]
pub struct DeviceRegion {
    memory: Arc<dyn Memory>,
    mover: Arc<dyn Mover>,
    shape: RegionShape,
}

impl std::fmt::Debug for DeviceRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DeviceRegion").field("mover", &self.mover).field("shape", &self.shape).finish()
    }
}

impl DeviceRegion {
    /// `memory` holds pages of this shape, on the device of `mover`.
    pub fn new(memory: Arc<dyn Memory>, mover: Arc<dyn Mover>, shape: RegionShape) -> Self {
        Self { memory, mover, shape }
    }

    /// How many pages, and how large.
    pub fn shape(&self) -> RegionShape {
        self.shape
    }

    /// The device they are on.
    pub fn device(&self) -> DeviceId {
        self.mover.id()
    }

    /// Whether this device can write to the memory of that one.
    pub fn reaches(&self, other: DeviceId) -> bool {
        self.mover.reaches(other)
    }

    /// Marks the end of what was enqueued to be computed so far: what it wrote to pages can be read when the mark is
    /// past.
    pub fn mark(&self) -> Result<Box<dyn Mark>, DriverError> {
        self.mover.mark()
    }

    /// Enqueues copies from host memory into pages, before whatever is computed next. `from` stays as it is until the
    /// mark is past.
    pub fn upload(&self, from: &KvRegion, runs: &[PageRun]) -> Result<Box<dyn Mark>, DriverError> {
        for run in runs {
            let (at, to) =
                (from.shape().offset(run.layer, run.from, run.count), self.address(run.layer, run.to, run.count));
            self.mover.upload(from, at, to, run.count * self.shape.page_bytes)?;
        }
        self.mover.mark()
    }

    /// A stream of copies out of these pages, for one thread.
    pub fn copies(&self) -> Result<PageCopies, DriverError> {
        Ok(PageCopies { stream: self.mover.stream()?, pages: self.clone() })
    }

    /// Locks `region`, so that the device copies from and to it by itself.
    pub fn lock(&self, region: &KvRegion) -> Result<LockedRegion, DriverError> {
        self.mover.lock(region)?;
        Ok(LockedRegion { mover: self.mover.clone(), region: region.clone() })
    }

    /// What another process opens the pages with.
    pub fn export(&self) -> Result<IpcHandle, DriverError> {
        self.mover.export(self.memory.address())
    }

    /// Opens another process's pages, which it says are of this shape and are on a device that this one
    /// [reaches](Self::reaches).
    pub fn open(&self, handle: &IpcHandle, shape: RegionShape) -> Result<PeerPages, DriverError> {
        Ok(PeerPages { start: self.mover.open(handle)?, mover: self.mover.clone(), shape, open: true })
    }

    /// Where consecutive pages of one layer start. Panics outside the region.
    fn address(&self, layer: usize, first: usize, count: usize) -> Address {
        self.memory.address().offset(self.shape.offset(layer, first, count))
    }
}

/// Host memory that a device copies from and to by itself, for as long as this lives.
#[derive(Debug)]
pub struct LockedRegion {
    mover: Arc<dyn Mover>,
    region: KvRegion,
}

impl Drop for LockedRegion {
    fn drop(&mut self) {
        self.mover.unlock(&self.region);
    }
}

/// Another process's pages, opened. Once they are closed, nothing of this process can write to them.
#[derive(Debug)]
pub struct PeerPages {
    mover: Arc<dyn Mover>,
    start: Address,
    shape: RegionShape,
    open: bool,
}

impl PeerPages {
    /// Closes them; an error means that they may still be open.
    pub fn close(mut self) -> Result<(), DriverError> {
        self.open = false;
        self.mover.close(self.start)
    }
}

impl Drop for PeerPages {
    fn drop(&mut self) {
        if self.open {
            // Whoever has to know whether it worked calls `close`.
            let _ = self.mover.close(self.start);
        }
    }
}

/// Copies out of a device's pages, one behind the other, beside its computing.
#[derive(Debug)]
pub struct PageCopies {
    stream: Box<dyn CopyStream>,
    pages: DeviceRegion,
}

impl PageCopies {
    /// Enqueues a copy into host memory.
    pub fn download(&self, run: PageRun, to: &KvRegion) -> Result<(), DriverError> {
        let PageRun { layer, from, to: first, count } = run;
        let (from, at) = (self.pages.address(layer, from, count), to.shape().offset(layer, first, count));
        self.stream.download(from, to, at, count * self.pages.shape.page_bytes)
    }

    /// Enqueues a copy into another process's pages.
    pub fn copy(&self, run: PageRun, to: &PeerPages) -> Result<(), DriverError> {
        let PageRun { layer, from, to: first, count } = run;
        let (from, to) =
            (self.pages.address(layer, from, count), to.start.offset(to.shape.offset(layer, first, count)));
        self.stream.copy(from, to, count * self.pages.shape.page_bytes)
    }

    /// Waits until all copies are over. Afterwards whatever this thread does is ordered behind them for everybody.
    pub fn finish(&self) -> Result<(), DriverError> {
        self.stream.finish()
    }
}
