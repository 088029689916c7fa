//! The real driver.
//!
//! libcuda is looked for when the first device is asked for, so the program starts where there is none.

use std::ffi::c_void;
use std::fmt;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, result, sys};

use engine_kernels::cuda::{
    ARGS_MAX, Address, Arg, Boxes, DeviceId, Driver, DriverError, HostMemory, Launch, Memory, Mover, Start, TensorMap,
};

use crate::modules::{Modules, is_set};
use crate::mover::{DeviceMover, id_of};

/// The CUDA version that the kernels are compiled with (`scripts/fetch-nvcc.sh`), as drivers give theirs. NVIDIA
/// promises that a driver runs what was compiled with its own major version or an earlier one, and nothing beyond.
const CUDA_VERSION_MIN: i32 = 13_000;
/// The oldest devices that there is code for (`build.rs`).
const CAPABILITY_MIN: (i32, i32) = (8, 0);
/// The oldest devices that start a kernel while the one before still runs (`follow` of `kernels/cuda/common.cuh`).
const CAPABILITY_TO_START_EARLY: (i32, i32) = (9, 0);
/// Set, and not empty: there too, a kernel starts when the one before has ended, for whoever wants to know whether that
/// is what errs.
const WITHOUT_EARLY_START: &str = "ENGINE_CUDA_WITHOUT_EARLY_START";
/// Columns of a box of a matrix.
const BOX_COLS: u32 = 64;

/// A CUDA device, and the stream everything runs on.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    modules: Modules,
    name: String,
    processors: usize,
    capability: (i32, i32),
    starts_early: bool,
    id: DeviceId,
}

// SAFETY: handles of the driver may be used from any thread, one at a time: `Device` is not `Sync`.
unsafe impl Send for Device {}

impl Start for Device {
    fn start() -> Result<Self, DriverError> {
        Self::new(0)
    }
}

/// Device memory of a [`Device`].
pub struct DeviceMemory {
    context: Arc<CudaContext>,
    start: sys::CUdeviceptr,
}

/// Page-locked memory of a [`Device`].
pub struct PinnedMemory {
    /// The only one that copies from or to it.
    stream: Arc<CudaStream>,
    start: *mut u8,
}

// SAFETY: it owns its memory as a `Vec` does.
unsafe impl Send for PinnedMemory {}

/// A recording of a [`Device`].
pub struct DeviceGraph(CudaGraph);

// SAFETY: a graph's handle may be used from any thread, one at a time: `DeviceGraph` is not `Sync`.
unsafe impl Send for DeviceGraph {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Device({}, {})", self.context.ordinal(), self.name)
    }
}

/// Says what was asked for when something fails.
pub(crate) trait During<T> {
    fn during(self, operation: impl FnOnce() -> String) -> Result<T, DriverError>;
}

impl<T> During<T> for Result<T, result::DriverError> {
    fn during(self, operation: impl FnOnce() -> String) -> Result<T, DriverError> {
        self.map_err(|error| DriverError::Failed { operation: operation(), reason: error.to_string() })
    }
}

/// Makes the context the thread's current one. What cudarc could not give back, on whatever thread (a recording, say,
/// that the driver did not destroy), it keeps for whoever calls it next: that call has not failed. What is the matter with
/// the device itself, the driver says to every call.
pub(crate) fn bind(context: &CudaContext) -> Result<(), DriverError> {
    if let Err(error) = context.check_err() {
        tracing::debug!(%error, "something on the device could not be given back");
    }
    context.bind_to_thread().during(|| "choosing the device".into())
}

/// Devices that can be used: none without a driver. One that is there and cannot be used, or is left no device by
/// `CUDA_VISIBLE_DEVICES`, is an error.
pub fn device_count() -> Result<usize, DriverError> {
    if has_driver() { count() } else { Ok(0) }
}

fn has_driver() -> bool {
    // SAFETY: loads a library by name, as every call below does.
    unsafe { sys::is_culib_present() }
}

fn unavailable(error: result::DriverError) -> DriverError {
    DriverError::Unavailable(error.to_string())
}

fn count() -> Result<usize, DriverError> {
    if !has_driver() {
        return Err(DriverError::Unavailable("libcuda is not found, which comes with NVIDIA's driver".into()));
    }
    let count = result::init().and_then(|()| CudaContext::device_count()).map_err(unavailable)?;
    Ok(usize::try_from(count).unwrap_or(0))
}

