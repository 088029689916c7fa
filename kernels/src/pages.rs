//! Where KV pages are, for whoever moves them between workers.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::cuda::{
    AdapterAccess, Address, CopySpan, CopyStream, DeviceId, DriverError, HostSpan, IpcHandle, Mark, Memory, Mover,
};
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
/// As with [`KvRegion`], it says where pages are, not who may touch them: whoever copies answers for it that nobody
/// else writes to the same page at the same time.
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

/// Memory of a device as adapters' drivers take it.
#[derive(Debug)]
pub struct DmaBuf {
    /// Stands for the memory. It can be closed once the memory is registered.
    pub file: OwnedFd,
    /// Where in it the pages start.
    pub offset: u64,
}

impl DeviceRegion {
    /// Bytes behind the pages, on a page of the host of their own, that hold nothing: what adapters write and read to
    /// see whether the memory is there.
    pub const SPARE_BYTES: usize = 4096;

    /// Bytes that memory for pages of this shape has: theirs, and the [spare ones](Self::spare) behind them.
    pub const fn bytes(shape: RegionShape) -> usize {
        Self::spare_offset(shape).saturating_add(Self::SPARE_BYTES)
    }

    const fn spare_offset(shape: RegionShape) -> usize {
        // More than there is of memory is asked for in vain, and not counted wrong.
        let pages = shape.layers.saturating_mul(shape.pages).saturating_mul(shape.page_bytes);
        pages.saturating_add(Self::SPARE_BYTES - 1) / Self::SPARE_BYTES * Self::SPARE_BYTES
    }

    /// `memory` is of the device of `mover`, and has the [bytes](Self::bytes) that pages of this shape take.
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

    /// Whether this device can write to the memory of that one, as far as this process can tell.
    pub fn reaches(&self, other: DeviceId) -> bool {
        self.mover.reaches(other)
    }

    /// Marks the end of what was enqueued to be computed so far: what it wrote to pages can be read when the mark is
    /// past.
    pub fn mark(&self) -> Result<Box<dyn Mark>, DriverError> {
        self.mover.mark()
    }

