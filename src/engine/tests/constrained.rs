//! Answers with grammars, beside others, on runners that wait for each step and on those that run ahead.

use std::sync::atomic::Ordering;

use super::{STARTS, assert_answers, collect, config, fake::VOCAB_SIZE, request, waiting::block_on};
use crate::{
    engine::*,
    grammar::{Grammar, Source, Vocabulary},
};

/// Ends an answer.
const END: u32 = VOCAB_SIZE as u32 - 1;

/// Bytes, and pairs of letters.
fn vocabulary() -> Vocabulary {
    let letters = || (b'a'..=b'z').chain(*b" ,");
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    tokens.extend(letters().flat_map(|first| letters().map(move |second| vec![first, second])).take(700));
    tokens.resize(VOCAB_SIZE, Vec::new());
    Vocabulary::of_tokens(tokens, &[END]).unwrap()
}

fn compiled(regex: &str) -> Grammar {
    vocabulary().compile(Source::Regex(regex.to_owned())).unwrap()
}

/// A request that ends with the token that ends answers.
fn with_grammar(seed: u64, regex: &str, max_tokens: u32) -> Request {
    let mut request = request([7, seed as u32], max_tokens);
    request.sampling.seed = seed;
    request.stop_token_ids = vec![END];
    request.grammar = Some(compiled(regex).matcher());
    request
}

#[test]
fn answers_follow_their_grammars_beside_others_that_have_none() {
    for start in STARTS {
        let (handle, _) = start(config());
        let mut requests = vec![request([1], 40), request(0..90, 20)];
        for seed in 0..6 {
            requests.push(with_grammar(seed, "[a-f]{3}, [0-9]{2,5}", 60));
            // It may end after every word, and never has to.
            requests.push(with_grammar(seed, "([a-z]{1,4} )+", 12));
            requests.push(Request { logprobs: Some(2), ..with_grammar(seed, "[a-z, ]{9}", 30) });
        }
        requests.push(Request { prompt: (0..60).collect(), ..with_grammar(9, "[ab]{30}", 60) });
        requests.push(Request { prompt_logprobs: Some(1), ..with_grammar(10, "[ab]{8}", 60) });
        assert_answers(&handle, &requests);
        assert_eq!(handle.status(), EngineStatus::Running);
    }
}

#[test]
fn steps_are_launched_before_the_tokens_are_known_that_their_grammars_wait_for() {
    let (handle, control) = super::start_ahead(config());
    let requests = [with_grammar(1, "[ab]{20}", 60), with_grammar(2, "[ab]{30}", 60), request([1], 5)];
    assert_answers(&handle, &requests);
    block_on(handle.drain());
    // Each step of the longest answer but the first, and one for nobody behind its last token, at least.
    let longest = requests.iter().map(|request| super::model_answer(request, 128).0.len()).max().unwrap();
    assert!(longest > 10 && control.ahead.load(Ordering::Relaxed) >= longest);
    assert_eq!(handle.snapshot().pages_owned, 0);
}

#[test]
fn an_answer_ends_where_nothing_can_be_drawn() {
    for start in STARTS {
        let (handle, _) = start(config());
        let optional = with_grammar(1, "a?", 20);
        // Nothing at all can be drawn where the end is ignored, or not to come yet.
        let nothing = Request { min_tokens: 3, ..with_grammar(2, "", 20) };
        let ignoring = Request { stop_token_ids: Vec::new(), ..with_grammar(3, "[ab]{1,3}", 20) };
        let more_than_there_is = Request { min_tokens: 10, ..with_grammar(4, "[ab]{2,3}", 20) };
        let requests = [optional, nothing.clone(), ignoring.clone(), more_than_there_is.clone(), request([3], 30)];
        assert_answers(&handle, &requests);
        let answer = |request: &Request| {
            let (events, reason, _) = block_on(collect(&mut handle.submit(request.clone()).unwrap()));
            assert_eq!(reason, FinishReason::Stop);
            events.len()
        };
        assert_eq!(answer(&nothing), 0);
        assert!((1..=3).contains(&answer(&ignoring)) && (2..=3).contains(&answer(&more_than_there_is)));
    }
}

#[test]
fn preempted_answers_go_on_in_their_grammars() {
    for start in STARTS {
        let (handle, _) = start(EngineConfig { blocks: 32, ..config() });
        let requests: Vec<Request> = (0..8).map(|seed| with_grammar(seed, "([a-z]{1,3} ){40}", 60)).collect();
        assert_answers(&handle, &requests);
    }
}

#[test]
fn an_answer_begun_elsewhere_goes_on_in_its_grammar() {
    for start in STARTS {
        let (handle, _) = start(config());
        let whole = with_grammar(5, "([a-z]{1,3} ){8}", 60);
        let tokens_of = |request: &Request| -> Vec<u32> {
            let (events, reason, _) = block_on(collect(&mut handle.submit(request.clone()).unwrap()));
            assert_eq!(reason, FinishReason::Stop);
            let token = |event| if let Event::Token(output) = event { output.token } else { panic!("{event:?}") };
            events.into_iter().map(token).collect()
        };
        let tokens = tokens_of(&whole);
        for cut in 1..tokens.len() {
            let mut rest = Request { output: tokens[..cut].to_vec(), ..whole.clone() };
            let matcher = rest.grammar.as_mut().unwrap();
            tokens[..cut].iter().for_each(|&token| matcher.take(token).unwrap());
            assert_eq!(tokens_of(&rest), tokens[cut..], "cut after {cut}");
        }
    }
}

#[test]
fn a_grammar_that_becomes_too_much_to_follow_ends_its_request_and_no_other() {
    for start in STARTS {
        let (handle, _) = start(config());
        // Whether a letter is the one that counts is known 14 letters later: as many states as there are beginnings.
        let hard = vocabulary().with_lexer_states(60).compile(Source::Regex("[ab]*a[ab]{14}c".to_owned())).unwrap();
        let lost = Request { grammar: Some(hard.matcher()), ..with_grammar(1, "a", 100) };
        let mut lost = handle.submit(lost).unwrap();
        assert_answers(&handle, &[request([1], 30), with_grammar(2, "[ab]{20}", 40)]);
        let (events, reason, _) = block_on(collect(&mut lost));
        assert_eq!(reason, FinishReason::LostTrack, "after {} tokens", events.len());
    }
}