/// The driver's version: 13000 for CUDA 13.0.
fn driver_version() -> Result<i32, DriverError> {
    let mut version = 0;
    // SAFETY: the driver writes a number there, or fails.
    unsafe { sys::cuDriverGetVersion(&mut version) }.result().map_err(unavailable)?;
    Ok(version)
}

/// As people write them.
fn cuda_version(version: i32) -> String {
    format!("{}.{}", version / 1000, version % 1000 / 10)
}

impl Device {
    /// Device number `ordinal` among those that `CUDA_VISIBLE_DEVICES` leaves.
    pub fn new(ordinal: usize) -> Result<Self, DriverError> {
        let count = count()?;
        // Functions that an older driver lacks are not there to be called, and what it would say of the kernels
        // explains nothing.
        let version = driver_version()?;
        if version < CUDA_VERSION_MIN {
            return Err(DriverError::DriverTooOld { cuda: cuda_version(version) });
        }
        if ordinal >= count {
            return Err(DriverError::Unavailable(format!("there are {count}, and number {ordinal} was asked for")));
        }
        let context = CudaContext::new(ordinal).map_err(unavailable)?;
        // SAFETY: what needs an order between streams (see `mover`) sees to it itself.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(unavailable)?;
        let name = context.name().map_err(unavailable)?;
        let processors = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT;
        let processors = context.attribute(processors).map_err(unavailable)?.unsigned_abs() as usize;
        let capability = context.compute_capability().map_err(unavailable)?;
        if capability < CAPABILITY_MIN {
            let capability = format!("{}.{}", capability.0, capability.1);
            return Err(DriverError::DeviceTooOld { name, capability });
        }
        let id = id_of(context.cu_device()).map_err(unavailable)?;
        let modules = Modules::load(&context, capability).during(|| format!("loading the kernels on {name}"))?;
        let starts_early = capability >= CAPABILITY_TO_START_EARLY && !is_set(WITHOUT_EARLY_START);
        Ok(Self { context, stream, modules, name, processors, capability, starts_early, id })
    }

    /// What it is, for people: its name, what it can do, and what its driver is for.
    pub fn description(&self) -> String {
        let Self { name, processors, capability: (major, minor), .. } = self;
        let driver = driver_version().map_or("unknown".into(), cuda_version);
        let wgmma = if self.modules.have_wgmma() { "used with wgmma" } else { "used without wgmma" };
        format!(
            "{name}, {processors} multiprocessors of compute capability {major}.{minor}, {wgmma}, a driver for CUDA \
             {driver}"
        )
    }

    /// GB/s that the memory's clock and width make, which nothing reaches; none if the driver does not tell.
    pub fn memory_bandwidth(&self) -> Option<f64> {
        use sys::CUdevice_attribute::{
            CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH as BITS, CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE as KILOHERTZ,
        };
        let of = |attribute| self.context.attribute(attribute).ok().filter(|&value| value > 0).map(f64::from);
        // Twice a cycle.
        Some(2.0 * of(KILOHERTZ)? * of(BITS)? / 8.0 / 1e6)
    }

    /// Names of all kernels.
    pub fn kernels(&self) -> Result<Vec<String>, DriverError> {
        self.bind()?;
        self.modules.kernels().during(|| "listing the kernels".into())
    }

    /// Marks the end of what is enqueued so far, and when the device gets there.
    pub fn record_time(&self) -> Result<CudaEvent, DriverError> {
        self.bind()?;
        self.stream.record_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).during(|| "recording an event".into())
    }

    /// Milliseconds from one such event to another, both of which have been waited for.
    pub fn milliseconds(&self, from: &CudaEvent, to: &CudaEvent) -> Result<f32, DriverError> {
        self.bind()?;
        from.elapsed_ms(to).during(|| "measuring time".into())
    }

    /// Loads all kernels, a few megabytes, which are otherwise loaded when each is launched for the first time: for
    /// whoever would rather wait now than in the midst of a request.
    pub fn load_kernels(&self) -> Result<(), DriverError> {
        self.bind()?;
        self.modules.load_functions().during(|| format!("loading the kernels on {}", self.name))
    }

    fn bind(&self) -> Result<(), DriverError> {
        bind(&self.context)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // Its kernels may go with it.
        let _ = self.bind();
        let _ = self.stream.synchronize();
    }
}

impl Memory for DeviceMemory {
    fn address(&self) -> Address {
        Address(self.start)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        let _ = bind(&self.context);
        // SAFETY: our own allocation; the driver waits for what uses it. A failure leaks it.
        let _ = unsafe { result::free_sync(self.start) };
    }
}

