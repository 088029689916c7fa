//! Two engine threads with made-up models, one prefilling for the other, and a test between them that plays the
//! network.

mod adapters;
mod quiet;
mod returning;
mod support;

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
    mpsc::{RecvTimeoutError, channel},
};

use futures::future::{join, join_all};
use proptest::prelude::*;

use self::support::*;
use super::{
    BLOCK, STARTS, any_request, collect, config,
    fake::{Control, FakeRunner},
    model_answer, request, start,
    waiting::{MINUTE, block_on, wait_until},
};
use crate::{
    cache::Salt,
    engine::*,
    handoff::{
        Epoch, Grant, HandoffId, LenderEvent, LenderTimeouts, MailboxSlot, MailboxWord, Status, ToDecode, ToPrefill,
    },
    telemetry::TraceContext,
};

#[test]
fn a_prompt_prefilled_elsewhere_gets_the_same_answer() {
    let decode = decode(config(), 16);
    let (prefill, control) = start(config());
    let asked = request(0..70, 9);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    serve(&decode, decode.next_job(), &prefill, &control);
    let (events, reason, cached) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    assert_eq!(cached, 0, "what another worker computed was not found in the cache");
    assert_eq!(control.computed.load(Ordering::Relaxed), 69);
    assert_eq!(decode.control.computed.load(Ordering::Relaxed), 9);
    assert_eq!((decode.metrics.prefills_remote.get(), decode.metrics.prefills_local.get()), (1, 0));
    // Now it is in both caches: a longer prompt lends what is missing only, and little of it is computed.
    let asked = request(0..100, 3);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    serve(&decode, decode.next_job(), &prefill, &control);
    let (events, reason, cached) = block_on(collect(&mut generation));
    assert_eq!((events, reason, cached), (model_answer(&asked, 128).0, FinishReason::Length, 68));
    assert_eq!(control.computed.load(Ordering::Relaxed), 69 + 99 - 68);
    block_on(decode.handle.drain());
    let snapshot = decode.handle.snapshot();
    assert_eq!((snapshot.pages_owned, snapshot.pages_lent, snapshot.pages_quarantined), (0, 0, 0));
    // The handle was dropped, which the engine thread has yet to hear.
    wait_until(|| prefill.snapshot().pages_owned == 0);
}

#[test]
fn a_prefill_worker_keeps_prompts_apart_by_the_salts_that_it_is_told_of_whoever_asks() {
    let decodes = [decode(config(), 16), decode(config(), 16)];
    let (prefill, control) = start(config());
    let ask = |decode: &Decode, salt: Option<Salt>| {
        let asked = Request { salt, ..request(0..70, 9) };
        let before = control.computed.load(Ordering::Relaxed);
        let mut generation = decode.handle.submit(asked.clone()).unwrap();
        serve(decode, decode.next_job(), &prefill, &control);
        let (events, reason, cached) = block_on(collect(&mut generation));
        assert_eq!((events, reason, cached), (model_answer(&asked, 128).0, FinishReason::Length, 0));
        control.computed.load(Ordering::Relaxed) - before
    };
    let salts = [Some(Salt::of("tea")), Some(Salt::of("coffee")), None];
    assert_eq!(salts.map(|salt| ask(&decodes[0], salt)), [69; 3]);
    // Of those that it has seen it lacks the last page, which is not full.
    assert_eq!(salts.map(|salt| ask(&decodes[1], salt)), [1; 3]);
}

#[test]
fn without_prefix_caching_no_worker_keeps_what_one_computed_for_another() {
    let config = EngineConfig { prefix_caching: false, ..config() };
    let decode = decode(config.clone(), 16);
    let (prefill, control) = start(config);
    let salt = Some(Salt::of("tea"));
    for round in 1..=2 {
        let asked = Request { salt, ..request(0..70, 9) };
        let mut generation = decode.handle.submit(asked.clone()).unwrap();
        let grant = decode.claim(decode.next_job());
        assert_eq!((grant.first, grant.salt), (0, salt), "others may keep what they compute");
        serve_granted(&decode, grant, &prefill, &control);
        let (events, reason, cached) = block_on(collect(&mut generation));
        assert_eq!((events, reason, cached), (model_answer(&asked, 128).0, FinishReason::Length, 0));
        assert_eq!(control.computed.load(Ordering::Relaxed), 69 * round);
    }
    decode.wait_until(|snapshot| snapshot.pages_free == 64);
    wait_until(|| prefill.snapshot().pages_free == 64);
}

