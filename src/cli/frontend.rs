use std::time::Duration;

use clap::{Args, builder::NonEmptyStringValueParser};

use super::{
    ClusterArgs, LogArgs,
    values::{parse_origin, parse_seconds, parse_seconds_above_zero, parse_size, parse_within},
    worker::DEFAULT_PORT,
};

/// Flags of `engine frontend`.
#[derive(Debug, Args)]
pub struct FrontendArgs {
    /// Address to listen on; 0.0.0.0 for all interfaces
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    pub host: String,

    /// Port to listen on; 0 for any free one
    #[arg(long, value_name = "PORT", default_value_t = DEFAULT_PORT, help_heading = "Server")]
    pub port: u16,

    /// Key that clients have to send; may be given several times. Keys go on to the workers, which may want them too
    #[arg(
        long,
        value_name = "KEY",
        env = "ENGINE_API_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        value_parser = NonEmptyStringValueParser::new(),
        help_heading = "Server"
    )]
    pub api_key: Vec<String>,

    /// Origins whose pages may ask from a browser, as scheme://host:port each, or * for all; may be given several times
    #[arg(long, value_name = "ORIGIN", value_parser = parse_origin, help_heading = "Server")]
    pub allowed_origins: Vec<String>,

    /// Largest body of a request
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "16MiB", help_heading = "Server")]
    pub max_body_size: usize,

    /// All bodies of more than 64 KiB together, which are kept until their answers end; beyond it, 429. As much again
    /// is for what answers need to outlive their workers; beyond it, they end with them
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "1GiB", help_heading = "Server")]
    pub max_body_memory: usize,

    /// Requests at a time; beyond that, 429
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_within::<1, 1_048_576>,
        default_value_t = 4096,
        help_heading = "Server"
    )]
    pub max_requests: usize,

    /// Connections at a time; a further one gets the place of one that is idle, or waits [default: 512 more than
    /// --max-requests]
    #[arg(long, value_name = "N", value_parser = parse_within::<1, 1_048_576>, help_heading = "Server")]
    pub max_connections: Option<usize>,

    /// Threads that serve connections; by default one for every four processors
    #[arg(long, value_name = "N", value_parser = parse_within::<1, 1024>, help_heading = "Server")]
    pub connection_threads: Option<usize>,

    /// Seconds an answer may take, waiting and moving to another worker included
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = parse_seconds_above_zero,
        default_value = "3600",
        help_heading = "Server"
    )]
    pub request_timeout: Duration,

    /// Seconds that an answer whose worker was lost, or a request whose model's last worker has just gone, waits for
    /// another one
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "15", help_heading = "Server")]
    pub worker_patience: Duration,

    /// Seconds that running answers have to end after SIGTERM
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "300", help_heading = "Server")]
    pub shutdown_timeout: Duration,

    /// The cluster's services.
    #[command(flatten)]
    pub cluster: ClusterArgs,

    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}
