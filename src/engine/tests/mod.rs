//! The engine thread with a made-up model, and what its tests share.

mod ahead;
mod constrained;
mod ending;
mod fake;
mod remote;
mod resumed;
mod waiting;

use std::sync::{Arc, atomic::Ordering};

use engine_kernels::{RowTask, SampleRow, Sampled, SamplingParams, SequenceId};
use futures::future::join_all;
use proptest::prelude::*;

use self::{
    fake::{Control, FakeRunner, NOTHING_FOLLOWS, VOCAB_SIZE, expected},
    waiting::{block_on, wait_until},
};
use super::*;
use crate::{cache::Salt, telemetry::Metrics};

pub(crate) const BLOCK: usize = 4;

pub(crate) fn config() -> EngineConfig {
    EngineConfig {
        max_num_seqs: 8,
        max_num_batched_tokens: 32,
        itl_target: std::time::Duration::from_millis(200),
        max_waiting_requests: 100,
        max_model_len: 128,
        vocab_size: VOCAB_SIZE,
        block_size: BLOCK,
        blocks: 64,
        prefix_caching: true,
        model_key: b"fake".to_vec(),
    }
}

pub(crate) fn start(config: EngineConfig) -> (EngineHandle, Arc<Control>) {
    let control = Arc::new(Control::default());
    let runner = FakeRunner::new(config.blocks, config.block_size, control.clone());
    (Engine::start(runner, config, Metrics::new().engine).unwrap(), control)
}

/// The same with a runner that runs ahead.
fn start_ahead(config: EngineConfig) -> (EngineHandle, Arc<Control>) {
    let control = Arc::new(Control::default());
    let runner = FakeRunner::new(config.blocks, config.block_size, control.clone()).ahead();
    (Engine::start(runner, config, Metrics::new().engine).unwrap(), control)
}

type Start = fn(EngineConfig) -> (EngineHandle, Arc<Control>);

/// Both ways to compute steps.
const STARTS: [Start; 2] = [start, start_ahead];

fn request(prompt: impl IntoIterator<Item = u32>, max_tokens: u32) -> Request {
    Request {
        prompt: prompt.into_iter().collect(),
        output: Vec::new(),
        sampling: SamplingParams::default(),
        max_tokens,
        min_tokens: 0,
        stop_token_ids: Vec::new(),
        grammar: None,
        logprobs: None,
        prompt_logprobs: None,
        salt: None,
        trace: None,
    }
}

/// The events a request must give, cached tokens aside.
fn model_answer(request: &Request, max_model_len: usize) -> (Vec<Event>, FinishReason) {
    let prompt = &request.prompt[..];
    let mut events = Vec::new();
    let output = |sampled: Sampled, wanted: Option<u32>| TokenOutput {
        token: sampled.token,
        logprob: wanted.map(|_| sampled.logprob),
        top: sampled.top[..sampled.top_len as usize].to_vec(),
    };
    if request.prompt_logprobs.is_some() {
        events.push(Event::Prompt(TokenOutput { token: prompt[0], logprob: None, top: vec![] }));
        for (position, &token) in prompt.iter().enumerate().skip(1) {
            let task = RowTask::Score { token };
            let row =
                SampleRow { task, sequence: SequenceId(0), prompt, output: &[], logprobs: request.prompt_logprobs };
            events.push(Event::Prompt(output(expected(&prompt[..position], &row), request.prompt_logprobs)));
        }
    }
    let mut tokens = prompt.to_vec();
    let limit = (request.max_tokens as usize).min(max_model_len - prompt.len());
    let mut matcher = request.grammar.clone();
    for generated in 0..limit {
        let suppress = if generated < request.min_tokens as usize { &request.stop_token_ids[..] } else { &[] };
        let mask = matcher.as_mut().map(|matcher| {
            let mut mask = matcher.allowed().unwrap();
            let ends = matcher.eos_token_ids().into_iter().filter(|end| !request.stop_token_ids.contains(end));
            ends.chain(suppress.iter().copied()).for_each(|id| mask.forbid(id));
            mask
        });
        if mask.as_ref().is_some_and(|mask| mask.is_empty()) {
            return (events, FinishReason::Stop);
        }
        let task = RowTask::Sample { params: &request.sampling, suppress, mask: mask.as_ref() };
        let row = SampleRow {
            task,
            sequence: SequenceId(0),
            prompt,
            output: &tokens[prompt.len()..],
            logprobs: request.logprobs,
        };
        let sampled = expected(&tokens, &row);
        events.push(Event::Token(output(sampled, request.logprobs)));
        tokens.push(sampled.token);
        if generated >= request.min_tokens as usize && request.stop_token_ids.contains(&sampled.token) {
            return (events, FinishReason::Stop);
        }
        if let Some(matcher) = &mut matcher {
            matcher.take(sampled.token).unwrap();
            if matcher.is_complete() {
                return (events, FinishReason::Stop);
            }
        }
    }
    (events, FinishReason::Length)
}

