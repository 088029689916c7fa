//! Pages that an adapter writes to a device's memory, where they are not before somebody waits for that.

use super::*;

/// Does a job, with pages that are on the way to the device when the word is there.
fn serve_by_adapter(decode: &Decode, prefill: &EngineHandle, control: &Arc<Control>) {
    let there = Arc::new(Control::default());
    *there.cache.lock().unwrap() = decode.control.cache.lock().unwrap().clone();
    let grant = compute(decode.claim(decode.next_job()), prefill, control, &there);
    let cache = there.cache.lock().unwrap();
    let written = |&page: &u32| (page, cache[page as usize * BLOCK..][..BLOCK].try_into().unwrap());
    decode.wires.on_the_way.lock().unwrap().extend(grant.pages.iter().map(written));
    decode.ends(&grant, Status::Done);
}

fn writing_by_adapter() -> Decode {
    let decode = decode(config(), 16);
    decode.wires.by_adapter.store(true, Ordering::Relaxed);
    decode
}

#[test]
fn what_an_adapter_wrote_is_waited_for_before_the_prompt_goes_on() {
    let decode = writing_by_adapter();
    let (prefill, control) = start(config());
    let asked = request(0..70, 9);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    serve_by_adapter(&decode, &prefill, &control);
    let (events, reason, _) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    assert_eq!((decode.metrics.prefills_remote.get(), decode.metrics.prefills_local.get()), (1, 0));
}

#[test]
fn what_an_adapter_wrote_for_nobody_is_waited_for_before_its_pages_are_free() {
    let decode = writing_by_adapter();
    let asked = request(0..70, 9);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    let grant = decode.claim(decode.next_job());
    decode.post.lender(LenderEvent::SessionClosed { session: SESSION });
    let (events, reason, _) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    decode.wires.on_the_way.lock().unwrap().extend(grant.pages.iter().map(|&page| (page, [0xBAD; BLOCK])));
    decode.post.lender(LenderEvent::SessionFenced { session: SESSION });
    decode.wait_until(|snapshot| snapshot.pages_quarantined == 0);
    assert!(decode.wires.on_the_way.lock().unwrap().is_empty(), "it would land in pages of somebody else");
}

/// A prompt's loan, with pages on their way that nobody will be able to wait for.
fn lose_pages(decode: &Decode) -> Grant {
    let grant = decode.claim(decode.next_job());
    decode.wires.on_the_way.lock().unwrap().extend(grant.pages.iter().map(|&page| (page, [0xBAD; BLOCK])));
    decode.wires.flush_fails.store(true, Ordering::Relaxed);
    grant
}

fn has_ended(decode: &Decode) {
    let EngineStatus::Failed { reason } = block_on(decode.handle.stopped()) else { panic!("it goes on") };
    assert!(reason.contains("adapters wrote to its memory"), "{reason}");
    assert!(!decode.wires.on_the_way.lock().unwrap().is_empty());
}

#[test]
fn an_engine_ends_before_it_computes_in_pages_that_cannot_be_waited_for() {
    for status in [Status::Done, Status::Failed] {
        let decode = writing_by_adapter();
        let mut generation = decode.handle.submit(request(0..70, 9)).unwrap();
        decode.ends(&lose_pages(&decode), status);
        let (events, reason, _) = block_on(collect(&mut generation));
        assert_eq!((events.len(), reason), (0, FinishReason::Aborted), "{status:?}");
        has_ended(&decode);
        assert_eq!((decode.metrics.prefills_remote.get(), decode.metrics.prefills_local.get()), (0, 0));
    }
}

#[test]
fn an_engine_ends_whose_pages_cannot_be_waited_for_though_nobody_wants_them() {
    let decode = writing_by_adapter();
    let asked = request(0..70, 9);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    lose_pages(&decode);
    decode.post.lender(LenderEvent::SessionClosed { session: SESSION });
    let (events, reason, _) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    decode.post.lender(LenderEvent::SessionFenced { session: SESSION });
    has_ended(&decode);
}
