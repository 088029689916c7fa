//! What disaggregation costs and what it is for, measured: part of `make bench`.
//!
//! Real processes on this machine: etcd, nats-server, and workers that are held to one core each. [`handoffs`] takes
//! one remote prefill after the other apart into its phases; [`streams`] looks at what eight answers notice of long
//! prompts that arrive beside them, in one process and in two. What is compared takes turns (A B C A B C …), so that
//! all meet the same machine in the same minutes.

mod client;
mod cluster;
mod handoffs;
#[path = "../suite/http.rs"]
mod http;
#[path = "../suite/machine.rs"]
#[allow(dead_code, reason = "the memory's speed is another bench's")]
mod machine;
mod model;
mod report;
#[path = "../../tests/services/mod.rs"]
mod services;
#[path = "../suite/stats.rs"]
mod stats;
mod streams;

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use clap::Parser;

use model::Model;

/// Measures handoffs, and what long prompts cost those who are being answered.
#[derive(Parser)]
struct Options {
    /// The model file.
    #[arg(long, env = "ENGINE_DEMO_MODEL")]
    model: Option<PathBuf>,
    /// Handoffs of each transport and prompt length.
    #[arg(long, default_value_t = 100)]
    handoffs: usize,
    /// Rounds of each setup beside which long prompts arrive.
    #[arg(long, default_value_t = 2)]
    rounds: usize,
    /// Long prompts of a round.
    #[arg(long, default_value_t = 5)]
    prompts: usize,
    /// Folder to write the report to.
    #[arg(long)]
    results: Option<PathBuf>,
    /// What `cargo bench` passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let file = options.model.context("--model names no file (make bench does)")?;
    let machine = machine::describe()?;
    ensure!(machine.cores >= 2, "two workers on a core each need two cores");
    let demo = Model::of_file(&file)?;
    let small = Model::made_up()?;
    let mut report = report::Report::new(machine);
    if options.handoffs > 0 {
        report.handoffs(handoffs::measure(&demo, options.handoffs)?);
    }
    if options.rounds > 0 {
        for model in [&demo, &small] {
            report.streams(streams::measure(model, options.rounds, options.prompts)?);
        }
    }
    let text = report.markdown();
    println!("\n{text}");
    if let Some(folder) = options.results {
        println!("written to {}", report.write(&folder, &text)?.display());
    }
    Ok(())
}
