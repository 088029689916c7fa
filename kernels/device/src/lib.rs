//! Real CUDA devices.
//!
//! `Device` is the driver that [`engine_kernels::cuda`] runs on where there is a GPU, as `engine-cuda-emulated` is
//! where there is none. The kernels (`kernels/cuda`) are compiled with nvcc and carried along. This is a crate of its
//! own so that building with CUDA compiles nothing anew that does without.

#![cfg(feature = "cuda")]

mod device;
mod modules;
mod mover;

pub use device::{Device, DeviceGraph, DeviceMemory, PinnedMemory, device_count};
