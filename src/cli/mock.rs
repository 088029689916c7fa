use std::time::Duration;

use clap::Args;

use super::{
    ClusterArgs, LogArgs, TransportArgs,
    values::{parse_step_time, parse_token_time},
    worker::DEFAULT_PORT,
};

/// Flags of `engine mock`.
#[derive(Debug, Args)]
pub struct MockArgs {
    /// Decode workers to run; the first listens on --port, the others on free ports
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "Mock")]
    pub decode_workers: usize,

    /// Prefill workers to run
    #[arg(long, value_name = "N", default_value_t = 0, help_heading = "Mock")]
    pub prefill_workers: usize,

    /// Milliseconds a step takes
    #[arg(
        long,
        value_name = "MILLISECONDS",
        value_parser = parse_step_time,
        default_value = "10",
        help_heading = "Mock"
    )]
    pub step_time: Duration,

    /// Microseconds each token of a prompt takes in addition
    #[arg(
        long,
        value_name = "MICROSECONDS",
        value_parser = parse_token_time,
        default_value = "50",
        help_heading = "Mock"
    )]
    pub prompt_token_time: Duration,

    /// Tokens of a prompt and its answer together
    #[arg(long, value_name = "TOKENS", default_value_t = 8192, help_heading = "Mock")]
    pub max_model_len: usize,

    /// Sequences computed at the same time, by each worker
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Mock")]
    pub max_num_seqs: usize,

    /// Tokens computed in one step, by each worker
    #[arg(long, value_name = "TOKENS", default_value_t = 512, help_heading = "Mock")]
    pub max_num_batched_tokens: usize,

    /// Uncached prompt tokens above which decode workers look for a prefill worker
    #[arg(long, value_name = "TOKENS", default_value_t = 512, help_heading = "Mock")]
    pub max_local_prefill_length: usize,

    /// Address to listen on; 0.0.0.0 for all interfaces
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    pub host: String,

    /// Port of the first decode worker; 0 for any free one
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_PORT, help_heading = "Server")]
    pub port: u16,

    /// How KV pages travel.
    #[command(flatten)]
    pub transports: TransportArgs,

    /// The cluster's services.
    #[command(flatten)]
    pub cluster: ClusterArgs,

    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}
