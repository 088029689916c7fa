//! The command line. Every flag that vLLM has too has its name; each can also be given by environment where that is said.

use std::{path::PathBuf, time::Duration};

use clap::{Parser, ValueEnum};
use engine_kernels::KvDType;
use engine_models::LoadFormat;

use crate::telemetry::LogFormat;

/// Serves a large language model behind the OpenAI API.
#[derive(Debug, Parser)]
#[command(name = "engine", version, about, after_help = EXAMPLES)]
pub struct Cli {
    /// A directory with config.json and safetensors, a .gguf file, or a model of the Hugging Face hub (Qwen/Qwen3-0.6B)
    #[arg(long, value_name = "PATH|ID", help_heading = "Model")]
    pub model: String,

    /// Names clients may use for the model [default: its directory, file or hub id]
    #[arg(long, value_name = "NAME", num_args = 1.., help_heading = "Model")]
    pub served_model_name: Vec<String>,

    /// Branch, tag or commit of a model on the hub
    #[arg(long, value_name = "REVISION", help_heading = "Model")]
    pub revision: Option<String>,

    /// Where the weights come from
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "auto", help_heading = "Model")]
    pub load_format: LoadFormatArg,

    /// A Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    pub chat_template: Option<PathBuf>,

    /// Tokens of a prompt and its answer together [default: what the model was made for, or the KV cache holds]
    #[arg(long, value_name = "TOKENS", help_heading = "Engine")]
    pub max_model_len: Option<usize>,

    /// Sequences computed at the same time
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Engine")]
    pub max_num_seqs: usize,

    /// Tokens computed in one step: longer prompts are prefilled in several, between which others generate
    #[arg(long, value_name = "TOKENS", default_value_t = 512, help_heading = "Engine")]
    pub max_num_batched_tokens: usize,

    /// Requests that may wait for a place among the running ones; beyond that, 429
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Engine")]
    pub max_waiting_requests: usize,

    /// Threads that compute [default: one a core]
    #[arg(long, value_name = "N", help_heading = "Engine")]
    pub threads: Option<usize>,

    /// Tokens of a KV page
    #[arg(long, value_name = "TOKENS", default_value_t = 16, help_heading = "KV cache")]
    pub block_size: usize,

    /// KV pages [default: as --kv-cache-memory says]
    #[arg(long, value_name = "PAGES", help_heading = "KV cache")]
    pub kv_blocks: Option<usize>,

    /// Memory of the KV cache, as 2GiB or 512MiB [default: a quarter of what is free, at most 4 GiB]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, conflicts_with = "kv_blocks", help_heading = "KV cache")]
    pub kv_cache_memory: Option<usize>,

    /// Element type of the KV cache; auto: that of the weights, f16 for quantised ones
    #[arg(long, value_enum, value_name = "TYPE", default_value = "auto", help_heading = "KV cache")]
    pub kv_cache_dtype: KvDTypeArg,

    /// Address to listen on; 0.0.0.0 for all interfaces
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    pub host: String,

    /// Port to listen on; 0 for any free one
    #[arg(long, value_name = "PORT", default_value_t = 8000, help_heading = "Server")]
    pub port: u16,

    /// Key that clients have to send; may be given several times
    #[arg(
        long,
        value_name = "KEY",
        env = "ENGINE_API_KEY",
        hide_env_values = true,
        value_delimiter = ',',
        value_parser = clap::builder::NonEmptyStringValueParser::new(),
        help_heading = "Server"
    )]
    pub api_key: Vec<String>,

    /// Origins whose pages may ask from a browser (as their Origin header names them, or * for all); may be given several times
    #[arg(long, value_name = "ORIGIN", help_heading = "Server")]
    pub allowed_origins: Vec<String>,

    /// Largest body of a request
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "16MiB", help_heading = "Server")]
    pub max_body_size: usize,

    /// Connections at a time; further ones wait to be accepted
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Server")]
    pub max_connections: usize,

    /// Seconds an answer may take, waiting included
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "3600", help_heading = "Server")]
    pub request_timeout: Duration,

    /// Seconds that running answers have to end after SIGTERM
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "300", help_heading = "Server")]
    pub shutdown_timeout: Duration,

    /// How log lines are written
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text", help_heading = "Log")]
    pub log_format: LogFormatArg,

    /// What is logged, as `info` or `warn,engine=debug`
    #[arg(long, value_name = "FILTER", env = "RUST_LOG", default_value = "info", help_heading = "Log")]
    pub log_level: String,
}

const EXAMPLES: &str = "\
Examples:
  engine --model Qwen/Qwen3-0.6B
  engine --model ./SmolLM2-135M-Instruct.Q4_1.gguf --max-model-len 4096 --port 8080
  ENGINE_API_KEY=secret engine --model ./model --host 0.0.0.0";

/// `--load-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormatArg {
    /// The model's files.
    Auto,
    /// Made up from config.json alone, to measure a shape.
    Dummy,
}

impl From<LoadFormatArg> for LoadFormat {
    fn from(arg: LoadFormatArg) -> Self {
        match arg {
            LoadFormatArg::Auto => Self::Auto,
            LoadFormatArg::Dummy => Self::Dummy,
        }
    }
}

/// `--kv-cache-dtype`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvDTypeArg {
    /// Chosen by the weights.
    Auto,
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// bfloat16.
    Bf16,
}

impl KvDTypeArg {
    /// The type, where `auto` stands for `default`.
    pub fn or(self, default: KvDType) -> KvDType {
        match self {
            Self::Auto => default,
            Self::F32 => KvDType::F32,
            Self::F16 => KvDType::F16,
            Self::Bf16 => KvDType::BF16,
        }
    }
}

/// `--log-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormatArg {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

impl From<LogFormatArg> for LogFormat {
    fn from(arg: LogFormatArg) -> Self {
        match arg {
            LogFormatArg::Text => Self::Text,
            LogFormatArg::Json => Self::Json,
        }
    }
}

/// Bytes, from a number with an optional unit: `1048576`, `512MiB`, `2GiB`, `1.5GB`.
fn parse_size(text: &str) -> Result<usize, String> {
    let expected = || format!("'{text}' is no size; expected a number and KiB, MiB, GiB, KB, MB or GB, as in 2GiB");
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: f64 = number.parse().map_err(|_| expected())?;
    let factor = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1u64,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        _ => return Err(expected()),
    };
    let bytes = number * factor as f64;
    if bytes < 1.0 || bytes > (1u64 << 50) as f64 {
        return Err(format!("'{text}' is not between one byte and 1024 TiB"));
    }
    Ok(bytes as usize)
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is no number of seconds"))?;
    // About 31 years: anything beyond is a slip, and would not fit a timer.
    if !(0.0..=1e9).contains(&seconds) {
        return Err(format!("'{text}' is not between 0 and 1e9 seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_binary_and_decimal_units() {
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert_eq!(parse_size("1.5k"), Ok(1536));
        assert_eq!(parse_size("1 MB"), Ok(1_000_000));
        assert_eq!(parse_size("4096"), Ok(4096));
        for bad in ["", "GiB", "1XB", "-1", "0", "1e9GiB", "99999999TiB"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn several_keys_may_be_given() {
        let cli = Cli::parse_from(["engine", "--model", "m", "--api-key", "a", "--api-key", "b,c"]);
        assert_eq!(cli.api_key, ["a", "b", "c"]);
    }

    #[test]
    fn an_empty_key_is_no_key() {
        assert!(Cli::try_parse_from(["engine", "--model", "m", "--api-key", ""]).is_err());
    }
}
