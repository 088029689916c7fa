//! Memory that is registered with an adapter.

use std::ffi::{c_int, c_void};
use std::io;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use engine_kernels::{DeviceRegion, DmaBuf};
use ibverbs_sys as sys;

use super::RdmaError;
use super::adapter::Adapter;
use super::reach::Registration;
use crate::transfer::Region;

/// Memory that an adapter may read, and its peers write if that was allowed. It stays where it is and registered until
/// the value is dropped.
pub(super) struct Registered {
    key: NonNull<sys::ibv_mr>,
    start: u64,
    pub(super) adapter: Arc<Adapter>,
    _memory: Memory,
}

// SAFETY: a registration may be used from any thread at the same time, as verbs promises.
unsafe impl Send for Registered {}
// SAFETY: as above.
unsafe impl Sync for Registered {}

/// What is registered, so that it is there as long.
enum Memory {
    Host { _region: Region },
    Device { _pages: DeviceRegion },
}

/// What may be done with registered memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// This process's own adapter alone reads and writes it.
    Own,
    /// Peers write it.
    Written,
    /// Peers write it and read it.
    WrittenAndRead,
}

impl Access {
    fn flags(self) -> c_int {
        let own = sys::ibv_access_flags::IBV_ACCESS_LOCAL_WRITE.0;
        let flags = match self {
            // Writing too where only reading is wanted: pages that nobody has touched yet would otherwise be registered
            // as the zeroes they read as, by kernels that do not look ahead.
            Self::Own => own,
            // No relaxed ordering: the word behind the pages must not overtake them on its way through PCIe.
            Self::Written => own | sys::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0,
            Self::WrittenAndRead => {
                own | sys::ibv_access_flags::IBV_ACCESS_REMOTE_WRITE.0 | sys::ibv_access_flags::IBV_ACCESS_REMOTE_READ.0
            }
        };
        flags as c_int
    }
}

impl Registered {
    /// Registers all of `region`.
    pub(super) fn new(adapter: &Arc<Adapter>, region: &Region, access: Access) -> Result<Self, RdmaError> {
        let (bytes, domain) = (region.shape().total_bytes(), adapter.domain.as_ptr());
        // SAFETY: the region is mapped as long as `self` keeps it, which is longer than it is registered.
        let key = unsafe { (adapter.verbs.reg_mr)(domain, region.base().cast(), bytes, access.flags()) };
        let key = NonNull::new(key).ok_or_else(|| {
            let (device, source) = (adapter.choice.device.clone(), io::Error::last_os_error());
            RdmaError::Register { device, bytes, source }
        })?;
        let (start, memory) = (region.base() as u64, Memory::Host { _region: region.clone() });
        Ok(Self { key, start, adapter: adapter.clone(), _memory: memory })
    }

    /// Registers pages in device memory, and the spare bytes behind them. An error where adapter and device do not work
    /// together in this way.
    pub(super) fn on_device(
        adapter: &Arc<Adapter>,
        pages: &DeviceRegion,
        by: Registration,
        access: [Access; 2],
    ) -> Result<[Self; 2], RdmaError> {
        pages.open_to_adapters()?;
        // Closed when both are registered: each keeps what it needs of it.
        let file = match by {
            Registration::DmaBuf => Some(pages.dma_buf(host_page())?),
            Registration::PeerMemory => None,
        };
        let first = (pages.start().0, pages.shape().total_bytes());
        let second = (pages.spare().0, DeviceRegion::SPARE_BYTES);
        let register = |(start, bytes): (u64, usize), access: Access| -> Result<Self, RdmaError> {
            let key = match &file {
                Some(file) => by_file(adapter, file, start - pages.start().0, (start, bytes), access)?,
                // SAFETY: memory of the allocation, which `self` keeps as long as it is registered. It is none of the
                // host's, and so of nobody's but for whoever finds out from the device's driver what it is.
                None => unsafe {
                    (adapter.verbs.reg_mr)(adapter.domain.as_ptr(), start as *mut c_void, bytes, access.flags())
                },
            };
            let key = NonNull::new(key).ok_or_else(|| refused(adapter, by, io::Error::last_os_error()))?;
            let memory = Memory::Device { _pages: pages.clone() };
            Ok(Self { key, start, adapter: adapter.clone(), _memory: memory })
        };
        Ok([register(first, access[0])?, register(second, access[1])?])
    }

    /// Names it in requests to its own adapter.
    pub(super) fn local_key(&self) -> u32 {
        // SAFETY: registered until `self` is dropped; the fields never change.
        unsafe { self.key.as_ref() }.lkey
    }

    /// Names it in requests of peers.
    pub(super) fn remote_key(&self) -> u32 {
        // SAFETY: as above.
        unsafe { self.key.as_ref() }.rkey
    }

    /// Where it starts.
    pub(super) fn address(&self) -> u64 {
        self.start
    }
}

/// Bytes of a page of this host's memory.
fn host_page() -> usize {
    // SAFETY: it asks for a number.
    let bytes = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(bytes).unwrap_or(4096)
}

/// Registers what lies `within` bytes behind the first page; its address is the same in requests.
fn by_file(
    adapter: &Adapter,
    file: &DmaBuf,
    within: u64,
    (start, bytes): (u64, usize),
    access: Access,
) -> Result<*mut sys::ibv_mr, RdmaError> {
    let by = Registration::DmaBuf;
    let Some(register) = adapter.verbs.reg_dmabuf_mr else {
        let lacks = io::Error::new(io::ErrorKind::Unsupported, "this libibverbs is too old for it");
        return Err(refused(adapter, by, lacks));
    };
    let (domain, offset) = (adapter.domain.as_ptr(), file.offset + within);
    // SAFETY: the file is open, and whether it stands for so much memory the kernel checks.
    Ok(unsafe { register(domain, offset, bytes, start, file.file.as_raw_fd(), access.flags()) })
}

fn refused(adapter: &Adapter, by: Registration, source: io::Error) -> RdmaError {
    RdmaError::RegisterDevice { device: adapter.choice.device.clone(), by, source }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // SAFETY: registered once, given back once. A peer's write that comes later is refused by the adapter.
        unsafe { (self.adapter.verbs.dereg_mr)(self.key.as_ptr()) };
    }
}
