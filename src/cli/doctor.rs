use clap::Args;

use super::{ClusterArgs, LogArgs, TransportArgs, values::parse_size};

/// Flags of `engine doctor`: those of a worker that matter to what is looked at, under the same names.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// Say it as JSON
    #[arg(long)]
    pub json: bool,

    /// Also move pages, for as long as a second or two, into every decode worker, and say how fast that went
    #[arg(long)]
    pub measure: bool,

    /// Instead of all else, run every CUDA kernel on the first device and compare what it computes with the reference;
    /// with WORDS, only the checks that have them in their names
    #[arg(long, value_name = "WORDS", num_args = 0..=1, require_equals = true, default_missing_value = "")]
    pub gpu: Option<String>,

    /// Memory of the KV cache, as 2GiB or 512MiB, that RDMA would have to lock [default: what a worker would take]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub kv_cache_memory: Option<usize>,

    /// How KV pages are meant to travel.
    #[command(flatten)]
    pub transports: TransportArgs,

    /// The cluster's services.
    #[command(flatten)]
    pub cluster: ClusterArgs,

    /// Findings say what is wrong; the log would say it twice.
    #[arg(skip = LogArgs::quiet())]
    pub log: LogArgs,
}
