//! Eight answers being streamed, and long prompts that arrive beside them.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::client;
use crate::cluster::{Engine, Pair, Services, Worker};
use crate::model::Model;

/// Answers being streamed.
pub(crate) const STREAMS: usize = 8;
/// Tokens of the prompts of those that are being answered, which are computed where they arrive.
const OWN_PROMPT: usize = 32;
/// More tokens than anybody waits for.
const ENDLESS: usize = 8000;
/// How long streams are watched before the first prompt arrives.
const QUIET: Duration = Duration::from_secs(4);
/// Prompts arrive no more often than one a second, and leave the core of a single process this much of its time.
const INTERVAL_MIN: f64 = 1.0;
const HEADROOM: f64 = 1.5;
/// The same on a device. Answers grow a thousand tokens a second there: they are watched so briefly that those after
/// are not much longer than those before, and prompts arrive so often that more than one gap in a hundred has one in
/// it. Two processes share a device, so there is more room.
const QUIET_ON_DEVICE: Duration = Duration::from_millis(500);
const INTERVAL_MIN_ON_DEVICE: f64 = 0.1;
const HEADROOM_ON_DEVICE: f64 = 3.0;

/// Long prompts of a round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arrivals {
    pub(crate) prompts: usize,
    /// Of each.
    pub(crate) tokens: usize,
    /// Before the first, and between two.
    quiet: Duration,
    every: Duration,
}

/// How the cores are used, or the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Setup {
    OneCore,
    Disaggregated,
    TwoCores,
    OneProcess,
    TwoProcesses,
}

impl Setup {
    const ON_CORES: [Self; 3] = [Self::OneCore, Self::Disaggregated, Self::TwoCores];
    const ON_DEVICE: [Self; 2] = [Self::OneProcess, Self::TwoProcesses];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::OneCore => "one process, one core",
            Self::Disaggregated => "decode worker on one core, prefill worker on the other",
            Self::TwoCores => "one process, both cores",
            Self::OneProcess => "one process",
            Self::TwoProcesses => "decode worker and prefill worker, which share the device",
        }
    }
}

/// What was seen of a model.
pub(crate) struct Seen {
    pub(crate) model: String,
    /// Tokens of a prompt that arrives.
    pub(crate) prompt: usize,
    /// Seconds for one long prompt on an idle core or device, and between two arrivals.
    pub(crate) alone: f64,
    pub(crate) interval: f64,
    pub(crate) setups: Vec<(Setup, Figures)>,
}

/// Of all rounds together. Seconds.
#[derive(Default)]
pub(crate) struct Figures {
    /// Between two tokens of an answer, before and while prompts arrive.
    pub(crate) quiet: Vec<f64>,
    pub(crate) busy: Vec<f64>,
    /// To the first token of a long prompt.
    pub(crate) first_token: Vec<f64>,
    /// Long prompts that the prefill worker computed.
    pub(crate) handed_off: usize,
    /// Tokens a second of all answers while prompts arrive, a round.
    pub(crate) tokens_per_second: Vec<f64>,
}

