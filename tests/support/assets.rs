//! Files that tests of all crates read and that are too large for the repository.

use std::path::PathBuf;

/// The file `name` in the cache folder, which `make <target>` puts there.
pub(crate) fn cached(name: &str, target: &str) -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".cache");
    let cache = std::env::var_os("XDG_CACHE_HOME").map_or_else(home, PathBuf::from);
    let path = cache.join("engine").join(name);
    assert!(path.is_file(), "{} is not there: run `make {target}`", path.display());
    path
}

/// The demo model, SmolLM2-135M-Instruct in Q4_1.
pub(crate) fn demo_model() -> PathBuf {
    let chosen = std::env::var_os("ENGINE_DEMO_MODEL").map(PathBuf::from);
    chosen.unwrap_or_else(|| cached("SmolLM2-135M-Instruct.Q4_1.gguf", "demo-model"))
}
