//! Where pages lie: in host memory, or in a device's.

use std::{
    os::unix::fs::FileExt,
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result, bail, ensure};
use engine_kernels::{DeviceRegion, KvPages, KvRegion, PageCopies, PageRun, RegionShape, cuda::Driver};

use super::Pages;
use crate::{
    cli::DeviceArg,
    worker::{Chosen, choose},
};

/// Takes memory of a device for pages of a shape.
type Reserve = Arc<dyn Fn(RegionShape) -> Result<DeviceRegion> + Send + Sync>;

/// Where a side's pages lie.
#[derive(Clone)]
pub enum Place {
    /// In host memory.
    Host,
    /// In the memory of a device.
    Device(Reserve),
}

impl Place {
    /// Where `--device` says.
    pub(super) fn of(wanted: DeviceArg) -> Result<Self> {
        Ok(match choose(wanted)? {
            Chosen::Cpu => Self::Host,
            #[cfg(feature = "cuda")]
            Chosen::Cuda { device, .. } => Self::on(device),
        })
    }

    /// In the memory of this device.
    pub fn on<D: Driver>(device: D) -> Self {
        let device = Mutex::new(device);
        Self::Device(Arc::new(move |shape| {
            let device = device.lock().unwrap_or_else(PoisonError::into_inner);
            let memory = device.allocate(DeviceRegion::bytes(shape))?;
            // The zeros come in the order of what is computed, which copies of other streams and processes are not in.
            device.synchronize()?;
            Ok(DeviceRegion::new(Arc::new(memory), device.mover(), shape))
        }))
    }

    /// Zeroed pages for others to write to.
    pub(super) fn lent(&self, pages: Pages) -> Result<KvPages> {
        match self {
            Self::Host => Ok(KvRegion::shared(pages.shape()).context("cannot reserve pages")?.into()),
            Self::Device(reserve) => Ok(KvPages::Device(reserve(pages.shape())?)),
        }
    }

    /// Pages to be written, filled. In host memory that is this process's alone, in large pages where the system has
    /// them, as a prefill worker's is.
    pub(super) fn filled(&self, pages: Pages) -> Result<KvPages> {
        let host = KvRegion::private(pages.shape())?;
        // Through the system, as writing to an address is nothing that safe code can do.
        let memory = std::fs::File::options().write(true).open("/proc/self/mem")?;
        let mut page = vec![0; pages.page_bytes()];
        for number in 0..pages.shape().pages {
            Pages::fill(number as u32, &mut page);
            memory.write_all_at(&page, host.base() as u64 + (number * page.len()) as u64)?;
        }
        let Self::Device(reserve) = self else { return Ok(host.into()) };
        let device = reserve(pages.shape())?;
        device.upload(&host, &[PageRun { layer: 0, from: 0, to: 0, count: pages.shape().pages }])?.wait()?;
        Ok(KvPages::Device(device))
    }

    /// What copies as many bytes within the device, to compare with.
    pub(super) fn yardstick(&self, pages: Pages) -> Result<Option<Yardstick>> {
        let Self::Device(reserve) = self else { return Ok(None) };
        let region = reserve(pages.shape())?;
        Ok(Some(Yardstick { copies: region.copies()?, pages: pages.count() }))
    }
}

/// One copy, within a device, of as many bytes as a round writes.
pub(super) struct Yardstick {
    copies: PageCopies,
    pages: usize,
}

impl Yardstick {
    /// Copies; returns when that is done.
    pub(super) fn copy(&self) -> Result<()> {
        self.copies.copy_within(PageRun { layer: 0, from: 0, to: self.pages, count: self.pages })?;
        Ok(self.copies.finish()?)
    }
}

/// Reads pages that another process writes to. Through a file: reading memory that somebody else writes is nothing that
/// safe code can do.
pub(super) struct Readback {
    /// What the file is of: the pages, or one that they are copied to.
    host: KvRegion,
    device: Option<PageCopies>,
}

impl Readback {
    pub(super) fn new(pages: &KvPages) -> Result<Self> {
        Ok(match pages {
            KvPages::Host(region) => Self { host: region.clone(), device: None },
            KvPages::Device(region) => {
                let one = KvRegion::shared(RegionShape { pages: 1, ..region.shape() })?;
                Self { host: one, device: Some(region.copies()?) }
            }
        })
    }

    /// Fills `bytes` with what a page has from byte `from` on.
    pub(super) fn read(&self, page: u32, from: usize, bytes: &mut [u8]) -> Result<()> {
        let mut first = page as usize;
        if let Some(copies) = &self.device {
            copies.download([PageRun { layer: 0, from: first, to: 0, count: 1 }], &self.host)?;
            copies.finish()?;
            first = 0;
        }
        let page_bytes = self.host.shape().page_bytes;
        ensure!(from + bytes.len() <= page_bytes, "bytes of a page");
        let Some(file) = self.host.file() else { bail!("pages that are lent have a file") };
        Ok(file.read_exact_at(bytes, (first * page_bytes + from) as u64)?)
    }
}
