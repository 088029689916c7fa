//! What a frontend costs, beside Dynamo's: part of `make bench`.
//!
//! Both serve streamed completions from workers that only pretend to compute: ours is `engine frontend` over `engine
//! mock`, the peer Dynamo's frontend over its mocker, each with an etcd and a NATS of its own. They take turns round
//! after round (A B A B …), with the same client, prompts and tokenizer; a figure is the median of its rounds. Two
//! loads:
//!
//! - *as fast as it goes*: workers answer at once, so that what is around them is all there is to wait for;
//! - *paced*: a token every few milliseconds, as from a model. Now no two tokens of an answer meet on their way, and
//!   each costs what it costs.
//!
//! CPU time is the frontend process', from the system's accounts; the workers' is told beside it, because peers share
//! the work between the two differently: Dynamo's frontend encodes and decodes text, ours leaves that to the workers.

mod client;
#[allow(dead_code, reason = "of it, what names the machine is used")]
#[path = "../suite/machine.rs"]
mod machine;
mod process;
mod report;
#[path = "../../tests/services/mod.rs"]
mod services;
mod stack;
#[path = "../suite/stats.rs"]
mod stats;

use std::{path::PathBuf, time::Duration};

use anyhow::Result;
use clap::Parser;

use client::Load;
use report::{Figures, Report};
use stack::{Pace, Stack};

/// Tokens of each answer, bytes (and, with the mock's tokenizer, tokens) of each prompt.
const OUTPUT_TOKENS: usize = 64;
const PROMPT_BYTES: usize = 256;
/// Clients at once.
const CLIENTS: [usize; 4] = [1, 16, 64, 256];

/// Compares what frontends cost.
#[derive(Parser)]
struct Options {
    /// A Python that has Dynamo; without it the engine is measured alone.
    #[arg(long)]
    dynamo: Option<PathBuf>,
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds that each load lasts.
    #[arg(long, default_value_t = 4.0)]
    seconds: f64,
    /// Folder to write the report to.
    #[arg(long)]
    results: Option<PathBuf>,
    /// What `cargo bench` passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// Who is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Who {
    Engine,
    Dynamo,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut who = vec![Who::Engine];
    who.extend(options.dynamo.is_some().then_some(Who::Dynamo));
    let mut report = Report::new(machine::describe()?, &options);
    for round in 1..=options.rounds {
        for pace in [Pace::Unbounded, Pace::Model] {
            for &who in &who {
                let stack = match (who, &options.dynamo) {
                    (Who::Dynamo, Some(python)) => Stack::dynamo(python, pace)?,
                    _ => Stack::engine(pace)?,
                };
                for clients in CLIENTS {
                    let figures = measure(&stack, clients, Duration::from_secs_f64(options.seconds))?;
                    eprintln!(
                        "round {round}: {who:?}, {pace:?}, {clients} clients: {:.0} requests/s, TTFT {:.2} ms, \
                         frontend {:.1} µs a token",
                        figures.requests_per_second,
                        figures.first_p50 * 1e3,
                        figures.frontend_cpu_per_token * 1e6,
                    );
                    report.add(who, pace, clients, figures);
                }
            }
        }
    }
    let text = report.markdown()?;
    println!("\n{text}");
    if let Some(folder) = options.results {
        println!("written to {}", report.write(&folder, &text)?.display());
    }
    Ok(())
}

/// Puts `clients` clients on a stack's frontend, and for the added time to the first token on a worker itself.
fn measure(stack: &Stack, clients: usize, time: Duration) -> Result<Figures> {
    let load =
        |address, clients, time| Load { address, model: &stack.model, clients, time, every: Duration::ZERO }.run();
    // Connections, caches, branch predictors.
    load(stack.frontend.address, clients, time / 8)?;
    let (frontend, workers) = (stack.frontend.cpu()?, stack.workers.cpu()?);
    let through = load(stack.frontend.address, clients, time)?;
    let (frontend, workers) = (stack.frontend.cpu()? - frontend, stack.workers.cpu()? - workers);
    let direct = match stack.worker {
        // A worker's share of the clients, so that it has as much to do.
        Some(address) => Some(load(address, clients.div_ceil(stack::WORKERS), time / 2)?),
        None => None,
    };
    let tokens = (through.requests * OUTPUT_TOKENS) as f64;
    let first = |percent| stats::percentile(&through.first, percent);
    Ok(Figures {
        requests_per_second: through.requests as f64 / through.seconds,
        first_p50: first(50.0),
        first_p99: first(99.0),
        added_first: direct.map(|direct| first(50.0) - stats::percentile(&direct.first, 50.0)),
        frontend_cpu_per_request: frontend / through.requests as f64,
        frontend_cpu_per_token: frontend / tokens,
        workers_cpu_per_token: workers / tokens,
        frontend_cores: frontend / through.seconds,
    })
}
