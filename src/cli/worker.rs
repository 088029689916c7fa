//! Flags of a worker.

use std::{path::PathBuf, time::Duration};

use clap::{Args, builder::NonEmptyStringValueParser};
use serde_json::{Map, Value};

use super::{
    ClusterArgs, EngineArgs, LogArgs, TransportArgs,
    values::{
        DisaggPolicyArg, ReasoningParserArg, ToolCallParserArg, parse_millis, parse_origin, parse_seconds,
        parse_seconds_above_zero, parse_size, parse_template_kwargs, parse_within,
    },
};
use crate::{
    api::{CallFormat, Parsers},
    http::CONNECTIONS_BESIDE_REQUESTS,
};

/// Port of a decode worker, and of a frontend.
pub(super) const DEFAULT_PORT: u16 = 8000;

/// How long a step on a device may take, unless a flag says it. The largest take a second or two.
const DEVICE_STEP_TIME_MAX: Duration = Duration::from_secs(300);

/// Flags of a worker: decode, or with `--is-prefill-worker` prefill.
#[derive(Debug, Args)]
pub struct WorkerArgs {
    /// The model, and how it is computed.
    #[command(flatten)]
    pub engine: EngineArgs,

    /// Names clients may use for the model [default: its directory, file or hub id]
    #[arg(long, value_name = "NAME", num_args = 1.., conflicts_with = "is_prefill_worker", help_heading = "Model")]
    pub served_model_name: Vec<String>,

    /// A Jinja chat template to use instead of the model's own
    #[arg(long, value_name = "FILE", conflicts_with = "is_prefill_worker", help_heading = "Model")]
    pub chat_template: Option<PathBuf>,

    /// Variables for the chat template where a request's chat_template_kwargs do not set them, as {"enable_thinking":
    /// false}
    #[arg(
        long,
        alias = "chat-template-kwargs",
        value_name = "JSON",
        value_parser = parse_template_kwargs,
        conflicts_with = "is_prefill_worker",
        help_heading = "Model"
    )]
    pub default_chat_template_kwargs: Option<Map<String, Value>>,

    /// How thoughts are told from the rest of an answer, to stand in a field of their own
    #[arg(
        long,
        value_enum,
        value_name = "PARSER",
        default_value = "auto",
        conflicts_with = "is_prefill_worker",
        help_heading = "Model"
    )]
    pub reasoning_parser: ReasoningParserArg,

    /// How the model writes calls of functions
    #[arg(
        long,
        value_enum,
        value_name = "PARSER",
        default_value = "auto",
        conflicts_with = "is_prefill_worker",
        help_heading = "Model"
    )]
    pub tool_call_parser: ToolCallParserArg,

    /// Seconds that a step may take before its device is taken to hang, and the process ends; 0: as long as it likes
    /// [default: 300 on a CUDA device, 0 on a CPU]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, help_heading = "Engine")]
    pub step_timeout: Option<Duration>,

    /// Requests that may wait for a place among the running ones; beyond that, 429
    #[arg(
        long,
        value_name = "N",
        default_value_t = 1024,
        conflicts_with = "is_prefill_worker",
        help_heading = "Engine"
    )]
    pub max_waiting_requests: usize,

    /// Keep no KV pages beyond their request: prompts that begin alike are computed each by itself, and nobody can tell
    /// from the time it takes what others have asked
    #[arg(long, visible_alias = "no-enable-prefix-caching", help_heading = "KV cache")]
    pub no_prefix_caching: bool,

    /// vLLM's word for what is so anyway, as the next two are.
    #[arg(long, hide = true, conflicts_with = "no_prefix_caching")]
    pub enable_prefix_caching: bool,

    /// Likewise.
    #[arg(long, hide = true)]
    pub enable_chunked_prefill: bool,

    /// Likewise.
    #[arg(long, hide = true)]
    pub enable_auto_tool_choice: bool,

    /// Address to listen on; 0.0.0.0 for all interfaces
    #[arg(long, value_name = "HOST", default_value = "127.0.0.1", help_heading = "Server")]
    pub host: String,

    /// Port to listen on; 0 for any free one [default: 8000; a prefill worker's any free one]
    #[arg(long, value_name = "PORT", help_heading = "Server")]
    pub port: Option<u16>,

    /// Key that clients have to send; may be given several times. A prefill worker has no clients, and no use for it
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
    #[arg(
        long,
        value_name = "ORIGIN",
        value_parser = parse_origin,
        conflicts_with = "is_prefill_worker",
        help_heading = "Server"
    )]
    pub allowed_origins: Vec<String>,

    /// Largest body of a request
    #[arg(
        long,
        value_name = "SIZE",
        value_parser = parse_size,
        default_value = "16MiB",
        conflicts_with = "is_prefill_worker",
        help_heading = "Server"
    )]
    pub max_body_size: usize,

    /// Connections at a time; a further one gets the place of one that is idle, or waits [default: 512 more than
    /// --max-num-seqs and --max-waiting-requests together]
    #[arg(long, value_name = "N", value_parser = parse_within::<1, 1_048_576>, help_heading = "Server")]
    pub max_connections: Option<usize>,

    /// Seconds an answer may take, waiting included
    #[arg(
        long,
        value_name = "SECONDS",
        value_parser = parse_seconds_above_zero,
        default_value = "3600",
        conflicts_with = "is_prefill_worker",
        help_heading = "Server"
    )]
    pub request_timeout: Duration,

    /// Seconds that running answers have to end after SIGTERM
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds, default_value = "300", help_heading = "Server")]
    pub shutdown_timeout: Duration,

    /// How it shares prefills.
    #[command(flatten)]
    pub disagg: DisaggArgs,

    /// Name or address under which others reach this worker [default: the address listened on, or the one that leads to
    /// etcd]
    #[arg(long, value_name = "HOST", help_heading = "Cluster")]
    pub advertise_host: Option<String>,

    /// The cluster's services.
    #[command(flatten)]
    pub cluster: ClusterArgs,

    /// Logging.
    #[command(flatten)]
    pub log: LogArgs,
}

