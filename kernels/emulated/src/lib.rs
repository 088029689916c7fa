//! A CUDA driver for tests on machines without one.
//!
//! It runs the very kernels of `kernels/cuda`, compiled for the host: `simt/` says how. It is as strict as it can be:
//!
//! - What is enqueued runs as late as it may: when somebody waits for it. Whoever reads too early reads old data.
//! - Memory ends at a page nobody may touch, so a kernel that goes beyond it faults.
//! - Arguments are compared with what the kernel takes, and pointers with what is allocated.
//! - Threads of a block, and blocks, go on in another order in each launch; threads that wait for each other at
//!   different places are an error.
//! - What devices of compute capability 9.0 do by themselves is done as late as it may be: boxes of a matrix arrive in
//!   shared memory when no thread can go on without them, products are computed when they are waited for. Until then
//!   what was there reads as not a number. (But in some blocks of a grid boxes arrive at once, and in some a warp goes
//!   on only when no other can.) No other device takes their kernels.

mod memory;
mod mover;
mod queue;

use std::ffi::CString;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use engine_kernels::cuda::{
    AdapterAccess, Address, Boxes, CudaBackend, Driver, DriverError, HostMemory, Launch, Memory, Mover, Start,
    TensorMap,
};

use memory::Guarded;
use mover::EmulatedMover;
use queue::{Queue, Work, failed};

/// An emulated device, of compute capability 9.0 or of one before.
#[derive(Debug, Clone, Default)]
pub struct EmulatedDevice<const HOPPER: bool>(Arc<Mutex<Queue>>);

/// An emulated device of a compute capability that all kernels but those for 9.0 run on.
pub type Emulated = EmulatedDevice<false>;

/// An emulated device of compute capability 9.0.
pub type EmulatedHopper = EmulatedDevice<true>;

/// A backend on an emulated device.
pub type EmulatedBackend = CudaBackend<Emulated>;

/// Memory of an emulated device, or host memory that it knows.
#[derive(Debug)]
pub struct EmulatedMemory {
    memory: Guarded,
    queue: Arc<Mutex<Queue>>,
}

/// What an emulated device says it has.
const MEMORY_BYTES: usize = 1 << 34;
/// Multiprocessors, for which work is cut: few, so that small tests too have more than fills the device.
const PROCESSORS: usize = 4;
/// Those of an H100, of which small tests leave most without work.
const HOPPER_PROCESSORS: usize = 132;

/// Where recordings fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// They cannot be begun.
    AtBegin,
    /// Something spoils them: nothing more is recorded until they are ended, and that fails too.
    Amid,
    /// They cannot be made into what is replayed.
    AtEnd,
}