async fn collect(generation: &mut Generation) -> (Vec<Event>, FinishReason, u32) {
    let mut events = Vec::new();
    while let Some(event) = generation.next().await {
        if let Event::Finished { reason, cached_tokens } = event {
            assert_eq!(generation.next().await, None);
            return (events, reason, cached_tokens);
        }
        events.push(event);
    }
    panic!("an answer ends with Finished");
}

fn assert_answers(handle: &EngineHandle, requests: &[Request]) {
    let generations: Vec<_> = requests.iter().map(|request| handle.submit(request.clone()).unwrap()).collect();
    let answers = block_on(join_all(generations.into_iter().map(|mut generation| async move {
        let (events, reason, _) = collect(&mut generation).await;
        (events, reason)
    })));
    for (request, answer) in requests.iter().zip(answers) {
        assert_eq!(answer, model_answer(request, handle.config().max_model_len), "{request:?}");
    }
}

#[test]
fn a_request_gets_its_tokens_and_one_end() {
    for start in STARTS {
        let (handle, _) = start(config());
        let mut scored = request(10..31, 7);
        scored.logprobs = Some(2);
        scored.prompt_logprobs = Some(3);
        assert_answers(&handle, &[request([5], 1), request(0..100, 28), scored]);
    }
}

#[test]
fn a_request_that_nothing_can_follow_is_aborted_and_no_other() {
    for start in STARTS {
        let (handle, _) = start(config());
        let mut hopeless = request(0..9, 5);
        hopeless.sampling.seed = NOTHING_FOLLOWS;
        let mut generation = handle.submit(hopeless).unwrap();
        let (events, reason, _) = block_on(collect(&mut generation));
        assert_eq!((events, reason), (vec![], FinishReason::Impossible));
        assert_eq!(handle.status(), EngineStatus::Running);
        assert_answers(&handle, &[request(0..9, 5)]);
    }
}

#[test]
fn a_prompt_can_be_scored_without_an_answer() {
    for start in STARTS {
        let (handle, _) = start(config());
        for len in [1, 4, 70, 128] {
            let mut scored = request(0..len, 0);
            scored.prompt_logprobs = Some(0);
            assert_answers(&handle, &[scored]);
        }
    }
}

#[test]
fn a_stop_token_ends_the_answer_but_not_before_min_tokens() {
    for start in STARTS {
        let (handle, _) = start(config());
        let free = model_answer(&request([1, 2, 3], 10), 128).0;
        let Event::Token(fourth) = &free[3] else { panic!() };
        let mut stopped = request([1, 2, 3], 10);
        // Ids beyond the vocabulary are never drawn and do no harm.
        stopped.stop_token_ids = vec![fourth.token, u32::MAX];
        assert_eq!(model_answer(&stopped, 128).0.len(), 4);
        let mut later = stopped.clone();
        later.stop_token_ids.pop();
        later.min_tokens = 6;
        assert_answers(&handle, &[stopped, later]);
    }
}

