//! Values of flags.

use std::{net::Ipv6Addr, time::Duration};

use clap::ValueEnum;
use engine_kernels::KvDType;
use engine_models::LoadFormat;
use serde_json::{Map, Value};

use crate::{api::refuse_reserved, handoff::Policy, telemetry::LogFormat};

/// `--load-format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LoadFormatArg {
    /// The model's files.
    Auto,
    /// Made up from config.json alone, to measure a shape.
    Dummy,
}

impl LoadFormatArg {
    /// As it is written on the command line and in a worker's card.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Dummy => "dummy",
        }
    }
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
    /// Eight bits (E4M3): half the memory, and answers that differ a little.
    #[value(alias = "fp8_e4m3")]
    Fp8,
}

impl KvDTypeArg {
    /// The type, where `auto` stands for `default`.
    pub fn or(self, default: KvDType) -> KvDType {
        match self {
            Self::Auto => default,
            Self::F32 => KvDType::F32,
            Self::F16 => KvDType::F16,
            Self::Bf16 => KvDType::BF16,
            Self::Fp8 => KvDType::F8,
        }
    }

    /// How a type is written on the command line and in a worker's card.
    pub const fn name_of(dtype: KvDType) -> &'static str {
        match dtype {
            KvDType::F32 => "f32",
            KvDType::F16 => "f16",
            KvDType::BF16 => "bf16",
            KvDType::F8 => "fp8",
        }
    }
}

/// `--device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceArg {
    /// The first CUDA device, or the CPU where there is none.
    Auto,
    /// The CPU.
    Cpu,
    /// A CUDA device, by its number among those that CUDA_VISIBLE_DEVICES leaves.
    Cuda(usize),
}

/// What computes.
pub(super) fn parse_device(text: &str) -> Result<DeviceArg, String> {
    match text.split_once(':') {
        None if text == "auto" => Some(DeviceArg::Auto),
        None if text == "cpu" => Some(DeviceArg::Cpu),
        None if text == "cuda" => Some(DeviceArg::Cuda(0)),
        Some(("cuda", number)) => number.parse().ok().map(DeviceArg::Cuda),
        _ => None,
    }
    .ok_or_else(|| format!("'{text}' is no device; expected auto, cpu or cuda:N, as in cuda:0"))
}

/// A part of a whole.
pub(super) fn parse_share(text: &str) -> Result<f64, String> {
    let share: f64 = text.parse().map_err(|_| format!("'{text}' is no number"))?;
    if !(share > 0.0 && share <= 1.0) {
        return Err(format!("'{text}' is not above 0 and at most 1"));
    }
    Ok(share)
}

/// Which model's shapes `engine bench-kernels` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ShapeArg {
    /// Qwen3-0.6B.
    #[value(name = "qwen3-0.6b")]
    Qwen3Small,
    /// Qwen3-8B.
    #[value(name = "qwen3-8b")]
    Qwen3Large,
    /// Qwen3-14B, where five query heads share a key.
    #[value(name = "qwen3-14b")]
    Qwen3Larger,
    /// Llama-3-8B.
    #[value(name = "llama-3-8b")]
    Llama3,
    /// No model's, but small: to see that all works.
    Tiny,
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

/// `--disagg-policy`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DisaggPolicyArg {
    /// Prefill here.
    Never,
    /// Prefill remotely whenever a prefill worker is alive.
    Always,
    /// Prefill remotely what is long, while the queue is short.
    Threshold,
    /// Prefill where the first token is expected sooner, as measured.
    Auto,
}

impl From<DisaggPolicyArg> for Policy {
    fn from(arg: DisaggPolicyArg) -> Self {
        match arg {
            DisaggPolicyArg::Never => Self::Never,
            DisaggPolicyArg::Always => Self::Always,
            DisaggPolicyArg::Threshold => Self::Threshold,
            DisaggPolicyArg::Auto => Self::Auto,
        }
    }
}

/// `--reasoning-parser`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReasoningParserArg {
    /// As the chat template says.
    Auto,
    /// Thoughts stand between <think> and </think> at the beginning of an answer.
    #[value(aliases = ["qwen3", "deepseek_r1"])]
    Think,
    /// Thoughts stay in the content.
    None,
}

/// `--tool-call-parser`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ToolCallParserArg {
    /// As the chat template says.
    Auto,
    /// JSON between <tool_call> and </tool_call>: Hermes, Qwen2.5, Qwen3.
    Hermes,
    /// Answers that are JSON with "name" and "parameters": Llama 3.1 and later.
    #[value(name = "llama3_json")]
    Llama3Json,
    /// A JSON list behind `[TOOL_CALLS]`: Mistral 7B v0.3, Mistral Nemo.
    Mistral,
    /// Requests with tools are refused.
    None,
}

/// `--transport`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TransportArg {
    /// On one host CUDA IPC between devices, or shared memory; else RDMA, else TCP.
    Auto,
    /// From device to device of one host, or not at all.
    CudaIpc,
    /// Shared memory, or not at all.
    Shm,
    /// RDMA, or not at all, on one host too.
    Rdma,
    /// TCP, on one host too.
    Tcp,
}

