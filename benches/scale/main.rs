//! What grows with what in a cluster, without its hardware: `make bench-scale`.
//!
//! Clusters of growing size, each with real etcd, real NATS and a real frontend, and workers of `engine mock`:
//! everything of them is real but the arithmetic, which is a pause. In each size the load a worker is the same, so that
//! a figure that stays level grows with nothing, one that grows with the workers is their number's, and one that grows
//! faster is a mistake. Read are the servers' own counters and the system's accounts; nothing is added to what is
//! measured.

mod cell;
#[path = "../frontend/client.rs"]
mod client;
mod counters;
#[allow(dead_code, reason = "of it, what names the machine is used")]
#[path = "../suite/machine.rs"]
mod machine;
#[path = "../frontend/process.rs"]
mod process;
mod report;
#[path = "../../tests/services/mod.rs"]
mod services;
#[allow(dead_code, reason = "percentiles are")]
#[path = "../suite/stats.rs"]
mod stats;

use std::{
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use clap::Parser;

use cell::Cell;
use client::Load;
use counters::{Counters, Rates};
use report::{Figures, Report};

/// Tokens of each answer, and bytes (with the mock's tokenizer, tokens) of each prompt, which is prefilled remotely.
const OUTPUT_TOKENS: usize = 32;
const PROMPT_BYTES: usize = 192;
/// A decode worker gets a request so often.
const EVERY: Duration = Duration::from_secs(2);

/// Measures clusters of growing size.
#[derive(Parser)]
struct Options {
    /// Sizes as DECODE+PREFILL workers.
    #[arg(long, value_delimiter = ',', default_value = "10+5,50+25,200+100", value_parser = size)]
    sizes: Vec<Size>,
    /// Seconds that each part of a measurement lasts.
    #[arg(long, default_value_t = 20.0)]
    seconds: f64,
    /// Folder to write the report to.
    #[arg(long)]
    results: Option<PathBuf>,
    /// What `cargo bench` passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

/// How many workers.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub(crate) decode: usize,
    pub(crate) prefill: usize,
}

fn size(text: &str) -> Result<Size, String> {
    let parts = text.split_once('+').and_then(|(decode, prefill)| Some((decode.parse().ok()?, prefill.parse().ok()?)));
    let (decode, prefill) = parts.ok_or_else(|| format!("'{text}' is not as 200+100"))?;
    Ok(Size { decode, prefill })
}

fn main() -> Result<()> {
    let options = Options::parse();
    let time = Duration::from_secs_f64(options.seconds);
    let mut report = Report::new(machine::describe()?, options.seconds);
    for &size in &options.sizes {
        let figures = measure(size, time)?;
        eprintln!("{size:?}: {figures:#?}");
        report.add(size, figures);
    }
    let text = report.markdown()?;
    println!("\n{text}");
    if let Some(folder) = options.results {
        println!("written to {}", report.write(&folder, &text)?.display());
    }
    Ok(())
}

fn measure(size: Size, time: Duration) -> Result<Figures> {
    let started = Instant::now();
    let mut cell = Cell::start(size)?;
    let up = started.elapsed().as_secs_f64();

    let before = Counters::read(&cell)?;
    thread::sleep(time);
    let idle = Rates::between(&before, &Counters::read(&cell)?);

    let (waited, before) = (cell.queue_waits()?, Counters::read(&cell)?);
    let load = Load { address: cell.frontend.address, model: "mock", clients: size.decode, time, every: EVERY };
    let seen = load.run()?;
    let after = Counters::read(&cell)?;
    let busy = Rates::between(&before, &after);
    let waited = cell.queue_waits()?.since(&waited);

    // What was opened for the load stays open.
    thread::sleep(Duration::from_secs(2));
    let before = Counters::read(&cell)?;
    thread::sleep(time);
    let rest = Rates::between(&before, &Counters::read(&cell)?);

    let before = Counters::read(&cell)?;
    cell.come_and_go()?;
    let changed = Counters::read(&cell)?;
    let first = |percent| stats::percentile(&seen.first, percent);
    let [remote, sessions] =
        ["engine_prefills_total{where=\"remote\"}", "engine_transfer_sessions_total{transport=\"shm\"}"]
            .map(|name| cell.sum(name));
    Ok(Figures {
        up,
        requests: seen.requests,
        requests_per_second: seen.requests as f64 / seen.seconds,
        first: (first(50.0), first(99.0)),
        queue: (waited.percentile(50.0), waited.percentile(99.0)),
        remote: remote?,
        sessions: sessions?,
        watchers: after.etcd_watchers,
        frontend_bytes: after.frontend_bytes,
        events_a_change: changed.etcd_events - before.etcd_events,
        bytes_a_change: changed.etcd_bytes - before.etcd_bytes,
        idle,
        busy,
        rest,
    })
}
