//! The real driver, for those who move its memory beside the computing.

use std::collections::BTreeSet;
use std::ffi::{c_int, c_uint, c_void};
use std::fmt;
use std::mem::MaybeUninit;
use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::{CudaContext, CudaStream, result, sys};

use engine_kernels::KvRegion;
use engine_kernels::cuda::{
    AdapterAccess, Address, CopySpan, CopyStream, DeviceId, DriverError, HostSpan, IpcHandle, Mark, Mover,
};

use crate::device::{During, bind};
use crate::modules::is_set;

/// The device of a [`Device`](super::Device), and the stream that it computes on.
pub(crate) struct DeviceMover {
    context: Arc<CudaContext>,
    computing: Arc<CudaStream>,
    id: DeviceId,
    batches: Arc<Batches>,
}

impl fmt::Debug for DeviceMover {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceMover({}, {})", self.context.ordinal(), self.id)
    }
}

/// For so long an event is looked at again and again before it is waited for: copies of a layer's pages take a few
/// microseconds, and whoever sleeps is woken tens of microseconds later.
const LOOK_TIME: Duration = Duration::from_micros(100);
/// Pauses of the processor between two looks, each of which takes a lock of the driver's.
const LOOK_PAUSES: usize = 32;

/// A point in a stream, which is waited for without taking a core for long.
struct Event {
    context: Arc<CudaContext>,
    event: sys::CUevent,
}

// SAFETY: an event's handle may be used from any thread.
unsafe impl Send for Event {}

impl Event {
    /// The end of what was enqueued on `stream` so far.
    fn record(context: &Arc<CudaContext>, stream: &CudaStream) -> Result<Self, DriverError> {
        let operation = || "recording an event".into();
        bind(context)?;
        let flags = sys::CUevent_flags::CU_EVENT_BLOCKING_SYNC as c_uint
            | sys::CUevent_flags::CU_EVENT_DISABLE_TIMING as c_uint;
        let mut event = MaybeUninit::uninit();
        // SAFETY: the driver writes a handle there, or fails.
        unsafe { sys::cuEventCreate(event.as_mut_ptr(), flags) }.result().during(operation)?;
        // SAFETY: it did not fail.
        let this = Self { context: context.clone(), event: unsafe { event.assume_init() } };
        // SAFETY: both are of this context, and neither has been given back.
        unsafe { result::event::record(this.event, stream.cu_stream()) }.during(operation)?;
        Ok(this)
    }
}

impl Mark for Event {
    fn is_past(&self) -> Result<bool, DriverError> {
        bind(&self.context)?;
        // SAFETY: our own event.
        match unsafe { result::event::query(self.event) } {
            Err(result::DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            queried => queried.during(|| "looking at an event".into()).map(|()| true),
        }
    }

    fn wait(&self) -> Result<(), DriverError> {
        let started = Instant::now();
        while started.elapsed() < LOOK_TIME {
            if self.is_past()? {
                return Ok(());
            }
            (0..LOOK_PAUSES).for_each(|_| std::hint::spin_loop());
        }
        bind(&self.context)?;
        // SAFETY: our own event.
        unsafe { result::event::synchronize(self.event) }.during(|| "waiting for the device".into())
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        let _ = bind(&self.context);
        // SAFETY: our own event, given back once. A failure leaks it.
        let _ = unsafe { result::event::destroy(self.event) };
    }
}

impl DeviceMover {
    pub(crate) fn new(context: Arc<CudaContext>, computing: Arc<CudaStream>, id: DeviceId) -> Self {
        let batches = Batches { are_taken: AtomicBool::new(!is_set(WITHOUT_BATCHES)), locked: Mutex::default() };
        Self { context, computing, id, batches: Arc::new(batches) }
    }

    fn bind(&self) -> Result<(), DriverError> {
        bind(&self.context)
    }
}

impl Mover for DeviceMover {
    fn id(&self) -> DeviceId {
        self.id
    }

    fn reaches(&self, other: DeviceId) -> bool {
        if other == self.id {
            return true;
        }
        let count = result::device::get_count().unwrap_or(0);
        let mut devices = (0..count).filter_map(|ordinal| result::device::get(ordinal).ok());
        // Memory of one that this process does not see (CUDA_VISIBLE_DEVICES) can be opened all the same; whether that
        // goes nobody says before it is tried.
        let Some(device) = devices.find(|&device| id_of(device).is_ok_and(|id| id == other)) else {
            return true;
        };
        let mut can = 0;
        // SAFETY: the driver writes a number there.
        let asked = unsafe { sys::cuDeviceCanAccessPeer(&raw mut can, self.context.cu_device(), device) }.result();
        asked.is_ok() && can != 0
    }

