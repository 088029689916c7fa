//! Parses the command line and starts what it asks for.

use std::{io, process::ExitCode};

use engine::{
    bench, bench_kernels,
    cli::{Invocation, LogFormatArg},
    doctor, frontend, mock,
    process::Ready,
    telemetry::init_logging,
    transfer_bench,
    worker::{decode, prefill},
};
use tokio::runtime::{Builder, Runtime};

/// The runtime for HTTP and the cluster. Few threads beside an engine, which needs the cores; one a core where there is
/// no model to speak of; one for a frontend, whose connections have their own.
fn runtime(invocation: &Invocation) -> io::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(2, |cores| cores.get());
    let shared = |threads| Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    match invocation {
        Invocation::Decode(_) | Invocation::Prefill(_) | Invocation::Bench(_) | Invocation::BenchKernels(_) => {
            shared((cores / 4).clamp(2, 8))
        }
        Invocation::Mock(_) | Invocation::Doctor(_) | Invocation::TransferBench(_) => shared(cores),
        Invocation::Frontend(_) => Builder::new_current_thread().enable_all().build(),
    }
}

fn main() -> ExitCode {
    let invocation = Invocation::from_command_line();
    let log_format = invocation.log().log_format;
    match start(invocation) {
        Ok(code) => code,
        Err(error) => {
            // Collectors of JSON drop lines that are none. Nor may it be lost where there is no log, or a silent one.
            if log_format == LogFormatArg::Json && tracing::enabled!(tracing::Level::ERROR) {
                tracing::error!("{}", told(&error));
            } else {
                eprintln!("error: {}", told(&error));
            }
            ExitCode::FAILURE
        }
    }
}

/// An error and what it came from, unless that is in its text already.
fn told(error: &anyhow::Error) -> String {
    let mut text = String::new();
    for cause in error.chain().map(|cause| cause.to_string()).filter(|cause| !cause.is_empty()) {
        match text.contains(&cause) {
            true => {}
            false if text.is_empty() => text = cause,
            false => text = format!("{text}: {cause}"),
        }
    }
    text
}

/// Allows this process as many open files, and as much locked memory, as the system lets it have. The usual limit of
/// 1,024 files is there for programs that use `select`, and fewer than the connections and sessions that are promised;
/// adapters lock the memory that is registered with them.
fn raise_limits() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    for (resource, what) in [(Resource::Nofile, "open files"), (Resource::Memlock, "locked memory")] {
        let limit = getrlimit(resource);
        if let Err(error) = setrlimit(resource, Rlimit { current: limit.maximum, ..limit }) {
            tracing::warn!(%error, "the limit of {what} stays where it is");
        }
    }
}

fn start(invocation: Invocation) -> anyhow::Result<ExitCode> {
    init_logging(&invocation.log().log_level, invocation.log().log_format.into())?;
    raise_limits();
    let runtime = runtime(&invocation)?;
    let result = runtime.block_on(async {
        match invocation {
            Invocation::Decode(args) => decode::run(args, Ready::print).await?,
            Invocation::Prefill(args) => prefill::run(args, Ready::print).await?,
            Invocation::Frontend(args) => frontend::run(args).await?,
            Invocation::Mock(args) => mock::run(args).await?,
            Invocation::TransferBench(args) => transfer_bench::run(args).await?,
            Invocation::Bench(args) => bench::run(args).await?,
            Invocation::BenchKernels(args) => bench_kernels::run(&args)?,
            Invocation::Doctor(args) => {
                if !doctor::run(args).await? {
                    return Ok(ExitCode::FAILURE);
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    });
    // Work on blocking threads (a prompt being encoded, a model being loaded) is left behind.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use anyhow::{Context, anyhow};

    use super::told;

    #[test]
    fn a_cause_that_its_error_tells_of_is_not_told_again() {
        let twice = Err::<(), _>(anyhow!("no such file").context("cannot read a: no such file")).context("no model");
        assert_eq!(told(&twice.unwrap_err()), "no model: cannot read a: no such file");
        assert_eq!(told(&anyhow!("refused").context("no etcd")), "no etcd: refused");
    }
}
