//! What to say of the machine.

use engine_kernels::cpu;

use super::{Area, Finding, Level, size};
use crate::{
    doctor::facts::{Container, HostFacts},
    worker::default_kv_bytes,
};

/// Connections and sessions that a worker takes at a time by default, and files beside them.
const OPEN_FILES_WANTED: u64 = 4096;

/// The machine, and what this process may use of it.
pub(in crate::doctor) fn host(facts: &HostFacts) -> Vec<Finding> {
    let mut findings = vec![processor(facts), memory(facts)];
    findings.extend(huge_pages(facts));
    findings.push(open_files(facts));
    findings.extend(container(facts));
    findings
}

fn processor(facts: &HostFacts) -> Finding {
    let HostFacts { cpu, cores, level, bf16, .. } = facts;
    let machine = format!("{cpu}, {cores} core{}", if *cores == 1 { "" } else { "s" });
    let found = |level, what: &str| Finding::new(Area::Host, "cpu", level, format!("{machine}; {what}"));
    match level {
        cpu::Level::Avx512 if *bf16 => found(Level::Ok, "computes with AVX-512 VNNI; it has AVX-512 BF16 too"),
        cpu::Level::Avx512 => found(Level::Ok, "computes with AVX-512 VNNI"),
        cpu::Level::Avx2 => found(Level::Ok, "computes with AVX2 (no AVX-512 VNNI here)"),
        cpu::Level::Portable => found(Level::Warning, "neither AVX-512 nor AVX2: computes with portable code, slowly")
            .remedy("use x86-64 with AVX2 (2013 on), and in a virtual machine pass the host's processor through"),
    }
}

fn memory(facts: &HostFacts) -> Finding {
    let found = |level, seen: String| Finding::new(Area::Host, "memory", level, seen);
    let (Some(total), Some(available)) = (facts.memory_bytes, facts.available_bytes) else {
        return found(Level::Warning, "/proc/meminfo cannot be read, so the KV cache cannot be sized by it".into())
            .remedy("mount /proc, or give workers --kv-cache-memory");
    };
    let kv = size(default_kv_bytes(available) as u64);
    let seen = format!(
        "{} of {} free; before a model is loaded the KV cache would be at most {kv} (--kv-cache-memory changes that)",
        size(available as u64),
        size(total),
    );
    found(Level::Ok, seen)
}

fn huge_pages(facts: &HostFacts) -> Vec<Finding> {
    let set = |file: &str, word: &str| format!("echo {word} > /sys/kernel/mm/transparent_hugepage/{file}");
    let found = |level, seen: &str| Finding::new(Area::Host, "huge pages", level, seen);
    let private = match facts.huge_pages.as_deref() {
        Some("always" | "madvise") => found(Level::Ok, "given to the KV cache of a worker that serves alone"),
        Some(_) => found(Level::Warning, "switched off: attention reads the KV cache slower than it could")
            .remedy(set("enabled", "madvise")),
        None => found(Level::Note, "this kernel has none"),
    };
    let shared = match facts.shared_huge_pages.as_deref() {
        Some("always" | "advise" | "within_size" | "force") => {
            Some(found(Level::Ok, "given to memory that workers of this host share"))
        }
        Some(_) => Some(
            found(
                Level::Note,
                "not given to memory that workers of this host share; a decode worker of a cluster was measured to \
                 read its KV cache up to 15 % slower for that",
            )
            .remedy(set("shmem_enabled", "advise")),
        ),
        None => None,
    };
    std::iter::once(private).chain(shared).collect()
}

fn open_files(facts: &HostFacts) -> Finding {
    let found = |level, seen: String| Finding::new(Area::Host, "open files", level, seen);
    match facts.open_files {
        None => found(Level::Ok, "no limit".into()),
        Some(limit) if limit >= OPEN_FILES_WANTED => found(Level::Ok, format!("at most {limit}")),
        Some(limit) => found(Level::Warning, format!("at most {limit}: fewer than the connections a worker takes"))
            .remedy(
                "raise the hard limit: nofile in /etc/security/limits.conf, LimitNOFILE=65536 in a systemd unit, \
                     docker run --ulimit nofile=65536",
            ),
    }
}

fn container(facts: &HostFacts) -> Option<Finding> {
    let name = match facts.container? {
        Container::Docker => "Docker",
        Container::Podman => "Podman",
        Container::Kubernetes => "Kubernetes",
    };
    let lock = if facts.may_lock_any { "with" } else { "without" };
    let seen = format!("runs in a container ({name}), {lock} the capability IPC_LOCK");
    Some(Finding::new(Area::Host, "container", Level::Note, seen))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A machine on which nothing is amiss.
    pub(in super::super) fn facts() -> HostFacts {
        HostFacts {
            cpu: "AMD EPYC".into(),
            cores: 64,
            level: cpu::Level::Avx512,
            bf16: true,
            memory_bytes: Some(256 << 30),
            available_bytes: Some(200 << 30),
            huge_pages: Some("madvise".into()),
            shared_huge_pages: Some("advise".into()),
            memlock: None,
            open_files: Some(65536),
            may_lock_any: false,
            container: None,
        }
    }

    fn levels(facts: &HostFacts) -> Vec<(&'static str, Level)> {
        host(facts).into_iter().map(|finding| (finding.check, finding.level)).collect()
    }

    #[test]
    fn nothing_is_amiss_on_a_machine_that_has_everything() {
        assert!(host(&facts()).iter().all(|finding| finding.level == Level::Ok), "{:?}", host(&facts()));
    }

    #[test]
    fn what_is_slow_or_too_small_is_a_warning_with_a_remedy() {
        let facts = HostFacts {
            level: cpu::Level::Portable,
            available_bytes: None,
            huge_pages: Some("never".into()),
            shared_huge_pages: Some("never".into()),
            open_files: Some(1024),
            container: Some(Container::Docker),
            ..facts()
        };
        let expected = [
            ("cpu", Level::Warning),
            ("memory", Level::Warning),
            ("huge pages", Level::Warning),
            ("huge pages", Level::Note),
            ("open files", Level::Warning),
            ("container", Level::Note),
        ];
        assert_eq!(levels(&facts), expected);
        let warnings = host(&facts).into_iter().filter(|finding| finding.level == Level::Warning);
        assert!(warnings.into_iter().all(|finding| finding.remedy.is_some()));
    }

    #[test]
    fn the_memory_says_what_the_kv_cache_would_be() {
        let seen = &host(&facts())[1].seen;
        assert!(seen.starts_with("200 GiB of 256 GiB free") && seen.contains("at most 4 GiB"), "{seen}");
    }
}
