//! The machine, and what this process may use of it.

use engine_kernels::cpu::Level;
use rustix::process::{Resource, Rlimit, getrlimit};

use super::text;
use crate::worker::available_memory;

/// The bit of `CAP_IPC_LOCK` among capabilities.
const CAP_IPC_LOCK: u32 = 14;

/// A limit of the process; `None`: there is none.
type Limit = Option<u64>;

/// What keeps this process apart from its host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::doctor) enum Container {
    Docker,
    Podman,
    Kubernetes,
}

/// See the module.
#[derive(Debug, Clone)]
pub(in crate::doctor) struct HostFacts {
    pub(in crate::doctor) cpu: String,
    pub(in crate::doctor) cores: usize,
    /// What the kernels will use.
    pub(in crate::doctor) level: Level,
    /// AVX-512 has an instruction for products of bf16.
    pub(in crate::doctor) bf16: bool,
    pub(in crate::doctor) memory_bytes: Option<u64>,
    pub(in crate::doctor) available_bytes: Option<usize>,
    /// `always`, `madvise` or `never`.
    pub(in crate::doctor) huge_pages: Option<String>,
    /// The same for memory that processes share.
    pub(in crate::doctor) shared_huge_pages: Option<String>,
    pub(in crate::doctor) memlock: Limit,
    pub(in crate::doctor) open_files: Limit,
    /// The limit on locked memory does not hold for this process: it has CAP_IPC_LOCK, and not only in a user namespace
    /// of its own.
    pub(in crate::doctor) may_lock_any: bool,
    pub(in crate::doctor) container: Option<Container>,
}

impl HostFacts {
    pub(in crate::doctor) fn collect() -> Self {
        let cpuinfo = text("/proc/cpuinfo").unwrap_or_default();
        let cpu = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':'));
        let status = text("/proc/self/status").unwrap_or_default();
        let limit = |resource| {
            let Rlimit { current, .. } = getrlimit(resource);
            current
        };
        Self {
            cpu: cpu.map_or_else(|| std::env::consts::ARCH.to_owned(), |(_, name)| name.trim().to_owned()),
            cores: std::thread::available_parallelism().map_or(1, |cores| cores.get()),
            level: Level::detect(),
            bf16: has_bf16(),
            memory_bytes: text("/proc/meminfo").and_then(|text| total_memory(&text)),
            available_bytes: available_memory(),
            huge_pages: chosen(text("/sys/kernel/mm/transparent_hugepage/enabled")),
            shared_huge_pages: chosen(text("/sys/kernel/mm/transparent_hugepage/shmem_enabled")),
            memlock: limit(Resource::Memlock),
            open_files: limit(Resource::Nofile),
            may_lock_any: has_capability(&status, CAP_IPC_LOCK) && is_initial_user_namespace(),
            container: container(),
        }
    }
}

fn has_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    return std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn total_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// `madvise` of `always [madvise] never`.
fn chosen(words: Option<String>) -> Option<String> {
    let words = words?;
    let (_, rest) = words.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

/// Whether `/proc/self/status` lists a capability as effective.
fn has_capability(status: &str, bit: u32) -> bool {
    let set = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let set = set.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).unwrap_or(0);
    set & (1 << bit) != 0
}

/// The adapter's driver asks for the capability in the first user namespace, whatever this process may do in its own.
fn is_initial_user_namespace() -> bool {
    let map = text("/proc/self/uid_map").unwrap_or_default();
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

fn container() -> Option<Container> {
    let exists = |path: &str| std::path::Path::new(path).exists();
    if std::env::var_os("KUBERNETES_SERVICE_HOST").is_some() {
        return Some(Container::Kubernetes);
    }
    if exists("/run/.containerenv") {
        return Some(Container::Podman);
    }
    exists("/.dockerenv").then_some(Container::Docker)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_the_kernel_are_read_as_it_writes_them() {
        assert_eq!(chosen(Some("always [madvise] never".into())).as_deref(), Some("madvise"));
        assert_eq!(chosen(Some("what is this".into())), None);
        assert_eq!(total_memory("MemTotal:       2048 kB\nMemFree: 1 kB\n"), Some(2 << 20));
        let status = "Name:\tengine\nCapPrm:\t0\nCapEff:\t0000000000004000\n";
        assert!(has_capability(status, CAP_IPC_LOCK));
        assert!(!has_capability(status, 21));
    }
}
