//! Two engine threads with made-up models, one prefilling for the other, and a test between them that plays the
//! network.

mod adapters;
mod quiet;
mod returning;

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    mpsc::{Receiver, Sender, channel},
};

use futures::{
    executor::block_on,
    future::{join, join_all},
};
use proptest::prelude::*;

use super::{
    BLOCK, STARTS, any_request, collect, config,
    fake::{Control, FakeRunner},
    model_answer, request, start,
};
use crate::{
    cache::Salt,
    engine::*,
    handoff::{
        Epoch, Forecast, Grant, HandoffId, LenderEvent, LenderTimeouts, MailboxSlot, MailboxWord, SessionId, Status,
        ToDecode, ToPrefill, WorkerId,
    },
    scheduler::{Candidate, Route},
    telemetry::{EngineMetrics, Metrics, TraceContext},
};

const SESSION: SessionId = SessionId(1);
const WORKER: WorkerId = WorkerId(7);
/// What the port says of the queue.
const JOBS_AHEAD: u64 = 3;

type Permit = (MailboxSlot, Epoch, Arc<[u32]>);

/// What the engine says and sees.
struct Wires {
    open: AtomicBool,
    threshold: usize,
    handoffs_max: AtomicU32,
    /// What the latest job is part of.
    traced: Mutex<Option<TraceContext>>,
    /// What the latest prompt would take here, as the port was told.
    forecast: Mutex<Option<Forecast>>,
    /// Jobs before each handoff that came to its end, and its tokens.
    handed_off: Mutex<Vec<(u64, usize)>>,
    words: Vec<AtomicU64>,
    /// Looks into the mailbox that come too early for what is there.
    early_looks: AtomicUsize,
    fenced: AtomicBool,
    permitted: Mutex<Vec<Permit>>,
    /// Pages are written by an adapter, to a device's memory.
    by_adapter: AtomicBool,
    /// Pages and what the adapter has written to them, which is there when somebody waits for it and not before.
    on_the_way: Mutex<Vec<(u32, [u64; BLOCK])>>,
    /// The device cannot be made to wait.
    flush_fails: AtomicBool,
    /// How often all pages were looked at.
    looks: AtomicUsize,
    /// Jobs that nobody claimed.
    unclaimed: AtomicUsize,
}

struct Port {
    wires: Arc<Wires>,
    control: Arc<Control>,
    jobs: Sender<HandoffId>,
    said: Sender<ToPrefill>,
}

impl LendingPort for Port {
    fn is_open(&self) -> bool {
        self.wires.open.load(Ordering::Relaxed)
    }

    fn decide(&mut self, candidate: Candidate, local: Option<Forecast>) -> Route {
        *self.wires.forecast.lock().unwrap() = local;
        let long = candidate.tokens - candidate.cached > self.wires.threshold;
        if long && candidate.lost < self.wires.handoffs_max.load(Ordering::Relaxed) {
            Route::Remote
        } else {
            Route::Local
        }
    }

    fn jobs_ahead(&self) -> u64 {
        JOBS_AHEAD
    }

    fn enqueue(&mut self, handoff: HandoffId, _: usize, trace: Option<TraceContext>) {
        *self.wires.traced.lock().unwrap() = trace;
        self.jobs.send(handoff).unwrap();
    }

    fn word(&self, slot: MailboxSlot) -> MailboxWord {
        let early = self.wires.early_looks.load(Ordering::Acquire);
        if early > 0 {
            self.wires.early_looks.store(early - 1, Ordering::Release);
            return MailboxWord::from_raw(0);
        }
        MailboxWord::from_raw(self.wires.words[slot.0 as usize].load(Ordering::Acquire))
    }

    fn claimed(&mut self) {}

    fn unclaimed(&mut self) -> bool {
        self.wires.unclaimed.fetch_add(1, Ordering::Relaxed) == 0
    }

    fn permit(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch, pages: Arc<[u32]>) {
        assert_eq!(session, SESSION);
        self.wires.permitted.lock().unwrap().push((slot, epoch, pages));
    }

    fn stage(&mut self, session: SessionId, _: usize) -> Option<Destination> {
        assert_eq!(session, SESSION);
        let by_adapter = self.wires.by_adapter.load(Ordering::Relaxed);
        Some(if by_adapter { Destination::ByAdapter } else { Destination::InPlace })
    }

