//! The command line: one struct for each kind of process. A flag that vLLM has too has its name, or takes it as an
//! alias, and those of disaggregation have Dynamo's; each can also be given by environment where that is said.

mod bench;
mod bench_kernels;
mod cluster;
mod doctor;
mod engine;
mod frontend;
mod instead;
mod mock;
mod transfer_bench;
mod transport;
mod values;
mod worker;

pub use bench::BenchArgs;
pub use bench_kernels::BenchKernelsArgs;
pub use cluster::ClusterArgs;
pub use doctor::DoctorArgs;
pub use engine::EngineArgs;
pub use frontend::FrontendArgs;
pub use mock::MockArgs;
pub use transfer_bench::TransferBenchArgs;
pub use transport::TransportArgs;
pub use values::{
    DeviceArg, DeviceMemoryArg, DisaggPolicyArg, KvDTypeArg, LoadFormatArg, LogFormatArg, ShapeArg, TransportArg,
};
pub use worker::{DisaggArgs, WorkerArgs};

use std::ffi::OsString;

use clap::{Args, CommandFactory, FromArgMatches, Id, Parser, Subcommand, error::ErrorKind};

/// Serves large language models behind the OpenAI API, alone or as part of a cluster.
#[derive(Debug, Parser)]
#[command(name = "engine", version, about, after_help = EXAMPLES)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,

    #[command(flatten)]
    worker: WorkerArgs,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The cluster's HTTP edge: spreads requests over decode workers, and moves them when one dies
    Frontend(FrontendArgs),
    /// How fast a model is computed here: prompts by themselves, and sequences decoded at the same time
    Bench(BenchArgs),
    /// How long each CUDA kernel takes on the device at hand, for the shapes of real models
    BenchKernels(BenchKernelsArgs),
    /// Looks at this machine, etcd, NATS and the cluster, and says what is amiss and what to do about it
    Doctor(DoctorArgs),
    /// How fast KV pages move between two processes, one with --serve and one with --connect
    TransferBench(TransferBenchArgs),
    /// Many workers in one process that compute nothing, to measure and try out clusters
    Mock(MockArgs),
}

/// What the process is asked to be.
#[derive(Debug)]
pub enum Invocation {
    /// A decode worker, alone or in a cluster.
    Decode(WorkerArgs),
    /// A prefill worker.
    Prefill(WorkerArgs),
    /// A frontend.
    Frontend(FrontendArgs),
    /// Many workers without hardware.
    Mock(MockArgs),
    /// Somebody who measures a model.
    Bench(BenchArgs),
    /// Somebody who measures kernels.
    BenchKernels(BenchKernelsArgs),
    /// Somebody who looks whether all is well.
    Doctor(DoctorArgs),
    /// One of two who measure transfers.
    TransferBench(TransferBenchArgs),
}

impl Invocation {
    /// Reads the process's command line. Ends the process if it is wrong or asks for help.
    pub fn from_command_line() -> Self {
        Self::try_parse_from(std::env::args_os()).unwrap_or_else(|error| error.exit())
    }

    /// Reads a command line, the program's name first.
    pub fn try_parse_from<I, T>(line: I) -> Result<Self, clap::Error>
    where
        I: IntoIterator<Item = T>,
        T: Into<OsString>,
    {
        let line: Vec<OsString> = line.into_iter().map(Into::into).collect();
        let mut cli = Cli::command();
        if line.iter().any(|word| word == "--standalone") {
            // What the environment says of a cluster is meant for others then, and means nothing here, be it wrong.
            // Its secret stays: without one, anybody could have answers continued here.
            let cluster = ClusterArgs::augment_args(clap::Command::new("cluster"));
            let leads_there = |id: &Id| id != "cluster_token" && cluster.get_arguments().any(|arg| arg.get_id() == id);
            cli = cli.mut_args(|arg| if leads_there(arg.get_id()) { arg.env(None::<&str>) } else { arg });
        }
        let matches = cli.try_get_matches_from_mut(&line).map_err(|error| instead::explained(error, &line))?;
        let Cli { command, worker } = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut cli))?;
        match command {
            Some(Command::Frontend(frontend)) => Ok(Self::Frontend(frontend)),
            Some(Command::Mock(mock)) => Ok(Self::Mock(mock)),
            Some(Command::Bench(bench)) if bench.engine.model.is_some() => Ok(Self::Bench(bench)),
            Some(Command::Bench(_)) => Err(model_is_missing()),
            Some(Command::BenchKernels(bench)) => Ok(Self::BenchKernels(bench)),
            Some(Command::Doctor(doctor)) => Ok(Self::Doctor(doctor)),
            Some(Command::TransferBench(bench)) => Ok(Self::TransferBench(bench)),
            None if worker.disagg.is_prefill_worker => Ok(Self::Prefill(worker)),
            None if worker.engine.model.is_none() => Err(model_is_missing()),
            None => Ok(Self::Decode(worker)),
        }
    }

    /// How it logs.
    pub fn log(&self) -> &LogArgs {
        match self {
            Self::Decode(worker) | Self::Prefill(worker) => &worker.log,
            Self::Frontend(frontend) => &frontend.log,
            Self::Mock(mock) => &mock.log,
            Self::Bench(bench) => &bench.log,
            Self::BenchKernels(bench) => &bench.log,
            Self::Doctor(doctor) => &doctor.log,
            Self::TransferBench(bench) => &bench.log,
        }
    }
}

