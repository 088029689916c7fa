//! What the engine exists for, measured beside a peer: `make bench`; and the forward pass alone of one model in files of
//! several types: `make bench-types`.
//!
//! Everything runs in processes of its own, ours and the peer's alternating (A B A B …), so that both meet the same
//! machine in the same minutes; a figure is the median of its rounds. [`offline`] times the forward pass alone, as
//! llama-bench does; [`serving`] times whole servers over HTTP; [`machine`] measures the memory bandwidth that the
//! floors in the report are derived from. [`report`] writes the page of one file, [`types`] that of several.

mod http;
mod load;
mod machine;
mod offline;
mod report;
mod server;
mod serving;
mod stats;
mod types;

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};

/// Compares the engine with llama.cpp on one GGUF file, or its forward pass on several.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    part: Option<Part>,
    /// The model file.
    #[arg(long, env = "ENGINE_DEMO_MODEL")]
    model: Option<PathBuf>,
    /// Folder of GGUF files of one model in several types: measures the forward pass alone, of each of them.
    #[arg(long)]
    types: Option<PathBuf>,
    /// Folder of llama-bench and llama-server; without it the engine is measured alone.
    #[arg(long)]
    llama: Option<PathBuf>,
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Threads of the multi-threaded measurements [default: all].
    #[arg(long)]
    threads: Option<usize>,
    /// Leaves out the forward pass alone.
    #[arg(long)]
    no_offline: bool,
    /// Leaves out the servers.
    #[arg(long)]
    no_serving: bool,
    /// Folder to write the report to.
    #[arg(long)]
    results: Option<PathBuf>,
    /// What `cargo bench` passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Part {
    /// Times the engine's forward pass once, in this process, and prints tokens per second.
    Forward(offline::Work),
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(Part::Forward(work)) = options.part {
        println!("{}", offline::forward(&work)?);
        return Ok(());
    }
    let (llama, rounds) = (options.llama.as_deref(), options.rounds);
    let threads = match options.threads {
        Some(threads) => threads,
        None => std::thread::available_parallelism()?.get(),
    };
    let machine = machine::describe()?;
    let page = machine.page_name()?;
    let (name, text) = if let Some(folder) = &options.types {
        (format!("{page}-types.md"), types::page(folder, &machine, llama, rounds, threads)?)
    } else {
        let model = options.model.context("--model names no file (make bench does)")?;
        let mut report = report::Report::new(&model, machine, rounds, threads);
        for threads in [1, threads] {
            report.bandwidth(threads, machine::read_bandwidth(threads));
        }
        if !options.no_offline {
            report.offline(offline::compare(&model, llama, rounds, threads, &[512, 2048])?);
        }
        if !options.no_serving {
            report.serving(serving::compare(&model, llama, rounds, threads)?);
        }
        (format!("{page}.md"), report.markdown())
    };
    println!("\n{text}");
    if let Some(folder) = options.results {
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(name);
        std::fs::write(&path, text)?;
        println!("written to {}", path.display());
    }
    Ok(())
}