    fn flush(&mut self) -> bool {
        if self.wires.flush_fails.load(Ordering::Relaxed) {
            // Nobody knows where they are.
            return false;
        }
        let mut cache = self.control.cache.lock().unwrap();
        for (page, content) in self.wires.on_the_way.lock().unwrap().drain(..) {
            cache[page as usize * BLOCK..][..BLOCK].copy_from_slice(&content);
        }
        true
    }

    fn staged(&self) -> usize {
        self.wires.looks.fetch_add(1, Ordering::Relaxed);
        0
    }

    fn send(&mut self, _: SessionId, message: ToPrefill) {
        self.said.send(message).unwrap();
    }

    fn revoke(&mut self, _: SessionId, _: MailboxSlot, _: Epoch) {}

    fn forget(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        assert_eq!(session, SESSION);
        self.wires.permitted.lock().unwrap().retain(|permit| (permit.0, permit.1) != (slot, epoch));
    }

    fn fence(&mut self, _: SessionId) {
        self.wires.fenced.store(true, Ordering::Relaxed);
    }

    fn handed_off(&mut self, ahead: u64, _: std::time::Duration, tokens: usize, _: std::time::Duration) {
        self.wires.handed_off.lock().unwrap().push((ahead, tokens));
    }
}

/// A decode worker, and the ends of its wires.
struct Decode {
    handle: EngineHandle,
    control: Arc<Control>,
    metrics: EngineMetrics,
    wires: Arc<Wires>,
    post: Post,
    jobs: Mutex<Receiver<HandoffId>>,
    said: Mutex<Receiver<ToPrefill>>,
}

fn decode(config: EngineConfig, threshold: usize) -> Decode {
    decode_with(config, threshold, PATIENT)
}

const PATIENT: LendingConfig = LendingConfig {
    mailbox_slots: 16,
    timeouts: LenderTimeouts { unclaimed: MINUTE, silent: MINUTE, stalled: MINUTE, release: MINUTE },
};

const MINUTE: std::time::Duration = std::time::Duration::from_secs(60);

fn decode_with(config: EngineConfig, threshold: usize, lending: LendingConfig) -> Decode {
    decode_by(FakeRunner::new, config, threshold, lending)
}

fn decode_by(
    runner: fn(usize, usize, Arc<Control>) -> FakeRunner,
    config: EngineConfig,
    threshold: usize,
    lending: LendingConfig,
) -> Decode {
    let wires = Arc::new(Wires {
        open: AtomicBool::new(true),
        threshold,
        handoffs_max: AtomicU32::new(1),
        traced: Mutex::default(),
        forecast: Mutex::default(),
        handed_off: Mutex::default(),
        words: (0..lending.mailbox_slots).map(|_| AtomicU64::new(0)).collect(),
        early_looks: AtomicUsize::new(0),
        fenced: AtomicBool::new(false),
        permitted: Mutex::default(),
        by_adapter: AtomicBool::new(false),
        on_the_way: Mutex::default(),
        flush_fails: AtomicBool::new(false),
        looks: AtomicUsize::new(0),
        unclaimed: AtomicUsize::new(0),
    });
    let (jobs_in, jobs) = channel();
    let (said_in, said) = channel();
    let (post, inbox) = inbox();
    let control = Arc::new(Control::default());
    let runner = runner(config.blocks, config.block_size, control.clone());
    let metrics = Metrics::new().engine;
    let port = Box::new(Port { wires: wires.clone(), control: control.clone(), jobs: jobs_in, said: said_in });
    let handle = Engine::start_lending(runner, config, metrics.clone(), inbox, lending, port).unwrap();
    Decode { handle, control, metrics, wires, post, jobs: Mutex::new(jobs), said: Mutex::new(said) }
}

impl Decode {
    fn next_job(&self) -> HandoffId {
        self.jobs.lock().unwrap().recv().unwrap()
    }

    fn hears(&self) -> ToPrefill {
        self.said.lock().unwrap().recv().unwrap()
    }

    fn says(&self, message: ToDecode) {
        self.post.lender(LenderEvent::Message { session: SESSION, worker: WORKER, message });
    }

    /// Claims a job and returns the grant.
    fn claim(&self, handoff: HandoffId) -> Grant {
        self.claim_if_there(handoff).expect("the claim is not refused")
    }

    /// Claims a job that may have been taken back. Returns the grant, if it was not.
    fn claim_if_there(&self, handoff: HandoffId) -> Option<Grant> {
        self.says(ToDecode::Claim { handoff });
        let ToPrefill::Grant(grant) = self.hears() else { return None };
        let permitted = self.wires.permitted.lock().unwrap();
        let (slot, epoch, pages) = permitted.last().unwrap();
        assert_eq!((*slot, *epoch, &pages[..]), (grant.slot, grant.epoch, &grant.pages[..]));
        grant.check(self.handle.config().block_size as u32).unwrap();
        Some(grant)
    }