impl HostMemory for PinnedMemory {
    fn start(&self) -> *mut u8 {
        self.start
    }
}

impl Drop for PinnedMemory {
    fn drop(&mut self) {
        // Copies from or to it may be under way. (Of this stream alone: whoever waits for all of a context spoils what
        // is recorded on any of its streams.) A failure leaks the memory.
        let _ = bind(self.stream.context());
        if self.stream.synchronize().is_ok() {
            // SAFETY: our own allocation, which nothing uses any more.
            let _ = unsafe { result::free_host(self.start.cast()) };
        }
    }
}

impl Driver for Device {
    type Memory = DeviceMemory;
    type HostMemory = PinnedMemory;
    type Event = CudaEvent;
    type Graph = DeviceGraph;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn has_wgmma(&self) -> bool {
        self.modules.have_wgmma()
    }

    fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap, DriverError> {
        // It writes to the host's memory alone, and takes a context all the same.
        self.bind()?;
        let Boxes { start, rows, cols, row_bytes, box_rows } = *boxes;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        // The innermost dimension first. Elements are moved, whatever their bits mean.
        let sides = [cols as u64, rows as u64];
        let strides = [row_bytes as u64];
        let box_sides = [BOX_COLS, box_rows as u32];
        let steps = [1, 1];
        // SAFETY: all arrays are as long as two dimensions take, and nothing of them is kept.
        let made = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
                2,
                start.0 as *mut c_void,
                sides.as_ptr(),
                strides.as_ptr(),
                box_sides.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        made.result().during(|| format!("describing {boxes:?}"))?;
        Ok(TensorMap(map.opaque))
    }

    fn memory(&self) -> Result<(usize, usize), DriverError> {
        self.bind()?;
        self.context.mem_get_info().during(|| "asking for free memory".into())
    }

    fn allocate(&self, bytes: usize) -> Result<DeviceMemory, DriverError> {
        self.bind()?;
        let out_of_memory = sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY;
        // SAFETY: zeroed below, before anything reads it.
        let start = match unsafe { result::malloc_sync(bytes) } {
            Err(result::DriverError(error)) if error == out_of_memory => {
                return Err(DriverError::OutOfMemory { bytes });
            }
            start => start.during(|| format!("allocating {bytes} bytes"))?,
        };
        let memory = DeviceMemory { context: self.context.clone(), start };
        // SAFETY: our own memory, as long as that.
        let zeroed = unsafe { result::memset_d8_async(start, 0, bytes, self.stream.cu_stream()) };
        zeroed.during(|| format!("zeroing {bytes} bytes"))?;
        Ok(memory)
    }

    fn allocate_host(&self, bytes: usize) -> Result<PinnedMemory, DriverError> {
        self.bind()?;
        // Flags 0: ordinary memory that the host can read fast.
        // SAFETY: zeroed below.
        let start = unsafe { result::malloc_host(bytes, 0) }.during(|| format!("locking {bytes} bytes"))?;
        // SAFETY: so many bytes were allocated.
        unsafe { start.cast::<u8>().write_bytes(0, bytes) };
        Ok(PinnedMemory { stream: self.stream.clone(), start: start.cast() })
    }

    fn write(&self, from: &[u8], to: Address) -> Result<(), DriverError> {
        self.bind()?;
        if from.is_empty() {
            return Ok(());
        }
        // SAFETY: the caller's address of as much memory. `from` stays until the copy is over: it is waited for.
        let copied = unsafe { result::memcpy_htod_async(to.0, from, self.stream.cu_stream()) };
        copied.during(|| format!("copying {} bytes to the device", from.len()))?;
        self.synchronize()
    }

    fn read(&self, from: Address, to: &mut [u8]) -> Result<(), DriverError> {
        self.bind()?;
        let bytes = to.len();
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's address of as much memory. `to` stays until the copy is over: it is waited for.
        let copied = unsafe { result::memcpy_dtoh_async(to, from.0, self.stream.cu_stream()) };
        copied.during(|| format!("copying {bytes} bytes from the device"))?;
        self.synchronize()
    }

    fn upload(&self, from: &PinnedMemory, to: Address, bytes: usize) -> Result<(), DriverError> {
        self.bind()?;
        // SAFETY: the caller's memory, both of it as large, which stays as it is until the copy is over.
        let copied = unsafe {
            let from = std::slice::from_raw_parts(from.start, bytes);
            result::memcpy_htod_async(to.0, from, self.stream.cu_stream())
        };
        copied.during(|| format!("copying {bytes} bytes to the device"))
    }