    fn mark(&self) -> Result<Box<dyn Mark>, DriverError> {
        Ok(Box::new(Event::record(&self.context, &self.computing)?))
    }

    fn upload(&self, from: &KvRegion, spans: &[HostSpan]) -> Result<(), DriverError> {
        self.bind()?;
        let span = |span: &HostSpan| CopySpan { from: host_address(from, span), to: span.device, bytes: span.bytes };
        let spans: Vec<_> = spans.iter().map(span).collect();
        // On the stream that it computes on: what is computed next comes behind them all, in however many calls.
        self.batches.enqueue(&self.computing, &spans, Some(from), copy_to_device)
    }

    fn stream(&self) -> Result<Box<dyn CopyStream>, DriverError> {
        self.bind()?;
        let stream = self.context.new_stream().during(|| "making a stream".into())?;
        Ok(Box::new(Copies { context: self.context.clone(), stream, batches: self.batches.clone() }))
    }

    fn lock(&self, region: &KvRegion) -> Result<(), DriverError> {
        self.bind()?;
        let bytes = region.shape().total_bytes();
        // SAFETY: mapped until it is unlocked, which is the caller's word.
        let locked =
            unsafe { sys::cuMemHostRegister_v2(region.base().cast(), bytes, sys::CU_MEMHOSTREGISTER_PORTABLE) };
        locked.result().during(|| format!("locking {bytes} bytes"))?;
        // Where a device knows locked memory by other addresses than the host does, as under WSL 2, single copies take
        // the host's all the same; many in one call take them for the device's, and it fails for good
        // (sgl-project/sglang#40232).
        let by_address = sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM;
        if self.context.attribute(by_address).is_ok_and(|known| known != 0) {
            self.batches.locked().insert(region.base() as usize);
        }
        Ok(())
    }

    fn unlock(&self, region: &KvRegion) {
        self.batches.locked().remove(&(region.base() as usize));
        let _ = self.bind();
        // Copies from or to it may be under way, on any stream. A failure leaves it locked; and if the computing thread
        // records at the time, which is when this fails, that step is enqueued without.
        if result::ctx::synchronize().is_ok() {
            // SAFETY: locked before, and nothing uses it any more.
            let _ = unsafe { sys::cuMemHostUnregister(region.base().cast()) };
        }
    }

    fn export(&self, start: Address) -> Result<IpcHandle, DriverError> {
        self.bind()?;
        let mut handle = sys::CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the start of an allocation, which is what the driver wants.
        let exported = unsafe { sys::cuIpcGetMemHandle(&raw mut handle, start.0) };
        exported.result().during(|| "exporting device memory to other processes".into())?;
        Ok(IpcHandle(handle.reserved.map(|byte| byte as u8)))
    }

    fn open(&self, handle: &IpcHandle) -> Result<Address, DriverError> {
        let operation = || "opening another process's device memory".into();
        self.bind()?;
        let shared = self.context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MPS_ENABLED);
        if shared.during(operation)? != 0 {
            let reason = "processes share this device by MPS, and copies of one that ends may still run then".into();
            return Err(DriverError::Failed { operation: operation(), reason });
        }
        let handle = sys::CUipcMemHandle { reserved: handle.0.map(|byte| byte as _) };
        let flags = sys::CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as c_uint;
        let mut start = 0;
        // SAFETY: the driver checks the handle, and writes an address.
        let opened = unsafe { sys::cuIpcOpenMemHandle_v2(&raw mut start, handle, flags) };
        opened.result().during(operation)?;
        Ok(Address(start))
    }

    fn close(&self, start: Address) -> Result<(), DriverError> {
        self.bind()?;
        // SAFETY: opened before, and whoever copied there has waited for the copies.
        let closed = unsafe { sys::cuIpcCloseMemHandle(start.0) };
        closed.result().during(|| "closing another process's device memory".into())
    }

    fn adapter_access(&self) -> Result<AdapterAccess, DriverError> {
        use sys::CUdevice_attribute as Of;
        let ask = |attribute| {
            self.bind()?;
            let asked = self.context.attribute(attribute);
            asked.during(|| "asking what adapters may do with device memory".into())
        };
        // A device orders writes for whoever its scope has in it, and scopes are numbered from small to large.
        let to_owner = sys::CUGPUDirectRDMAWritesOrdering::CU_GPU_DIRECT_RDMA_WRITES_ORDERING_OWNER as c_int;
        let by_the_host = sys::CUflushGPUDirectRDMAWritesOptions::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_OPTION_HOST as c_int;
        Ok(AdapterAccess {
            dma_buf: ask(Of::CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED)? != 0,
            by_address: ask(Of::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_SUPPORTED)? != 0,
            ordered: ask(Of::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING)? >= to_owner,
            flushes: ask(Of::CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_FLUSH_WRITES_OPTIONS)? & by_the_host != 0,
        })
    }

