//! The machine: what it is, and how fast it reads memory.

use std::hint::black_box;
use std::sync::Barrier;
use std::time::Instant;

use anyhow::Result;

/// Bytes each thread reads in one pass: four times the third-level cache together, within these.
const BYTES: std::ops::RangeInclusive<usize> = 256 << 20..=1 << 30;
const PASSES: usize = 5;

/// What is printed about the machine.
pub(crate) struct Machine {
    /// The processor's own name.
    pub(crate) cpu: String,
    /// Cores this process may use.
    pub(crate) cores: usize,
    /// Instruction sets that matter to the kernels.
    pub(crate) features: Vec<&'static str>,
    /// Memory in GiB.
    pub(crate) memory_gib: f64,
    /// MiB of the third-level cache, which machines that share a processor may share; 0 if the system does not say.
    pub(crate) cache_mib: usize,
}

impl std::fmt::Display for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { cpu, cores, features, memory_gib, cache_mib } = self;
        write!(f, "{cpu}, {cores} cores, {memory_gib:.0} GiB")?;
        if *cache_mib > 0 {
            write!(f, ", {cache_mib} MiB of third-level cache")?;
        }
        write!(f, "; {}", features.join(", "))
    }
}

impl Machine {
    /// What a page of results is named after: the day and the processor.
    pub(crate) fn page_name(&self) -> Result<String> {
        let seconds = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?.as_secs();
        let cpu: String = self.cpu.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        let cpu = cpu.split('-').filter(|word| !word.is_empty()).collect::<Vec<_>>().join("-").to_lowercase();
        Ok(format!("{}-{cpu}", date(seconds / 86_400)))
    }
}

/// Reads the machine's description from the system.
pub(crate) fn describe() -> Result<Machine> {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo")?;
    let field = |name: &str| {
        cpuinfo
            .lines()
            .find(|line| line.starts_with(name))
            .and_then(|line| line.split_once(':'))
            .map_or(String::new(), |(_, value)| value.trim().to_string())
    };
    let flags = field("flags");
    let features = ["avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8"]
        .into_iter()
        .filter(|feature| flags.split(' ').any(|flag| flag == *feature))
        .collect();
    let meminfo = std::fs::read_to_string("/proc/meminfo")?;
    let kib = meminfo.split_whitespace().nth(1).and_then(|kib| kib.parse::<f64>().ok()).unwrap_or(0.0);
    Ok(Machine {
        cpu: format!("{} (family {}, model {})", field("model name"), field("cpu family"), field("model\t")),
        cores: std::thread::available_parallelism()?.get(),
        features,
        memory_gib: kib / (1 << 20) as f64,
        cache_mib: cache_mib(),
    })
}

fn cache_mib() -> usize {
    let size = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    size.trim().strip_suffix('K').and_then(|kib| kib.parse::<usize>().ok()).unwrap_or(0) >> 10
}

/// Bytes per second that `threads` threads read together, each from a buffer of its own; the best of a few passes.
pub(crate) fn read_bandwidth(threads: usize) -> f64 {
    let bytes = ((4 * cache_mib() / threads) << 20).clamp(*BYTES.start(), *BYTES.end());
    let barrier = Barrier::new(threads);
    let seconds = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..threads)
            .map(|thread| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let buffer: Vec<u64> = (0..(bytes / 8) as u64).map(|i| i ^ thread as u64).collect();
                    (0..PASSES)
                        .map(|_| {
                            barrier.wait();
                            let start = Instant::now();
                            black_box(sum(black_box(&buffer)));
                            start.elapsed().as_secs_f64()
                        })
                        .collect::<Vec<_>>()
                })
            })
            .collect();
        let passes: Vec<Vec<f64>> = handles.into_iter().map(|h| h.join().expect("a reader panicked")).collect();
        (0..PASSES)
            .map(|pass| passes.iter().map(|thread| thread[pass]).fold(0.0, f64::max))
            .fold(f64::INFINITY, f64::min)
    });
    (threads * bytes) as f64 / seconds
}

/// Adds everything up, with loads as wide as the kernels' where the processor has them.
fn sum(values: &[u64]) -> u64 {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f")]
        fn in_64_bytes(values: &[u64]) -> u64 {
            sum_in_lanes(values)
        }
        #[target_feature(enable = "avx2")]
        fn in_32_bytes(values: &[u64]) -> u64 {
            sum_in_lanes(values)
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has the instructions.
            return unsafe { in_64_bytes(values) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: as above.
            return unsafe { in_32_bytes(values) };
        }
    }
    sum_in_lanes(values)
}

/// In so many independent sums that the compiler makes vectors of them, and these do not wait for each other.
#[inline(always)]
fn sum_in_lanes(values: &[u64]) -> u64 {
    let mut lanes = [0u64; 32];
    for chunk in values.chunks_exact(32) {
        for (lane, value) in lanes.iter_mut().zip(chunk) {
            *lane = lane.wrapping_add(*value);
        }
    }
    lanes.into_iter().fold(0, u64::wrapping_add)
}

/// The calendar day (UTC) that is `days` after 1970-01-01, as `2026-11-21` (Hinnant's `civil_from_days`).
fn date(days: u64) -> String {
    let z = days + 719_468;
    let era = z / 146_097;
    let day_of_era = z % 146_097;
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02}")
}
