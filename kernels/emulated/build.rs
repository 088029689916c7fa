//! Compiles the CUDA kernels for the host.

use std::path::Path;

fn main() {
    for folder in ["simt", "../cuda"] {
        println!("cargo:rerun-if-changed={folder}");
    }
    let mut build = cc::Build::new();
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2") {
        // Tests run where they are built. Without the instruction, each multiply-add is a call.
        build.flag("-mavx2").flag("-mfma");
    }
    build
        .cpp(true)
        .std("c++20")
        .file(Path::new("simt/emulate.cpp"))
        // Kernels read floats as vectors of them, which CUDA allows.
        .flag("-fno-strict-aliasing")
        .flag("-Wno-unknown-pragmas")
        // It tells of what changed in 2010.
        .flag("-Wno-psabi")
        // The index variables are read all the time: not through a function.
        .flag("-ftls-model=initial-exec")
        // What the kernels write as two operations stays two.
        .flag("-ffp-contract=off")
        .flag("-O2")
        .compile("engine_simt");
}
