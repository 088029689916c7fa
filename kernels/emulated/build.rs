//! Compiles the CUDA kernels for the host.

use std::path::Path;

fn main() {
    for folder in ["simt", "../cuda"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++20")
        .file(Path::new("simt/emulate.cpp"))
        // Kernels read floats as vectors of them, which CUDA allows.
        .flag("-fno-strict-aliasing")
        .flag("-Wno-unknown-pragmas")
        // The index variables are read all the time: not through a function.
        .flag("-ftls-model=initial-exec")
        .flag("-O2")
        .compile("engine_simt");
}
