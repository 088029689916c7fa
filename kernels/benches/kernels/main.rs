//! Times of the CUDA kernels, for the shapes of real models: each operation by itself, and whole decoding steps, beside
//! the bandwidth that a copy reaches. Built by `make gpu-check`; runs where a CUDA device is, or with `tiny` on the
//! stand-in for one. Prints a table for benches/results.

#[cfg(feature = "cuda")]
mod on_device;

fn main() {
    #[cfg(feature = "cuda")]
    on_device::run(std::env::args().any(|arg| arg == "tiny"));
    #[cfg(not(feature = "cuda"))]
    println!("built without the feature `cuda`: nothing to measure");
}