/// A recording.
#[derive(Debug)]
pub struct EmulatedGraph(Vec<Work>);

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<const HOPPER: bool> EmulatedDevice<HOPPER> {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        lock(&self.0)
    }

    /// Allocations that are open here as another process's, or are being opened.
    pub fn open_handles(&self) -> usize {
        self.queue().opened
    }

    /// From now on nobody can tell when copies beside the computing are over.
    pub fn lose_copies(&self) {
        self.queue().copies_lost = true;
    }

    /// Lets whatever is asked of the device from now on fail.
    pub fn break_down(&self) {
        self.queue().break_down();
    }

    /// From now on this is what adapters may do with its memory.
    pub fn set_adapter_access(&self, access: AdapterAccess) {
        self.queue().adapter_access = Some(access);
    }

    /// From now on adapters do not get to see what is copied to its memory beside the computing (`unseen`), or it what
    /// they write there (`unreached`), though either does not notice.
    pub fn mislead_adapters(&self, unseen: bool, unreached: bool) {
        let mut queue = self.queue();
        (queue.unseen, queue.unreached) = (unseen, unreached);
    }

    /// Whether the allocation that starts here was the last to be prepared for adapters.
    pub fn is_open_to_adapters(&self, start: Address) -> bool {
        self.queue().open_to_adapters == Some(start.0 as usize)
    }

    /// Files for adapters' drivers that were handed out so far.
    pub fn dma_bufs(&self) -> u64 {
        self.queue().dma_bufs
    }

    /// How often adapters' writes were waited for.
    pub fn flushes(&self) -> u64 {
        self.queue().flushes
    }

    /// From now on recordings fail there, or nowhere.
    pub fn refuse_recordings(&self, refusal: Option<Refusal>) {
        self.queue().refusal = refusal;
    }

    /// Says from now on that it has so many multiprocessors.
    pub fn set_processors(&self, processors: usize) {
        self.queue().processors = Some(processors);
    }

    /// Says from now on that so many bytes are free.
    pub fn leave_free(&self, bytes: usize) {
        self.queue().free = Some(bytes);
    }

    /// From now on there is no room for so many bytes in one piece, whatever it says is free.
    pub fn leave_no_room_for(&self, bytes: usize) {
        self.queue().too_large = Some(bytes);
    }

    /// Bytes of all allocations there are.
    pub fn bytes_allocated(&self) -> usize {
        self.queue().bytes_allocated()
    }

    /// Has whoever waits for a mark, or opens another process's memory, wait until this is called again with `false`:
    /// for a device that takes its time.
    pub fn keep_busy(&self, is_busy: bool) {
        let busy = self.queue().busy.clone();
        busy.set(is_busy);
    }

    /// Recordings that were asked for so far.
    pub fn recordings(&self) -> u64 {
        self.queue().recordings
    }

    /// Events that were made so far.
    pub fn events(&self) -> u64 {
        self.queue().events
    }

    /// Kernels that were run so far.
    pub fn launches(&self) -> u64 {
        self.queue().launches
    }

    fn memory(&self, bytes: usize) -> Result<EmulatedMemory, DriverError> {
        if self.queue().captured.is_some() {
            return Err(failed("allocating", "a recording is under way"));
        }
        if self.queue().too_large.is_some_and(|too_large| bytes >= too_large) {
            return Err(DriverError::OutOfMemory { bytes });
        }
        let memory = Guarded::new(bytes).ok_or(DriverError::OutOfMemory { bytes })?;
        self.queue().allocated(memory.start(), bytes);
        Ok(EmulatedMemory { memory, queue: self.0.clone() })
    }

    /// Waits for everything, and checks that there is such memory.
    fn settled(&self, address: Address, bytes: usize) -> Result<usize, DriverError> {
        let mut queue = self.queue();
        queue.run_all()?;
        let start = address.0 as usize;
        if !queue.holds(start, bytes) {
            return Err(failed(format!("copying {bytes} bytes"), "they are not in one allocation"));
        }
        Ok(start)
    }
}

impl<const HOPPER: bool> Start for EmulatedDevice<HOPPER> {
    fn start() -> Result<Self, DriverError> {
        Ok(Self::default())
    }
}

impl Memory for EmulatedMemory {
    fn address(&self) -> Address {
        Address(self.memory.start() as u64)
    }
}

impl HostMemory for EmulatedMemory {
    fn start(&self) -> *mut u8 {
        self.memory.start() as *mut u8
    }
}

impl Drop for EmulatedMemory {
    fn drop(&mut self) {
        let mut queue = lock(&self.queue);
        // What was enqueued may use it. A failure of that comes up elsewhere.
        let _ = queue.run_all();
        queue.freed(self.memory.start());
    }
}

impl<const HOPPER: bool> Driver for EmulatedDevice<HOPPER> {
    type Memory = EmulatedMemory;
    type HostMemory = EmulatedMemory;
    type Event = u64;
    type Graph = EmulatedGraph;

    fn name(&self) -> String {
        "emulated".into()
    }

    fn processors(&self) -> usize {
        self.queue().processors.unwrap_or(if HOPPER { HOPPER_PROCESSORS } else { PROCESSORS })
    }

