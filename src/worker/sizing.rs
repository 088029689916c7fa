//! How many pages the KV cache has, and how long a sequence may be.

use engine_kernels::KvLayout;

/// Most of the machine's free memory the KV cache takes by default: a quarter.
const DEFAULT_SHARE: usize = 4;
/// Most bytes the KV cache takes by default on a CPU, where memory is shared with everything else.
const DEFAULT_BYTES_MAX: usize = 4 << 30;

/// What the operator asked for; `None`: decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KvRequest {
    /// `--kv-blocks`.
    pub blocks: Option<usize>,
    /// `--kv-cache-memory`, bytes. `blocks` goes before it.
    pub bytes: Option<usize>,
    /// `--max-model-len`.
    pub max_model_len: Option<usize>,
    /// Bytes that `--gpu-memory-utilization` leaves for pages, if those are a device's.
    pub device_bytes: Option<usize>,
}

/// The KV cache as it will be, and the longest sequence it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvSizing {
    /// Pages.
    pub blocks: usize,
    /// Tokens of prompt and answer together at most.
    pub max_model_len: usize,
    /// What was decided and why, for the log.
    pub explanation: String,
}

/// Why the KV cache cannot be what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizingError {
    /// More than the model was made for, or than are served of it where attention slides.
    #[error("--max-model-len {asked} is more than the {limit} positions this model has here")]
    BeyondModel {
        /// `--max-model-len`.
        asked: usize,
        /// Positions of the model.
        limit: usize,
    },
    /// The pages do not hold the sequence that was asked for.
    #[error(
        "--max-model-len {asked} needs {needed} KV pages ({needed_mib} MiB), and there are {blocks}; raise \
         --kv-cache-memory or --kv-blocks, or lower --max-model-len to {fits}"
    )]
    ContextTooLong {
        /// `--max-model-len`.
        asked: usize,
        /// Pages it needs.
        needed: usize,
        /// The same in MiB, rounded up.
        needed_mib: usize,
        /// Pages there are.
        blocks: usize,
        /// Tokens they hold.
        fits: usize,
    },
    /// Not even one page in what the device has left, and no flag says how many bytes pages may take.
    #[error(
        "weights, and what others use of the device, leave no room for a KV page ({page} bytes) within \
         --gpu-memory-utilization: see who uses it (nvidia-smi), take another (--device cuda:N), raise the flag, or \
         serve a smaller model; two workers on one device take --kv-cache-memory each"
    )]
    DeviceFull {
        /// Bytes of a page.
        page: usize,
    },
    /// Not even one page.
    #[error("{bytes} bytes do not hold one KV page of {page} bytes; raise --kv-cache-memory")]
    NoPage {
        /// Bytes there are.
        bytes: usize,
        /// Bytes of a page.
        page: usize,
    },
}