/// Whether RDMA adapters read and write pages in the memory of a CUDA device themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceMemoryArg {
    /// If they can, as a worker finds out at its start.
    Auto,
    /// Never: pages are staged in host memory.
    Never,
}

/// Bytes, from a number with an optional unit: `1048576`, `512MiB`, `2GiB`, `1.5GB`.
pub(super) fn parse_size(text: &str) -> Result<usize, String> {
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

/// A number of tokens, in thousands too, which vLLM has as `k` and `K`.
pub(super) fn parse_tokens(text: &str) -> Result<usize, String> {
    let (number, factor) = match (text.strip_suffix('k'), text.strip_suffix('K')) {
        (Some(number), _) => (number, 1000),
        (_, Some(number)) => (number, 1024),
        (None, None) => (text, 1),
    };
    let tokens = number.parse().ok().and_then(|number: usize| number.checked_mul(factor));
    tokens.ok_or_else(|| format!("'{text}' is no number of tokens; expected one as 4096, 32k (32000) or 32K (32768)"))
}

/// A count in a range: what is beyond would be refused later, and less clearly.
pub(super) fn parse_within<const MIN: usize, const MAX: usize>(text: &str) -> Result<usize, String> {
    let count: usize = text.parse().map_err(|_| format!("'{text}' is no number"))?;
    if !(MIN..=MAX).contains(&count) {
        return Err(format!("'{text}' is not between {MIN} and {MAX}"));
    }
    Ok(count)
}

/// A duration from a number of seconds.
pub(super) fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("'{text}' is no number of seconds"))?;
    // About 31 years: anything beyond is a slip, and would not fit a timer.
    if !(0.0..=1e9).contains(&seconds) {
        return Err(format!("'{text}' is not between 0 and 1e9 seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

/// A duration that has to leave time for something.
pub(super) fn parse_seconds_above_zero(text: &str) -> Result<Duration, String> {
    let duration = parse_seconds(text)?;
    if duration.is_zero() {
        return Err(format!("'{text}' seconds are no time: it has to be above 0, and at most 1e9"));
    }
    Ok(duration)
}

/// A duration from a number of milliseconds.
pub(super) fn parse_millis(text: &str) -> Result<Duration, String> {
    let millis: f64 = text.parse().map_err(|_| format!("'{text}' is no number of milliseconds"))?;
    if !(millis > 0.0 && millis <= 60_000.0) {
        return Err(format!("'{text}' is not above 0 and at most 60000 milliseconds"));
    }
    Ok(Duration::from_secs_f64(millis / 1e3))
}

/// Variables for the chat template, such as requests may set.
pub(super) fn parse_template_kwargs(text: &str) -> Result<Map<String, Value>, String> {
    let kwargs: Map<String, Value> = serde_json::from_str(text)
        .map_err(|error| format!("not a JSON object, as {{\"enable_thinking\": false}} is one: {error}"))?;
    refuse_reserved(&kwargs).map_err(|error| error.message().to_owned())?;
    Ok(kwargs)
}

/// How long a mock's step takes, in milliseconds.
pub(super) fn parse_step_time(text: &str) -> Result<Duration, String> {
    parse_pace(text, 1e3)
}

/// How long a prompt's token takes in a mock, in microseconds.
pub(super) fn parse_token_time(text: &str) -> Result<Duration, String> {
    parse_pace(text, 1e6)
}

fn parse_pace(text: &str, per_second: f64) -> Result<Duration, String> {
    let number: f64 = text.parse().map_err(|_| format!("'{text}' is no number"))?;
    if !(0.0..=1e6).contains(&number) {
        return Err(format!("'{text}' is not between 0 and 1e6"));
    }
    Ok(Duration::from_secs_f64(number / per_second))
}

/// A name that may stand in etcd's keys and NATS's subjects.
pub(super) fn parse_namespace(text: &str) -> Result<String, String> {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if text.is_empty() || text.len() > 64 || !text.chars().all(valid) {
        return Err(format!("'{text}' is no namespace: expected up to 64 letters, digits, '-' and '_'"));
    }
    Ok(text.to_owned())
}

/// An origin as browsers name it, or what stands for all of them. What is refused would never match one.
pub(super) fn parse_origin(text: &str) -> Result<String, String> {
    // `null` is how they call pages without an origin, files among them, which in Electron and Cordova are `file://`.
    if matches!(text, "*" | "null" | "file://") {
        return Ok(text.to_owned());
    }
    let expected = || {
        format!(
            "'{text}' is no origin; expected * or scheme://host[:port], as https://app.example or \
             http://localhost:3000, and the flag again for each further one"
        )
    };
    let lower = text.to_ascii_lowercase();
    let (scheme, authority) = lower.split_once("://").ok_or_else(expected)?;
    let (host, port) = match authority.rsplit_once(':') {
        Some((host, port)) if !port.ends_with(']') => (host, Some(port)),
        _ => (authority, None),
    };
    let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
    let host_is_one = match address {
        Some(address) => address.parse::<Ipv6Addr>().is_ok(),
        None => !host.is_empty() && host.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_')),
    };
    let scheme_is_one = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
    // To parse it alone would let a sign pass.
    let digits = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let number = port.filter(|port| digits(port)).and_then(|port| port.parse::<u16>().ok());
    if !(scheme_is_one && host_is_one && number.is_some() == port.is_some()) {
        return Err(expected());
    }
    // In their words: the shortest of an address, and no port that goes without saying.
    let host = match address.and_then(|address| address.parse::<Ipv6Addr>().ok()) {
        Some(address) => format!("[{address}]"),
        None => host.to_owned(),
    };
    Ok(match (scheme, number) {
        ("http", Some(80)) | ("https", Some(443)) | (_, None) => format!("{scheme}://{host}"),
        (_, Some(port)) => format!("{scheme}://{host}:{port}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_type_that_a_card_names_is_understood() {
        for dtype in [KvDType::F32, KvDType::F16, KvDType::BF16, KvDType::F8] {
            let read = KvDTypeArg::from_str(KvDTypeArg::name_of(dtype), false).unwrap();
            assert_eq!(read.or(KvDType::F32), dtype);
        }
        assert_eq!(KvDTypeArg::from_str("fp8_e4m3", false), Ok(KvDTypeArg::Fp8), "as vLLM calls it");
    }

    #[test]
    fn devices_are_named_as_they_are_elsewhere() {
        for (text, device) in [
            ("auto", DeviceArg::Auto),
            ("cpu", DeviceArg::Cpu),
            ("cuda", DeviceArg::Cuda(0)),
            ("cuda:3", DeviceArg::Cuda(3)),
        ] {
            assert_eq!(parse_device(text), Ok(device));
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cpu:0"] {
            assert!(parse_device(text).unwrap_err().contains("cuda:0"), "{text}");
        }
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
    fn tokens_are_counted_in_thousands_as_vllm_counts_them() {
        for (text, tokens) in [("4096", 4096), ("32k", 32_000), ("32K", 32_768)] {
            assert_eq!(parse_tokens(text), Ok(tokens));
        }
        for bad in ["", "k", "-1", "1.5k", "8kK", "auto", "99999999999999999999", "9999999999999999999K"] {
            assert!(parse_tokens(bad).unwrap_err().contains("32K (32768)"), "{bad}");
        }
    }

    #[test]
    fn a_time_that_has_to_be_one_is_above_zero() {
        assert_eq!(parse_seconds("0"), Ok(Duration::ZERO));
        assert_eq!(parse_seconds_above_zero("0.05"), Ok(Duration::from_millis(50)));
        for bad in ["0", "0.0", "-1", "1e-12", "2e9", "x"] {
            assert!(parse_seconds_above_zero(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn counts_are_held_to_their_range() {
        assert_eq!(parse_within::<1, 4096>("4096"), Ok(4096));
        for bad in ["0", "4097", "-1", "x", "99999999999999999999"] {
            assert!(parse_within::<1, 4096>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn variables_for_the_template_are_an_object_without_what_the_server_sets() {
        let kwargs = parse_template_kwargs(r#"{"enable_thinking": false, "tools": null}"#).unwrap();
        assert_eq!(kwargs["enable_thinking"], false);
        for bad in ["", "false", "[]", "{\"a\": }", "enable_thinking=false"] {
            assert!(parse_template_kwargs(bad).unwrap_err().contains("not a JSON object"), "{bad}");
        }
        let refused = parse_template_kwargs(r#"{"a": 1, "bos_token": "x"}"#).unwrap_err();
        assert!(refused.contains("chat_template_kwargs.bos_token") && refused.contains("sets it itself"), "{refused}");
    }

    #[test]
    fn an_origin_is_what_browsers_call_it() {
        for (text, origin) in [
            ("*", "*"),
            ("null", "null"),
            ("file://", "file://"),
            ("https://a.example", "https://a.example"),
            ("HTTPS://A.example", "https://a.example"),
            ("http://localhost:3000", "http://localhost:3000"),
            ("https://a.example:443", "https://a.example"),
            ("http://[::1]", "http://[::1]"),
            ("http://[::1]:8080", "http://[::1]:8080"),
            ("http://[0:0::1]:080", "http://[::1]"),
            ("http://a:08080", "http://a:8080"),
            ("chrome-extension://abcdef", "chrome-extension://abcdef"),
        ] {
            assert_eq!(parse_origin(text).as_deref(), Ok(origin));
        }
        for bad in [
            "[\"*\"]",
            "https://a.example/",
            "https://a.example/page",
            "https://a.example,https://b.example",
            "https://*.example",
            "https://a.example:x",
            "https://a.example:+80",
            "https://a.example:",
            "https://me@a.example",
            "https://",
            "a.example",
            "://a.example",
            "http://[::1",
            "",
        ] {
            assert!(parse_origin(bad).unwrap_err().contains("https://app.example"), "{bad}");
        }
    }

    #[test]
    fn a_namespace_can_stand_in_a_key_and_a_subject() {
        assert!(parse_namespace("team-a_1").is_ok());
        for bad in ["", "a.b", "a/b", "a b", "*", ">", "ä"] {
            assert!(parse_namespace(bad).is_err(), "{bad}");
        }
    }
}