    fn has_wgmma(&self) -> bool {
        HOPPER
    }

    fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap, DriverError> {
        if !HOPPER {
            return Err(failed("describing a matrix", "only devices of compute capability 9.0 copy boxes"));
        }
        self.queue().map(boxes)
    }

    fn memory(&self) -> Result<(usize, usize), DriverError> {
        Ok((self.queue().free.unwrap_or(MEMORY_BYTES), MEMORY_BYTES))
    }

    fn allocate(&self, bytes: usize) -> Result<EmulatedMemory, DriverError> {
        self.memory(bytes)
    }

    fn allocate_host(&self, bytes: usize) -> Result<EmulatedMemory, DriverError> {
        self.memory(bytes)
    }

    fn write(&self, from: &[u8], to: Address) -> Result<(), DriverError> {
        let to = self.settled(to, from.len())?;
        // SAFETY: there are so many bytes, and nothing that uses them is under way.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    fn read(&self, from: Address, to: &mut [u8]) -> Result<(), DriverError> {
        let from = self.settled(from, to.len())?;
        // SAFETY: there are so many bytes, and nothing that uses them is under way.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
        Ok(())
    }

    fn upload(&self, from: &EmulatedMemory, to: Address, bytes: usize) -> Result<(), DriverError> {
        self.queue().push(Work::Copy { from: from.memory.start(), to: to.0 as usize, bytes })
    }

    fn download(&self, from: Address, to: &EmulatedMemory, bytes: usize) -> Result<(), DriverError> {
        self.queue().push(Work::Copy { from: from.0 as usize, to: to.memory.start(), bytes })
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        let name = CString::new(launch.kernel).map_err(|error| failed("launching", error.to_string()))?;
        let int = |n: usize| u32::try_from(n).map_err(|error| failed("launching", error.to_string()));
        let grid = [int(launch.grid[0])?, int(launch.grid[1])?, int(launch.grid[2])?];
        let (block, shared) = (int(launch.block)?, int(launch.shared)?);
        let (maps, args) = (launch.maps.to_vec(), launch.args.to_vec());
        self.queue().push(Work::Kernel { name, grid, block, shared, maps, args })
    }

    fn record(&self, used: Option<u64>) -> Result<u64, DriverError> {
        let mut queue = self.queue();
        queue.events += u64::from(used.is_none());
        Ok(queue.end())
    }

    fn wait(&self, event: &u64) -> Result<(), DriverError> {
        self.queue().run_until(*event)
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        self.queue().run_all()
    }

    fn begin_capture(&self) -> Result<(), DriverError> {
        let mut queue = self.queue();
        queue.recordings += 1;
        if queue.captured.is_some() {
            return Err(failed("recording", "a recording is under way"));
        }
        if queue.refusal == Some(Refusal::AtBegin) {
            return Err(failed("recording", "it cannot be begun"));
        }
        queue.captured = Some(Vec::new());
        Ok(())
    }

    fn end_capture(&self) -> Result<EmulatedGraph, DriverError> {
        let mut queue = self.queue();
        let captured = queue.captured.take().ok_or_else(|| failed("ending a recording", "none is under way"))?;
        match queue.refusal {
            Some(Refusal::Amid) => Err(failed("ending a recording", "it was spoilt")),
            Some(Refusal::AtEnd) => Err(failed("ending a recording", "there is no room for it")),
            Some(Refusal::AtBegin) | None => Ok(EmulatedGraph(captured)),
        }
    }

    fn mover(&self) -> Arc<dyn Mover> {
        Arc::new(EmulatedMover(self.0.clone()))
    }

    fn replay(&self, graph: &EmulatedGraph) -> Result<(), DriverError> {
        let mut queue = self.queue();
        graph.0.iter().try_for_each(|work| queue.push(work.clone()))
    }
}

#[cfg(test)]
mod tests;