    fn open_to_adapters(&self, start: Address) -> Result<(), DriverError> {
        self.bind()?;
        let on: c_uint = 1;
        let attribute = sys::CUpointer_attribute::CU_POINTER_ATTRIBUTE_SYNC_MEMOPS;
        // SAFETY: the driver reads a number of this type, and checks the address.
        let set = unsafe { sys::cuPointerSetAttribute((&raw const on).cast(), attribute, start.0) };
        set.result().during(|| "preparing device memory for adapters".into())
    }

    fn dma_buf(&self, start: Address, bytes: usize) -> Result<OwnedFd, DriverError> {
        self.bind()?;
        let operation = || format!("exporting {bytes} bytes of device memory to adapters");
        let (mut allocation, mut allocated) = (0, 0);
        // SAFETY: the driver writes two numbers, and checks the address.
        let found = unsafe { sys::cuMemGetAddressRange_v2(&raw mut allocation, &raw mut allocated, start.0) };
        found.result().during(operation)?;
        if start.0 + bytes as u64 > allocation + allocated as u64 {
            let reason = "its allocation does not begin and end at the host's pages".into();
            return Err(DriverError::Failed { operation: operation(), reason });
        }
        let kind = sys::CUmemRangeHandleType::CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD;
        let mut file: c_int = -1;
        // SAFETY: for this kind of handle the driver writes a file's number there; it checks the range.
        let exported = unsafe { sys::cuMemGetHandleForAddressRange((&raw mut file).cast(), start.0, bytes, kind, 0) };
        exported.result().during(operation)?;
        // SAFETY: a file that the driver has opened for us alone.
        Ok(unsafe { OwnedFd::from_raw_fd(file) })
    }

    fn flush(&self) -> Result<(), DriverError> {
        self.bind()?;
        let target = sys::CUflushGPUDirectRDMAWritesTarget::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX;
        let scope = sys::CUflushGPUDirectRDMAWritesScope::CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER;
        // SAFETY: it waits, and touches no memory of ours.
        let flushed = unsafe { sys::cuFlushGPUDirectRDMAWrites(target, scope) };
        flushed.result().during(|| "waiting for what adapters wrote to device memory".into())
    }
}

/// Most copies of one call. Drivers have been seen to fail at fifty thousand (vllm-project/vllm#49276).
const BATCH_MAX: usize = 1024;
/// Set, and not empty: copies are enqueued one by one, for whoever has found that the driver errs where it is told many
/// in one call.
const WITHOUT_BATCHES: &str = "ENGINE_CUDA_WITHOUT_BATCHES";

/// Which copies the driver is told many of in one call. A mover and its streams know the same.
struct Batches {
    /// It takes such calls, as far as is known.
    are_taken: AtomicBool,
    /// Host memory that may be in them, by where it starts: what is locked. (Other memory the driver takes too, as it
    /// says; it does not say when it reads or writes that.)
    locked: Mutex<BTreeSet<usize>>,
}

impl Batches {
    fn locked(&self) -> MutexGuard<'_, BTreeSet<usize>> {
        // Nothing is left half done in it by a panic.
        self.locked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enqueues copies, in as few calls as may be, or else one by one with `copy`. The `host` memory that they are from
    /// or to, if it is host memory, decides about that too.
    fn enqueue(
        &self,
        stream: &CudaStream,
        spans: &[CopySpan],
        host: Option<&KvRegion>,
        copy: fn(&CudaStream, &CopySpan) -> Result<(), DriverError>,
    ) -> Result<(), DriverError> {
        let mut rest = spans;
        if host.is_none_or(|region| self.locked().contains(&(region.base() as usize))) {
            while self.are_taken.load(Ordering::Relaxed) && rest.len() > 1 {
                let (batch, others) = rest.split_at(rest.len().min(BATCH_MAX));
                if let Err(error) = copy_batch(stream, batch) {
                    // Those that have begun all the same will write the same once more.
                    tracing::warn!(%error, "copies are enqueued one by one from now on, which takes longer");
                    self.are_taken.store(false, Ordering::Relaxed);
                } else {
                    rest = others;
                }
            }
        }
        rest.iter().try_for_each(|span| copy(stream, span))
    }
}

/// Where a span begins in host memory. Panics outside the region.
fn host_address(region: &KvRegion, span: &HostSpan) -> Address {
    assert!(span.at + span.bytes <= region.shape().total_bytes(), "bytes of the region");
    Address(region.base() as u64).offset(span.at)
}