/// Decides how many pages the KV cache has and how long a sequence may be. `layout.blocks` is ignored;
/// `model_positions` is the context the model was made for, `available` the machine's free memory in bytes.
///
/// Without a wish it takes what a device leaves, or on a CPU a quarter of the free memory, at most 4 GiB, and no more
/// than `max_num_seqs` of the longest sequences. A context nobody asked for is cut to what the pages hold.
pub fn size_kv(
    wish: KvRequest,
    layout: KvLayout,
    model_positions: usize,
    max_num_seqs: usize,
    available: usize,
) -> Result<KvSizing, SizingError> {
    let page_tokens = layout.block_size;
    let page = layout.block_bytes();
    if let Some(asked) = wish.max_model_len
        && asked > model_positions
    {
        return Err(SizingError::BeyondModel { asked, limit: model_positions });
    }
    let longest = wish.max_model_len.unwrap_or(model_positions);
    let useful = longest.div_ceil(page_tokens).saturating_mul(max_num_seqs);
    let default_bytes = wish.device_bytes.unwrap_or_else(|| default_kv_bytes(available));
    let (blocks, why) = match (wish.blocks, wish.bytes) {
        (Some(blocks), _) => (blocks, "--kv-blocks".to_owned()),
        (None, Some(bytes)) => (bytes / page, "--kv-cache-memory".to_owned()),
        (None, None) if default_bytes / page >= useful => (useful, "all that --max-num-seqs can use".to_owned()),
        (None, None) if wish.device_bytes.is_some() => {
            (default_bytes / page, "what --gpu-memory-utilization leaves".to_owned())
        }
        (None, None) => {
            let free = mib(available);
            (default_bytes / page, format!("a quarter of the {free} MiB free, at most {} MiB", mib(DEFAULT_BYTES_MAX)))
        }
    };
    // Not `NoPage`, which advises raising --kv-cache-memory: the device's memory is used up.
    if let KvRequest { blocks: None, bytes: None, device_bytes: Some(bytes), .. } = wish
        && bytes < page
    {
        return Err(SizingError::DeviceFull { page });
    }
    if blocks == 0 {
        return Err(SizingError::NoPage { bytes: wish.bytes.unwrap_or(default_bytes), page });
    }
    let tokens = blocks.saturating_mul(page_tokens);
    let max_model_len = longest.min(tokens);
    if let Some(asked) = wish.max_model_len
        && asked > tokens
    {
        let needed = asked.div_ceil(page_tokens);
        let needed_mib = needed.saturating_mul(page).div_ceil(1 << 20);
        return Err(SizingError::ContextTooLong { asked, needed, needed_mib, blocks, fits: tokens });
    }
    let mut explanation = format!(
        "KV cache: {blocks} pages of {page_tokens} tokens = {tokens} tokens, {} MiB ({why}); holds {:.1} sequences of \
         the full {max_model_len} tokens",
        mib(blocks.saturating_mul(page)),
        tokens as f64 / max_model_len as f64,
    );
    if max_model_len < longest {
        let flag = match wish {
            KvRequest { blocks: Some(_), .. } => "--kv-blocks",
            KvRequest { bytes: None, device_bytes: Some(_), .. } => "--gpu-memory-utilization",
            _ => "--kv-cache-memory",
        };
        explanation.push_str(&format!(
            "; the context is cut from the model's {longest} tokens to what the pages hold: raise {flag} for more"
        ));
    }
    Ok(KvSizing { blocks, max_model_len, explanation })
}

/// Most bytes the KV cache takes when nobody says how many, of `available` free ones.
pub fn default_kv_bytes(available: usize) -> usize {
    (available / DEFAULT_SHARE).min(DEFAULT_BYTES_MAX)
}

/// Memory the process may still take, in bytes: what the system has available, or what is left of the control group's
/// limit if that is less. Cached files count as free in both: the system drops them when memory is wanted. `None` where
/// neither can be read.
pub fn available_memory() -> Option<usize> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let system = read("/proc/meminfo").and_then(|text| meminfo_available(&text));
    let number = |path: &str| read(path)?.trim().parse::<usize>().ok();
    let group = number("/sys/fs/cgroup/memory.max").and_then(|limit| {
        let cached = read("/sys/fs/cgroup/memory.stat").map_or(0, |text| cached_files(&text));
        let used = number("/sys/fs/cgroup/memory.current")?.saturating_sub(cached);
        Some(limit.saturating_sub(used))
    });
    system.into_iter().chain(group).min()
}

fn meminfo_available(meminfo: &str) -> Option<usize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<usize>().ok()?.checked_mul(1024)
}

/// Bytes of cached files among what a control group uses, from its `memory.stat`: a model that was just downloaded or
/// read is all of it there.
fn cached_files(stat: &str) -> usize {
    let counted = stat.lines().filter_map(|line| line.split_once(' '));
    let counted = counted.filter(|(name, _)| matches!(*name, "inactive_file" | "active_file"));
    counted.filter_map(|(_, bytes)| bytes.trim().parse::<usize>().ok()).fold(0, usize::saturating_add)
}

const fn mib(bytes: usize) -> usize {
    bytes >> 20
}

#[cfg(test)]
mod tests {
    use engine_kernels::KvDType;

    use super::*;

    /// 1 MiB a page.
    const LAYOUT: KvLayout =
        KvLayout { layers: 16, kv_heads: 8, head_dim: 128, block_size: 16, blocks: 0, dtype: KvDType::F16 };
    const GIB: usize = 1 << 30;

    fn size(wish: KvRequest, positions: usize, available: usize) -> Result<KvSizing, SizingError> {
        size_kv(wish, LAYOUT, positions, 64, available)
    }

