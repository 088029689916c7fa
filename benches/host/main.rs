//! How long a device has nothing to do between two decoding steps, because the host has not launched the next: with one
//! that is launched while the device still computes, and with one that is planned when the tokens are known.
//!
//! All of the engine takes part but the device: scheduler, pages, delivery to readers on another thread, and the CUDA
//! backend over a driver that does nothing. That driver takes the times: where the host waits for the device it lets
//! some pass, as a device would. What calls of a real driver cost comes on top (a graph's launch, some copies).
//!
//! `make bench-host`

mod idle;
#[allow(dead_code, reason = "of it, what names the machine is used")]
#[path = "../suite/machine.rs"]
mod machine;
#[path = "../suite/stats.rs"]
mod stats;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;

use engine::engine::{Engine, EngineConfig, Event, ModelRunner, Request, Runner, RunnerError};
use engine::telemetry::Metrics;
use engine_kernels::cuda::CudaBackend;
use engine_kernels::{Batch, KvDType, KvLayout, SampleRow, Sampled, SamplingParams};
use engine_models::{ForwardLimits, LoadFormat, ModelSource, OpenOptions};

use idle::Idle;

/// What matters of it is how many layers' kernels are in a step, and that is one graph.
const CONFIG: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "bfloat16", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 8192, "vocab_size": 32000, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}
}"#;
const BLOCK_SIZE: usize = 64;
/// Tokens of each prompt, and how many different ones are among them: about as in prose.
const CONTEXT: usize = 4096;
const DISTINCT: u32 = 1500;
const MAX_MODEL_LEN: usize = 8192;
const SEQUENCES_MAX: usize = 256;
/// Steps that are measured at least.
const STEPS: usize = 1000;
/// How long a step takes on the device that is not there.
const STEP: Duration = Duration::from_micros(1000);

/// Measures how long a device waits for the host.
#[derive(Parser)]
struct Options {
    /// Folder to write the report to.
    #[arg(long)]
    results: Option<PathBuf>,
    /// What `cargo bench` passes to every benchmark.
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let machine = machine::describe()?;
    let mut text = format!("# What a device waits for the host, engine {}\n\n", env!("CARGO_PKG_VERSION"));
    writeln!(text, "- Machine: {machine}; the device is made believe")?;
    writeln!(
        text,
        "- {STEPS} steps of {} µs, in which all sequences decode, after {CONTEXT} tokens",
        STEP.as_micros()
    )?;
    writeln!(text, "- µs for which the device has nothing to do before a step, median and 90th percentile\n")?;
    writeln!(text, "| sequences | planned when tokens are known | | launched ahead | |")?;
    writeln!(text, "| --- | --- | --- | --- | --- |")?;
    for (penalty, name) in [(1.0, ""), (1.1, ", with a repetition penalty")] {
        for sequences in [1, 64, 256] {
            write!(text, "| {sequences}{name} |")?;
            for ahead in [false, true] {
                let gaps = measure(sequences, penalty, ahead)?;
                write!(text, " {:.1} | {:.1} |", stats::median(&gaps), stats::percentile(&gaps, 90.0))?;
            }
            text.push('\n');
        }
    }
    println!("\n{text}");
    if let Some(folder) = options.results {
        std::fs::create_dir_all(&folder)?;
        let path = folder.join(format!("{}-host.md", machine.page_name()?));
        std::fs::write(&path, text)?;
        println!("written to {}", path.display());
    }
    Ok(())
}

/// A runner that keeps to itself that it could run ahead.
struct Waits<R>(R);

impl<R: Runner> Runner for Waits<R> {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        self.0.execute(batch, row, out, layer_done)
    }
}

/// The gaps between steps in which so many sequences decode, in µs.
fn measure(sequences: usize, repetition_penalty: f32, ahead: bool) -> Result<Vec<f64>> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join("config.json"), CONFIG)?;
    let options = OpenOptions { load_format: LoadFormat::Dummy, ..OpenOptions::default() };
    let source = ModelSource::open(&folder.path().to_string_lossy(), &options)?;
    let gaps = Arc::new(Mutex::new(Vec::with_capacity(1 << 20)));
    let mut backend = CudaBackend::new(Idle::new(STEP, gaps.clone()));
    let limits = ForwardLimits { max_tokens: 2048, max_logit_rows: SEQUENCES_MAX, max_positions: MAX_MODEL_LEN };
    let loaded = source.load(&mut backend, limits)?;
    let blocks = SEQUENCES_MAX * MAX_MODEL_LEN / BLOCK_SIZE;
    let dtype = KvDType::BF16;
    let layout = KvLayout { layers: 1, kv_heads: 2, head_dim: 32, block_size: BLOCK_SIZE, blocks, dtype };
    let mut runner = ModelRunner::new(backend, loaded.model, layout, limits)?;
    let config = EngineConfig {
        max_num_seqs: SEQUENCES_MAX,
        max_num_batched_tokens: limits.max_tokens,
        itl_target: Duration::from_secs(60),
        max_waiting_requests: SEQUENCES_MAX,
        max_model_len: MAX_MODEL_LEN,
        vocab_size: source.config().vocab_size,
        block_size: BLOCK_SIZE,
        blocks,
        prefix_caching: true,
        model_key: Vec::new(),
    };
    runner.warm_up(&config, true)?;
    let runner: Box<dyn Runner> = if ahead { Box::new(runner) } else { Box::new(Waits(runner)) };
    let engine = Engine::start(runner, config, Metrics::new().engine)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let readers: Vec<_> = (0..sequences as u32)
        .map(|sequence| {
            let request = Request {
                prompt: (0..CONTEXT as u32).map(|position| position % DISTINCT * 7 + sequence * 13).collect(),
                output: Vec::new(),
                sampling: SamplingParams { repetition_penalty, ..SamplingParams::default() },
                // All decode together for as long as is measured.
                max_tokens: (STEPS + 200) as u32,
                min_tokens: 0,
                stop_token_ids: Vec::new(),
                grammar: None,
                logprobs: None,
                prompt_logprobs: None,
                salt: None,
                trace: None,
            };
            let mut generation = engine.submit(request)?;
            Ok(runtime.spawn(async move {
                let mut tokens = 0;
                while let Some(event) = generation.next().await {
                    tokens += usize::from(matches!(event, Event::Token(_)));
                }
                tokens
            }))
        })
        .collect::<Result<_, engine::engine::SubmitError>>()?;
    for reader in readers {
        runtime.block_on(reader)?;
    }
    engine.stop();
    runtime.block_on(engine.stopped());
    let gaps = gaps.lock().ok().context("a panic")?;
    // The last of them are steps of fewer sequences.
    let measured = gaps.len().saturating_sub(STEPS + 100)..gaps.len().saturating_sub(100);
    Ok(gaps[measured].iter().map(|gap| gap.as_secs_f64() * 1e6).collect())
}
