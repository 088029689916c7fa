//! Parses the command line and starts a role.

use std::{io, process::ExitCode};

use engine::{
    bench, bench_kernels,
    cli::Role,
    doctor, frontend, mock,
    telemetry::init_logging,
    transfer_bench,
    worker::{Ready, decode, prefill},
};
use tokio::runtime::{Builder, Runtime};

/// A runtime for HTTP and the cluster: few threads beside an engine, which needs the cores; all of them where there is
/// no model to speak of; and the frontend's connections have their own.
fn runtime(role: &Role) -> io::Result<Runtime> {
    let cores = std::thread::available_parallelism().map_or(2, |cores| cores.get());
    let shared = |threads| Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    match role {
        Role::Decode(_) | Role::Prefill(_) | Role::Bench(_) | Role::BenchKernels(_) => shared((cores / 4).clamp(2, 8)),
        Role::Mock(_) | Role::Doctor(_) | Role::TransferBench(_) => shared(cores),
        Role::Frontend(_) => Builder::new_current_thread().enable_all().build(),
    }
}

fn main() -> ExitCode {
    let role = Role::from_command_line();
    match start(role) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
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

fn start(role: Role) -> anyhow::Result<ExitCode> {
    init_logging(&role.log().log_level, role.log().log_format.into())?;
    raise_limits();
    let runtime = runtime(&role)?;
    let result = runtime.block_on(async {
        match role {
            Role::Decode(args) => decode::run(args, Ready::print).await?,
            Role::Prefill(args) => prefill::run(args, Ready::print).await?,
            Role::Frontend(args) => frontend::run(args).await?,
            Role::Mock(args) => mock::run(args).await?,
            Role::TransferBench(args) => transfer_bench::run(args).await?,
            Role::Bench(args) => bench::run(args).await?,
            Role::BenchKernels(args) => bench_kernels::run(&args)?,
            Role::Doctor(args) => {
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
