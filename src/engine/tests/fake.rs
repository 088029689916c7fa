//! A runner without a model. Its cache holds digests of tokens and positions, and the token it draws is a digest of
//! what it reads back through the block table, so that any mix-up of pages changes the text.

use std::{
    collections::{HashMap, VecDeque},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use engine_kernels::{Batch, RowTask, SampleRow, Sampled, SamplingParams, SequenceId, TokenMask};

use super::waiting::MINUTE;
use crate::engine::{Runner, RunnerError, RunsAhead, mock_runner::mix};

pub(super) const VOCAB_SIZE: usize = 1000;
/// The seed of requests whose logits are of no use, as a model's are when it gives NaN.
pub(super) const NOTHING_FOLLOWS: u64 = u64::MAX;

/// What a test does to a runner from outside.
#[derive(Default)]
pub(crate) struct Control {
    gate: Mutex<Gate>,
    changed: Condvar,
    /// Tokens computed in all steps.
    pub(super) computed: AtomicUsize,
    /// Steps that were launched while the one before was under way.
    pub(super) ahead: AtomicUsize,
    /// What the pages hold, `[page][token]`. Tests play the workers that fill lent ones.
    pub(super) cache: Mutex<Vec<u64>>,
    /// Of a runner that runs ahead.
    device: Mutex<Device>,
    /// The output of each sequence when it was last drawn for: backends rely on that it only grows.
    outputs: Mutex<HashMap<SequenceId, Vec<u32>>>,
}

/// What computes for a runner that runs ahead: nothing before somebody waits for it.
#[derive(Default)]
struct Device {
    launched: VecDeque<Launched>,
    computed: VecDeque<Vec<Sampled>>,
    /// What was drawn in the latest step that is computed.
    drawn: Vec<u32>,
}

#[derive(Default)]
struct Gate {
    closed: bool,
    /// Steps let through although it is closed.
    permits: usize,
    /// A step is held back.
    held: bool,
    fault: Option<Fault>,
}

/// How the next step goes wrong.
#[derive(Debug, Clone, Copy)]
pub(super) enum Fault {
    Panic,
    Error,
}

impl Control {
    /// Holds steps back from now on.
    pub(super) fn close(&self) {
        self.gate.lock().unwrap().closed = true;
    }

    /// Returns once a step is held back.
    #[track_caller]
    pub(super) fn wait_until_held(&self) {
        let gate = self.gate.lock().unwrap();
        let waited = self.changed.wait_timeout_while(gate, MINUTE, |gate| !gate.held || gate.permits > 0);
        let (gate, waited) = waited.unwrap();
        drop(gate);
        assert!(!waited.timed_out(), "still waiting for a step");
    }

    /// Lets the step that is held back go on, and no other.
    pub(super) fn let_one(&self) {
        self.gate.lock().unwrap().permits += 1;
        self.changed.notify_all();
    }

    /// Lets steps go on.
    pub(super) fn open(&self) {
        self.gate.lock().unwrap().closed = false;
        self.changed.notify_all();
    }

    /// Makes the next step to pass the gate fail.
    pub(super) fn fail(&self, fault: Fault) {
        self.gate.lock().unwrap().fault = Some(fault);
    }

    fn pass(&self) -> Result<(), RunnerError> {
        let mut gate = self.gate.lock().unwrap();
        gate.held = true;
        self.changed.notify_all();
        gate = self.changed.wait_while(gate, |gate| gate.closed && gate.permits == 0).unwrap();
        gate.held = false;
        gate.permits = gate.permits.saturating_sub(1);
        let fault = gate.fault.take();
        drop(gate);
        match fault {
            None => Ok(()),
            Some(Fault::Panic) => panic!("a test wants this"),
            Some(Fault::Error) => Err(RunnerError("a test wants this".to_owned())),
        }
    }
}

pub(super) struct FakeRunner {
    block_size: usize,
    control: Arc<Control>,
    runs_ahead: bool,
}

/// A step as it was when it was launched.
struct Launched {
    batch: Batch,
    /// Not before it is drawn.
    rows: Option<Vec<Wish>>,
    block_size: usize,
}

/// What is wanted of a row.
struct Wish {
    known: Option<u32>,
    params: SamplingParams,
    suppress: Vec<u32>,
    mask: Option<TokenMask>,
    sequence: SequenceId,
    output: Vec<u32>,
    logprobs: Option<u32>,
}

impl Wish {
    fn of(row: &SampleRow<'_>) -> Self {
        let SampleRow { sequence, logprobs, .. } = *row;
        let output = row.output.to_vec();
        match row.task {
            RowTask::Score { token } => {
                let (params, suppress) = (SamplingParams::default(), Vec::new());
                Self { known: Some(token), params, suppress, mask: None, sequence, output, logprobs }
            }
            RowTask::Sample { params, suppress, mask } => {
                let (params, suppress, mask) = (params.clone(), suppress.to_vec(), mask.cloned());
                Self { known: None, params, suppress, mask, sequence, output, logprobs }
            }
        }
    }

    fn row(&self) -> SampleRow<'_> {
        let Self { known, params, suppress, mask, sequence, output, logprobs } = self;
        let task = match *known {
            Some(token) => RowTask::Score { token },
            None => RowTask::Sample { params, suppress, mask: mask.as_ref() },
        };
        SampleRow { task, sequence: *sequence, prompt: &[], output, logprobs: *logprobs }
    }
}

