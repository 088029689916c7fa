//! Moving KV pages, measured beside a plain copy and beside NIXL: part of `make bench`.
//!
//! A prefill worker's pages go into another process' memory, every second page, so that no two can be joined. All ways
//! take turns in each round (A B C A B C …), so that they meet the same machine in the same moments; a figure is the
//! median of all rounds. The report states each floor beside what was measured: bytes and copies.

#[path = "../suite/machine.rs"]
mod machine;
mod peer;
#[path = "../suite/stats.rs"]
mod stats;
mod ways;

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Parser, Subcommand};
use engine::transfer::Transport;

use ways::{Copy, Engine, Nixl, Stream, Way};

/// Pages of one write, as in NIXL's own benchmark.
const PAGES: usize = 128;
/// A page of one layer of a small model and of a large one.
const PAGE_BYTES: [usize; 2] = [64 << 10, 1 << 20];

/// Measures how fast KV pages move between processes.
#[derive(Parser)]
struct Options {
    #[command(subcommand)]
    part: Option<Part>,
    /// A Python that has NIXL; without it the engine is measured alone.
    #[arg(long)]
    nixl: Option<PathBuf>,
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 31)]
    rounds: usize,
    /// Folder to write the report to.
    #[arg(long)]
    results: Option<PathBuf>,
    /// What `cargo bench` passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Subcommand)]
enum Part {
    /// The decode worker: serves pages of this size until its input ends.
    Decode {
        /// Bytes of a page.
        page_bytes: usize,
    },
}

/// One way's figures for one page size.
struct Row {
    name: &'static str,
    what: &'static str,
    page_bytes: usize,
    /// Bytes a second, one value a round.
    speeds: Vec<f64>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    if let Some(Part::Decode { page_bytes }) = options.part {
        return peer::decode(page_bytes);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let _context = runtime.enter();
    let mut rows = Vec::new();
    for page_bytes in PAGE_BYTES {
        rows.extend(measure(&options, page_bytes)?);
    }
    let machine = machine::describe()?;
    let text = markdown(&machine, &rows, options.rounds)?;
    println!("\n{text}");
    if let Some(folder) = options.results {
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{}-transfer.md", machine.page_name()?));
        std::fs::write(&path, text)?;
        println!("written to {}", path.display());
    }
    Ok(())
}

/// All ways, in turns.
fn measure(options: &Options, page_bytes: usize) -> Result<Vec<Row>> {
    let decode = peer::Decode::start(page_bytes)?;
    let mut ways: Vec<Box<dyn Way>> = vec![
        Box::new(Copy::new(page_bytes)?),
        Box::new(Engine::new(&decode, page_bytes, Transport::Shm)?),
        Box::new(Stream::new(&decode, page_bytes)?),
        Box::new(Engine::new(&decode, page_bytes, Transport::Tcp)?),
    ];
    if let Some(python) = &options.nixl {
        ways.insert(2, Box::new(Nixl::new(python, "shm", page_bytes)?));
        ways.push(Box::new(Nixl::new(python, "tcp", page_bytes)?));
    }
    let mut speeds = vec![Vec::new(); ways.len()];
    for round in 0..=options.rounds {
        for (way, speeds) in ways.iter_mut().zip(&mut speeds) {
            let seconds = way.write()?;
            // The first round meets untouched memory and connections without a window.
            if round > 0 {
                speeds.push((PAGES * page_bytes) as f64 / seconds);
            }
        }
    }
    let row = |(way, speeds): (Box<dyn Way>, Vec<f64>)| {
        let (name, what) = way.name();
        Row { name, what, page_bytes, speeds }
    };
    Ok(ways.into_iter().zip(speeds).map(row).collect())
}

fn markdown(machine: &machine::Machine, rows: &[Row], rounds: usize) -> Result<String> {
    let mut text = String::new();
    writeln!(text, "# KV transfers, engine {}\n", env!("CARGO_PKG_VERSION"))?;
    writeln!(text, "- Machine: {machine}")?;
    writeln!(text, "- Memory read by 1 thread: {:.1} GB/s", machine::read_bandwidth(1) / 1e9)?;
    writeln!(
        text,
        "- One write is {PAGES} pages, no two adjacent, from its submission until its completion is posted"
    )?;
    writeln!(text, "- Median of {rounds} rounds, all ways taking turns, peers in processes of their own")?;
    for page_bytes in PAGE_BYTES {
        let rows: Vec<&Row> = rows.iter().filter(|row| row.page_bytes == page_bytes).collect();
        let median = |name: &str| {
            let row = rows.iter().find(|row| row.name == name);
            row.map(|row| stats::median(&row.speeds))
        };
        writeln!(text, "\n## Pages of {} KiB: {} MiB a write\n", page_bytes >> 10, (PAGES * page_bytes) >> 20)?;
        writeln!(text, "| | copies of each byte | GB/s, median (10th to 90th percentile) |")?;
        writeln!(text, "| --- | --- | --- |")?;
        for row in &rows {
            let [low, high] = [10.0, 90.0].map(|percent| stats::percentile(&row.speeds, percent) / 1e9);
            let median = stats::median(&row.speeds) / 1e9;
            writeln!(text, "| {} | {} | {median:.2} ({low:.2} to {high:.2}) |", row.name, row.what)?;
        }
        writeln!(text, "\n| ratio | measured | floor |")?;
        writeln!(text, "| --- | --- | --- |")?;
        for (ours, other, floor) in [
            ("engine, shm", "memcpy", 0.8),
            ("engine, shm", "NIXL, UCX's choice", 2.0),
            ("engine, tcp", "loopback stream", 1.0),
            ("engine, tcp", "NIXL, UCX over tcp", 1.1),
        ] {
            if let (Some(a), Some(b)) = (median(ours), median(other)) {
                writeln!(text, "| {ours} / {other} | {:.2}× | {floor:.1}× |", a / b)?;
            }
        }
    }
    Ok(text)
}
