//! A request's tokens and log-probabilities are the same, bit for bit, whatever else is computed beside it, in whatever
//! chunks, from whatever is cached, and however often it is preempted.

mod support;

use engine::{
    engine::{Engine, EngineConfig, EngineHandle, Event, FinishReason, Request, Runner, TokenOutput},
    telemetry::Metrics,
};
use engine_kernels::{
    Backend, SamplingParams,
    cpu::{CpuBackend, CpuOptions},
    reference::ReferenceBackend,
};
use engine_models::{ForwardLimits, ModelSource};
use futures::{executor::block_on, future::join_all};
use support::Lent;

const BLOCK_SIZE: usize = 16;
/// Longer than the 256 keys that attention works on at a time: some contexts are merged from parts.
const MAX_MODEL_LEN: usize = 336;
const BLOCKS: usize = 400;
const MAX_TOKENS: usize = 512;

/// What a request asked for: tokens, and the bits of their log-probabilities and those of the alternatives.
type Answer = Vec<(u32, Option<u32>, Vec<(u32, u32)>)>;

/// 24 requests, no two alike: prompts from one token to beyond attention's first 256 keys, which one answer grows over,
/// a third of them starting alike with each of two others, greedy and drawn, with penalties, biases, log-probabilities
/// and scored prompts.
fn requests(vocab_size: usize) -> Vec<Request> {
    let vocab_size = vocab_size as u32;
    let lengths = [33, 1, 64, 17, 250, 7, 96, 16, 48, 2, 110, 31, 65, 15, 97, 32, 300, 5, 80, 47, 63, 100, 30, 120];
    let mut requests = Vec::new();
    for (i, length) in (0..).zip(lengths) {
        let token = |position: u32| {
            let stream = if position < length * 3 / 4 { i % 3 } else { 10 + i };
            (stream * 7919 + position * 104_729 + stream * position * 31) % vocab_size
        };
        let mut sampling = SamplingParams { seed: u64::from(i) << 33 | 5, ..SamplingParams::default() };
        if i % 2 == 1 {
            sampling.temperature = 0.4 + i as f32 * 0.05;
            sampling.top_k = [0, 40, 5][i as usize % 3];
            sampling.top_p = [1.0, 0.9, 0.7, 0.95][i as usize % 4];
            sampling.min_p = [0.0, 0.02][i as usize / 2 % 2];
        }
        if i % 3 == 1 {
            sampling.repetition_penalty = 1.3;
        }
        if i % 5 == 1 {
            (sampling.presence_penalty, sampling.frequency_penalty) = (0.8, 0.4);
        }
        if i % 7 == 2 {
            sampling.logit_bias = vec![(3, 2.5), (vocab_size - 1, -4.0)];
        }
        requests.push(Request {
            prompt: (0..length).map(token).collect(),
            output: Vec::new(),
            sampling,
            max_tokens: 24 + i * 5 % 20,
            min_tokens: 4,
            stop_token_ids: (0..vocab_size).filter(|token| i % 8 == 4 && token % 23 == i % 23).collect(),
            grammar: None,
            logprobs: [Some(5), None, Some(0)][i as usize % 3],
            prompt_logprobs: (i % 6 == 4).then_some(2),
            salt: None,
            trace: None,
        });
    }
    requests
}

async fn answer(handle: &EngineHandle, request: &Request) -> (Answer, u32) {
    let bits = |output: TokenOutput| {
        let top = output.top.iter().map(|&(token, logprob)| (token, logprob.to_bits())).collect();
        (output.token, output.logprob.map(f32::to_bits), top)
    };
    let mut generation = handle.submit(request.clone()).unwrap();
    let mut answer = Answer::new();
    while let Some(event) = generation.next().await {
        match event {
            Event::Prompt(output) | Event::Token(output) => answer.push(bits(output)),
            Event::Finished { reason, cached_tokens } => {
                assert_ne!(reason, FinishReason::Aborted, "{:?}", handle.status());
                return (answer, cached_tokens);
            }
        }
    }
    unreachable!("an answer ends with Finished");
}