#[test]
fn an_answer_ends_where_the_context_does() {
    for start in STARTS {
        let (handle, _) = start(config());
        assert_answers(&handle, &[request(0..120, 1000), request(0..127, 1)]);
        let too_long = SubmitError::PromptTooLong { prompt: 128, limit: 128 };
        assert_eq!(handle.submit(request(0..128, 1)).unwrap_err(), too_long);
        let too_long = SubmitError::PromptTooLong { prompt: 129, limit: 128 };
        assert_eq!(handle.submit(request(0..129, 0)).unwrap_err(), too_long);
    }
}

#[test]
fn what_the_model_cannot_take_is_refused() {
    let (handle, _) = start(config());
    assert_eq!(handle.submit(request([], 1)).unwrap_err(), SubmitError::EmptyPrompt);
    let unknown = SubmitError::UnknownToken { token: 1000, vocab_size: VOCAB_SIZE };
    assert_eq!(handle.submit(request([1, 1000], 1)).unwrap_err(), unknown);
    let mut biased = request([1], 1);
    biased.sampling.logit_bias.push((1000, 1.0));
    assert_eq!(handle.submit(biased).unwrap_err(), unknown);
}

#[test]
fn a_prompt_seen_before_is_found() {
    for start in STARTS {
        let (handle, control) = start(config());
        let ask = || {
            let before = control.computed.load(Ordering::Relaxed);
            let mut generation = handle.submit(request(0..22, 3)).unwrap();
            let cached = block_on(collect(&mut generation)).2;
            (cached, control.computed.load(Ordering::Relaxed) - before)
        };
        assert_eq!(ask(), (0, 24));
        // The answer's first token filled a page too, but the prompt ends before it.
        assert_eq!(ask(), (20, 4));
        let mut generation = handle.submit(request(0..8, 1)).unwrap();
        assert_eq!(block_on(collect(&mut generation)).2, 4);
    }
}

#[test]
fn a_prompt_seen_before_is_found_by_those_with_its_salt_alone() {
    for start in STARTS {
        let (handle, _) = start(config());
        let ask = |salt: Option<Salt>| {
            let asked = Request { salt, ..request(0..22, 3) };
            let (events, reason, cached) = block_on(collect(&mut handle.submit(asked.clone()).unwrap()));
            assert_eq!((events, reason), model_answer(&asked, 128));
            cached
        };
        let salts = [Some(Salt::of("tea")), Some(Salt::of("coffee")), None];
        assert_eq!(salts.map(ask), [0; 3]);
        assert_eq!(salts.map(ask), [20; 3]);
    }
}

#[test]
fn an_answer_begun_elsewhere_is_found_under_its_salt_alone() {
    let (handle, _) = start(config());
    let ask = |salt: Option<Salt>| {
        // A prompt of less than a page: what is found begins with a page that its answer fills.
        let asked = Request { salt, output: vec![8; 7], ..request(0..2, 9) };
        block_on(collect(&mut handle.submit(asked).unwrap())).2
    };
    let salts = [Some(Salt::of("tea")), Some(Salt::of("coffee")), None];
    assert_eq!(salts.map(ask), [0; 3]);
    assert_eq!(salts.map(ask), [2; 3], "all of the prompt");
}

#[test]
fn without_prefix_caching_nothing_is_found_or_kept() {
    for start in STARTS {
        let (handle, control) = start(EngineConfig { prefix_caching: false, ..config() });
        let ask = |_| {
            let before = control.computed.load(Ordering::Relaxed);
            let cached = block_on(collect(&mut handle.submit(request(0..22, 3)).unwrap())).2;
            (cached, control.computed.load(Ordering::Relaxed) - before)
        };
        assert_eq!([(); 2].map(ask), [(0, 24); 2]);
        block_on(handle.drain());
        assert_eq!(handle.snapshot().pages_free, 64);
    }
}