    fn download(&self, from: Address, to: &PinnedMemory, bytes: usize) -> Result<(), DriverError> {
        self.bind()?;
        // SAFETY: the caller's memory, both of it as large, which nobody uses until the copy is over.
        let copied = unsafe {
            let to = std::slice::from_raw_parts_mut(to.start, bytes);
            result::memcpy_dtoh_async(to, from.0, self.stream.cu_stream())
        };
        copied.during(|| format!("copying {bytes} bytes from the device"))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        self.bind()?;
        let function = self.modules.function(launch.kernel, launch.shared);
        let function = function.during(|| format!("finding kernel {}", launch.kernel))?;
        let operation = || format!("launching {} on {:?} blocks of {}", launch.kernel, launch.grid, launch.block);
        // Little-endian: a cell starts with its low word.
        let mut cells = [0u64; ARGS_MAX];
        let mut pointers = [std::ptr::null_mut::<c_void>(); ARGS_MAX];
        let (of_maps, of_args) = pointers.split_at_mut(launch.maps.len());
        for (pointer, map) in of_maps.iter_mut().zip(launch.maps) {
            *pointer = std::ptr::from_ref(map).cast_mut().cast();
        }
        for ((cell, pointer), arg) in cells.iter_mut().zip(of_args).zip(launch.args) {
            *cell = match arg {
                Arg::Pointer(address) => address.0,
                Arg::Int(value) => u64::from(*value as u32),
                Arg::Float(value) => u64::from(value.to_bits()),
            };
            *pointer = std::ptr::from_mut(cell).cast();
        }
        let [x, y, z] = launch.grid.map(|side| u32::try_from(side).unwrap_or(u32::MAX));
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.block as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared as u32,
            hStream: self.stream.cu_stream(),
            attrs: &raw mut early,
            numAttrs: u32::from(self.starts_early),
        };
        // SAFETY: the emulated driver, which all launches are tested on, compares arguments with what kernels take, and
        // faults where they leave the memory they were given; and it starts kernels early, too.
        let launched =
            unsafe { sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) };
        launched.result().during(operation)
    }

    fn record(&self, used: Option<CudaEvent>) -> Result<CudaEvent, DriverError> {
        self.bind()?;
        let recorded = match used {
            Some(event) => event.record(&self.stream).map(|()| event),
            // Without a time.
            None => self.stream.record_event(None),
        };
        recorded.during(|| "recording an event".into())
    }

    fn wait(&self, event: &CudaEvent) -> Result<(), DriverError> {
        self.bind()?;
        event.synchronize().during(|| "waiting for the device".into())
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        self.bind()?;
        self.stream.synchronize().during(|| "waiting for the device".into())
    }

    fn begin_capture(&self) -> Result<(), DriverError> {
        // What the mode decides is whose calls may not do what a recording cannot hold, allocating and the like. Of
        // this thread's we want to hear: it would be a mistake, as all that a step needs is there before it is
        // recorded. Those of others are none: to move pages they make streams and events, and open, lock and free
        // memory. With a global recording these calls would fail, and sessions with them. Waiting for all of the
        // context spoils a recording in any mode: that is left to `DeviceMover::unlock`, at a worker's end.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.bind()?;
        self.stream.begin_capture(mode).during(|| "beginning to record".into())
    }

    fn end_capture(&self) -> Result<DeviceGraph, DriverError> {
        let flags = sys::CUgraphInstantiate_flags(0);
        // The stream is itself again even where the last of these fails.
        self.bind()?;
        let graph = self.stream.end_capture(flags).during(|| "recording a step".into())?;
        let Some(graph) = graph else {
            let (operation, reason) = ("recording a step".into(), "nothing was recorded".into());
            return Err(DriverError::Failed { operation, reason });
        };
        // What it takes of the device is taken now: for want of that a recording fails, and not the first step that is
        // replayed.
        graph.upload().during(|| "bringing a recorded step to the device".into())?;
        Ok(DeviceGraph(graph))
    }

    fn mover(&self) -> Arc<dyn Mover> {
        Arc::new(DeviceMover::new(self.context.clone(), self.stream.clone(), self.id))
    }

    fn replay(&self, graph: &DeviceGraph) -> Result<(), DriverError> {
        self.bind()?;
        graph.0.launch().during(|| "replaying a step".into())
    }
}
