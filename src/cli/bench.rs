use clap::Args;

use super::{EngineArgs, LogArgs, values::parse_within};

/// Flags of `engine bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// Prompts that are prefilled, each by itself, in tokens
    #[arg(
        long,
        value_name = "TOKENS",
        value_delimiter = ',',
        value_parser = parse_within::<1, 1_048_576>,
        default_value = "512,2048",
        help_heading = "Bench"
    )]
    pub prefill: Vec<usize>,

    /// Sequences that are decoded at the same time
    #[arg(
        long,
        value_name = "N",
        value_delimiter = ',',
        value_parser = parse_within::<1, 4096>,
        default_value = "1,16,64",
        help_heading = "Bench"
    )]
    pub decode: Vec<usize>,

    /// Tokens that each of them has before
    #[arg(
        long,
        value_name = "TOKENS",
        value_parser = parse_within::<1, 1_048_576>,
        default_value_t = 512,
        help_heading = "Bench"
    )]
    pub context: usize,

    /// Steps of each decoding measurement
    #[arg(
        long,
        value_name = "N",
        value_parser = parse_within::<1, 65_536>,
        default_value_t = 64,
        help_heading = "Bench"
    )]
    pub steps: usize,

    /// Rounds of each measurement
    #[arg(long, value_name = "N", value_parser = parse_within::<1, 1000>, default_value_t = 5, help_heading = "Bench")]
    pub rounds: usize,

    /// Print a JSON object a measurement
    #[arg(long, help_heading = "Bench")]
    pub json: bool,

    /// The model, and how it is computed.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}