/// All in one call: pages are small for a device, and a call each would take longer than they do. (vLLM moves its pages
/// between device and host so.) The addresses are a device's or those of locked host memory; with unified addresses the
/// driver finds out which.
fn copy_batch(stream: &CudaStream, spans: &[CopySpan]) -> Result<(), DriverError> {
    let addresses = |of: fn(&CopySpan) -> Address| spans.iter().map(|span| of(span).0).collect::<Vec<_>>();
    let (mut to, mut from) = (addresses(|span| span.to), addresses(|span| span.from));
    let mut bytes: Vec<usize> = spans.iter().map(|span| span.bytes).collect();
    // Hints for memory that has no place of its own, which none of this is.
    let nowhere = sys::CUmemLocation { type_: sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_INVALID, id: 0 };
    let mut attributes = sys::CUmemcpyAttributes {
        // Behind what is ahead of them in the stream, as single copies are.
        srcAccessOrder: sys::CUmemcpySrcAccessOrder::CU_MEMCPY_SRC_ACCESS_ORDER_STREAM,
        srcLocHint: nowhere,
        dstLocHint: nowhere,
        flags: sys::CUmemcpyFlags::CU_MEMCPY_FLAG_DEFAULT as c_uint,
    };
    // From which copy on the attributes, of which there is one set, are meant.
    let mut first = 0;
    // SAFETY: as many addresses and numbers each as there are copies, which the driver only reads; they are of the
    // caller's memory, which stays until the copies are over.
    let copied = unsafe {
        sys::cuMemcpyBatchAsync_v2(
            to.as_mut_ptr(),
            from.as_mut_ptr(),
            bytes.as_mut_ptr(),
            spans.len(),
            &raw mut attributes,
            &raw mut first,
            1,
            stream.cu_stream(),
        )
    };
    copied.result().during(|| format!("enqueuing {} copies in one call", spans.len()))
}

fn copy_to_device(stream: &CudaStream, &CopySpan { from, to, bytes }: &CopySpan) -> Result<(), DriverError> {
    // SAFETY: the caller's memory, as much at either address; the host's stays as it is, and mapped, until the copy is
    // over.
    let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.0 as *const c_void, bytes, stream.cu_stream()) };
    copied.result().during(|| format!("copying {bytes} bytes to the device"))
}

fn copy_to_host(stream: &CudaStream, &CopySpan { from, to, bytes }: &CopySpan) -> Result<(), DriverError> {
    // SAFETY: the caller's memory, as much at either address; nobody else uses the host's until the copy is over.
    let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to.0 as *mut c_void, from.0, bytes, stream.cu_stream()) };
    copied.result().during(|| format!("copying {bytes} bytes from the device"))
}

fn copy_on_device(stream: &CudaStream, &CopySpan { from, to, bytes }: &CopySpan) -> Result<(), DriverError> {
    // SAFETY: the caller's addresses of as much memory each; with unified addresses the driver finds out which devices
    // they are of.
    let copied = unsafe { result::memcpy_dtod_async(to.0, from.0, bytes, stream.cu_stream()) };
    copied.during(|| format!("copying {bytes} bytes on the device"))
}

/// A second stream. It does not wait for the first, nor the first for it.
struct Copies {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    batches: Arc<Batches>,
}

impl fmt::Debug for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Copies({})", self.context.ordinal())
    }
}

impl CopyStream for Copies {
    fn download(&self, to: &KvRegion, spans: &[HostSpan]) -> Result<(), DriverError> {
        bind(&self.context)?;
        let span = |span: &HostSpan| CopySpan { from: span.device, to: host_address(to, span), bytes: span.bytes };
        let spans: Vec<_> = spans.iter().map(span).collect();
        self.batches.enqueue(&self.stream, &spans, Some(to), copy_to_host)
    }

    fn copy(&self, spans: &[CopySpan]) -> Result<(), DriverError> {
        bind(&self.context)?;
        self.batches.enqueue(&self.stream, spans, None, copy_on_device)
    }

    fn finish(&self) -> Result<(), DriverError> {
        let waited = Event::record(&self.context, &self.stream).and_then(|event| event.wait());
        // That takes a core, and needs nothing that could be missing.
        waited.or_else(|_| {
            bind(&self.context)?;
            self.stream.synchronize().during(|| "waiting for copies".into())
        })
    }
}

/// Which device this is.
pub(crate) fn id_of(device: sys::CUdevice) -> Result<DeviceId, result::DriverError> {
    Ok(DeviceId(result::device::get_uuid(device)?.bytes.map(|byte| byte as u8)))
}
