//! One remote prefill after the other, each taken apart.
//!
//! Both workers sum up how long each phase took (`engine_handoff_seconds`). With one handoff at a time, what a sum
//! grows by is that handoff's, exactly: so there are percentiles to be had, which buckets would not give.

use anyhow::{Result, ensure};

use crate::client;
use crate::cluster::{Engine, Pair, Services, Worker};
use crate::model::Model;

/// Tokens of short prompts, many of them, to see the handoff.
const SHORT: usize = 256;
/// Handoffs before those that count.
const WARM_UP: usize = 3;
/// Handoffs of long prompts that count on a device, if as many were asked for. There are fewer on a core, which takes
/// seconds for each.
const LONG_MIN: usize = 8;

/// The handoffs of one transport and prompt length. Seconds, one value a handoff.
pub(crate) struct Row {
    pub(crate) transport: &'static str,
    pub(crate) tokens: usize,
    /// At the client, and how much of that was not the prefill worker's computing.
    pub(crate) first_token: Vec<f64>,
    pub(crate) overhead: Vec<f64>,
    /// By the names of [`PHASES`].
    pub(crate) phases: Vec<Vec<f64>>,
    /// First tokens of one process, and what being handed off added.
    pub(crate) local: Vec<f64>,
    pub(crate) added: Vec<f64>,
}

/// Phases as the report lists them, and what they are.
pub(crate) const PHASES: [(&str, &str); 6] = [
    ("queue", "from the decision until a prefill worker has claimed the job"),
    ("claim", "of which: from the claim to its answer, seen by the prefill worker"),
    ("compute", "the prompt, on the prefill worker; pages travel meanwhile"),
    ("transfer", "from the last layer to the word in the mailbox: what computing did not hide"),
    ("pickup", "the word lay in the mailbox, at most"),
    ("remote", "from the claim until the word is found: compute, transfer, pickup and messages"),
];

/// `long`: tokens of long prompts.
pub(crate) fn measure(engine: &Engine, model: &Model, long: usize, handoffs: usize) -> Result<Vec<Row>> {
    let services = Services::start();
    let alone = Worker::alone(engine, model, &[0])?;
    let pair = |&transport| {
        Pair::start(engine, &services, transport, model, &["--transport", transport]).map(|pair| (transport, pair))
    };
    let pairs = engine.transports().iter().map(pair).collect::<Result<Vec<_>>>()?;
    let mut seed = 0;
    let mut rows = Vec::new();
    let on_device = engine.device.is_some();
    let of_long = handoffs.div_ceil(20).max(if on_device { LONG_MIN.min(handoffs) } else { 0 });
    for (tokens, handoffs) in [(SHORT, handoffs), (long, of_long)] {
        let mut of_length: Vec<Row> = pairs.iter().map(|(transport, _)| Row::new(transport, tokens)).collect();
        // Sessions are open and buffers have grown after the first few; on a device, clocks are up and longer prompts
        // have met their own kernels.
        let warm_up = if rows.is_empty() || on_device { WARM_UP.min(handoffs) } else { 0 };
        for turn in 0..warm_up + handoffs {
            for ((_, pair), row) in pairs.iter().zip(&mut of_length) {
                seed += 1;
                let prompt = model.prompt(tokens, seed);
                // The same prompt in one process, whose core is idle now: once to warm up, and then with each fourth
                // that counts; a baseline needs no as many.
                let is_local = turn == 0 || (turn >= warm_up && (turn - warm_up).is_multiple_of(4));
                let local = is_local.then(|| client::first_token(&alone.address, &prompt)).transpose()?;
                let handoff = handoff(pair, &prompt)?;
                if turn >= warm_up {
                    row.push(handoff, local);
                }
            }
        }
        for row in &mut of_length {
            let local = crate::stats::median(&row.local);
            row.added = row.first_token.iter().map(|remote| remote - local).collect();
        }
        rows.extend(of_length);
    }
    Ok(rows)
}

/// The time to the first token, and of each phase.
type Handoff = (f64, [f64; PHASES.len()]);

fn handoff(pair: &Pair, prompt: &[u32]) -> Result<Handoff> {
    let before = sums(pair)?;
    let count = "engine_handoff_seconds_count{phase=\"transfer\"}";
    let done = pair.prefill.metric(count)?;
    let first_token = client::first_token(&pair.decode.address, prompt)?;
    // The prefill worker counts a handoff after the decode worker has gone on.
    pair.prefill.wait_until(count, |now| now > done)?;
    ensure!(pair.prefill.metric(count)? == done + 1.0, "there was more than one handoff");
    let after = sums(pair)?;
    Ok((first_token, std::array::from_fn(|phase| after[phase] - before[phase])))
}

/// Seconds that each phase took so far, wherever it is seen.
fn sums(pair: &Pair) -> Result<[f64; PHASES.len()]> {
    let mut sums = [0.0; PHASES.len()];
    for ((phase, _), sum) in PHASES.iter().zip(&mut sums) {
        let name = format!("engine_handoff_seconds_sum{{phase=\"{phase}\"}}");
        *sum = pair.decode.metric(&name)? + pair.prefill.metric(&name)?;
    }
    Ok(sums)
}

impl Row {
    fn new(transport: &'static str, tokens: usize) -> Self {
        let (first_token, overhead, local, added) = Default::default();
        Self { transport, tokens, first_token, overhead, phases: vec![Vec::new(); PHASES.len()], local, added }
    }

    fn push(&mut self, (first_token, phases): Handoff, local: Option<f64>) {
        self.first_token.push(first_token);
        let compute = PHASES.iter().zip(phases).find(|((name, _), _)| *name == "compute").map_or(0.0, |(_, took)| took);
        self.overhead.push(first_token - compute);
        for (values, took) in self.phases.iter_mut().zip(phases) {
            values.push(took);
        }
        self.local.extend(local);
    }
}