fn config(max_num_seqs: usize, max_num_batched_tokens: usize, blocks: usize, vocab_size: usize) -> EngineConfig {
    EngineConfig {
        max_num_seqs,
        max_num_batched_tokens,
        itl_target: std::time::Duration::from_millis(200),
        max_waiting_requests: 64,
        max_model_len: MAX_MODEL_LEN,
        vocab_size,
        block_size: BLOCK_SIZE,
        blocks,
        prefix_caching: true,
        model_key: Vec::new(),
    }
}

/// Answers to `requests`, all at once; in every round but the first with everything the one before left in the cache.
fn together(
    name: &str,
    rounds: usize,
    runner: &Lent<impl Runner>,
    config: EngineConfig,
    requests: &[Request],
    expected: &[Answer],
) -> Metrics {
    let metrics = Metrics::new();
    let handle = Engine::start(runner.again(), config, metrics.engine.clone()).unwrap();
    for round in 0..rounds {
        let answers = block_on(join_all(requests.iter().map(|request| answer(&handle, request))));
        for (i, ((answer, _), expected)) in answers.iter().zip(expected).enumerate() {
            assert_eq!(answer, expected, "request {i}, {name}, round {round}");
        }
    }
    block_on(handle.drain());
    assert_eq!(handle.snapshot().pages_owned, 0);
    metrics
}

/// Holds all the ways of computing the same against each other.
fn check<B: Backend>(source: &ModelSource, backend: B) {
    let limits = ForwardLimits { max_tokens: MAX_TOKENS, max_logit_rows: 24, max_positions: MAX_MODEL_LEN };
    let runner = Lent::new(support::load(source, backend, limits, BLOCK_SIZE, BLOCKS));
    let vocab_size = source.config().vocab_size;
    let requests = requests(vocab_size);
    let config = |seqs, tokens, blocks| config(seqs, tokens, blocks, vocab_size);

    // Alone: an engine for each, so that nothing is cached either.
    let alone: Vec<Answer> = requests
        .iter()
        .map(|request| {
            let config = config(1, MAX_TOKENS, BLOCKS);
            let handle = Engine::start(runner.again(), config, Metrics::new().engine).unwrap();
            let (answer, cached) = block_on(answer(&handle, request));
            assert_eq!(cached, 0);
            answer
        })
        .collect();

    let metrics = together("all together", 2, &runner, config(24, MAX_TOKENS, BLOCKS), &requests, &alone);
    assert!(metrics.engine.prefix_hit_tokens.get() > 1000, "the second round finds the first one's pages");
    for chunk in [7, 64] {
        together(&format!("in chunks of {chunk}"), 1, &runner, config(7, chunk, BLOCKS), &requests, &alone);
    }

    // Short prompts first: many are let in, and then their answers outgrow the pages.
    let mut by_length: Vec<_> = requests.iter().cloned().zip(alone).collect();
    by_length.sort_by_key(|(request, _)| request.prompt.len());
    let (requests, alone): (Vec<_>, Vec<_>) = by_length.into_iter().unzip();
    let pages = MAX_MODEL_LEN / BLOCK_SIZE + 1;
    let metrics = together("preempted", 1, &runner, config(24, 64, pages), &requests, &alone);
    assert!(metrics.engine.preemptions.get() > 0, "pages are too many to force a preemption");
}

const LLAMA_F32: &str = r#"{
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32", "vocab_size": 320,
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": false, "hidden_act": "silu"
}"#;

const QWEN3_BF16: &str = r#"{
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16", "vocab_size": 320,
    "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 1, "head_dim": 32, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0,
    "max_position_embeddings": 512, "tie_word_embeddings": true, "hidden_act": "silu"
}"#;

#[test]
fn the_reference_backend_gives_a_request_the_same_bits_in_any_company() {
    check(&support::made_up(LLAMA_F32), ReferenceBackend);
    check(&support::made_up(QWEN3_BF16), ReferenceBackend);
}

#[test]
fn the_cpu_backend_gives_a_request_the_same_bits_in_any_company() {
    check(&support::made_up(LLAMA_F32), CpuBackend::new(CpuOptions::default()));
    check(&support::made_up(QWEN3_BF16), CpuBackend::new(CpuOptions::default()));
}

#[test]
fn the_demo_model_gives_a_request_the_same_bits_in_any_company() {
    check(&support::open(&support::demo_model()), CpuBackend::new(CpuOptions::default()));
}
