//! With the feature `cuda`: compiles the kernels with nvcc into two fatbins, which the driver embeds.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

/// Machine code for Ampere and Hopper (and, as their minor versions, Ada), and for anything later (`COMPILED_MAX` of
/// `modules.rs`) what the driver compiles.
const TARGETS: &[&str] =
    &["arch=compute_80,code=sm_80", "arch=compute_90,code=sm_90", "arch=compute_90,code=compute_90"];
/// Machine code for Hopper and nothing later: what it alone has.
const HOPPER: &[&str] = &["arch=compute_90a,code=sm_90a"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return;
    }
    println!("cargo:rerun-if-changed=../cuda");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    let Some(nvcc) = find_nvcc() else {
        panic!(
            "the feature `cuda` needs nvcc, which is not in CUDA_HOME, on the PATH or fetched: `make cuda` does it all"
        )
    };
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    // target/debug/build/engine-cuda-device-0123456789abcdef/out
    let kept = out.ancestors().nth(4).expect("cargo puts it there").join("kernels");
    for (name, targets) in [("kernels", TARGETS), ("hopper", HOPPER)] {
        Fatbin::new(name, targets).make(&nvcc, &kept, &out);
    }
}

/// A source with all that it includes, compiled for some targets.
struct Fatbin {
    name: &'static str,
    arguments: Vec<String>,
}

impl Fatbin {
    fn new(name: &'static str, targets: &[&str]) -> Self {
        let mut arguments: Vec<String> = ["-std=c++17", "-O3", "-fatbin", "--threads", "0"].map(String::from).into();
        arguments.extend(targets.iter().flat_map(|target| ["-gencode".into(), (*target).into()]));
        arguments.push(format!("../cuda/{name}.cu"));
        Self { name, arguments }
    }

    /// Puts it into the folder `out`. As it takes minutes, and a build with optimisations, one without and Clippy each
    /// ask for it, it is compiled once and kept for all of them.
    fn make(&self, nvcc: &Path, kept: &Path, out: &Path) {
        let kept = kept.join(format!("{}-{:016x}.fatbin", self.name, self.key(nvcc)));
        if !kept.is_file() {
            let new = kept.with_extension(std::process::id().to_string());
            fs::create_dir_all(kept.parent().expect("it was joined")).expect("the target folder can be written to");
            self.compile(nvcc, &new);
            fs::rename(new, &kept).expect("it was written");
        }
        let out = out.join(self.name).with_extension("fatbin");
        fs::copy(&kept, out).unwrap_or_else(|error| panic!("{}: {error}", kept.display()));
    }

    fn compile(&self, nvcc: &Path, out: &Path) {
        let nvcc = nvcc.display();
        let done = Command::new(nvcc.to_string()).args(&self.arguments).arg("-o").arg(out).output();
        let done = done.unwrap_or_else(|error| panic!("{nvcc} cannot be run: {error}"));
        let said = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
        print!("{said}");
        assert!(done.status.success(), "{nvcc} failed ({}); its own words are above", done.status);
        // (C7510) and its like: products on tensor cores made to go on by themselves would wait for each other.
        let as_written = !said.contains("Potential Performance Loss");
        assert!(as_written, "{}.cu does not become what it says; nvcc's words are above", self.name);
    }

    /// Another for whatever could make it another: sources, compiler, arguments.
    fn key(&self, nvcc: &Path) -> u64 {
        let mut key = DefaultHasher::new();
        let version = Command::new(nvcc).arg("--version").output().expect("it was found");
        (&self.arguments, version.stdout).hash(&mut key);
        let mut sources: Vec<_> =
            fs::read_dir("../cuda").expect("it is here").map(|entry| entry.expect("it is here").path()).collect();
        sources.sort();
        for source in sources {
            (&source, fs::read(&source).expect("it is a file")).hash(&mut key);
        }
        key.finish()
    }
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
