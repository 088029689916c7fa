//! The kernels that the engine carries, on a device.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::{CudaContext, sys};

/// The kernels, for several kinds of devices (`build.rs` says which). As the driver's loader wants it, aligned.
#[repr(C, align(64))]
struct Fatbin<T: ?Sized>(T);
static KERNELS: &Fatbin<[u8]> = &Fatbin(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));
/// Those for compute capability 9.0 alone: a module of their own, so that it is us who decide where they run.
static HOPPER_KERNELS: &Fatbin<[u8]> = &Fatbin(*include_bytes!(concat!(env!("OUT_DIR"), "/hopper.fatbin")));

/// The devices that [`HOPPER_KERNELS`] is for.
const HOPPER: (i32, i32) = (9, 0);
/// The last generation that there is machine code for. What comes later takes PTX, which the driver compiles.
const COMPILED_MAX: i32 = 9;
/// Set, and not empty: such devices are used as those before them, for whoever has found that these kernels err.
const WITHOUT_WGMMA: &str = "ENGINE_CUDA_WITHOUT_WGMMA";
/// Shared memory that a block gets without asking first.
const SHARED_BYTES: usize = 48 << 10;

/// Whether an environment variable is set, and not empty.
pub(crate) fn is_set(variable: &str) -> bool {
    std::env::var_os(variable).is_some_and(|value| !value.is_empty())
}

/// What is loaded on each device that is in use: once, since that takes time, however many have it. Checks use a device
/// anew each, well over a thousand of them.
static LOADED: Mutex<Vec<Weak<Loaded>>> = Mutex::new(Vec::new());

/// Modules on a device, until nobody has them any more.
struct Loaded {
    context: Arc<CudaContext>,
    base: sys::CUmodule,
    /// Of [`HOPPER_KERNELS`], where they run.
    hopper: Option<sys::CUmodule>,
}

// SAFETY: handles of the driver may be used from any thread, at the same time too. What is set of a function, how much
// shared memory it may have, each kernel has the same of wherever it is launched.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

impl Loaded {
    fn all(&self) -> impl Iterator<Item = sys::CUmodule> {
        std::iter::once(self.base).chain(self.hopper)
    }
}

impl Drop for Loaded {
    fn drop(&mut self) {
        let _ = self.context.bind_to_thread();
        for module in self.all() {
            // SAFETY: nothing of it runs any more, and nobody else has it. A failure leaks it.
            let _ = unsafe { result::module::unload(module) };
        }
    }
}

/// The kernels of a device. Its context is the current one whenever something is asked of them.
pub(crate) struct Modules {
    loaded: Arc<Loaded>,
    /// Kernels that were launched before, and the shared memory that each may ask for.
    functions: RefCell<HashMap<String, (sys::CUfunction, usize)>>,
}

impl Modules {
    /// The modules for a device of this compute capability.
    pub(crate) fn load(context: &Arc<CudaContext>, capability: (i32, i32)) -> Result<Self, DriverError> {
        let mut known = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|loaded| loaded.strong_count() > 0);
        let same = |loaded: &Arc<Loaded>| loaded.context.cu_ctx() == context.cu_ctx();
        if let Some(loaded) = known.iter().filter_map(Weak::upgrade).find(same) {
            return Ok(Self { loaded, functions: RefCell::default() });
        }
        // One of those that were looked at may have ended here just now, with its context the current one.
        context.bind_to_thread()?;
        let load = |kernels: &Fatbin<[u8]>| {
            // SAFETY: a fatbin, which says itself where it ends.
            unsafe { result::module::load_data(kernels.0.as_ptr().cast()) }
        };
        let refused = is_set(WITHOUT_WGMMA);
        if capability == HOPPER && refused {
            tracing::warn!("{WITHOUT_WGMMA} is set: longer steps are computed by slower kernels");
        }
        if capability.0 > COMPILED_MAX {
            tracing::info!(
                "the driver compiles the kernels for this device, which takes minutes the first time (it keeps them in \
                 CUDA_CACHE_PATH)"
            );
        }
        let base = load(KERNELS)?;
        let hopper = if capability == HOPPER && !refused { Some(load(HOPPER_KERNELS)?) } else { None };
        let loaded = Arc::new(Loaded { context: context.clone(), base, hopper });
        known.push(Arc::downgrade(&loaded));
        Ok(Self { loaded, functions: RefCell::default() })
    }

    /// Whether [`HOPPER_KERNELS`] are among them.
    pub(crate) fn have_wgmma(&self) -> bool {
        self.loaded.hopper.is_some()
    }

    /// A kernel that may be launched with so many bytes of shared memory.
    pub(crate) fn function(&self, kernel: &str, shared: usize) -> Result<sys::CUfunction, DriverError> {
        let known = self.functions.borrow().get(kernel).copied();
        if let Some((function, allowed)) = known
            && shared <= allowed
        {
            return Ok(function);
        }
        let not_found = DriverError(sys::CUresult::CUDA_ERROR_NOT_FOUND);
        let name = CString::new(kernel).map_err(|_| not_found)?;
        // One of the modules has it. That one has it not is no error; any other is the device's, of what it did before.
        let mut found = Err(not_found);
        for module in self.loaded.all() {
            // SAFETY: the modules stay loaded as long as we are there.
            found = unsafe { result::module::get_function(module, name.clone()) };
            if !matches!(found, Err(error) if error == not_found) {
                break;
            }
        }
        let function = found?;
        if shared > SHARED_BYTES {
            let most = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a function of such a module.
            unsafe { result::function::set_function_attribute(function, most, shared as i32) }?;
        }
        self.functions.borrow_mut().insert(kernel.into(), (function, shared.max(SHARED_BYTES)));
        Ok(function)
    }

    /// All kernels.
    fn functions(&self) -> Result<Vec<sys::CUfunction>, DriverError> {
        let mut all = Vec::new();
        for module in self.loaded.all() {
            let mut count = 0;
            // SAFETY: the module is loaded; the driver writes a number, or fails.
            unsafe { sys::cuModuleGetFunctionCount(&mut count, module) }.result()?;
            let mut functions: Vec<sys::CUfunction> = vec![std::ptr::null_mut(); count as usize];
            // SAFETY: there is room for so many.
            unsafe { sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module) }.result()?;
            all.append(&mut functions);
        }
        Ok(all)
    }

    /// Names of all kernels.
    pub(crate) fn kernels(&self) -> Result<Vec<String>, DriverError> {
        let name = |function| {
            let mut name = std::ptr::null();
            // SAFETY: a function of a module; the driver points to a string that lives as long as that, or fails.
            unsafe { sys::cuFuncGetName(&mut name, function) }.result()?;
            // SAFETY: as above.
            Ok(unsafe { CStr::from_ptr(name) }.to_string_lossy().into_owned())
        };
        self.functions()?.into_iter().map(name).collect()
    }

    /// Brings all kernels to the device, those that were not launched yet too.
    pub(crate) fn load_functions(&self) -> Result<(), DriverError> {
        // SAFETY: functions of the modules.
        self.functions()?.into_iter().try_for_each(|function| unsafe { sys::cuFuncLoad(function) }.result())
    }
}