    #[test]
    fn pages_default_to_a_quarter_of_the_memory_up_to_a_limit() {
        assert_eq!(LAYOUT.block_bytes(), 1 << 20);
        assert_eq!(size(KvRequest::default(), 8192, 8 * GIB).unwrap().blocks, 2048);
        assert_eq!(size(KvRequest::default(), 8192, 64 * GIB).unwrap().blocks, 4096);
    }

    #[test]
    fn no_more_is_taken_than_all_sequences_can_use() {
        assert_eq!(size(KvRequest::default(), 64, 64 * GIB).unwrap().blocks, 64 * 4);
    }

    #[test]
    fn pages_of_a_device_take_what_is_left_of_it_and_no_more_than_is_of_use() {
        let wish = |bytes| KvRequest { device_bytes: Some(bytes), ..KvRequest::default() };
        let small = size(wish(10 << 20), 8192, 1).unwrap();
        assert!(small.explanation.contains("(what --gpu-memory-utilization leaves)"), "{}", small.explanation);
        assert!(small.explanation.ends_with("raise --gpu-memory-utilization for more"), "{}", small.explanation);
        let plenty = size(wish(GIB << 10), 8192, 1).unwrap();
        assert!(plenty.explanation.contains("all that --max-num-seqs can use"), "{}", plenty.explanation);
    }

    #[test]
    fn who_finds_a_device_full_is_not_told_to_ask_for_more_of_it() {
        let wish = KvRequest { device_bytes: Some(1000), ..KvRequest::default() };
        assert_eq!(size(wish, 8192, GIB), Err(SizingError::DeviceFull { page: 1 << 20 }));
        let asked = KvRequest { bytes: Some(1000), ..wish };
        assert_eq!(size(asked, 8192, GIB), Err(SizingError::NoPage { bytes: 1000, page: 1 << 20 }));
        assert_eq!(size(KvRequest { blocks: Some(3), ..wish }, 8192, GIB).unwrap().blocks, 3);
    }

    #[test]
    fn a_context_nobody_asked_for_is_cut_and_explained() {
        let sizing = size(KvRequest { blocks: Some(10), ..KvRequest::default() }, 8192, GIB).unwrap();
        assert_eq!(sizing.max_model_len, 160);
        assert!(sizing.explanation.contains("cut from the model's 8192"), "{}", sizing.explanation);
        assert!(sizing.explanation.ends_with("raise --kv-blocks for more"), "{}", sizing.explanation);
        let sizing = size(KvRequest { bytes: Some(10 << 20), ..KvRequest::default() }, 8192, GIB).unwrap();
        assert!(sizing.explanation.ends_with("raise --kv-cache-memory for more"), "{}", sizing.explanation);
    }

    #[test]
    fn a_context_that_was_asked_for_is_never_cut() {
        let wish = KvRequest { bytes: Some(10 << 20), max_model_len: Some(161), ..KvRequest::default() };
        let expected = SizingError::ContextTooLong { asked: 161, needed: 11, needed_mib: 11, blocks: 10, fits: 160 };
        assert_eq!(size(wish, 8192, GIB), Err(expected));
        let wish = KvRequest { max_model_len: Some(9000), ..KvRequest::default() };
        assert_eq!(size(wish, 8192, GIB), Err(SizingError::BeyondModel { asked: 9000, limit: 8192 }));
    }

    #[test]
    fn too_little_memory_for_a_page_is_an_error() {
        let wish = KvRequest { bytes: Some(1000), ..KvRequest::default() };
        assert_eq!(size(wish, 8192, GIB), Err(SizingError::NoPage { bytes: 1000, page: 1 << 20 }));
    }

    #[test]
    fn cached_files_are_not_counted_as_used() {
        let stat = "anon 5000\nfile 900\nfile_mapped 7\ninactive_file 500\nactive_file 300\nslab 4\n";
        assert_eq!(cached_files(stat), 800);
        assert_eq!(cached_files(""), 0);
    }

    #[test]
    fn free_memory_is_read_as_the_kernel_writes_it() {
        assert_eq!(meminfo_available("MemTotal: 9 kB\nMemAvailable:   123 kB\n"), Some(123 * 1024));
        assert_eq!(meminfo_available("MemTotal: 9 kB\n"), None);
    }
}