#[test]
fn who_decides_hears_what_prompts_take_here_and_what_handoffs_took() {
    let decode = decode(config(), 16);
    let (prefill, control) = start(config());
    // Too short to leave, and before anything was measured.
    block_on(collect(&mut decode.handle.submit(request(200..216, 1)).unwrap()));
    assert_eq!(*decode.wires.forecast.lock().unwrap(), None);
    let mut generation = decode.handle.submit(request(0..70, 1)).unwrap();
    let handoff = decode.next_job();
    let forecast = decode.wires.forecast.lock().unwrap().expect("a prompt was computed here before");
    assert_eq!(forecast.gap, None, "nobody generates");
    serve(&decode, handoff, &prefill, &control);
    block_on(collect(&mut generation));
    assert_eq!(*decode.wires.handed_off.lock().unwrap(), [(JOBS_AHEAD, 69)], "all but the last token");
    // Of one that is lost nothing was learned.
    let mut generation = decode.handle.submit(request(300..370, 1)).unwrap();
    let grant = decode.claim(decode.next_job());
    decode.ends(&grant, Status::Failed);
    block_on(collect(&mut generation));
    assert_eq!(decode.wires.handed_off.lock().unwrap().len(), 1);
}

#[test]
fn a_full_prefix_hit_is_not_handed_off() {
    // Nothing is too short for this port, and a job for nothing would be taken back for want of somebody who claims it.
    let soon = std::time::Duration::from_millis(1);
    let timeouts = LenderTimeouts { unclaimed: soon, silent: soon, stalled: MINUTE, release: soon };
    let decode = decode_with(config(), 0, LendingConfig { mailbox_slots: 1, timeouts });
    decode.wires.open.store(false, Ordering::Relaxed);
    block_on(collect(&mut decode.handle.submit(request(0..69, 1)).unwrap()));
    decode.wires.open.store(true, Ordering::Relaxed);
    let (_, _, cached) = block_on(collect(&mut decode.handle.submit(request(0..69, 1)).unwrap()));
    assert_eq!(cached, 68);
    assert!(decode.jobs.lock().unwrap().try_recv().is_err());
}

#[test]
fn a_worker_that_fails_costs_the_answer_nothing() {
    let decode = decode(config(), 16);
    let asked = request(0..70, 9);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    let grant = decode.claim(decode.next_job());
    decode.ends(&grant, Status::Failed);
    let (events, reason, _) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    assert_eq!((decode.metrics.prefills_remote.get(), decode.metrics.prefills_local.get()), (0, 1));
    block_on(decode.handle.drain());
    assert_eq!(decode.handle.snapshot().pages_lent, 0);
}

#[test]
fn a_worker_that_vanishes_keeps_its_pages_until_it_is_fenced() {
    let decode = decode(config(), 16);
    let asked = request(0..70, 9);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    let grant = decode.claim(decode.next_job());
    decode.post.lender(LenderEvent::SessionClosed { session: SESSION });
    // The answer does not wait for the fence, and what is written late changes nothing.
    let mut cache = decode.control.cache.lock().unwrap();
    for &page in &grant.pages {
        cache[page as usize * BLOCK..][..BLOCK].fill(0xBAD);
    }
    drop(cache);
    let (events, reason, _) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    assert_eq!(decode.handle.snapshot().pages_quarantined, grant.pages.len());
    decode.ends(&grant, Status::Done);
    decode.wait_until(|snapshot| snapshot.pages_quarantined == 0);
}

#[test]
fn a_lost_handoff_is_followed_by_another_on_other_pages_and_too_many_by_none() {
    let decode = decode(config(), 16);
    decode.wires.handoffs_max.store(2, Ordering::Relaxed);
    let trace: TraceContext = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".parse().unwrap();
    let asked = Request { trace: Some(trace), ..request(0..70, 9) };
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    let first = decode.claim(decode.next_job());
    decode.post.lender(LenderEvent::WorkerGone { worker: WORKER });
    assert!(matches!(decode.hears(), ToPrefill::Release { .. }));
    let second = decode.claim(decode.next_job());
    assert!(first.pages.iter().all(|page| !second.pages.contains(page)), "pages in quarantine were lent again");
    assert_eq!(*decode.wires.traced.lock().unwrap(), Some(trace));
    decode.ends(&second, Status::Failed);
    let (events, reason, _) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    assert_eq!((decode.metrics.prefills_remote.get(), decode.metrics.prefills_local.get()), (0, 1));
    decode.ends(&first, Status::Failed);
    decode.wait_until(|snapshot| snapshot.pages_quarantined == 0);
}

