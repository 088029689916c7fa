//! `engine bench`: how fast a model is computed here, without a server around it.
//!
//! The whole engine is measured: scheduler, pages, forward pass and sampling, through the handle that the API has too.
//! Prompts and weights may be anything, since neither changes how long a step takes: with `--load-format dummy` a
//! `config.json` is enough.
//!
//! - *Prefill*: the time from the submission of a prompt, by itself, until its first token is there.
//! - *Decode*: sequences whose prompts are in the prefix cache start together; the one that starts last is watched,
//!   while all others run as well. What a step reads at least, the weights and the keys and values of all sequences,
//!   over the time it takes is a speed that the memory's can be compared with.

mod report;

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use engine_kernels::SamplingParams;

use crate::{
    cli::BenchArgs,
    engine::{Event, FinishReason, Generation, Request},
    worker::{BareEngine, SizingError},
};
use report::{Report, Row};

/// Rounds that are not counted: they meet memory that nobody has touched, and steps that were not recorded yet.
const ROUNDS_UNCOUNTED: usize = 1;
/// How long prompts are computed before anything counts: the clocks of a device that was idle take a while to rise.
const WARM_UP: Duration = Duration::from_millis(500);
/// Tokens of each at most, so that one is no long wait on a CPU.
const WARM_UP_PROMPT: usize = 64;
/// Steps that a sequence may be ahead of the one that is watched.
const LEAD_MAX: usize = 256;

/// Measures and prints.
pub async fn run(mut args: BenchArgs) -> Result<()> {
    let unasked = fit(&mut args);
    let (bare, args) = tokio::task::spawn_blocking(move || BareEngine::start(&args.engine).map(|bare| (bare, args)))
        .await
        .context("loading the model panicked")?
        .map_err(|error| explain(error, unasked))?;
    let report = Report { json: args.json };
    report.start(&bare, &args);
    let mut prompts = Prompts { vocabulary: bare.engine.config().vocab_size as u64, state: 0 };
    let started = Instant::now();
    while started.elapsed() < WARM_UP {
        token(&mut bare.engine.submit(request(prompts.next(args.context.min(WARM_UP_PROMPT)), 1))?).await?;
    }
    for (index, &tokens) in args.prefill.iter().enumerate() {
        let seconds = prefill(&bare, &mut prompts, tokens, args.rounds).await?;
        report.print(&Row::prefill(tokens, &seconds), index == 0);
    }
    for (index, &sequences) in args.decode.iter().enumerate() {
        let steps = decode(&bare, &mut prompts, sequences, &args).await?;
        report.print(&Row::decode(&bare, sequences, args.context + args.steps / 2, &steps), index == 0);
    }
    bare.engine.stop();
    bare.engine.stopped().await;
    Ok(())
}

/// Raises the engine's limits to what is measured, as far as nobody has set them. Returns the length of sequences, if
/// that was one of them.
fn fit(args: &mut BenchArgs) -> Option<usize> {
    let longest = args.prefill.iter().copied().max().unwrap_or(0).max(args.context + LEAD_MAX + args.steps) + 1;
    let sequences = args.decode.iter().copied().max().unwrap_or(1);
    let engine = &mut args.engine;
    let unasked = engine.max_model_len.is_none().then_some(longest);
    engine.max_model_len = engine.max_model_len.or(unasked);
    let sequences = engine.max_num_seqs.map_or(sequences, |seqs| seqs.max(sequences));
    engine.max_num_seqs = Some(sequences);
    engine.max_num_batched_tokens = engine.max_num_batched_tokens.map(|tokens| tokens.max(sequences));
    unasked
}

/// Says of a length that is too much where it comes from, if not from `--max-model-len`.
fn explain(error: anyhow::Error, unasked: Option<usize>) -> anyhow::Error {
    let is_length =
        |error: &SizingError| matches!(error, SizingError::BeyondModel { .. } | SizingError::ContextTooLong { .. });
    match unasked {
        Some(longest) if error.downcast_ref::<SizingError>().is_some_and(is_length) => error
            .context(format!("sequences of {longest} tokens would be measured: lower --prefill, --context or --steps")),
        _ => error,
    }
}

/// Seconds until the first token of prompts that nobody has seen before.
async fn prefill(bare: &BareEngine, prompts: &mut Prompts, tokens: usize, rounds: usize) -> Result<Vec<f64>> {
    let mut seconds = Vec::new();
    for _ in 0..ROUNDS_UNCOUNTED + rounds {
        let request = request(prompts.next(tokens), 1);
        let started = Instant::now();
        let mut generation = bare.engine.submit(request)?;
        token(&mut generation).await?;
        seconds.push(started.elapsed().as_secs_f64());
    }
    Ok(seconds.split_off(ROUNDS_UNCOUNTED))
}

