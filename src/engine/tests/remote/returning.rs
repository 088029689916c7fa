//! Prompts that come back from elsewhere at a bad moment.

use super::*;

#[test]
fn one_that_leaves_the_moment_its_prompt_comes_back_frees_its_pages() {
    // The word is seen at the last look before the engine hears that nobody waits any more, at the first after it, or
    // later.
    for early_looks in 0..4 {
        let decode = decode(config(), 16);
        let generation = decode.handle.submit(request(0..70, 9)).unwrap();
        let grant = decode.claim(decode.next_job());
        // The engine is busy with another request while both happen.
        decode.control.close();
        let asked = request(200..210, 20);
        let mut other = decode.handle.submit(asked.clone()).unwrap();
        decode.control.wait_until_held();
        decode.wires.early_looks.store(early_looks, Ordering::Release);
        decode.ends(&grant, Status::Done);
        drop(generation);
        decode.control.open();
        let (events, reason, _) = block_on(collect(&mut other));
        assert_eq!((events, reason), model_answer(&asked, 128));
        block_on(decode.handle.drain());
        decode.wait_until(|snapshot| snapshot.pages_lent + snapshot.pages_quarantined + snapshot.pages_owned == 0);
    }
}

#[test]
fn a_prompt_that_comes_back_when_no_page_is_left_takes_its_place_all_the_same() {
    // Eighteen pages are lent for the first; the second takes what is left of 32 and then waits for more.
    let decode = decode(EngineConfig { blocks: 32, ..config() }, 40);
    let (prefill, control) = start(config());
    let asked = [request(0..72, 30), request(200..216, 100)];
    let mut first = decode.handle.submit(asked[0].clone()).unwrap();
    let job = decode.next_job();
    let mut second = decode.handle.submit(asked[1].clone()).unwrap();
    decode.wait_until(|snapshot| (snapshot.pages_lent, snapshot.pages_owned, snapshot.pages_free) == (18, 14, 0));
    serve(&decode, job, &prefill, &control);
    for (asked, generation) in asked.iter().zip([&mut first, &mut second]) {
        let (events, reason, _) = block_on(collect(generation));
        assert_eq!((events, reason), model_answer(asked, 128));
    }
    assert_eq!(decode.metrics.prefills_remote.get(), 1);
    // The younger one had to make room.
    assert!(decode.metrics.preemptions.get() > 0);
    block_on(decode.handle.drain());
    let snapshot = decode.handle.snapshot();
    assert_eq!((snapshot.pages_owned, snapshot.pages_lent, snapshot.pages_quarantined), (0, 0, 0));
}

#[test]
fn pages_of_a_prompt_that_nobody_has_claimed_go_to_those_that_came_before() {
    let lending =
        LendingConfig { timeouts: LenderTimeouts { unclaimed: 1000 * MINUTE, ..PATIENT.timeouts }, ..PATIENT };
    let decode = decode_with(EngineConfig { blocks: 12, max_model_len: 48, ..config() }, 8, lending);
    let (older, younger) = (request(0..5, 43), request(100..120, 3));
    let expected = [model_answer(&older, 48), model_answer(&younger, 48)];
    // Both are there before the older one has more pages.
    decode.control.close();
    let [mut older, mut younger] = [older, younger].map(|request| decode.handle.submit(request).unwrap());
    decode.control.open();
    let handoff = decode.next_job();
    // The older one needs all of the pages in the end.
    let (events, reason, _) = block_on(collect(&mut older));
    assert_eq!((events, reason), expected[0]);
    decode.says(ToDecode::Claim { handoff });
    assert!(matches!(decode.hears(), ToPrefill::Gone { .. }));
    // Now that there is room for it, it leaves once more.
    let (prefill, control) = start(config());
    serve(&decode, decode.next_job(), &prefill, &control);
    let (events, reason, _) = block_on(collect(&mut younger));
    assert_eq!((events, reason), expected[1]);
}