impl FakeRunner {
    pub(super) fn new(blocks: usize, block_size: usize, control: Arc<Control>) -> Self {
        *control.cache.lock().unwrap() = vec![0; blocks * block_size];
        Self { block_size, control, runs_ahead: false }
    }

    /// The same as one that runs ahead.
    pub(super) fn ahead(self) -> Self {
        Self { runs_ahead: true, ..self }
    }
}

fn cell(token: u32, position: usize) -> u64 {
    mix(u64::from(token) + 1, position as u64)
}

/// What follows a sequence whose cache reads `state`.
fn answer(state: u64, row: &SampleRow<'_>) -> Sampled {
    let (token, state) = match row.task {
        RowTask::Score { token } => (token, state),
        RowTask::Sample { params, .. } if params.seed == NOTHING_FOLLOWS => {
            return Sampled { impossible: true, ..Sampled::default() };
        }
        RowTask::Sample { params, suppress, mask } => {
            let mut state = mix(state, params.seed);
            let SamplingParams { repetition_penalty, presence_penalty, frequency_penalty, .. } = params;
            if *repetition_penalty != 1.0 || *presence_penalty != 0.0 || *frequency_penalty != 0.0 {
                state = row.output.iter().fold(state, |state, &token| mix(state, token.into()));
            }
            let mut token = (state >> 32) as u32 % VOCAB_SIZE as u32;
            let is_allowed = |token: u32| mask.is_none_or(|mask| mask.allows(token));
            while suppress.contains(&token) || !is_allowed(token) {
                state = mix(state, 1);
                token = (state >> 32) as u32 % VOCAB_SIZE as u32;
            }
            (token, state)
        }
    };
    let mut sampled = Sampled { token, logprob: (state as u16).into(), ..Sampled::default() };
    for i in 0..row.logprobs.unwrap_or(0) {
        sampled.top[i as usize] = (token + i, sampled.logprob - i as f32);
        sampled.top_len = i + 1;
    }
    sampled
}

/// What the engine must answer: the same arithmetic over the sequence's own tokens.
pub(super) fn expected(tokens: &[u32], row: &SampleRow<'_>) -> Sampled {
    let state = tokens.iter().enumerate().fold(0, |state, (position, &token)| mix(state, cell(token, position)));
    answer(state, row)
}

