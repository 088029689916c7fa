//! What disaggregation costs and what it is for, measured: part of `make bench`.
//!
//! Real processes on this machine: etcd, nats-server, and workers that are held to one core each. [`handoffs`] takes
//! one remote prefill after the other apart into its phases; [`streams`] looks at what eight answers notice of long
//! prompts that arrive beside them, in one process and in two. What is compared takes turns (A B C A B C …), so that
//! all meet the same machine in the same minutes.
//!
//! With `--device` workers compute on that instead, all on the one, and [`answers`] looks first whether they say what
//! one process says. `make gpu-check` has this program carried to a machine with a GPU.

mod answers;
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

use cluster::Engine;
use model::Model;
use report::Report;

/// Measures handoffs, and what long prompts cost those who are being answered.
#[derive(Parser)]
struct Options {
    /// The model file; with --device the folder of a shape.
    #[arg(long, env = "ENGINE_DEMO_MODEL")]
    model: Option<PathBuf>,
    /// The engine.
    #[arg(long, default_value = env!("CARGO_BIN_EXE_engine"))]
    engine: PathBuf,
    /// A CUDA device that all workers compute on, as cuda:0; without one each is held to a core.
    #[arg(long, requires = "tokenizer")]
    device: Option<String>,
    /// Folder of a tokenizer for the shape.
    #[arg(long, requires = "device")]
    tokenizer: Option<PathBuf>,
    /// Further flags of all workers, between spaces.
    #[arg(long, default_value = "", allow_hyphen_values = true)]
    flags: String,
    /// Tokens of long prompts.
    #[arg(long, default_value_t = 2000)]
    prompt_tokens: usize,
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
    ensure!(options.device.is_some() || machine.cores >= 2, "two workers on a core each need two cores");
    let models = match &options.tokenizer {
        Some(tokenizer) => vec![Model::of_shape(&file, tokenizer)?],
        None => vec![Model::of_file(&file)?, Model::made_up()?],
    };
    let flags = options.flags.split_whitespace().map(str::to_owned).collect();
    let engine = Engine { program: options.engine, device: options.device.clone(), flags };
    let mut report = Report::new(machine, options.device);
    let long = options.prompt_tokens;
    ensure!(long >= 200, "--prompt-tokens {long}: prompts so short are not handed off");
    // If answers are wrong, how fast they come is worth knowing all the same; and so with each of the others.
    let mut ended = Ok(());
    if engine.device.is_some() {
        ended = answers::compare(&engine, &models[0], long).map(|alike| report.answers(&alike));
    }
    if options.rounds > 0 {
        for model in &models {
            let seen = streams::measure(&engine, model, options.rounds, options.prompts, long);
            ended = ended.and(seen.map(|seen| report.streams(&seen)));
        }
    }
    if options.handoffs > 0 {
        let rows = handoffs::measure(&engine, &models[0], long, options.handoffs);
        ended = ended.and(rows.map(|rows| report.handoffs(&rows)));
    }
    ended?;
    if let Some(folder) = options.results {
        println!("written to {}", report.write(&folder)?.display());
    }
    Ok(())
}
