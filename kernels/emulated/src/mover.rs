//! The emulated device as those see it who move its memory.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use engine_kernels::KvRegion;
use engine_kernels::cuda::{
    AdapterAccess, Address, CopySpan, CopyStream, DeviceId, DriverError, HostSpan, IpcHandle, Mark, Mover,
};

use super::lock;
use super::queue::{Queue, Work, failed};

/// There is one device, and its memory is the process's: what is exported is opened by the same.
#[derive(Debug, Clone)]
pub(crate) struct EmulatedMover(pub(crate) Arc<Mutex<Queue>>);

struct EmulatedMark(Arc<Mutex<Queue>>, u64);

impl Mark for EmulatedMark {
    fn is_past(&self) -> Result<bool, DriverError> {
        let queue = lock(&self.0);
        queue.state()?;
        Ok(queue.has_run(self.1))
    }

    fn wait(&self) -> Result<(), DriverError> {
        let busy = lock(&self.0).busy.clone();
        busy.wait();
        lock(&self.0).run_until(self.1)
    }
}

/// Whether the device is busy with something else, for as long as a test says so.
#[derive(Debug, Default)]
pub(crate) struct Busy {
    is_busy: Mutex<bool>,
    changed: Condvar,
}

impl Busy {
    pub(crate) fn set(&self, is_busy: bool) {
        *self.is_busy.lock().unwrap_or_else(PoisonError::into_inner) = is_busy;
        self.changed.notify_all();
    }

    fn wait(&self) {
        let is_busy = self.is_busy.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.changed.wait_while(is_busy, |is_busy| *is_busy));
    }
}

impl Mover for EmulatedMover {
    fn id(&self) -> DeviceId {
        DeviceId(*b"an emulated one.")
    }

    fn reaches(&self, other: DeviceId) -> bool {
        other == self.id()
    }

    fn mark(&self) -> Result<Box<dyn Mark>, DriverError> {
        let queue = lock(&self.0);
        queue.state()?;
        if queue.captured.is_some() {
            return Err(failed("marking", "a recording is under way"));
        }
        Ok(Box::new(EmulatedMark(self.0.clone(), queue.end())))
    }

    fn upload(&self, from: &KvRegion, spans: &[HostSpan]) -> Result<(), DriverError> {
        let mut queue = lock(&self.0);
        if queue.unseen {
            return queue.state();
        }
        // Not in the order they were given in.
        spans.iter().rev().try_for_each(|&HostSpan { at, device, bytes }| {
            queue.push(Work::Upload { region: from.clone(), at, to: device.0 as usize, bytes })
        })
    }

    fn stream(&self) -> Result<Box<dyn CopyStream>, DriverError> {
        lock(&self.0).state()?;
        Ok(Box::new(Copies { queue: self.0.clone(), waiting: Mutex::default() }))
    }

    fn lock(&self, _: &KvRegion) -> Result<(), DriverError> {
        lock(&self.0).state()
    }

    fn unlock(&self, _: &KvRegion) {}

    fn export(&self, start: Address) -> Result<IpcHandle, DriverError> {
        if !lock(&self.0).holds(start.0 as usize, 1) {
            return Err(failed("exporting", "it is nobody's"));
        }
        let mut handle = [0; 64];
        handle[..8].copy_from_slice(&start.0.to_le_bytes());
        Ok(IpcHandle(handle))
    }

    fn open(&self, handle: &IpcHandle) -> Result<Address, DriverError> {
        let mut start = [0; 8];
        start.copy_from_slice(&handle.0[..8]);
        let start = u64::from_le_bytes(start);
        let mut queue = lock(&self.0);
        if !queue.holds(start as usize, 1) {
            return Err(failed("opening", "it is nobody's"));
        }
        queue.opened += 1;
        let busy = queue.busy.clone();
        drop(queue);
        busy.wait();
        Ok(Address(start))
    }

    fn close(&self, _: Address) -> Result<(), DriverError> {
        let mut queue = lock(&self.0);
        queue.opened = queue.opened.checked_sub(1).ok_or_else(|| failed("closing", "nothing is open"))?;
        Ok(())
    }