#[test]
fn equal_prompts_at_once_are_computed_once() {
    let (handle, control) = start(config());
    control.close();
    let mut generations: Vec<_> = (0..8).map(|_| handle.submit(request(0..41, 1)).unwrap()).collect();
    control.open();
    block_on(join_all(generations.iter_mut().map(collect)));
    assert_eq!(control.computed.load(Ordering::Relaxed), 41 + 7);
}

#[test]
fn a_reader_that_leaves_frees_its_pages_within_a_step() {
    let (handle, control) = start(config());
    control.close();
    let mut stays = handle.submit(request(0..5, 100)).unwrap();
    let leaves = handle.submit(request(500..540, 80)).unwrap();
    for _ in 0..5 {
        control.let_one();
        control.wait_until_held();
    }
    assert_eq!(handle.snapshot().running, 2);
    drop(leaves);
    // The step under way had begun before; the next one is without the one that left.
    control.let_one();
    control.wait_until_held();
    assert_eq!(handle.snapshot().running, 1);
    assert!(handle.snapshot().pages_owned <= 105_usize.div_ceil(BLOCK));
    control.open();
    assert_eq!(block_on(collect(&mut stays)).1, FinishReason::Length);
    block_on(handle.drain());
    assert_eq!(handle.snapshot().pages_owned, 0);
}

#[test]
fn one_that_waits_can_leave_too() {
    for start in STARTS {
        let (handle, control) = start(EngineConfig { max_num_seqs: 1, ..config() });
        control.close();
        let mut first = handle.submit(request(0..5, 3)).unwrap();
        control.wait_until_held();
        let second = handle.submit(request(0..5, 3)).unwrap();
        let mut third = handle.submit(request(0..5, 3)).unwrap();
        drop(second);
        control.open();
        assert_eq!(block_on(collect(&mut first)).1, FinishReason::Length);
        assert_eq!(block_on(collect(&mut third)).1, FinishReason::Length);
        block_on(handle.drain());
        assert_eq!(control.computed.load(Ordering::Relaxed), 7 + 3);
    }
}

#[test]
fn more_requests_than_may_wait_are_refused() {
    let (handle, control) = start(EngineConfig { max_num_seqs: 2, max_waiting_requests: 3, ..config() });
    control.close();
    let _one = handle.submit(request(0..5, 3)).unwrap();
    control.wait_until_held();
    assert_eq!(handle.check_place(), Ok(()));
    let rest: Vec<_> = (0..4).map(|_| handle.submit(request(0..5, 3)).unwrap()).collect();
    let refused = handle.submit(request(0..5, 3)).err();
    assert!(matches!(refused, Some(SubmitError::QueueFull { .. })));
    assert_eq!(handle.check_place().err(), refused, "nor need it be prepared");
    control.open();
    drop(rest);
    // Places are free again once the engine has looked.
    let mut accepted = None;
    wait_until(|| {
        accepted = handle.submit(request(0..5, 3)).ok();
        accepted.is_some()
    });
    let mut accepted = accepted.unwrap();
    assert_eq!(block_on(collect(&mut accepted)).1, FinishReason::Length);
}

#[test]
fn limits_that_contradict_each_other_are_refused() {
    let start = |config: EngineConfig| {
        Engine::start(FakeRunner::new(1, 1, Arc::default()), config, Metrics::new().engine).map(|_| ()).unwrap_err()
    };
    let blocks = start(EngineConfig { blocks: 31, ..config() });
    assert_eq!(blocks, ConfigError::Pages { blocks: 31, block_size: BLOCK, max_model_len: 128 });
    let budget = start(EngineConfig { max_num_batched_tokens: 7, ..config() });
    assert_eq!(budget, ConfigError::Budget { tokens: 7, seqs: 8 });
    assert_eq!(start(EngineConfig { max_num_seqs: 0, ..config() }), ConfigError::Zero { name: "--max-num-seqs" });
}