fn model_is_missing() -> clap::Error {
    let say = "--model is missing: a directory, a .gguf file, or a model of the hub as Qwen/Qwen3-0.6B";
    Cli::command().error(ErrorKind::MissingRequiredArgument, say)
}

/// What is worth knowing. NATS's client says in its own words what `cluster` says in ours.
const DEFAULT_FILTER: &str = "info,async_nats=off";

/// Logging, the same for every kind of process.
#[derive(Debug, Args)]
#[command(next_help_heading = "Log")]
pub struct LogArgs {
    /// How log lines are written
    #[arg(long, value_enum, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormatArg,

    /// What is logged, as `info` or `warn,engine=debug`
    #[arg(long, value_name = "FILTER", env = "RUST_LOG", default_value = DEFAULT_FILTER)]
    pub log_level: String,
}

impl LogArgs {
    /// Nothing, for those whose output is an answer.
    fn quiet() -> Self {
        Self { log_format: LogFormatArg::Text, log_level: "off".to_owned() }
    }
}

const EXAMPLES: &str = "\
Examples:
  engine --model Qwen/Qwen3-0.6B
  engine --model ./SmolLM2-135M-Instruct.Q4_1.gguf --max-model-len 4096 --port 8080
  ENGINE_API_KEY=secret engine --model ./model --host 0.0.0.0
A cluster, where etcd and nats-server -js run on this machine:
  engine --model Qwen/Qwen3-0.6B
  engine --is-prefill-worker