#[test]
fn one_that_leaves_while_its_prompt_is_elsewhere_frees_its_pages_when_they_are_released() {
    let decode = decode(config(), 16);
    // Not claimed yet: the pages are free at once, and the claim is refused.
    let generation = decode.handle.submit(request(0..70, 9)).unwrap();
    let handoff = decode.next_job();
    // The job is on its way before the gauges tell of the loan.
    decode.wait_until(|snapshot| snapshot.pages_lent > 0);
    drop(generation);
    decode.wait_until(|snapshot| snapshot.pages_lent == 0 && snapshot.pages_quarantined == 0);
    decode.says(ToDecode::Claim { handoff });
    assert!(matches!(decode.hears(), ToPrefill::Gone { .. }));
    // Claimed: its holder is asked to stop.
    let generation = decode.handle.submit(request(0..70, 9)).unwrap();
    let Grant { handoff, epoch, pages, .. } = decode.claim(decode.next_job());
    drop(generation);
    let ToPrefill::Release { handoff: released, .. } = decode.hears() else { panic!() };
    assert_eq!(released, handoff);
    decode.wait_until(|snapshot| snapshot.pages_quarantined == pages.len());
    assert!(!decode.wires.permitted.lock().unwrap().is_empty());
    decode.says(ToDecode::Released { handoff, epoch });
    decode.wait_until(|snapshot| snapshot.pages_quarantined == 0);
    assert_eq!(decode.handle.snapshot().pages_free, 64);
    assert!(decode.wires.permitted.lock().unwrap().is_empty(), "pages are free that the transport would write to");
}

#[test]
fn a_job_that_nobody_takes_is_done_here() {
    let soon = std::time::Duration::from_millis(1);
    let timeouts = LenderTimeouts { unclaimed: soon, silent: soon, stalled: MINUTE, release: soon };
    let decode = decode_with(config(), 16, LendingConfig { mailbox_slots: 1, timeouts });
    let asked = [request(0..70, 9), request(200..260, 9)];
    let mut generations: Vec<_> = asked.iter().map(|asked| decode.handle.submit(asked.clone()).unwrap()).collect();
    for (asked, generation) in asked.iter().zip(&mut generations) {
        let (events, reason, _) = block_on(collect(generation));
        assert_eq!((events, reason), model_answer(asked, 128));
    }
    assert!(decode.wires.unclaimed.load(Ordering::Relaxed) > 0, "the port is told");
}

#[test]
fn a_job_that_nobody_is_left_to_take_is_done_here_at_once() {
    let decode = decode(config(), 16);
    let asked = request(0..70, 9);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    let handoff = decode.next_job();
    decode.post.no_prefill_workers();
    let (events, reason, _) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    // Somebody who comes after all finds nothing to do.
    decode.says(ToDecode::Claim { handoff });
    assert!(matches!(decode.hears(), ToPrefill::Gone { .. }));
}

#[test]
fn a_silent_worker_is_asked_then_fenced() {
    let soon = std::time::Duration::from_millis(1);
    let timeouts = LenderTimeouts { unclaimed: MINUTE, silent: soon, stalled: MINUTE, release: soon };
    let decode = decode_with(config(), 16, LendingConfig { mailbox_slots: 4, timeouts });
    let asked = request(0..70, 9);
    let mut generation = decode.handle.submit(asked.clone()).unwrap();
    let grant = decode.claim(decode.next_job());
    let (events, reason, _) = block_on(collect(&mut generation));
    assert_eq!((events, reason), model_answer(&asked, 128));
    assert!(matches!(decode.hears(), ToPrefill::Release { .. }));
    wait_until(|| decode.wires.fenced.load(Ordering::Relaxed));
    assert_eq!(decode.handle.snapshot().pages_quarantined, grant.pages.len(), "time alone frees nothing");
    decode.post.lender(LenderEvent::SessionClosed { session: SESSION });
    decode.post.lender(LenderEvent::SessionFenced { session: SESSION });
    decode.wait_until(|snapshot| snapshot.pages_quarantined == 0);
}

