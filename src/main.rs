//! Parses the command line and starts a role.

use std::process::ExitCode;

use engine::{
    cli::Role,
    frontend,
    telemetry::init_logging,
    worker::{decode, prefill},
};

/// Threads for HTTP: few, because the engine needs the cores.
fn io_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get() / 4).clamp(2, 8)
}

fn main() -> ExitCode {
    let role = Role::from_command_line();
    match start(role) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(role: Role) -> anyhow::Result<()> {
    init_logging(&role.log().log_level, role.log().log_format.into())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(io_threads()).enable_all().build()?;
    let result = runtime.block_on(async {
        match role {
            Role::Decode(args) => decode::run(args).await,
            Role::Prefill(args) => prefill::run(args).await,
            Role::Frontend(args) => frontend::run(args).await,
        }
    });
    // Work on blocking threads (a prompt being encoded, a model being loaded) is left behind.
    runtime.shutdown_background();
    result
}