elsewhere:
  engine --model Qwen/Qwen3-0.6B --etcd http://etcd:2379 --nats nats://nats:4222
  engine --is-prefill-worker --etcd http://etcd:2379 --nats nats://nats:4222
  engine frontend --etcd http://etcd:2379 --nats nats://nats:4222";

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        api::{CallFormat, Parsers},
        handoff::{Limits, Policy},
    };

    fn parse(line: &[&str]) -> Result<Invocation, String> {
        Invocation::try_parse_from([&["engine"], line].concat()).map_err(|error| error.to_string())
    }

    fn worker(line: &[&str]) -> WorkerArgs {
        match parse(line) {
            Ok(Invocation::Decode(worker) | Invocation::Prefill(worker)) => worker,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_can_be_given_by_environment() {
        let of_a_server = ["api-key ENGINE_API_KEY", "log-level RUST_LOG"];
        let of_a_cluster = [
            "etcd ETCD_ENDPOINTS",
            "nats NATS_SERVER",
            "cluster-token ENGINE_CLUSTER_TOKEN",
            "etcd-ca ETCD_CA",
            "etcd-cert ETCD_CERT",
            "etcd-key ETCD_KEY",
            "etcd-user ETCD_USER",
            "etcd-password ETCD_PASSWORD",
            "nats-ca NATS_CA",
            "nats-cert NATS_CERT",
            "nats-key NATS_KEY",
            "nats-user NATS_USER",
            "nats-password NATS_PASSWORD",
            "nats-creds NATS_CREDS",
            "nats-nkey NATS_NKEY",
        ];
        let engine = Cli::command();
        let part = |name| engine.find_subcommand(name).unwrap();
        for (command, flags) in [
            (&engine, [&of_a_server[..], &of_a_cluster].concat()),
            (part("frontend"), [&of_a_server[..], &of_a_cluster].concat()),
            (part("doctor"), of_a_cluster.to_vec()),
            (part("mock"), of_a_cluster.to_vec()),
        ] {
            for flag in flags {
                let (flag, variable) = flag.split_once(' ').unwrap();
                let argument = command.get_arguments().find(|argument| argument.get_long() == Some(flag)).unwrap();
                let known = argument.get_env().and_then(|name| name.to_str());
                assert_eq!(known, Some(variable), "{flag} of {}", command.get_name());
            }
        }
    }

    #[test]
    fn flags_that_are_not_given_are_the_limits_that_hold_without_any() {
        let (flags, limits) = (worker(&["--model", "m"]).disagg, Limits::default());
        assert_eq!(Policy::from(flags.disagg_policy), limits.policy);
        assert_eq!(flags.max_local_prefill_length, limits.max_local_prefill_length as usize);
        assert_eq!(flags.max_prefill_queue_size, limits.max_prefill_queue_size as usize);
        assert_eq!(flags.itl_target, limits.itl_target());
        let refused = parse(&["--model", "m", "--itl-target", "100000"]).unwrap_err();
        assert!(refused.contains("above 0 and at most 60000 milliseconds"), "{refused}");
    }

    #[test]
    fn flags_alone_are_a_worker_and_frontend_is_a_word() {
        assert!(matches!(parse(&["--model", "m"]), Ok(Invocation::Decode(_))));
        assert!(matches!(parse(&["-m", "m"]), Ok(Invocation::Decode(_))));
        assert!(matches!(parse(&["--is-prefill-worker"]), Ok(Invocation::Prefill(_))));
        assert!(matches!(parse(&["frontend"]), Ok(Invocation::Frontend(_))));
        assert!(matches!(parse(&["mock", "--step-time", "0"]), Ok(Invocation::Mock(_))));
        assert!(matches!(parse(&["bench", "--model", "m"]), Ok(Invocation::Bench(_))));
        assert!(matches!(parse(&["bench-kernels", "--shape", "tiny,qwen3-8b"]), Ok(Invocation::BenchKernels(_))));
        assert!(matches!(parse(&["doctor", "--json"]), Ok(Invocation::Doctor(_))));
        assert!(matches!(parse(&["transfer-bench", "--serve"]), Ok(Invocation::TransferBench(_))));
        assert!(parse(&["transfer-bench"]).is_err());
    }

    #[test]
    fn a_decode_worker_needs_a_model_and_a_prefill_worker_does_not() {
        assert!(parse(&[]).unwrap_err().contains("--model"));
        assert!(parse(&["bench"]).unwrap_err().contains("--model"));
        assert!(parse(&["--is-prefill-worker"]).is_ok());
    }

    #[test]
    fn who_stands_alone_names_no_services() {
        assert!(worker(&["--model", "m", "--standalone"]).disagg.standalone);
        for service in ["--etcd", "--nats"] {
            let refused = parse(&["--model", "m", "--standalone", service, "http://a:1"]).unwrap_err();
            assert!(refused.contains("--standalone") && refused.contains(service), "{refused}");
        }
        assert!(parse(&["--is-prefill-worker", "--standalone"]).is_err());
    }

    #[test]
    fn what_a_prefill_worker_has_no_use_for_is_refused() {
        for flag in [["--max-local-prefill-length", "1"], ["--disagg-policy", "never"], ["--served-model-name", "x"]] {
            assert!(parse(&[&["--is-prefill-worker"], &flag[..]].concat()).is_err(), "{flag:?}");
        }
    }

    #[test]
    fn workers_of_both_roles_can_be_told_to_keep_nothing_by_vllm_s_name_too() {
        for role in [&["--model", "m"][..], &["--is-prefill-worker"]] {
            assert!(!worker(role).no_prefix_caching);
            for flag in ["--no-prefix-caching", "--no-enable-prefix-caching"] {
                assert!(worker(&[role, &[flag]].concat()).no_prefix_caching, "{flag}");
                assert!(parse(&[role, &[flag, "--enable-prefix-caching"]].concat()).is_err());
            }
            let asked_for = ["--enable-prefix-caching", "--enable-chunked-prefill", "--enable-auto-tool-choice"];
            assert!(!worker(&[role, &asked_for].concat()).no_prefix_caching);
        }
    }

    #[test]
    fn two_workers_on_one_host_do_not_collide_by_default() {
        assert_eq!(worker(&["--model", "m"]).port(), 8000);
        assert_eq!(worker(&["--is-prefill-worker"]).port(), 0);
        assert_eq!(worker(&["--is-prefill-worker", "--port", "9"]).port(), 9);
    }

    #[test]
    fn there_are_more_connections_than_places_for_requests() {
        assert_eq!(worker(&["--model", "m"]).connections_max(1088), 1088 + 512);
        assert_eq!(worker(&["--model", "m", "--max-connections", "7"]).connections_max(1088), 7);
    }

    #[test]
    fn a_server_takes_a_request_and_a_connection_at_least() {
        for line in [
            &["--model", "m", "--max-connections", "0"][..],
            &["--is-prefill-worker", "--max-connections", "0"],
            &["frontend", "--max-connections", "0"],
            &["frontend", "--max-requests", "0"],
        ] {
            let refused = parse(line).unwrap_err();
            assert!(refused.contains("'0' is not between 1 and"), "{refused}");
        }
    }

    #[test]
    fn an_answer_may_take_some_time() {
        for role in [&["--model", "m"][..], &["frontend"]] {
            let refused = parse(&[role, &["--request-timeout", "0"]].concat()).unwrap_err();
            assert!(refused.contains("has to be above 0"), "{refused}");
        }
    }

    #[test]
    fn tokens_may_be_given_in_thousands() {
        let engine = worker(&["--model", "m", "--max-model-len", "32k", "--max-num-batched-tokens", "8K"]).engine;
        assert_eq!((engine.max_model_len, engine.max_num_batched_tokens), (Some(32_000), Some(8192)));
    }

    #[test]
    fn several_keys_may_be_given() {
        let worker = worker(&["--model", "m", "--api-key", "a", "--api-key", "b,c"]);
        assert_eq!(worker.api_key, ["a", "b", "c"]);
    }

    #[test]
    fn origins_that_no_browser_names_are_refused() {
        let asked = ["--allowed-origins", "https://a.example", "--allowed-origins", "*"];
        assert_eq!(worker(&[&["--model", "m"], &asked[..]].concat()).allowed_origins, ["https://a.example", "*"]);
        for role in [&["--model", "m"][..], &["frontend"]] {
            let refused = parse(&[role, &["--allowed-origins", "[\"*\"]"]].concat()).unwrap_err();
            assert!(refused.contains("expected * or scheme://host"), "{refused}");
        }
    }

    #[test]
    fn an_empty_key_is_no_key() {
        assert!(parse(&["--model", "m", "--api-key", ""]).is_err());
    }

    #[test]
    fn variables_for_the_template_are_given_by_either_of_two_names() {
        assert_eq!(worker(&["--model", "m"]).default_chat_template_kwargs, None);
        for flag in ["--default-chat-template-kwargs", "--chat-template-kwargs"] {
            let kwargs = worker(&["--model", "m", flag, "{\"enable_thinking\": false}"]).default_chat_template_kwargs;
            assert_eq!(kwargs.unwrap()["enable_thinking"], false, "{flag}");
            assert!(parse(&["--is-prefill-worker", flag, "{}"]).is_err(), "{flag}");
            assert!(parse(&["--model", "m", flag, "{\"messages\": []}"]).unwrap_err().contains("sets it itself"));
        }
    }

    #[test]
    fn what_answers_are_looked_through_for_may_be_said() {
        let by_template = Parsers { thoughts: true, calls: Some(CallFormat::Hermes) };
        let told = |flags: &[&str], by_template| {
            let Parsers { thoughts, calls } = worker(&[&["--model", "m"], flags].concat()).parsers(by_template);
            (thoughts, calls)
        };
        assert_eq!(told(&[], by_template), (true, Some(CallFormat::Hermes)));
        assert_eq!(told(&["--reasoning-parser", "none", "--tool-call-parser", "none"], by_template), (false, None));
        for (name, format) in [("llama3_json", CallFormat::Llama3Json), ("mistral", CallFormat::Mistral)] {
            assert_eq!(told(&["--tool-call-parser", name], by_template), (true, Some(format)));
        }
        for name in ["think", "qwen3", "deepseek_r1"] {
            let flags = ["--reasoning-parser", name, "--tool-call-parser", "hermes"];
            assert_eq!(told(&flags, Parsers::default()), (true, Some(CallFormat::Hermes)));
        }
    }
}
