//! With the feature `cuda`: compiles the kernels with nvcc into two fatbins, which the driver embeds.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Machine code for Ampere and Hopper (and, as their minor versions, Ada), and for anything later what the driver
/// compiles.
const TARGETS: &[&str] =
    &["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"];
/// Machine code for Hopper and nothing later: what it alone has.
const HOPPER: &[&str] = &["arch=compute_90a,code=sm_90a"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let Some(nvcc) = find_nvcc() else {
        panic!(
            "the feature `cuda` needs nvcc, which is not in CUDA_HOME, on the PATH or fetched: `make cuda` does it all"
        )
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    compile(&nvcc, "cuda/kernels.cu", TARGETS, &out.join("kernels.fatbin"));
    compile(&nvcc, "cuda/hopper.cu", HOPPER, &out.join("hopper.fatbin"));
}

fn compile(nvcc: &Path, source: &str, targets: &[&str], out: &Path) {
    let mut command = Command::new(nvcc);
    command.args(["-std=c++17", "-O3", "-fatbin", "--threads", "0"]);
    command.args(targets.iter().flat_map(|target| ["-gencode", target]));
    let nvcc = nvcc.display();
    let done = command.arg(source).arg("-o").arg(out).output();
    let done = done.unwrap_or_else(|error| panic!("{nvcc} cannot be run: {error}"));
    let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    print!("{said}");
    assert!(done.status.success(), "{nvcc} failed ({}); its own words are above", done.status);
    // (C7510) and its like: products on tensor cores that are made to go on by themselves would wait for each other.
    assert!(!said.contains("Potential Performance Loss"), "{source} does not become what it says; nvcc's words are above");
}

/// CUDA_HOME, the PATH, or where scripts/fetch-nvcc.sh puts it.
fn find_nvcc() -> Option<PathBuf> {
    let in_home = env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin"));
    let on_path = env::var_os("PATH").map(|path| env::split_paths(&path).collect::<Vec<_>>()).unwrap_or_default();
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let fetched = cache.map(|cache| cache.join("engine/nvcc-13.0/cu13/bin"));
    in_home.into_iter().chain(on_path).chain(fetched).map(|folder| folder.join("nvcc")).find(|nvcc| nvcc.is_file())
}
