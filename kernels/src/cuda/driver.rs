//! What the backend needs of a CUDA driver, and no more.

use std::fmt;
use std::sync::Arc;

use super::moving::Mover;

/// An address in device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Address(pub u64);

impl Address {
    /// No address: what kernels get for an argument that is not there.
    pub const NULL: Self = Self(0);

    /// The address `bytes` further on.
    pub fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Arg {
    /// A pointer to device memory.
    Pointer(Address),
    /// A C `int`.
    Int(i32),
    /// A C `float`.
    Float(f32),
}

impl From<Address> for Arg {
    fn from(address: Address) -> Self {
        Self::Pointer(address)
    }
}

impl From<usize> for Arg {
    /// Sizes and counts. What a kernel counts in an `int` fits one: buffers of more rows or columns are not made.
    fn from(count: usize) -> Self {
        Self::Int(i32::try_from(count).expect("counts were bounded when buffers were made"))
    }
}

impl From<f32> for Arg {
    fn from(value: f32) -> Self {
        Self::Float(value)
    }
}

/// A matrix of 16-bit elements in device memory, and the boxes in which kernels have it copied to shared memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Boxes {
    /// Where it starts, aligned to 16 bytes.
    pub start: Address,
    /// Its rows. What a box has beyond them, and beyond its columns, reads as zeros.
    pub rows: usize,
    /// Its columns.
    pub cols: usize,
    /// Bytes from one row to the next, a multiple of 16.
    pub row_bytes: usize,
    /// Rows of a box, at most 256. It has 64 columns: 128 bytes, within which it is swizzled.
    pub box_rows: usize,
}

/// What kernels are told of such a matrix, as the device's driver has it (`CUtensorMap`).
#[repr(C, align(128))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap(pub [u64; 16]);

/// Most arguments that a kernel takes, matrices included: drivers have room for as many.
pub const ARGS_MAX: usize = 24;

/// A grid of blocks running one kernel. None is launched if a side of the grid is 0.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Launch<'a> {
    /// Its name in `kernels/cuda`.
    pub kernel: &'a str,
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block, whole warps.
    pub block: usize,
    /// Bytes of shared memory that the kernel takes besides what it has by itself.
    pub shared: usize,
    /// Matrices that it takes boxes of: its first arguments.
    pub maps: &'a [TensorMap],
    /// The other arguments, in order.
    pub args: &'a [Arg],
}

/// The driver, or the device behind it, failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DriverError {
    /// There is no device to work with.
    #[error("no CUDA device can be used: {0}; run with --device cpu, or look at what nvidia-smi says")]
    Unavailable(String),
    /// The driver is older than what the kernels were compiled with.
    #[error(
        "the NVIDIA driver is one for CUDA {cuda}, and the kernels take one for CUDA 13, of release 580 or later: \
         update it (for data-centre GPUs NVIDIA's package cuda-compat-13-0, with its folder in LD_LIBRARY_PATH, does \
         without), or run with --device cpu"
    )]
    DriverTooOld {
        /// The CUDA version the driver is for.
        cuda: String,
    },
    /// There is no code for such a device.
    #[error(
        "{name} is a device of compute capability {capability}, and the kernels take 8.0 (Ampere) or later: choose \
         another with --device cuda:N, or run with --device cpu"
    )]
    DeviceTooOld {
        /// What it is called.
        name: String,
        /// What it can do.
        capability: String,
    },
    /// Device memory is used up.
    #[error("the device has no {bytes} bytes left; lower --kv-blocks or --kv-cache-memory, or use a smaller model")]
    OutOfMemory {
        /// Bytes asked for.
        bytes: usize,
    },
    /// Something the driver was asked to do failed. Errors of kernels come up at a later call.
    #[error("CUDA: {operation} failed: {reason}")]
    Failed {
        /// What was asked for.
        operation: String,
        /// What the driver said.
        reason: String,
    },
}

/// Memory owned by whoever holds this; given back when it is dropped.
pub trait Memory: Send + Sync + 'static {
    /// Where it starts, aligned to 16 bytes at least.
    fn address(&self) -> Address;
}

/// Host memory the device copies from and to by itself.
pub trait HostMemory: Send + 'static {
    /// Where it starts, aligned to 16 bytes at least. Whoever reads or writes there first waits for the copies that
    /// were enqueued.
    fn start(&self) -> *mut u8;
}

/// One device and one stream of work on it: what is enqueued runs in order, some time later.
pub trait Driver: fmt::Debug + Send + 'static {
    /// Device memory.
    type Memory: Memory;
    /// Page-locked host memory.
    type HostMemory: HostMemory;
    /// A point in the stream.
    type Event: Send;
    /// Recorded work that can be enqueued again.
    type Graph: Send;

    /// What the device is called.
    fn name(&self) -> String;

    /// Multiprocessors of the device: how many blocks fill it follows from that.
    fn processors(&self) -> usize;

    /// Whether it runs the kernels of `kernels/cuda/hopper.cu`, which are for compute capability 9.0 alone.
    fn has_wgmma(&self) -> bool;

    /// What such kernels are told of a matrix.
    fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap, DriverError>;

    /// Bytes of device memory that are free, and that there are.
    fn memory(&self) -> Result<(usize, usize), DriverError>;

    /// Device memory, zeroed.
    fn allocate(&self, bytes: usize) -> Result<Self::Memory, DriverError>;

    /// Host memory, zeroed.
    fn allocate_host(&self, bytes: usize) -> Result<Self::HostMemory, DriverError>;

    /// Copies `from` to device memory, behind all enqueued work. Returns when it is there.
    fn write(&self, from: &[u8], to: Address) -> Result<(), DriverError>;

    /// Copies device memory to `to`, behind all enqueued work. Returns when it is there.
    fn read(&self, from: Address, to: &mut [u8]) -> Result<(), DriverError>;

    /// Enqueues a copy of the first `bytes` of `from`, which has to stay as it is until the copy is over.
    fn upload(&self, from: &Self::HostMemory, to: Address, bytes: usize) -> Result<(), DriverError>;

    /// Enqueues a copy of `bytes` to the start of `to`.
    fn download(&self, from: Address, to: &Self::HostMemory, bytes: usize) -> Result<(), DriverError>;

    /// Enqueues a kernel.
    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError>;

    /// Marks the end of what is enqueued so far, with an event that was waited for if there is one.
    fn record(&self, used: Option<Self::Event>) -> Result<Self::Event, DriverError>;

    /// Waits until everything before the event has run.
    fn wait(&self, event: &Self::Event) -> Result<(), DriverError>;

    /// Waits until everything has run.
    fn synchronize(&self) -> Result<(), DriverError>;

    /// From here to [`Driver::end_capture`], what is enqueued is recorded instead. Nothing may be waited for, read,
    /// written or allocated in between.
    fn begin_capture(&self) -> Result<(), DriverError>;

    /// Ends a recording, whatever failed in it: afterwards work is enqueued again, even if this fails too.
    fn end_capture(&self) -> Result<Self::Graph, DriverError>;

    /// The device as those see it who move its memory beside what is enqueued here.
    fn mover(&self) -> Arc<dyn Mover>;

    /// Enqueues recorded work: with the same arguments, and with what the memory behind them holds by then.
    fn replay(&self, graph: &Self::Graph) -> Result<(), DriverError>;
}

/// A driver whose device can be had by itself, anew for each check.
pub trait Start: Driver + Sized {
    /// A device.
    fn start() -> Result<Self, DriverError>;
}
