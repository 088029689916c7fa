//! A worker on a CUDA device, an emulated one here, that has warmed up before the first request comes: steady
//! decoding records nothing any more, and answers are those of one that never records.

mod support;

use engine::{
    engine::{Engine, EngineConfig, Event, FinishReason, ModelRunner, Request, Runner},
    grammar::{Source, Vocabulary},
    telemetry::Metrics,
};
use engine_cuda_emulated::{Emulated, EmulatedBackend, Refusal};
use engine_kernels::SamplingParams;
use engine_models::ForwardLimits;
use futures::{executor::block_on, future::join_all};
use support::Lent;

/// Tokens, and the bits of their log-probabilities.
type Answer = Vec<(u32, u32)>;

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
        prefix_caching: true,
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
        grammar: None,
        logprobs: Some(1),
        prompt_logprobs: None,
        salt: None,
        trace: None,
    };
    (0..).zip(lengths).map(request).collect()
}

fn load(backend: EmulatedBackend) -> ModelRunner<EmulatedBackend> {
    let source = support::made_up(CONFIG);
    // Fewer rows of logits at a time than a step has.
    let limits = ForwardLimits { max_tokens: STEP_TOKENS, max_logit_rows: 2, max_positions: MAX_MODEL_LEN };
    support::load(&source, backend, limits, 16, config().blocks)
}

/// All answers of an engine, and how many recordings were asked for before its first step, and at last.
fn answers(backend: EmulatedBackend, is_warm: bool, requests: Vec<Request>) -> (Vec<Answer>, [u64; 2]) {
    let driver = backend.driver().clone();
    let mut runner = load(backend);
    if is_warm {
        runner.warm_up(&config(), true).unwrap();
    }
    let before = driver.recordings();
    (answers_of(runner, requests), [before, driver.recordings()])
}

fn answers_of(runner: impl Runner, requests: Vec<Request>) -> Vec<Answer> {
    let handle = Engine::start(runner, config(), Metrics::new().engine).unwrap();
    let answer = async |request| {
        let mut generation = handle.submit(request).unwrap();
        let mut answer = Vec::new();
        while let Some(event) = generation.next().await {
            match event {
                Event::Token(output) => answer.push((output.token, output.logprob.unwrap().to_bits())),
                Event::Prompt(_) => {}
                Event::Finished { reason, .. } => assert_ne!(reason, FinishReason::Aborted, "{:?}", handle.status()),
            }
        }
        answer
    };
    let answers = block_on(join_all(requests.into_iter().map(answer)));
    block_on(handle.drain());
    assert_eq!(handle.snapshot().pages_owned, 0);
    answers
}

fn backend() -> EmulatedBackend {
    EmulatedBackend::new(Emulated::default())
}

#[test]
fn a_worker_that_has_warmed_up_records_nothing_more_and_answers_as_ever() {
    let (expected, asked_for) = answers(backend().with_graphs_max(0), true, requests());
    assert_eq!(asked_for, [0, 0]);
    // Which steps these make depends on when each request comes, so that those of one alone are counted too: all of its
    // decodes have one shape, which is recorded when it comes again.
    let (plain, [before, _]) = answers(backend(), false, requests());
    assert!(plain == expected && before == 0, "{before} recordings");
    let (alone, asked_for) = answers(backend(), false, requests()[..1].to_vec());
    assert!(alone == expected[..1] && asked_for == [0, 1], "{asked_for:?}");
    let (warm, [before, after]) = answers(backend(), true, requests());
    assert_eq!(warm, expected);
    assert!(before > 5 && after == before, "{before} recordings, then {after}");
}

#[test]
fn who_decodes_makes_room_to_remember_sequences_at_start_even_if_nothing_is_recorded() {
    for graphs_max in [0, 100] {
        for decodes in [false, true] {
            let backend = backend().with_graphs_max(graphs_max);
            let driver = backend.driver().clone();
            let mut runner = load(backend);
            let before = driver.bytes_allocated();
            runner.warm_up(&config(), decodes).unwrap();
            let made = driver.bytes_allocated() - before;
            assert_eq!(made >= 64 << 20, decodes, "{made} bytes, at most {graphs_max} recordings");
        }
    }
}

#[test]
fn a_worker_that_runs_ahead_answers_as_one_that_waits_for_each_token() {
    // Some end when nobody knew that they would, and for some the tokens before count.
    let ends_anywhere = |i: usize, request: Request| Request {
        min_tokens: 2,
        max_tokens: 24,
        stop_token_ids: (0..256).filter(|token| i != 1 && token % 9 == i as u32).collect(),
        sampling: SamplingParams {
            repetition_penalty: if i == 3 { 1.3 } else { 1.0 },
            temperature: 0.9,
            ..request.sampling.clone()
        },
        ..request
    };
    let requests: Vec<_> = (0..).zip(requests()).map(|(i, request)| ends_anywhere(i, request)).collect();
    let ahead = answers_of(load(backend()), requests.clone());
    // Who borrows a runner sees no device.
    let waiting = answers_of(Lent::new(load(backend())), requests);
    assert_eq!(ahead, waiting);
    assert!(ahead.iter().any(|answer| answer.len() < 24), "none ended by itself");
}

#[test]
fn a_worker_that_runs_ahead_follows_grammars_as_one_that_waits_for_each_token() {
    let vocabulary = Vocabulary::of_tokens((0..=u8::MAX).map(|byte| vec![byte]).collect(), &[2]).unwrap();
    let grammar = vocabulary.compile(Source::Regex("[a-f]{4}, [0-9]{2,6}".to_owned())).unwrap();
    let with_grammar = |i: usize, request: Request| Request {
        max_tokens: 24,
        min_tokens: 0,
        stop_token_ids: vec![2],
        // Beside others that have none.
        grammar: i.is_multiple_of(2).then(|| grammar.matcher()),
        sampling: SamplingParams { temperature: 0.9, seed: i as u64, ..SamplingParams::default() },
        ..request
    };
    let requests: Vec<_> = (0..).zip(requests()).map(|(i, request)| with_grammar(i, request)).collect();
    let ahead = answers_of(load(backend()), requests.clone());
    let waiting = answers_of(Lent::new(load(backend())), requests);
    assert_eq!(ahead, waiting);
    for answer in ahead.iter().step_by(2) {
        let text: String = answer.iter().map(|&(token, _)| char::from(token as u8)).collect();
        let (letters, digits) = text.trim_end_matches('\u{2}').split_once(", ").unwrap();
        assert!(letters.len() == 4 && letters.chars().all(|letter| ('a'..='f').contains(&letter)), "{text:?}");
        assert!((2..=6).contains(&digits.len()) && digits.chars().all(|digit| digit.is_ascii_digit()), "{text:?}");
    }
}

#[test]
fn a_worker_whose_device_records_nothing_answers_as_ever() {
    let (expected, _) = answers(backend().with_graphs_max(0), false, requests());
    let backend = backend();
    backend.driver().refuse_recordings(Some(Refusal::Amid));
    let (answers, [before, after]) = answers(backend, true, requests());
    assert!(answers == expected && before == after, "{before} recordings, then {after}");
}