    fn ends(&self, grant: &Grant, status: Status) {
        let word = MailboxWord::new(grant.epoch, status);
        self.wires.words[grant.slot.0 as usize].store(word.raw(), Ordering::Release);
    }

    fn wait_until(&self, holds: impl Fn(Snapshot) -> bool) {
        while !holds(self.handle.snapshot()) {
            std::thread::yield_now();
        }
    }
}

/// Copies pages from one made-up cache to the other as they are computed.
struct Copier {
    from: Arc<Control>,
    to: Arc<Control>,
    grant: Grant,
    block_size: usize,
    copied: usize,
    done: Sender<Grant>,
}

impl Exporter for Copier {
    fn layer(&mut self, layer: usize, first: usize, pages: &[u32]) {
        assert_eq!((layer, first), (0, self.copied), "pages come in order");
        self.from.settle();
        let (from, mut to) = (self.from.cache.lock().unwrap(), self.to.cache.lock().unwrap());
        let (first_wanted, block) = (self.grant.first as usize / self.block_size, self.block_size);
        for (page, &local) in (first..).zip(pages) {
            let remote = self.grant.pages[page - first_wanted] as usize;
            to[remote * block..][..block].copy_from_slice(&from[local as usize * block..][..block]);
        }
        self.copied += pages.len();
    }

    fn found(&mut self, first: usize, pages: &[u32]) {
        self.layer(0, first, pages);
    }

    fn computed(&mut self, tokens: usize) {
        let pages = self.grant.first as usize / self.block_size + self.grant.pages.len();
        if tokens == self.grant.tokens.len() {
            assert_eq!(self.copied, pages);
            self.done.send(self.grant.clone()).unwrap();
        } else {
            assert!(
                self.copied >= tokens / self.block_size || self.copied == self.grant.first as usize / self.block_size
            );
        }
    }
}

/// Does one of the decode worker's jobs with another engine.
fn serve(decode: &Decode, handoff: HandoffId, prefill: &EngineHandle, control: &Arc<Control>) {
    serve_granted(decode, decode.claim(handoff), prefill, control);
}

fn serve_granted(decode: &Decode, grant: Grant, prefill: &EngineHandle, control: &Arc<Control>) {
    let grant = compute(grant, prefill, control, &decode.control);
    decode.ends(&grant, Status::Done);
}

/// The same, but for the last word, with pages for `to`.
fn compute(grant: Grant, prefill: &EngineHandle, control: &Arc<Control>, to: &Arc<Control>) -> Grant {
    let (done, finished) = channel();
    let block_size = prefill.config().block_size;
    let first_page = grant.first as usize / block_size;
    let (from, to) = (control.clone(), to.clone());
    let exporter = Copier { from, to, grant: grant.clone(), block_size, copied: first_page, done };
    let request =
        PrefillRequest { tokens: grant.tokens.clone(), salt: grant.salt, first_page, exporter: Box::new(exporter) };
    let _handle = prefill.prefill(request).unwrap();
    finished.recv().unwrap()
}

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
    while prefill.snapshot().pages_owned > 0 {
        std::thread::yield_now();
    }
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
    while prefill.snapshot().pages_free < 64 {
        std::thread::yield_now();
    }
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
    while !decode.wires.fenced.load(Ordering::Relaxed) {
        std::thread::yield_now();
    }
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
    assert!(finished.recv().is_err());
    assert_eq!(prefill.snapshot().pages_owned, 8);
    control.open();
    drop(handle);
    block_on(prefill.drain());
    while prefill.snapshot().pages_owned > 0 {
        std::thread::yield_now();
    }
    assert_eq!(control.computed.load(Ordering::Relaxed), 32);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

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
            let answers = block_on(join_all(generations.iter_mut().map(collect)));
            finished.store(true, Ordering::Relaxed);
            answers
        });
        for (request, (events, reason, _)) in requests.iter().zip(answers) {
            prop_assert_eq!((events, reason), model_answer(request, 128));
        }
        block_on(join(decode.handle.drain(), prefill.drain()));
        let snapshot = decode.handle.snapshot();
        prop_assert_eq!((snapshot.pages_owned, snapshot.pages_lent, snapshot.pages_quarantined), (0, 0, 0));
    }
}