/// Steps that computed a token of each of `sequences` sequences.
async fn decode(bare: &BareEngine, prompts: &mut Prompts, sequences: usize, args: &BenchArgs) -> Result<Steps> {
    let config = bare.engine.config();
    let pages = sequences * (args.context + LEAD_MAX + 1 + args.steps).div_ceil(config.block_size);
    ensure!(
        pages <= config.blocks,
        "{sequences} sequences of {} tokens may need {pages} KV pages, and there are {}: raise --kv-cache-memory, or \
         lower --decode or --context",
        args.context + args.steps,
        config.blocks
    );
    let all: Vec<Vec<u32>> = (0..sequences).map(|_| prompts.next(args.context)).collect();
    // Each computes a page at most before it is decoded, so the first begins no more steps before the last.
    let lead = (sequences * config.block_size).div_ceil(config.max_num_batched_tokens) + 1;
    ensure!(lead <= LEAD_MAX, "{sequences} sequences begin too far apart: raise --max-num-batched-tokens");
    // From here on all but their last pages are found in the cache.
    for prompt in &all {
        token(&mut bare.engine.submit(request(prompt.clone(), 1))?).await?;
    }
    let mut steps = Steps::default();
    for round in 0..ROUNDS_UNCOUNTED + args.rounds {
        // The others outlive the one that is watched, whose first token begins what is timed.
        let submit = |(index, prompt): (usize, &Vec<u32>)| {
            let lead = if index + 1 < sequences { LEAD_MAX } else { 0 };
            bare.engine.submit(request(prompt.clone(), lead + 1 + args.steps))
        };
        let mut running: Vec<Generation> = all.iter().enumerate().map(submit).collect::<Result<_, _>>()?;
        let mut last = running.pop().context("there is a sequence")?;
        token(&mut last).await?;
        let started = Instant::now();
        let mut before = started;
        for _ in 0..args.steps {
            token(&mut last).await?;
            let now = Instant::now();
            if round >= ROUNDS_UNCOUNTED {
                steps.gaps.push((now - before).as_secs_f64());
            }
            before = now;
        }
        if round >= ROUNDS_UNCOUNTED {
            steps.means.push((before - started).as_secs_f64() / args.steps as f64);
        }
        drop((running, last));
        settle(bare).await;
    }
    Ok(steps)
}

/// Seconds that steps took.
#[derive(Debug, Default)]
struct Steps {
    /// On average, in each round.
    means: Vec<f64>,
    /// Between two tokens, as a reader sees them, which is told of some a little late.
    gaps: Vec<f64>,
}

/// Waits until nobody is left of those who were cancelled.
async fn settle(bare: &BareEngine) {
    while bare.engine.snapshot().running > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Waits for a token.
async fn token(generation: &mut Generation) -> Result<()> {
    match generation.next().await {
        Some(Event::Token(_)) => Ok(()),
        Some(Event::Finished { reason: FinishReason::Impossible, .. }) => {
            anyhow::bail!("the model gave no possible token (NaN?)")
        }
        other => anyhow::bail!("the engine has stopped: {other:?}"),
    }
}

fn request(prompt: Vec<u32>, tokens: usize) -> Request {
    Request {
        prompt,
        output: Vec::new(),
        sampling: SamplingParams::default(),
        max_tokens: u32::try_from(tokens).unwrap_or(u32::MAX),
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        grammar: None,
        logprobs: None,
        prompt_logprobs: None,
        salt: None,
        trace: None,
    }
}

/// Prompts no two of which begin alike.
struct Prompts {
    vocabulary: u64,
    state: u64,
}

impl Prompts {
    fn next(&mut self, tokens: usize) -> Vec<u32> {
        let next = |_| {
            // Knuth's linear congruential generator; the high bits are the good ones.
            self.state = self.state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((self.state >> 33) % self.vocabulary) as u32
        };
        (0..tokens).map(next).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Invocation;

    fn args(line: &[&str]) -> BenchArgs {
        match Invocation::try_parse_from([&["engine", "bench", "--model", "m"], line].concat()) {
            Ok(Invocation::Bench(args)) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn limits_are_raised_to_what_is_measured_and_no_further() {
        let fitted = |line: &[&str]| {
            let mut args = args(line);
            fit(&mut args);
            (args.engine.max_model_len, args.engine.max_num_seqs, args.engine.max_num_batched_tokens)
        };
        let measured = ["--prefill", "100,4000", "--decode", "1,600", "--context", "50", "--steps", "10"];
        assert_eq!(fitted(&measured), (Some(4001), Some(600), None));
        let limited = [&measured[..], &["--max-num-batched-tokens", "100"]].concat();
        assert_eq!(fitted(&limited), (Some(4001), Some(600), Some(600)));
        assert_eq!(fitted(&["--max-model-len", "9000"]).0, Some(9000));
    }

    #[test]
    fn a_length_that_is_too_much_is_explained_by_what_is_measured_unless_it_was_asked_for() {
        let told = |line: &[&str], error: SizingError| {
            let unasked = fit(&mut args(line));
            explain(error.into(), unasked).to_string()
        };
        let beyond = SizingError::BeyondModel { asked: 2049, limit: 2048 };
        let explained = told(&["--prefill", "2048"], beyond.clone());
        assert!(explained.contains("2049 tokens") && explained.contains("lower --prefill"), "{explained}");
        assert_eq!(told(&["--max-model-len", "2049"], beyond.clone()), beyond.to_string());
        let full = SizingError::NoPage { bytes: 1, page: 2 };
        assert_eq!(told(&[], full.clone()), full.to_string());
    }

    #[test]
    fn no_two_prompts_begin_alike() {
        let mut prompts = Prompts { vocabulary: 50_000, state: 0 };
        let first: std::collections::HashSet<Vec<u32>> = (0..1000).map(|_| prompts.next(16)).collect();
        assert_eq!(first.len(), 1000);
        assert!(first.iter().flatten().all(|&token| token < 50_000));
    }
}
