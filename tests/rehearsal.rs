//! A worker on a CUDA device, an emulated one here, that has rehearsed its steps before the first request comes: steady
//! decoding records nothing any more, and answers are those of one that never records.

mod support;

use engine::{
    telemetry::Metrics,
    worker::{Engine, EngineConfig, Event, FinishReason, Request},
};
use engine_cuda_emulated::{Emulated, EmulatedBackend, Refusal};
use engine_kernels::{SamplingParams, cuda::CudaBackend};
use engine_models::ForwardLimits;
use futures::{executor::block_on, future::join_all};

const CONFIG: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "dtype": "float32", "hidden_size": 64,
    "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "max_position_embeddings": 512, "vocab_size": 256, "rms_norm_eps": 1e-6, "tie_word_embeddings": true,
    "eos_token_id": 2, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}
}"#;
/// Tokens of a step: up to here, rows are computed in one way whatever is beside them.
const STEP_TOKENS: usize = 16;
const MAX_MODEL_LEN: usize = 160;

fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 3,
        max_num_batched_tokens: STEP_TOKENS,
        itl_target: std::time::Duration::from_millis(200),
        max_waiting_requests: 16,
        max_model_len: MAX_MODEL_LEN,
        vocab_size: 256,
        block_size: 16,
        // Not enough for all: some are preempted.
        blocks: 14,
        model_key: Vec::new(),
    }
}

/// More than are computed at the same time, of lengths that make one partition of keys, and two.
fn requests() -> Vec<Request> {
    let lengths = [3, 40, 124, 1, 17];
    let request = |(i, length): (u32, u32)| Request {
        prompt: (0..length).map(|position| (position * 31 + i * 77) % 256).collect(),
        output: Vec::new(),
        sampling: SamplingParams { temperature: 0.7 * (i % 2) as f32, seed: i.into(), ..SamplingParams::default() },
        max_tokens: 10 + 2 * i,
        min_tokens: 10,
        stop_token_ids: Vec::new(),
        logprobs: Some(1),
        prompt_logprobs: None,
        trace: None,
    };
    (0..).zip(lengths).map(request).collect()
}

/// All answers of an engine, and how many recordings were asked for before its first step, and at last.
fn answers(backend: CudaBackend<Emulated>, rehearsed: bool) -> (Vec<Vec<(u32, u32)>>, [u64; 2]) {
    let driver = backend.driver().clone();
    let source = support::made_up(CONFIG);
    let limits = ForwardLimits { max_tokens: STEP_TOKENS, max_logit_rows: 4, max_positions: MAX_MODEL_LEN };
    let mut runner = support::load(&source, backend, limits, 16, config().blocks);
    if rehearsed {
        runner.rehearse(&config()).unwrap();
    }
    let before = driver.recordings();
    let handle = Engine::start(runner, config(), Metrics::new().engine).unwrap();
    let answer = async |request| {
        let mut generation = handle.submit(request).unwrap();
        let mut answer = Vec::new();
        while let Some(event) = generation.next().await {
            match event {
                Event::Token(output) => answer.push((output.token, output.logprob.unwrap().to_bits())),
                Event::Prompt(_) => {}
                Event::Finished { reason, .. } => assert_eq!(reason, FinishReason::Length, "{:?}", handle.status()),
            }
        }
        answer
    };
    let answers = block_on(join_all(requests().into_iter().map(answer)));
    (answers, [before, driver.recordings()])
}

fn backend() -> EmulatedBackend {
    EmulatedBackend::new(Emulated::default())
}

#[test]
fn a_worker_that_has_rehearsed_records_nothing_more_and_answers_as_ever() {
    let (expected, asked_for) = answers(backend().with_graphs_max(0), true);
    assert_eq!(asked_for, [0, 0]);
    let (plain, [before, after]) = answers(backend(), false);
    assert!(plain == expected && before == 0 && after > 2, "{after} recordings");
    let (rehearsed, [before, after]) = answers(backend(), true);
    assert_eq!(rehearsed, expected);
    assert!(before > 5 && after == before, "{before} recordings, then {after}");
}

#[test]
fn a_worker_whose_device_records_nothing_answers_as_ever() {
    let (expected, _) = answers(backend().with_graphs_max(0), false);
    let backend = backend();
    backend.driver().refuse_recordings(Some(Refusal::Amid));
    let (answers, [before, after]) = answers(backend, true);
    assert!(answers == expected && before == after, "{before} recordings, then {after}");
}