/// How a worker shares prefills with others.
#[derive(Debug, Args)]
#[command(next_help_heading = "Disaggregation")]
pub struct DisaggArgs {
    /// Compute prompts for the cluster's decode workers instead of answering requests
    #[arg(long)]
    pub is_prefill_worker: bool,

    /// Join no cluster, even if there is one on this machine or the environment names one
    #[arg(long, conflicts_with_all = ["etcd", "nats", "is_prefill_worker"])]
    pub standalone: bool,

    /// Where prompts are prefilled
    #[arg(long, value_enum, value_name = "POLICY", default_value = "threshold", conflicts_with = "is_prefill_worker")]
    pub disagg_policy: DisaggPolicyArg,

    /// Prompts with at most so many uncached tokens are prefilled by the decode worker itself
    #[arg(long, value_name = "TOKENS", default_value_t = 512, conflicts_with = "is_prefill_worker")]
    pub max_local_prefill_length: usize,

    /// Jobs that may wait for each live prefill worker; beyond that, prompts are prefilled locally
    #[arg(long, value_name = "N", default_value_t = 2, conflicts_with = "is_prefill_worker")]
    pub max_prefill_queue_size: usize,

    /// Milliseconds between two tokens of an answer that prompts computed beside it are cut for; --disagg-policy auto
    /// sends away what would exceed it all the same
    #[arg(
        long,
        value_name = "MS",
        value_parser = parse_millis,
        default_value = "200",
        conflicts_with = "is_prefill_worker"
    )]
    pub itl_target: Duration,

    /// How KV pages travel.
    #[command(flatten)]
    pub transports: TransportArgs,

    /// Host memory, as 512MiB or 2GiB, that pages pass through on their way to or from a CUDA device where they cannot
    /// go from device to device [default: 2 GiB of a decode worker, 256 MiB of a prefill worker, no more than all
    /// pages]
    #[arg(long, value_name = "SIZE", value_parser = parse_size, help_heading = "Transport")]
    pub kv_staging_memory: Option<usize>,

    /// Address to listen on for prefill workers' sessions [default: that of --host]
    #[arg(long, value_name = "HOST", conflicts_with = "is_prefill_worker")]
    pub session_host: Option<String>,

    /// Port to listen on for prefill workers' sessions; 0 for any free one
    #[arg(long, value_name = "PORT", default_value_t = 0, conflicts_with = "is_prefill_worker")]
    pub session_port: u16,
}

impl WorkerArgs {
    /// The port to listen on: two workers of one host must not collide by default.
    pub fn port(&self) -> u16 {
        self.port.unwrap_or(if self.disagg.is_prefill_worker { 0 } else { DEFAULT_PORT })
    }

    /// How long a step may take. A processor takes its time, and does not hang.
    pub fn step_time_max(&self, on_device: bool) -> Option<Duration> {
        self.step_timeout.or(on_device.then_some(DEVICE_STEP_TIME_MAX))
    }

    /// Connections at a time, where so many requests run or wait at most.
    pub fn connections_max(&self, requests_max: usize) -> usize {
        self.max_connections.unwrap_or_else(|| requests_max.saturating_add(CONNECTIONS_BESIDE_REQUESTS))
    }

    /// What is looked for in answers to conversations, where `by_template` is what the model was taught.
    pub fn parsers(&self, by_template: Parsers) -> Parsers {
        Parsers {
            thoughts: match self.reasoning_parser {
                ReasoningParserArg::Auto => by_template.thoughts,
                ReasoningParserArg::Think => true,
                ReasoningParserArg::None => false,
            },
            calls: match self.tool_call_parser {
                ToolCallParserArg::Auto => by_template.calls,
                ToolCallParserArg::Hermes => Some(CallFormat::Hermes),
                ToolCallParserArg::Llama3Json => Some(CallFormat::Llama3Json),
                ToolCallParserArg::Mistral => Some(CallFormat::Mistral),
                ToolCallParserArg::None => None,
            },
        }
    }

    /// Where prefill workers' sessions are accepted.
    pub fn session_host(&self) -> &str {
        self.disagg.session_host.as_deref().unwrap_or(&self.host)
    }
}