#[test]
fn sixty_four_requests_at_once_with_some_leaving_get_their_own_answers() {
    for start in STARTS {
        let (handle, _) = start(EngineConfig { blocks: 40, ..config() });
        let clients: Vec<_> = (0..64u32)
            .map(|client| {
                let handle = handle.clone();
                std::thread::spawn(move || {
                    for round in 0..4 {
                        let number = client * 7 + round * 13;
                        let prompt = (0..number % 50 + 1).map(|i| if i < 20 { i } else { i * number % 1000 });
                        let mut asked = request(prompt, number % 40 + 1);
                        asked.sampling.seed = u64::from(number);
                        let mut generation = handle.submit(asked.clone()).unwrap();
                        if number.is_multiple_of(3) {
                            for _ in 0..number % 10 {
                                block_on(generation.next());
                            }
                            continue;
                        }
                        let (events, reason, _) = block_on(collect(&mut generation));
                        assert_eq!((events, reason), model_answer(&asked, 128));
                    }
                })
            })
            .collect();
        clients.into_iter().for_each(|client| client.join().unwrap());
        block_on(handle.drain());
        let snapshot = handle.snapshot();
        assert_eq!((snapshot.running, snapshot.waiting, snapshot.pages_owned), (0, 0, 0));
        assert_eq!(snapshot.pages_free + snapshot.pages_cached, 40);
    }
}

fn any_request() -> impl Strategy<Value = Request> {
    let lengths = (0..30u32, 1..30u32, 1..40u32, 0..10u32);
    let wishes = (prop::option::of(0..4u32), prop::option::weighted(0.2, 0..4u32), any::<bool>(), any::<u64>());
    (lengths, wishes).prop_map(|((common, own, max_tokens, min_tokens), (logprobs, prompt_logprobs, stops, seed))| {
        let mut wanted = request((0..common).chain((0..own).map(|i| (i * 37 + seed as u32 % 100) % 1000)), max_tokens);
        wanted.sampling.seed = seed;
        // Some take knowing what was drawn before.
        match seed % 12 {
            0 => wanted.sampling.presence_penalty = 1.0,
            1 => wanted.sampling.frequency_penalty = 1.0,
            2 => wanted.sampling.repetition_penalty = 1.5,
            _ => {}
        }
        wanted.min_tokens = min_tokens;
        wanted.stop_token_ids = if stops { (0..200).collect() } else { Vec::new() };
        (wanted.logprobs, wanted.prompt_logprobs) = (logprobs, prompt_logprobs);
        wanted
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, max_shrink_time: 60_000, ..ProptestConfig::default() })]

    #[test]
    fn answers_do_not_depend_on_the_company_the_chunks_or_the_pages(
        requests in prop::collection::vec(any_request(), 1..24),
        max_num_seqs in 1..9usize,
        spare_tokens in 0..60usize,
        spare_pages in 0..40usize,
        block_size in 1..9usize,
        prefix_caching in prop::bool::weighted(0.8),
        start in prop::sample::select(STARTS.to_vec()),
    ) {
        let (handle, _) = start(EngineConfig {
            max_num_seqs,
            prefix_caching,
            max_num_batched_tokens: max_num_seqs + spare_tokens,
            block_size,
            blocks: 128_usize.div_ceil(block_size) + spare_pages,
            ..config()
        });
        assert_answers(&handle, &requests);
        block_on(handle.drain());
        prop_assert_eq!(handle.snapshot().pages_owned, 0);
    }
}

#[test]
fn the_step_under_way_is_known_and_while_there_is_nothing_to_compute_none_is() {
    for start in STARTS {
        let (handle, control) = start(config());
        assert_eq!(handle.step_under_way(), None);
        control.close();
        let mut generation = handle.submit(request([1, 2, 3], 3)).unwrap();
        control.wait_until_held();
        let first = handle.step_under_way().expect("one is held back");
        control.let_one();
        control.wait_until_held();
        assert!(handle.step_under_way().expect("another is") > first);
        control.open();
        block_on(collect(&mut generation));
        wait_until(|| handle.step_under_way().is_none());
    }
}
