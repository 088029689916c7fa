use clap::{Args, builder::NonEmptyStringValueParser};

use super::{
    LogArgs, TransportArgs,
    values::{DeviceArg, parse_device, parse_size, parse_within},
};

/// Flags of `engine transfer-bench`.
#[derive(Debug, Args)]
pub struct TransferBenchArgs {
    /// Lend pages to whoever connects, until Ctrl-C: the decode worker's part
    #[arg(long, required_unless_present = "connect", conflicts_with = "connect")]
    pub serve: bool,

    /// Write pages into the memory of the one that serves there, and print how fast that was: the prefill worker's part
    #[arg(long, value_name = "HOST:PORT")]
    pub connect: Option<String>,

    /// With --serve: address to listen on; 0.0.0.0 for all interfaces
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1")]
    pub host: String,

    /// With --serve: port to listen on; 0 for any free one
    #[arg(long, value_name = "PORT", default_value_t = 7474)]
    pub port: u16,

    /// Where this side's pages lie: cpu, or cuda:N. Between devices of a host they go over cuda-ipc, and are compared
    /// with a copy within one
    #[arg(long, value_name = "DEVICE", value_parser = parse_device, default_value = "cpu")]
    pub device: DeviceArg,

    /// Sizes of a page, each measured in turn
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = parse_size, default_value = "64KiB,1MiB")]
    pub page_size: Vec<usize>,

    /// Pages written in a round, no two of them adjacent
    #[arg(long, value_name = "N", value_parser = parse_within::<1, 65_536>, default_value_t = 128)]
    pub pages: usize,

    /// Rounds of each measurement
    #[arg(long, value_name = "N", value_parser = parse_within::<1, 1_000_000>, default_value_t = 50)]
    pub rounds: usize,

    /// Print a JSON object a page size
    #[arg(long)]
    pub json: bool,

    /// Secret that both have to know
    #[arg(
        long,
        value_name = "TOKEN",
        env = "ENGINE_CLUSTER_TOKEN",
        hide_env_values = true,
        value_parser = NonEmptyStringValueParser::new()
    )]
    pub cluster_token: Option<String>,

    /// How pages travel: whoever connects chooses, and whoever serves may rule ways out.
    #[command(flatten)]
    pub transports: TransportArgs,

    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}
