//! Real verbs devices, those of the emulated machine that `make test-rdma` starts: between host memory ([`devices`]),
//! and out of and into the memory of an emulated CUDA device ([`device_memory`]).

mod device_memory;
mod devices;
