use clap::Args;

use super::{LogArgs, ShapeArg};

/// Flags of `engine bench-kernels`.
#[derive(Debug, Args)]
pub struct BenchKernelsArgs {
    /// Shapes of models, measured in this order
    #[arg(
        long,
        value_enum,
        value_name = "MODEL",
        value_delimiter = ',',
        default_value = "qwen3-0.6b,qwen3-8b,qwen3-14b,llama-3-8b"
    )]
    pub shape: Vec<ShapeArg>,

    /// The table is the answer.
    #[arg(skip = LogArgs::quiet())]
    pub log: LogArgs,
}
