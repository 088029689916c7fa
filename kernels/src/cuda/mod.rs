//! The CUDA backend.
//!
//! Kernels (`kernels/cuda/*.cu`) and what enqueues them ([`CudaBackend`]) know of the device only what [`Driver`] says,
//! of which two run kernels: the real one (`kernels/device`), and one that compiles the same kernels for the host and
//! runs their threads as fibers (`kernels/emulated`), for tests without a GPU. (Others remember launches or take times.)

mod attention;
mod backend;
mod buffer;
mod driver;
mod gemm;
mod graphs;
mod hopper_attention;
mod hopper_gemm;
mod moving;
mod noted;
mod plan;
mod residual;
mod rounded;
mod sample;
mod seats;
mod skinny;
mod stream;
mod weight;

pub use backend::CudaBackend;
pub use buffer::{Activations, KvCache, Linear, Rope, Vector};
pub use driver::{ARGS_MAX, Address, Arg, Boxes, Driver, DriverError, HostMemory, Launch, Memory, Start, TensorMap};
pub use moving::{AdapterAccess, CopySpan, CopyStream, DeviceId, HostSpan, IpcHandle, Mark, Mover};
pub use noted::Noted;
pub use weight::weight_bytes;