    /// Enqueues copies from host memory into pages, whose order does not matter, before whatever is computed next.
    /// `from` stays as it is until the mark is past.
    pub fn upload(&self, from: &KvRegion, runs: &[PageRun]) -> Result<Box<dyn Mark>, DriverError> {
        let span = |&PageRun { layer, from: first, to, count }: &PageRun| HostSpan {
            at: from.shape().offset(layer, first, count),
            device: self.address(layer, to, count),
            bytes: count * self.shape.page_bytes,
        };
        self.mover.upload(from, &runs.iter().map(span).collect::<Vec<_>>())?;
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

    /// How adapters may get at the pages.
    pub fn adapter_access(&self) -> Result<AdapterAccess, DriverError> {
        self.mover.adapter_access()
    }

    /// Prepares the pages for adapters. Once is enough.
    pub fn open_to_adapters(&self) -> Result<(), DriverError> {
        self.mover.open_to_adapters(self.memory.address())
    }

    /// The pages and the spare bytes for adapters' drivers, on a host with pages of `host_page` bytes.
    pub fn dma_buf(&self, host_page: usize) -> Result<DmaBuf, DriverError> {
        let whole = whole_pages(self.memory.address().0, Self::bytes(self.shape), host_page);
        Ok(DmaBuf { file: self.mover.dma_buf(Address(whole.start), whole.bytes)?, offset: whole.offset })
    }

    /// Returns when what adapters had written is there for whatever is computed next.
    pub fn flush(&self) -> Result<(), DriverError> {
        self.mover.flush()
    }

    /// Has the device copy the start of `from`, as many bytes as are spare, to the spare ones, and waits for it.
    pub fn fill_spare(&self, from: &KvRegion) -> Result<(), DriverError> {
        self.mover.upload(from, &[self.spare_span()])?;
        self.mover.mark()?.wait()
    }

    /// Has the device copy the spare bytes to the start of `to`, and waits for it.
    pub fn read_spare(&self, to: &KvRegion) -> Result<(), DriverError> {
        let stream = self.mover.stream()?;
        stream.download(to, &[self.spare_span()])?;
        stream.finish()
    }

    fn spare_span(&self) -> HostSpan {
        HostSpan { at: 0, device: self.spare(), bytes: Self::SPARE_BYTES }
    }

    /// Where the first page starts.
    pub fn start(&self) -> Address {
        self.memory.address()
    }

    /// Where the spare bytes start.
    pub fn spare(&self) -> Address {
        self.memory.address().offset(Self::spare_offset(self.shape))
    }

    /// Where consecutive pages of one layer start. Panics outside the region.
    fn address(&self, layer: usize, first: usize, count: usize) -> Address {
        self.memory.address().offset(self.shape.offset(layer, first, count))
    }
}

/// The pages of a host that some memory lies in.
#[derive(Debug, PartialEq, Eq)]
struct WholePages {
    start: u64,
    bytes: usize,
    /// Where in them the memory starts.
    offset: u64,
}

fn whole_pages(start: u64, bytes: usize, host_page: usize) -> WholePages {
    let page = host_page as u64;
    let (first, end) = (start / page * page, (start + bytes as u64).next_multiple_of(page));
    WholePages { start: first, bytes: (end - first) as usize, offset: start - first }
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
    /// Enqueues copies into host memory, whose order does not matter.
    pub fn download(&self, runs: impl IntoIterator<Item = PageRun>, to: &KvRegion) -> Result<(), DriverError> {
        let span = |PageRun { layer, from, to: first, count }| HostSpan {
            at: to.shape().offset(layer, first, count),
            device: self.pages.address(layer, from, count),
            bytes: count * self.pages.shape.page_bytes,
        };
        self.stream.download(to, &runs.into_iter().map(span).collect::<Vec<_>>())
    }

    /// Enqueues copies into another process's pages, whose order does not matter.
    pub fn copy(&self, runs: impl IntoIterator<Item = PageRun>, to: &PeerPages) -> Result<(), DriverError> {
        let span = |PageRun { layer, from, to: first, count }| CopySpan {
            from: self.pages.address(layer, from, count),
            to: to.start.offset(to.shape.offset(layer, first, count)),
            bytes: count * self.pages.shape.page_bytes,
        };
        self.stream.copy(&runs.into_iter().map(span).collect::<Vec<_>>())
    }

    /// Enqueues a copy to other pages of the same memory.
    pub fn copy_within(&self, run: PageRun) -> Result<(), DriverError> {
        let PageRun { layer, from, to, count } = run;
        let [from, to] = [from, to].map(|first| self.pages.address(layer, first, count));
        self.stream.copy(&[CopySpan { from, to, bytes: count * self.pages.shape.page_bytes }])
    }

    /// Waits until all copies are over. Afterwards whatever this thread does is ordered behind them for everybody.
    pub fn finish(&self) -> Result<(), DriverError> {
        self.stream.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_handed_out_in_whole_pages_of_the_host() {
        let whole = |start, bytes, offset| WholePages { start, bytes, offset };
        assert_eq!(whole_pages(8192, 4096, 4096), whole(8192, 4096, 0));
        assert_eq!(whole_pages(8192, 4097, 4096), whole(8192, 8192, 0));
        assert_eq!(whole_pages(8192 + 256, 4096, 4096), whole(8192, 8192, 256));
        // A host with large pages.
        assert_eq!(whole_pages(3 << 16, 100, 64 << 10), whole(3 << 16, 64 << 10, 0));
        assert_eq!(whole_pages((3 << 16) + 4096, 64 << 10, 64 << 10), whole(3 << 16, 128 << 10, 4096));
    }

    #[test]
    fn the_spare_bytes_lie_behind_the_pages_and_share_no_page_of_the_host_with_them() {
        let shape = RegionShape { layers: 3, pages: 5, page_bytes: 100 };
        assert_eq!(DeviceRegion::bytes(shape), 2 * 4096);
        assert_eq!(DeviceRegion::bytes(RegionShape { page_bytes: 4096, ..shape }), 16 * 4096);
    }
}
