//! The forward pass alone, as llama-bench measures it: a prompt computed in one go, and tokens one after the other from
//! an empty context. No server, no sampling.

use std::fmt;
use std::hint::black_box;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use engine_kernels::cpu::{CpuBackend, CpuOptions};
use engine_kernels::{Backend, Batch, KvLayout};
use engine_models::{ForwardLimits, ModelSource, OpenOptions};

use crate::stats::median;

/// What is timed, and how many tokens of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A prompt of so many tokens.
    Prefill(usize),
    /// So many tokens one by one, batch 1.
    Decode(usize),
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill(tokens) => write!(f, "prefill {tokens}"),
            Self::Decode(tokens) => write!(f, "decode, batch 1, {tokens} tokens"),
        }
    }
}

/// One line of the table, in tokens per second.
pub(crate) struct Row {
    /// What was timed.
    pub(crate) kind: Kind,
    /// Threads it ran on.
    pub(crate) threads: usize,
    /// This engine.
    pub(crate) engine: f64,
    /// The peer, if there is one.
    pub(crate) peer: Option<f64>,
}

/// One measurement of the engine, for a process of its own.
#[derive(clap::Args)]
pub(crate) struct Work {
    /// The model file.
    #[arg(long)]
    model: PathBuf,
    /// Threads.
    #[arg(long)]
    threads: usize,
    /// Tokens of the prompt, computed in steps of 512.
    #[arg(long, default_value_t = 0)]
    prompt: usize,
    /// Tokens decoded instead, one a step.
    #[arg(long, default_value_t = 0)]
    decode: usize,
}

/// Measures both sides, alternating: prompts of these lengths, and decoding.
pub(crate) fn compare(
    model: &Path,
    llama: Option<&Path>,
    rounds: usize,
    threads: usize,
    prompts: &[usize],
) -> Result<Vec<Row>> {
    let mut work: Vec<_> = prompts.iter().map(|&tokens| (Kind::Prefill(tokens), threads)).collect();
    work.push((Kind::Decode(64), 1));
    if threads > 1 {
        work.push((Kind::Decode(64), threads));
    }
    let mut rows = Vec::new();
    for (kind, threads) in work {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        for round in 1..=rounds {
            ours.push(engine(model, kind, threads)?);
            eprintln!("round {round}: engine, {kind}, {threads} threads: {:.1} tokens/s", ours[round - 1]);
            if let Some(folder) = llama {
                theirs.push(llama_bench(folder, model, kind, threads)?);
                eprintln!("round {round}: llama.cpp, {kind}, {threads} threads: {:.1} tokens/s", theirs[round - 1]);
            }
        }
        let peer = (!theirs.is_empty()).then(|| median(&theirs));
        rows.push(Row { kind, threads, engine: median(&ours), peer });
    }
    Ok(rows)
}

fn engine(model: &Path, kind: Kind, threads: usize) -> Result<f64> {
    let mut command = Command::new(std::env::current_exe()?);
    command.arg("forward").arg("--model").arg(model).arg("--threads").arg(threads.to_string());
    match kind {
        Kind::Prefill(tokens) => command.arg("--prompt").arg(tokens.to_string()),
        Kind::Decode(tokens) => command.arg("--decode").arg(tokens.to_string()),
    };
    Ok(run(command)?.trim().parse()?)
}

fn llama_bench(folder: &Path, model: &Path, kind: Kind, threads: usize) -> Result<f64> {
    let (prompt, decode) = match kind {
        Kind::Prefill(tokens) => (tokens, 0),
        Kind::Decode(tokens) => (0, tokens),
    };
    let mut command = Command::new(folder.join("llama-bench"));
    command.arg("-m").arg(model).args(["-r", "1", "-o", "jsonl", "-t", &threads.to_string()]);
    command.args(["-p", &prompt.to_string(), "-n", &decode.to_string()]);
    let output = run(command)?;
    let line: serde_json::Value = serde_json::from_str(output.lines().next().context("llama-bench printed nothing")?)?;
    line["avg_ts"].as_f64().context("llama-bench printed no avg_ts")
}

fn run(mut command: Command) -> Result<String> {
    let output = command.output().with_context(|| format!("starting {:?}", command.get_program()))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// Tokens of a KV page.
const BLOCK_SIZE: usize = 16;
/// Tokens of one prefill step, as llama.cpp's default.
const CHUNK: usize = 512;

/// Runs one measurement of the engine in this process: tokens per second, after a warm-up.
pub(crate) fn forward(work: &Work) -> Result<f64> {
    let tokens = work.prompt.max(work.decode);
    let steps = if work.prompt > 0 { CHUNK } else { 1 };
    let mut backend = CpuBackend::new(CpuOptions { threads: work.threads, ..CpuOptions::default() });
    let model = work.model.to_str().context("the model's path is not UTF-8")?;
    let source = ModelSource::open(model, &OpenOptions::default())?;
    let limits = ForwardLimits { max_tokens: CHUNK, max_logit_rows: 1, max_positions: tokens };
    let mut loaded = source.load(&mut backend, limits)?;
    let config = source.config();
    let blocks = tokens.div_ceil(BLOCK_SIZE);
    let mut cache = backend.kv_cache(KvLayout {
        layers: config.layers,
        kv_heads: config.kv_heads,
        head_dim: config.head_dim,
        block_size: BLOCK_SIZE,
        blocks,
        dtype: loaded.kv_dtype,
    })?;
    let table: Vec<u32> = (0..blocks as u32).collect();
    let ids: Vec<u32> = (0..tokens).map(|i| (i * 7919 % config.vocab_size) as u32).collect();
    let mut batch = Batch::with_capacity(CHUNK, 1, blocks);
    let mut pass = |ids: &[u32]| {
        let start = Instant::now();
        for (step, chunk) in ids.chunks(steps).enumerate() {
            batch.clear();
            batch.push(chunk, (step * steps) as u32, &table, chunk.len() - 1);
            loaded.model.forward(&mut backend, &mut cache, &batch, &mut |_| ());
            black_box(loaded.model.logits(&mut backend, &batch.logit_rows));
        }
        ids.len() as f64 / start.elapsed().as_secs_f64()
    };
    pass(&ids[..tokens.min(CHUNK)]);
    Ok(pass(&ids))
}