/// In each round so many `prompts` of so many `tokens` arrive.
pub(crate) fn measure(engine: &Engine, model: &Model, rounds: usize, prompts: usize, tokens: usize) -> Result<Seen> {
    let services = Services::start();
    let one = Worker::alone(engine, model, &[0])?;
    let two = if engine.device.is_none() { Some(Worker::alone(engine, model, &[0, 1])?) } else { None };
    let pair = Pair::start(engine, &services, "streams", model, engine.way())?;
    // The first prompt meets memory that was never touched.
    client::first_token(&one.address, &model.prompt(tokens, 1))?;
    let alone = client::first_token(&one.address, &model.prompt(tokens, 2))?;
    for worker in two.iter().chain([&pair.decode]) {
        client::first_token(&worker.address, &model.prompt(tokens, 3))?;
    }
    let (least, headroom, quiet) = match engine.device {
        Some(_) => (INTERVAL_MIN_ON_DEVICE, HEADROOM_ON_DEVICE, QUIET_ON_DEVICE),
        None => (INTERVAL_MIN, HEADROOM, QUIET),
    };
    let interval = (alone * headroom).max(least);
    let arrivals = Arrivals { prompts, tokens, quiet, every: Duration::from_secs_f64(interval) };
    let setups = if two.is_some() { &Setup::ON_CORES[..] } else { &Setup::ON_DEVICE };
    let mut setups: Vec<_> = setups.iter().map(|&setup| (setup, Figures::default())).collect();
    for round in 0..rounds {
        for (setup, figures) in &mut setups {
            let worker = match setup {
                Setup::TwoCores => two.as_ref().unwrap_or(&one),
                Setup::OneCore | Setup::OneProcess => &one,
                Setup::Disaggregated | Setup::TwoProcesses => &pair.decode,
            };
            let remote = "engine_prefills_total{where=\"remote\"}";
            let before = pair.decode.metric(remote)?;
            watch(&worker.address, model, 1 + round as u64, arrivals, figures)?;
            figures.handed_off += (pair.decode.metric(remote)? - before) as usize;
            eprintln!("{}, round {}: {}", model.name, round + 1, setup.name());
        }
    }
    Ok(Seen { model: model.name.clone(), prompt: tokens, alone, interval, setups })
}

/// Starts the streams, watches them for a while, lets prompts arrive, and ends the streams when the last of these has
/// its first token, but not before it would have been the next one's turn.
fn watch(
    address: &str,
    model: &Model,
    round: u64,
    Arrivals { prompts, tokens: length, quiet, every }: Arrivals,
    figures: &mut Figures,
) -> Result<()> {
    let stop = AtomicBool::new(false);
    let (came, comes) = mpsc::channel();
    thread::scope(|scope| -> Result<()> {
        let mut threads = Vec::new();
        let streams: Vec<_> = (0..STREAMS as u64)
            .map(|stream| {
                let (came, stop) = (came.clone(), &stop);
                let prompt = model.prompt(OWN_PROMPT, 1_000_000 + round * 100 + stream);
                scope.spawn(move || -> Result<Vec<Instant>> {
                    let mut tokens = Vec::with_capacity(ENDLESS);
                    client::stream(address, &prompt, ENDLESS, stop, |now| {
                        if tokens.is_empty() {
                            // The other end waits for all, unless something else has failed.
                            let _ = came.send(());
                        }
                        tokens.push(now);
                    })?;
                    Ok(tokens)
                })
            })
            .collect();
        drop(came);
        let all_came = comes.iter().take(STREAMS).count() == STREAMS;
        let watched = Instant::now();
        let started = watched + quiet;
        for prompt in 0..prompts {
            sleep_until(started + every * prompt as u32);
            let tokens = model.prompt(length, 2_000_000 + round * 1000 + prompt as u64);
            threads.push(scope.spawn(move || client::first_token(address, &tokens)));
        }
        let first_tokens: Result<Vec<f64>> = threads.into_iter().map(|thread| joined(thread)).collect();
        sleep_until(started + every * prompts as u32);
        let ended = Instant::now();
        stop.store(true, Ordering::Relaxed);
        let mut tokens_seen = 0;
        for stream in streams {
            let tokens = joined(stream)?;
            ensure!(tokens.len() < ENDLESS, "an answer ended before the prompts beside it did");
            tokens_seen += tokens.iter().filter(|&&token| token >= started && token < ended).count();
            for pair in tokens.windows(2) {
                let gap = (pair[1] - pair[0]).as_secs_f64();
                if pair[0] >= watched && pair[1] < started {
                    figures.quiet.push(gap);
                } else if pair[0] >= started && pair[1] < ended {
                    figures.busy.push(gap);
                }
            }
        }
        ensure!(all_came, "{address} did not answer all");
        figures.first_token.extend(first_tokens?);
        figures.tokens_per_second.push(tokens_seen as f64 / (ended - started).as_secs_f64());
        Ok(())
    })
}

fn joined<T>(thread: thread::ScopedJoinHandle<'_, Result<T>>) -> Result<T> {
    thread.join().expect("a client panicked")
}

fn sleep_until(then: Instant) {
    thread::sleep(then.saturating_duration_since(Instant::now()));
}