    fn adapter_access(&self) -> Result<AdapterAccess, DriverError> {
        let queue = lock(&self.0);
        queue.state()?;
        // What takes the most trouble.
        let access = AdapterAccess { dma_buf: true, by_address: true, ordered: false, flushes: true };
        Ok(queue.adapter_access.unwrap_or(access))
    }

    fn open_to_adapters(&self, start: Address) -> Result<(), DriverError> {
        let mut queue = lock(&self.0);
        if !queue.holds(start.0 as usize, 1) {
            return Err(failed("preparing for adapters", "it is nobody's"));
        }
        queue.open_to_adapters = Some(start.0 as usize);
        Ok(())
    }

    fn dma_buf(&self, start: Address, bytes: usize) -> Result<OwnedFd, DriverError> {
        let mut queue = lock(&self.0);
        let start = start.0 as usize;
        if !(start | bytes).is_multiple_of(4096) || !queue.holds(start, bytes) {
            return Err(failed("exporting to adapters", "it is not whole pages of one allocation"));
        }
        queue.dma_bufs += 1;
        // Of the right kind to be opened, and of none that an adapter's driver takes.
        let file = rustix::fs::memfd_create(c"dma-buf", rustix::fs::MemfdFlags::CLOEXEC);
        file.map_err(|error| failed("exporting to adapters", error.to_string()))
    }

    fn flush(&self) -> Result<(), DriverError> {
        let mut queue = lock(&self.0);
        queue.state()?;
        queue.flushes += 1;
        Ok(())
    }
}

/// Copies that run when they are waited for, whatever the computing has come to by then.
#[derive(Debug)]
struct Copies {
    queue: Arc<Mutex<Queue>>,
    waiting: Mutex<Vec<Copy>>,
}

#[derive(Debug)]
enum Copy {
    Download { from: usize, to: KvRegion, at: usize, bytes: usize },
    Within { from: usize, to: usize, bytes: usize },
}

impl Copies {
    fn push(&self, copy: Copy) -> Result<(), DriverError> {
        lock(&self.queue).state()?;
        self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(copy);
        Ok(())
    }
}

impl CopyStream for Copies {
    fn download(&self, to: &KvRegion, spans: &[HostSpan]) -> Result<(), DriverError> {
        // Not in the order they were given in.
        spans.iter().rev().try_for_each(|&HostSpan { at, device, bytes }| {
            self.push(Copy::Download { from: device.0 as usize, to: to.clone(), at, bytes })
        })
    }

    fn copy(&self, spans: &[CopySpan]) -> Result<(), DriverError> {
        // Not in the order they were given in.
        spans.iter().rev().try_for_each(|&CopySpan { from, to, bytes }| {
            self.push(Copy::Within { from: from.0 as usize, to: to.0 as usize, bytes })
        })
    }

    fn finish(&self) -> Result<(), DriverError> {
        let queue = lock(&self.queue);
        queue.state()?;
        if queue.copies_lost {
            return Err(failed("waiting for copies", "their end is lost"));
        }
        for copy in std::mem::take(&mut *self.waiting.lock().unwrap_or_else(|poisoned| poisoned.into_inner())) {
            let (from, to, bytes) = match &copy {
                Copy::Download { from, to, at, bytes } => {
                    if at + bytes > to.shape().total_bytes() {
                        return Err(failed(format!("copying {bytes} bytes"), "they are not in the region"));
                    }
                    // SAFETY: within the region.
                    (*from, unsafe { to.base().add(*at) }, *bytes)
                }
                Copy::Within { from, to, bytes } => {
                    if !queue.holds(*to, *bytes) {
                        return Err(failed(format!("copying {bytes} bytes"), "they are not in one allocation"));
                    }
                    (*from, *to as *mut u8, *bytes)
                }
            };
            if !queue.holds(from, bytes) {
                return Err(failed(format!("copying {bytes} bytes"), "they are not in one allocation"));
            }
            if queue.unreached {
                continue;
            }
            // SAFETY: both were checked; nobody else touches either before this copy is waited for.
            unsafe { std::ptr::copy(from as *const u8, to, bytes) };
        }
        Ok(())
    }
}
