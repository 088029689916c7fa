//! Steps that are launched before the one before them is done, some of them in vain.

use std::{
    future::Future,
    sync::{Arc, Mutex, atomic::Ordering},
    task::{Context, Wake, Waker},
};

use futures::FutureExt;

use super::{
    assert_answers, collect, config,
    fake::Control,
    model_answer, request, start_ahead,
    waiting::{block_on, wait_until},
};
use crate::engine::*;

/// Tokens computed, when there are as many at least: the step for nobody is computed when the readers are gone.
fn computed(control: &Control, least: usize) -> usize {
    wait_until(|| control.computed.load(Ordering::Relaxed) >= least);
    control.computed.load(Ordering::Relaxed)
}

#[test]
fn a_step_that_runs_ahead_is_not_waited_for_and_one_more_is_for_nobody() {
    let (handle, control) = start_ahead(config());
    let mut two = vec![request(0..5, 6), request(10..15, 6)];
    // The first ends with its third token, which only that one tells.
    let Event::Token(third) = &model_answer(&two[0], 128).0[2] else { panic!() };
    two[0].stop_token_ids.push(third.token);
    assert_eq!(model_answer(&two[0], 128).0.len(), 3);
    assert_answers(&handle, &two);
    block_on(handle.drain());
    // It takes part in one step more; how many tokens follow the other's last is known before.
    assert_eq!(computed(&control, (5 + 2 + 1) + (5 + 5)), (5 + 2 + 1) + (5 + 5));
    assert_eq!(handle.snapshot().pages_owned, 0);
}

#[test]
fn steps_run_ahead_again_once_a_prompt_is_scored() {
    let (handle, control) = start_ahead(config());
    let mut scored = Request { prompt_logprobs: Some(0), ..request(0..5, 6) };
    let answer = model_answer(&scored, 128).0;
    let Event::Token(third) = &answer[5 + 2] else { panic!() };
    scored.stop_token_ids.push(third.token);
    assert_answers(&handle, &[scored]);
    block_on(handle.drain());
    // As without, one step more than its tokens take.
    assert_eq!(computed(&control, 5 + 2 + 1), 5 + 2 + 1);
}

/// Submits a request, on the engine thread, as soon as the reader of another is woken.
struct Follower {
    handle: EngineHandle,
    request: Mutex<Option<Request>>,
    submitted: Mutex<Option<Generation>>,
}

impl Wake for Follower {
    fn wake(self: Arc<Self>) {
        if let Some(request) = self.request.lock().unwrap().take() {
            *self.submitted.lock().unwrap() = Some(self.handle.submit(request).unwrap());
        }
    }
}

#[test]
fn what_was_computed_in_vain_for_one_is_not_taken_for_another_s_in_its_place() {
    let (handle, control) = start_ahead(config());
    let mut ends = request(0..5, 9);
    let Event::Token(third) = &model_answer(&ends, 128).0[2] else { panic!() };
    ends.stop_token_ids.push(third.token);
    let others = [request(100..105, 30), request(40..47, 9)];
    control.close();
    let mut stays = handle.submit(others[0].clone()).unwrap();
    let mut leaves = handle.submit(ends.clone()).unwrap();
    let mut events = Vec::new();
    while events.len() < 2 {
        control.let_one();
        control.wait_until_held();
        events.extend(std::iter::from_fn(|| leaves.next().now_or_never().flatten()));
    }
    // The next step ends the answer, and the one behind it, in which it takes part in vain, is launched when its slot
    // goes to the one that follows.
    let (request, submitted) = (Mutex::new(Some(others[1].clone())), Mutex::new(None));
    let follower = Arc::new(Follower { handle: handle.clone(), request, submitted });
    let waker = Waker::from(follower.clone());
    let pending = std::pin::pin!(leaves.next()).poll(&mut Context::from_waker(&waker)).is_pending();
    assert!(pending, "two steps gave three tokens");
    control.open();
    let mut follows = None;
    wait_until(|| {
        follows = follower.submitted.lock().unwrap().take();
        follows.is_some()
    });
    let mut follows = follows.unwrap();
    let (rest, reason, _) = block_on(collect(&mut leaves));
    events.extend(rest);
    assert_eq!((events, reason), model_answer(&ends, 128));
    for (generation, request) in [(&mut stays, &others[0]), (&mut follows, &others[1])] {
        let (events, reason, _) = block_on(collect(generation));
        assert_eq!((events, reason), model_answer(request, 128));
    }
    block_on(handle.drain());
    assert_eq!(handle.snapshot().pages_owned, 0);
}

#[test]
fn a_step_for_nobody_is_finished_too_and_then_the_engine_sleeps() {
    let (handle, control) = start_ahead(config());
    let mut ends = request(0..5, 9);
    let Event::Token(third) = &model_answer(&ends, 128).0[2] else { panic!() };
    ends.stop_token_ids.push(third.token);
    assert_answers(&handle, &[ends]);
    computed(&control, 5 + 2 + 1);
    assert_answers(&handle, &[request(0..5, 2)]);
}
