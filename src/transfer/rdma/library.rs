//! libibverbs, found at run time.
//!
//! Types and constants are `ibverbs-sys`'s. Its functions are not linked to, because a binary that does does not even
//! start where the library is missing; they are looked up when RDMA is first asked for. Posting and polling are not
//! functions of the library at all but of the device's driver, which has left pointers to them in each context.

use std::ffi::{c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

use ibverbs_sys as sys;
use libloading::Library;

use super::RdmaError;

/// rdma-core's, on every distribution.
const SONAME: &str = "libibverbs.so.1";

/// The arguments: where in the file the memory starts, how much it is, which address stands for its start in requests,
/// the file, and what may be done with it.
pub(super) type RegisterDmaBuf =
    unsafe extern "C" fn(*mut sys::ibv_pd, u64, usize, u64, c_int, c_int) -> *mut sys::ibv_mr;

/// The functions used of it.
pub(super) struct Verbs {
    pub(super) get_device_list: unsafe extern "C" fn(*mut c_int) -> *mut *mut sys::ibv_device,
    pub(super) free_device_list: unsafe extern "C" fn(*mut *mut sys::ibv_device),
    pub(super) get_device_name: unsafe extern "C" fn(*mut sys::ibv_device) -> *const c_char,
    pub(super) open_device: unsafe extern "C" fn(*mut sys::ibv_device) -> *mut sys::ibv_context,
    pub(super) close_device: unsafe extern "C" fn(*mut sys::ibv_context) -> c_int,
    pub(super) query_device: unsafe extern "C" fn(*mut sys::ibv_context, *mut sys::ibv_device_attr) -> c_int,
    /// Fills what `ibv_port_attr` had when the function was named, which all that is read here is part of.
    pub(super) query_port: unsafe extern "C" fn(*mut sys::ibv_context, u8, *mut sys::ibv_port_attr) -> c_int,
    pub(super) alloc_pd: unsafe extern "C" fn(*mut sys::ibv_context) -> *mut sys::ibv_pd,
    pub(super) dealloc_pd: unsafe extern "C" fn(*mut sys::ibv_pd) -> c_int,
    pub(super) reg_mr: unsafe extern "C" fn(*mut sys::ibv_pd, *mut c_void, usize, c_int) -> *mut sys::ibv_mr,
    /// Libraries from before 2021 lack it.
    pub(super) reg_dmabuf_mr: Option<RegisterDmaBuf>,
    pub(super) dereg_mr: unsafe extern "C" fn(*mut sys::ibv_mr) -> c_int,
    pub(super) create_comp_channel: unsafe extern "C" fn(*mut sys::ibv_context) -> *mut sys::ibv_comp_channel,
    pub(super) destroy_comp_channel: unsafe extern "C" fn(*mut sys::ibv_comp_channel) -> c_int,
    pub(super) create_cq: unsafe extern "C" fn(
        *mut sys::ibv_context,
        c_int,
        *mut c_void,
        *mut sys::ibv_comp_channel,
        c_int,
    ) -> *mut sys::ibv_cq,
    pub(super) destroy_cq: unsafe extern "C" fn(*mut sys::ibv_cq) -> c_int,
    pub(super) get_cq_event:
        unsafe extern "C" fn(*mut sys::ibv_comp_channel, *mut *mut sys::ibv_cq, *mut *mut c_void) -> c_int,
    pub(super) ack_cq_events: unsafe extern "C" fn(*mut sys::ibv_cq, c_uint),
    pub(super) create_qp: unsafe extern "C" fn(*mut sys::ibv_pd, *mut sys::ibv_qp_init_attr) -> *mut sys::ibv_qp,
    pub(super) modify_qp: unsafe extern "C" fn(*mut sys::ibv_qp, *mut sys::ibv_qp_attr, c_int) -> c_int,
    pub(super) destroy_qp: unsafe extern "C" fn(*mut sys::ibv_qp) -> c_int,
    /// Keeps what the others point into.
    _library: Library,
}

/// The library, loaded at the first call.
pub(super) fn verbs() -> Result<&'static Verbs, RdmaError> {
    static VERBS: OnceLock<Result<Verbs, String>> = OnceLock::new();
    let loaded = VERBS.get_or_init(|| load().map_err(|error| error.to_string()));
    loaded.as_ref().map_err(|reason| RdmaError::NoLibrary { reason: reason.clone() })
}

fn load() -> Result<Verbs, libloading::Error> {
    // SAFETY: rdma-core's initialisers only prepare its own lists.
    let library = unsafe { Library::new(SONAME) }?;
    macro_rules! function {
        ($name:literal) => {
            // SAFETY: the field it goes to has the type that the function has in rdma-core's headers, of which a
            // library of this name keeps the interface.
            *unsafe { library.get(concat!("ibv_", $name, "\0").as_bytes()) }?
        };
    }
    // SAFETY: as above.
    let reg_dmabuf_mr = unsafe { library.get::<RegisterDmaBuf>(b"ibv_reg_dmabuf_mr\0") }.ok().map(|function| *function);
    Ok(Verbs {
        reg_dmabuf_mr,
        get_device_list: function!("get_device_list"),
        free_device_list: function!("free_device_list"),
        get_device_name: function!("get_device_name"),
        open_device: function!("open_device"),
        close_device: function!("close_device"),
        query_device: function!("query_device"),
        query_port: function!("query_port"),
        alloc_pd: function!("alloc_pd"),
        dealloc_pd: function!("dealloc_pd"),
        reg_mr: function!("reg_mr"),
        dereg_mr: function!("dereg_mr"),
        create_comp_channel: function!("create_comp_channel"),
        destroy_comp_channel: function!("destroy_comp_channel"),
        create_cq: function!("create_cq"),
        destroy_cq: function!("destroy_cq"),
        get_cq_event: function!("get_cq_event"),
        ack_cq_events: function!("ack_cq_events"),
        create_qp: function!("create_qp"),
        modify_qp: function!("modify_qp"),
        destroy_qp: function!("destroy_qp"),
        _library: library,
    })
}
