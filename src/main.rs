//! Parses the command line and starts a role.

use std::process::ExitCode;

use clap::Parser;
use engine::{cli::Cli, decode, telemetry::init_logging};

/// Threads for HTTP: few, because the engine needs the cores.
fn io_threads() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get() / 4).clamp(2, 8)
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match start(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn start(cli: Cli) -> anyhow::Result<()> {
    init_logging(&cli.log_level, cli.log_format.into())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(io_threads()).enable_all().build()?;
    let result = runtime.block_on(decode::run(cli));
    // Work on blocking threads (a prompt being encoded, a model being loaded) is left behind.
    runtime.shutdown_background();
    result
}
