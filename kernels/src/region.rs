//! Memory for KV pages that may be handed to other threads and other processes.

use std::fs::File;
use std::io;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

/// How many pages, and how large: one range a layer, the layers one after the other, `[layer][page][page_bytes]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionShape {
    /// Layers of the model.
    pub layers: usize,
    /// KV pages.
    pub pages: usize,
    /// Bytes of one page of one layer.
    pub page_bytes: usize,
}

impl RegionShape {
    /// Bytes from the start of one layer to the start of the next.
    pub const fn layer_stride(&self) -> usize {
        self.pages * self.page_bytes
    }

    /// Bytes of the whole region.
    pub const fn total_bytes(&self) -> usize {
        self.layers * self.layer_stride()
    }

    /// Where `count` consecutive pages of one layer start, in bytes from the region's start. Panics outside the region.
    pub fn offset(&self, layer: usize, first: usize, count: usize) -> usize {
        assert!(layer < self.layers && first <= self.pages && count <= self.pages - first, "pages outside the region");
        layer * self.layer_stride() + first * self.page_bytes
    }

    /// Total bytes, unless they do not fit an address.
    fn checked_bytes(&self) -> Option<usize> {
        let bytes = self.layers.checked_mul(self.pages)?.checked_mul(self.page_bytes)?;
        isize::try_from(bytes).is_ok().then_some(bytes)
    }
}

/// The memory of all KV pages. Clones are the same memory, which stays mapped until the last of them is gone.
///
/// The region says where pages are, not who may touch them: it hands out addresses, and whoever reads or writes through
/// them answers for it that nobody else writes to the same page at the same time.
#[derive(Debug, Clone)]
pub struct KvRegion {
    map: Arc<MmapRaw>,
    /// The file behind the mapping, if other processes may map it too.
    file: Option<Arc<File>>,
    shape: RegionShape,
}

impl KvRegion {
    /// Reserves memory of this process alone, in large pages where the system has them. The system gives it, zeroed, as
    /// it is first written to.
    pub fn private(shape: RegionShape) -> io::Result<Self> {
        let bytes = checked(shape)?;
        let map = MmapRaw::from(MmapOptions::new().len(bytes.max(1)).map_anon()?);
        Ok(Self::new(map, None, shape))
    }

    /// Reserves memory that other processes may map as well: a file that exists in memory only (`memfd`), of a size
    /// that nobody can change any more, so that no process that maps it can be made to fault by another.
    ///
    /// Linux seldom gives such memory large pages (`/sys/kernel/mm/transparent_hugepage/shmem_enabled` is `never` by
    /// default), and attention was measured to read it up to 15 % slower than [`KvRegion::private`].
    #[cfg(target_os = "linux")]
    pub fn shared(shape: RegionShape) -> io::Result<Self> {
        use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

        let bytes = checked(shape)?;
        let file = File::from(memfd_create(c"engine-kv", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?);
        ftruncate(&file, bytes.max(1) as u64)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
        let map = MmapOptions::new().len(bytes.max(1)).map_raw(&file)?;
        Ok(Self::new(map, Some(file), shape))
    }

    /// Maps a region that another process made with [`KvRegion::shared`] and says is of this shape. A child process
    /// does not inherit the mapping. Refuses a file that is smaller than the shape needs, or that could still be shrunk
    /// under us.
    #[cfg(target_os = "linux")]
    pub fn open(file: File, shape: RegionShape) -> io::Result<Self> {
        use rustix::fs::{SealFlags, fcntl_get_seals};

        let bytes = checked(shape)?;
        if !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "shared memory that can be shrunk"));
        }
        if file.metadata()?.len() < bytes.max(1) as u64 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "shared memory smaller than the region it holds"));
        }
        let map = MmapOptions::new().len(bytes.max(1)).map_raw(&file)?;
        map.advise(memmap2::Advice::DontFork)?;
        Ok(Self::new(map, Some(file), shape))
    }

    fn new(map: MmapRaw, file: Option<File>, shape: RegionShape) -> Self {
        #[cfg(target_os = "linux")]
        if map.len() >= 1 << 22 {
            // Fewer misses of the translation buffer; a system that cannot is no worse off.
            let _ = map.advise(memmap2::Advice::HugePage);
        }
        Self { map: Arc::new(map), file: file.map(Arc::new), shape }
    }

    /// How many pages, and how large.
    pub fn shape(&self) -> RegionShape {
        self.shape
    }

    /// Where the region starts.
    pub fn base(&self) -> *mut u8 {
        self.map.as_mut_ptr()
    }

    /// Where `count` consecutive pages of one layer start: `count × page_bytes` bytes. Panics outside the region.
    pub fn pages(&self, layer: usize, first: usize, count: usize) -> *mut u8 {
        // SAFETY: within the mapping, or the offset would have panicked.
        unsafe { self.base().add(self.shape.offset(layer, first, count)) }
    }

    /// The file to hand to another process, if the region is one that can be shared.
    pub fn file(&self) -> Option<&File> {
        self.file.as_deref()
    }
}

fn checked(shape: RegionShape) -> io::Result<usize> {
    shape.checked_bytes().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "more bytes than can be addressed"))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const SHAPE: RegionShape = RegionShape { layers: 2, pages: 5, page_bytes: 4096 };

    #[test]
    fn what_is_written_through_one_mapping_is_read_through_another() {
        let ours = KvRegion::shared(SHAPE).unwrap();
        let theirs = KvRegion::open(ours.file().unwrap().try_clone().unwrap(), SHAPE).unwrap();
        assert_ne!(ours.base(), theirs.base());
        // SAFETY: the last byte of the region, touched by this thread alone.
        unsafe {
            ours.pages(1, 4, 1).add(4095).write(7);
            assert_eq!(theirs.pages(1, 4, 1).add(4095).read(), 7);
        }
    }

    #[test]
    fn memory_that_could_be_shrunk_or_is_too_small_is_not_mapped() {
        let ours = KvRegion::shared(SHAPE).unwrap();
        let larger = RegionShape { pages: 6, ..SHAPE };
        assert!(KvRegion::open(ours.file().unwrap().try_clone().unwrap(), larger).is_err());
        assert!(ours.file().unwrap().set_len(1).is_err());
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
        let unsealed = File::from(rustix::fs::memfd_create(c"unsealed", flags).unwrap());
        unsealed.set_len(SHAPE.total_bytes() as u64).unwrap();
        assert!(KvRegion::open(unsealed, SHAPE).is_err());
    }

    #[test]
    fn a_shape_beyond_the_address_space_is_an_error() {
        let shape = RegionShape { layers: usize::MAX, pages: 2, page_bytes: 2 };
        assert!(KvRegion::private(shape).is_err());
        assert!(KvRegion::shared(shape).is_err());
    }

    #[test]
    #[should_panic(expected = "outside the region")]
    fn pages_beyond_the_last_are_no_address() {
        KvRegion::private(SHAPE).unwrap().pages(0, 4, 2);
    }
}
