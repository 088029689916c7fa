use std::ffi::{CStr, c_int};
use std::io;
use std::mem::zeroed;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;

use ibverbs_sys as sys;

use super::library::{Verbs, verbs};
use super::queue_pair::QueuePair;
use super::{Choice, RdmaError, SYSFS_CLASS, Wish, choose, devices};

/// A port of an adapter that is open: its context, and the one protection domain for everything this process does
/// there.
pub(super) struct Adapter {
    pub(super) verbs: &'static Verbs,
    pub(super) context: NonNull<sys::ibv_context>,
    pub(super) domain: NonNull<sys::ibv_pd>,
    /// Which port, under which address.
    pub(super) choice: Choice,
    /// Most bytes of one request.
    pub(super) message_bytes_max: usize,
    /// Most requests in a send queue.
    pub(super) requests_max: usize,
    /// Most pieces of memory in one request.
    pub(super) pieces_max: usize,
}

// SAFETY: contexts and protection domains may be used from any thread at the same time, as verbs promises; both live
// until the value is dropped, which its last owner does.
unsafe impl Send for Adapter {}
// SAFETY: as above.
unsafe impl Sync for Adapter {}

/// Opens the ports that are wished for, or the best there is.
pub(super) fn open(wish: &Wish) -> Result<Vec<Arc<Adapter>>, RdmaError> {
    let devices = devices(Path::new(SYSFS_CLASS)).map_err(RdmaError::List)?;
    // Before the library, so that a host without RDMA is told what it lacks.
    let choices = choose(&devices, wish)?;
    let open = |choice| {
        let adapter = Arc::new(Adapter::open(choice)?);
        // What cannot make one of these, as EFA cannot, is no use, and better found out now.
        QueuePair::new(&adapter, 1, 1)?;
        Ok(adapter)
    };
    choices.into_iter().map(open).collect()
}

/// The error a call of verbs returned, or left in `errno`.
pub(super) fn failed(result: c_int) -> io::Error {
    if result > 0 { io::Error::from_raw_os_error(result) } else { io::Error::last_os_error() }
}

impl Adapter {
    fn open(choice: Choice) -> Result<Self, RdmaError> {
        let verbs = verbs()?;
        let device = choice.device.clone();
        let context = open_context(verbs, &device)?;
        // SAFETY: the context is open.
        let Some(domain) = NonNull::new(unsafe { (verbs.alloc_pd)(context.as_ptr()) }) else {
            let source = io::Error::last_os_error();
            // SAFETY: it is open, and nothing was made of it.
            unsafe { (verbs.close_device)(context.as_ptr()) };
            return Err(RdmaError::Device { device, action: "make a protection domain", source });
        };
        // From here on dropping it gives both back.
        let mut adapter = Self { verbs, context, domain, choice, message_bytes_max: 0, requests_max: 0, pieces_max: 0 };
        adapter.ask_for_limits()?;
        Ok(adapter)
    }

    fn ask_for_limits(&mut self) -> Result<(), RdmaError> {
        // SAFETY: plain numbers, for which zeroes are values.
        let mut device: sys::ibv_device_attr = unsafe { zeroed() };
        // SAFETY: the context is open, and the structure as large as what is written there.
        let result = unsafe { (self.verbs.query_device)(self.context.as_ptr(), &raw mut device) };
        if result != 0 {
            return Err(self.error("tell its limits", failed(result)));
        }
        let positive = |number: c_int| usize::try_from(number).unwrap_or(0).max(1);
        self.message_bytes_max = self.port()?.max_msg_sz as usize;
        self.requests_max = positive(device.max_qp_wr);
        self.pieces_max = positive(device.max_sge);
        Ok(())
    }

    /// What its port is like now: subnet managers give other addresses, and links come back with other packets.
    pub(super) fn port(&self) -> Result<sys::ibv_port_attr, RdmaError> {
        // SAFETY: plain numbers, for which zeroes are values.
        let mut port: sys::ibv_port_attr = unsafe { zeroed() };
        // SAFETY: the context is open; the function writes a beginning of the structure.
        let result = unsafe { (self.verbs.query_port)(self.context.as_ptr(), self.choice.port, &raw mut port) };
        if result == 0 { Ok(port) } else { Err(self.error("tell what its port is like", failed(result))) }
    }

    /// An error of this device's.
    pub(super) fn error(&self, action: &'static str, source: io::Error) -> RdmaError {
        RdmaError::Device { device: self.choice.device.clone(), action, source }
    }
}

impl Drop for Adapter {
    fn drop(&mut self) {
        // SAFETY: whatever was made of either keeps the adapter, so nothing is left of it; each is given back once.
        unsafe {
            (self.verbs.dealloc_pd)(self.domain.as_ptr());
            (self.verbs.close_device)(self.context.as_ptr());
        }
    }
}

fn open_context(verbs: &Verbs, name: &str) -> Result<NonNull<sys::ibv_context>, RdmaError> {
    let mut count = 0;
    // SAFETY: the library allocates a list and says how long it is.
    let list = unsafe { (verbs.get_device_list)(&raw mut count) };
    if list.is_null() {
        return Err(RdmaError::List(io::Error::last_os_error()));
    }
    let is_named = |&device: &*mut sys::ibv_device| {
        // SAFETY: a device of the list, whose name is a string as long as the list lives.
        unsafe { CStr::from_ptr((verbs.get_device_name)(device)) }.to_bytes() == name.as_bytes()
    };
    // SAFETY: the list has `count` devices, and is not freed before the end of this function.
    let device = unsafe { std::slice::from_raw_parts(list, count.max(0) as usize) }.iter().find(|d| is_named(d));
    let opened = device.map(|&device| {
        // SAFETY: a device of the list.
        NonNull::new(unsafe { (verbs.open_device)(device) }).ok_or_else(io::Error::last_os_error)
    });
    // SAFETY: the list came from the library, and is not used again. Contexts outlive it.
    unsafe { (verbs.free_device_list)(list) };
    match opened {
        None => Err(RdmaError::NoProvider { device: name.to_owned() }),
        Some(opened) => {
            let failed = |source| RdmaError::Device { device: name.to_owned(), action: "be opened", source };
            opened.map_err(failed)
        }
    }
}