#[test]
fn pages_are_lent_to_who_measures_and_come_back_with_its_word() {
    let decode = decode(config(), 16);
    let blocks = decode.handle.config().blocks;
    decode.says(ToDecode::Measure { pages: 10_000 });
    let ToPrefill::Scratch { slot, epoch, pages } = decode.hears() else { panic!("there are pages to spare") };
    assert_eq!(pages.len(), blocks / 8, "no more than an eighth of them");
    assert_eq!(decode.wires.permitted.lock().unwrap().last().unwrap().2[..], pages[..]);
    decode.says(ToDecode::Measure { pages: 1 });
    assert_eq!(decode.hears(), ToPrefill::NoScratch, "one at a time");
    let word = MailboxWord::new(epoch, Status::Done);
    decode.wires.words[slot.0 as usize].store(word.raw(), Ordering::Release);
    decode.wait_until(|snapshot| snapshot.pages_quarantined == 0 && snapshot.pages_free == blocks);
}

#[test]
fn a_prompt_that_is_cancelled_keeps_its_pages_until_nobody_reads_them() {
    let (prefill, control) = start(config());
    control.close();
    let (done, finished) = channel();
    let grant = Grant {
        handoff: HandoffId(1),
        slot: MailboxSlot(0),
        epoch: Epoch::FIRST,
        tokens: (0..100).collect(),
        salt: None,
        first: 0,
        pages: (0..25).collect(),
    };
    let to = Arc::new(Control::default());
    *to.cache.lock().unwrap() = vec![0; 100];
    let exporter = Copier { from: control.clone(), to, grant, block_size: BLOCK, copied: 0, done };
    let request =
        PrefillRequest { tokens: (0..100).collect(), salt: None, first_page: 0, exporter: Box::new(exporter) };
    let handle = prefill.prefill(request).unwrap();
    control.wait_until_held();
    handle.cancel();
    control.let_one();
    // The exporter is dropped without having passed on the end.
    assert_eq!(finished.recv_timeout(MINUTE), Err(RecvTimeoutError::Disconnected));
    assert_eq!(prefill.snapshot().pages_owned, 8);
    control.open();
    drop(handle);
    block_on(prefill.drain());
    wait_until(|| prefill.snapshot().pages_owned == 0);
    assert_eq!(control.computed.load(Ordering::Relaxed), 32);
}

/// Says so when it goes, in a panic too: nobody could end before the other thread does.
struct Finished<'a>(&'a AtomicBool);

impl Drop for Finished<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, max_shrink_time: 60_000, ..ProptestConfig::default() })]

    #[test]
    fn answers_do_not_depend_on_who_prefills(
        requests in prop::collection::vec(any_request(), 1..24),
        max_num_seqs in 1..9usize,
        spare_pages in 0..40usize,
        threshold in 0..40usize,
        block_size in 1..9usize,
        start in prop::sample::select(STARTS.to_vec()),
        decodes_ahead in any::<bool>(),
        prefix_caching in prop::bool::weighted(0.8),
    ) {
        let config = EngineConfig {
            max_num_seqs,
            prefix_caching,
            block_size,
            blocks: 128_usize.div_ceil(block_size) + spare_pages,
            ..config()
        };
        let runner = if decodes_ahead { |a, b, c| FakeRunner::new(a, b, c).ahead() } else { FakeRunner::new };
        let decode = decode_by(runner, config.clone(), threshold, PATIENT);
        let (prefill, control) = start(config);
        let mut generations: Vec<_> =
            requests.iter().map(|request| decode.handle.submit(request.clone()).unwrap()).collect();
        let finished = AtomicBool::new(false);
        let answers = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !finished.load(Ordering::Relaxed) {
                    match decode.jobs.lock().unwrap().try_recv() {
                        // Pages that others need first are taken back.
                        Ok(handoff) => {
                            if let Some(grant) = decode.claim_if_there(handoff) {
                                serve_granted(&decode, grant, &prefill, &control);
                            }
                        }
                        Err(_) => std::thread::yield_now(),
                    }
                }
            });
            let _finished = Finished(&finished);
            block_on(join_all(generations.iter_mut().map(collect)))
        });
        for (request, (events, reason, _)) in requests.iter().zip(answers) {
            prop_assert_eq!((events, reason), model_answer(request, 128));
        }
        block_on(join(decode.handle.drain(), prefill.drain()));
        let snapshot = decode.handle.snapshot();
        prop_assert_eq!((snapshot.pages_owned, snapshot.pages_lent, snapshot.pages_quarantined), (0, 0, 0));
    }
}
