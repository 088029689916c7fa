//! Once every sequence decodes, the engine thread allocates nothing: not for a step, not for a new page, not for
//! handing tokens to readers.

mod support;

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    sync::atomic::{AtomicUsize, Ordering},
};

use engine::{
    engine::{Engine, EngineConfig, EngineStatus, Event, FinishReason, Request, Runner, RunnerError},
    telemetry::Metrics,
};
use engine_kernels::{
    Batch, SampleRow, Sampled, SamplingParams,
    cpu::{CpuBackend, CpuOptions},
};
use engine_models::ForwardLimits;

const SEQUENCES: usize = 8;
const BLOCK_SIZE: usize = 16;
/// Steps that are left to settle, then steps that are watched.
const SETTLING: usize = 5;
const WATCHED: usize = 210;
/// Some are generated before the last prompt is computed.
const MAX_TOKENS: usize = SETTLING + WATCHED + 40;
const MAX_MODEL_LEN: usize = 512;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
static WATCHED_STEPS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Whether this thread's allocations count.
    static WATCHED_THREAD: Cell<bool> = const { Cell::new(false) };
}

/// The system's allocator, and a count of what watched threads ask it for.
struct Counting;

impl Counting {
    fn count() {
        if WATCHED_THREAD.try_with(Cell::get).unwrap_or(false) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

// SAFETY: every call goes to the system's allocator as it came; counting touches an atomic and a thread-local without
// destructor, neither of which allocates.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: the caller keeps `GlobalAlloc`'s contract, which is the system allocator's too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        Self::count();
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        Self::count();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Starts the watch on the engine thread, which it runs on, once all sequences decode, and ends it some steps later.
struct Watch<R> {
    runner: R,
    decodes: usize,
}

impl<R: Runner> Runner for Watch<R> {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        let all_decode = batch.tokens.len() == SEQUENCES && batch.sequences.len() == SEQUENCES;
        self.decodes += usize::from(all_decode);
        let watched = all_decode && (SETTLING + 1..=SETTLING + WATCHED).contains(&self.decodes);
        WATCHED_THREAD.set(watched);
        WATCHED_STEPS.fetch_add(usize::from(watched), Ordering::Relaxed);
        self.runner.execute(batch, row, out, layer_done)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn steady_decode_allocates_nothing_on_the_engine_thread() {
    let source = support::open(&support::demo_model());
    let vocab_size = source.config().vocab_size;
    let blocks = SEQUENCES * MAX_MODEL_LEN / BLOCK_SIZE;
    let limits = ForwardLimits { max_tokens: 256, max_logit_rows: 32, max_positions: MAX_MODEL_LEN };
    let runner = support::load(&source, CpuBackend::new(CpuOptions::default()), limits, BLOCK_SIZE, blocks);
    let config = EngineConfig {
        max_num_seqs: SEQUENCES,
        max_num_batched_tokens: 256,
        itl_target: std::time::Duration::from_millis(200),
        max_waiting_requests: 8,
        max_model_len: MAX_MODEL_LEN,
        vocab_size,
        block_size: BLOCK_SIZE,
        blocks,
        prefix_caching: true,
        model_key: Vec::new(),
    };
    let metrics = Metrics::new();
    let handle = Engine::start(Watch { runner, decodes: 0 }, config, metrics.engine.clone()).unwrap();
    let readers: Vec<_> = (0..SEQUENCES as u32)
        .map(|i| {
            let request = Request {
                prompt: (0..3 + 5 * i).map(|position| 100 + i * 1000 + position * 17).collect(),
                output: Vec::new(),
                sampling: SamplingParams {
                    temperature: if i % 2 == 0 { 0.0 } else { 0.8 },
                    top_k: 40 * (i % 3),
                    top_p: 0.95,
                    repetition_penalty: 1.1,
                    frequency_penalty: 0.1,
                    logit_bias: vec![(5, 0.5)],
                    seed: i.into(),
                    ..SamplingParams::default()
                },
                max_tokens: MAX_TOKENS as u32,
                min_tokens: MAX_TOKENS as u32,
                stop_token_ids: vec![0, 2],
                grammar: None,
                logprobs: (i % 2 == 1).then_some(i),
                prompt_logprobs: None,
                salt: None,
                trace: None,
            };
            let mut generation = handle.submit(request).unwrap();
            tokio::spawn(async move {
                let mut tokens = 0;
                while let Some(event) = generation.next().await {
                    match event {
                        Event::Prompt(_) => unreachable!("no prompt was asked for"),
                        Event::Token(_) => tokens += 1,
                        Event::Finished { reason, .. } => assert_eq!(reason, FinishReason::Length),
                    }
                }
                tokens
            })
        })
        .collect();
    for reader in readers {
        assert_eq!(reader.await.unwrap(), MAX_TOKENS);
    }
    assert_eq!(handle.status(), EngineStatus::Running);
    assert_eq!(WATCHED_STEPS.load(Ordering::Relaxed), WATCHED);
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 0, "allocations in {WATCHED} steps");
}
