//! Answers that were begun elsewhere.

use engine_kernels::SamplingParams;

use super::{config, fake::VOCAB_SIZE, waiting::block_on};
use crate::engine::*;

const MODEL_LEN: usize = 96;

fn start() -> EngineHandle {
    super::start(EngineConfig { max_num_batched_tokens: 16, max_model_len: MODEL_LEN, blocks: 48, ..config() }).0
}

fn request(prompt: u32, max_tokens: u32) -> Request {
    let sampling = SamplingParams { seed: 7, ..SamplingParams::default() };
    Request { sampling, logprobs: Some(1), ..super::request(0..prompt, max_tokens) }
}

fn answer(handle: &EngineHandle, request: &Request) -> (Vec<TokenOutput>, FinishReason) {
    let mut generation = handle.submit(request.clone()).unwrap();
    let mut tokens = Vec::new();
    loop {
        match block_on(generation.next()).unwrap() {
            Event::Token(token) => tokens.push(token),
            Event::Prompt(token) => panic!("{token:?} was not asked for"),
            Event::Finished { reason, .. } => return (tokens, reason),
        }
    }
}

#[test]
fn an_answer_cut_anywhere_goes_on_as_if_it_had_not_been() {
    for (prompt, max_tokens, stops) in [(1, 30, false), (9, 25, true), (70, 200, false)] {
        let mut whole = request(prompt, max_tokens);
        let first = start();
        if stops {
            let (tokens, _) = answer(&first, &whole);
            whole.stop_token_ids = vec![tokens[17].token, tokens[3].token];
            whole.min_tokens = 8;
        }
        let (expected, reason) = answer(&first, &whole);
        // The others have nothing in their cache, or what the cuts before left there.
        let second = start();
        for cut in 1..expected.len() {
            let output = expected[..cut].iter().map(|token| token.token).collect();
            let rest = Request { output, ..whole.clone() };
            assert_eq!(answer(&second, &rest), (expected[cut..].to_vec(), reason), "cut after {cut}");
        }
    }
}

#[test]
fn an_answer_that_is_complete_cannot_be_continued() {
    let handle = start();
    let submit = |output: Vec<u32>, max_tokens| {
        handle.submit(Request { output, ..request(MODEL_LEN as u32 - 6, max_tokens) }).map(|_| ())
    };
    assert_eq!(submit(vec![1; 4], 4), Err(SubmitError::NothingLeft { tokens: 4 }));
    assert_eq!(submit(vec![1; 6], 100), Err(SubmitError::NothingLeft { tokens: 6 }));
    let unknown = VOCAB_SIZE as u32;
    assert_eq!(submit(vec![unknown], 4), Err(SubmitError::UnknownToken { token: unknown, vocab_size: VOCAB_SIZE }));
}