impl Control {
    /// Computes a step, which a gate may hold back.
    fn compute<'a>(
        &self,
        block_size: usize,
        batch: &Batch,
        row: &dyn Fn(usize) -> SampleRow<'a>,
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        self.pass()?;
        self.computed.fetch_add(batch.tokens.len(), Ordering::Relaxed);
        let slot = |table_start: u32, position: usize| {
            let page = batch.block_tables[table_start as usize + position / block_size] as usize;
            page * block_size + position % block_size
        };
        let mut cache = self.cache.lock().unwrap();
        for span in &batch.sequences {
            for token in span.query_start as usize..(span.query_start + span.query_len) as usize {
                let position = batch.positions[token] as usize;
                cache[slot(span.table_start, position)] = cell(batch.tokens[token], position);
            }
        }
        drop(cache);
        layer_done(0);
        let cache = self.cache.lock().unwrap();
        for (i, (&logit_row, out)) in batch.logit_rows.iter().zip(out).enumerate() {
            let in_span = |span: &&engine_kernels::SequenceSpan| logit_row < span.query_start + span.query_len;
            let span = batch.sequences.iter().find(in_span).unwrap();
            let state = (0..=batch.positions[logit_row as usize] as usize)
                .fold(0, |state, position| mix(state, cache[slot(span.table_start, position)]));
            let row = row(i);
            if matches!(row.task, RowTask::Sample { .. }) {
                let mut outputs = self.outputs.lock().unwrap();
                let before = outputs.insert(row.sequence, row.output.to_vec()).unwrap_or_default();
                assert!(row.output.starts_with(&before), "{:?}: {before:?}, then {:?}", row.sequence, row.output);
            }
            *out = answer(state, &row);
        }
        Ok(())
    }

    /// Computes the earliest step that was launched and is not computed. False if there is none that is drawn too.
    fn compute_launched(&self) -> Result<bool, RunnerError> {
        let mut device = self.device.lock().unwrap();
        if device.launched.front().is_none_or(|launched| launched.rows.is_none()) {
            return Ok(false);
        }
        let Some(Launched { mut batch, rows: Some(mut rows), block_size }) = device.launched.pop_front() else {
            return Ok(false);
        };
        let told = batch.tokens.iter_mut().chain(rows.iter_mut().flat_map(|wish| &mut wish.output));
        for token in told.filter(|token| **token & Batch::PLACEHOLDER != 0) {
            *token = device.drawn[(*token & !Batch::PLACEHOLDER) as usize];
        }
        let mut out = vec![Sampled::default(); rows.len()];
        self.compute(block_size, &batch, &|i| rows[i].row(), &mut out, &mut |_| ())?;
        device.drawn = out.iter().map(|sampled| sampled.token).collect();
        device.computed.push_back(out);
        Ok(true)
    }

    /// Returns when everything that was launched is computed.
    pub(super) fn settle(&self) {
        while self.compute_launched().unwrap() {}
    }
}

impl Runner for FakeRunner {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        self.control.compute(self.block_size, batch, &row, out, layer_done)
    }

    fn ahead(&mut self) -> Option<&mut dyn RunsAhead> {
        if self.runs_ahead { Some(self) } else { None }
    }
}

impl RunsAhead for FakeRunner {
    fn launch(&mut self, batch: &Batch, layer_done: &mut dyn FnMut(usize)) -> Result<(), RunnerError> {
        // A prompt for another worker may be waited for before it is drawn from: there is nothing to draw.
        let rows = batch.logit_rows.is_empty().then(Vec::new);
        let mut device = self.control.device.lock().unwrap();
        device.launched.push_back(Launched { batch: copy(batch), rows, block_size: self.block_size });
        let under_way = device.launched.len() + device.computed.len();
        drop(device);
        assert!(under_way <= 2, "no more than one step ahead");
        self.control.ahead.fetch_add(under_way - 1, Ordering::Relaxed);
        layer_done(0);
        Ok(())
    }

    fn draw<'a>(&mut self, batch: &Batch, row: &(dyn Fn(usize) -> SampleRow<'a> + Sync)) -> Result<(), RunnerError> {
        if batch.logit_rows.is_empty() {
            return Ok(());
        }
        let rows = (0..batch.logit_rows.len()).map(|i| Wish::of(&row(i))).collect();
        let mut device = self.control.device.lock().unwrap();
        let launched = device.launched.back_mut().expect("what is drawn was launched");
        assert!(launched.rows.replace(rows).is_none(), "a step is drawn once");
        Ok(())
    }

    fn collect(&mut self, out: &mut [Sampled]) -> Result<(), RunnerError> {
        if self.control.device.lock().unwrap().computed.is_empty() {
            self.control.compute_launched()?;
        }
        let computed = self.control.device.lock().unwrap().computed.pop_front().unwrap();
        out.copy_from_slice(&computed);
        Ok(())
    }
}

fn copy(batch: &Batch) -> Batch {
    let Batch { tokens, positions, sequences, block_tables, logit_rows } = batch;
    Batch {
        tokens: tokens.clone(),
        positions: positions.clone(),
        sequences: sequences.clone(),
        block_tables: block_tables.clone(),
        logit_rows: logit_rows.clone(),
    }
}
