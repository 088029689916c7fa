//! A decode worker's engine thread whose port leads to a test, and what a test does to it in place of the network.

use std::sync::{
    Arc, Mutex,
    atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering},
    mpsc::{Receiver, Sender, channel},
};

use crate::{
    engine::{
        tests::{
            BLOCK,
            fake::{Control, FakeRunner},
            waiting::{MINUTE, wait_until},
        },
        *,
    },
    handoff::{
        Epoch, Forecast, Grant, HandoffId, LenderEvent, LenderTimeouts, MailboxSlot, MailboxWord, SessionId, Status,
        ToDecode, ToPrefill, WorkerId,
    },
    scheduler::{Candidate, Route},
    telemetry::{EngineMetrics, Metrics, TraceContext},
};

pub(super) const SESSION: SessionId = SessionId(1);
pub(super) const WORKER: WorkerId = WorkerId(7);
/// What the port says of the queue.
pub(super) const JOBS_AHEAD: u64 = 3;

type Permit = (MailboxSlot, Epoch, Arc<[u32]>);

/// What the engine says and sees.
pub(super) struct Wires {
    pub(super) open: AtomicBool,
    pub(super) threshold: usize,
    pub(super) handoffs_max: AtomicU32,
    /// What the latest job is part of.
    pub(super) traced: Mutex<Option<TraceContext>>,
    /// What the latest prompt would take here, as the port was told.
    pub(super) forecast: Mutex<Option<Forecast>>,
    /// Jobs before each handoff that came to its end, and its tokens.
    pub(super) handed_off: Mutex<Vec<(u64, usize)>>,
    pub(super) words: Vec<AtomicU64>,
    /// Looks into the mailbox that come too early for what is there.
    pub(super) early_looks: AtomicUsize,
    pub(super) fenced: AtomicBool,
    pub(super) permitted: Mutex<Vec<Permit>>,
    /// Pages are written by an adapter, to a device's memory.
    pub(super) by_adapter: AtomicBool,
    /// Pages and what the adapter has written to them, which is there when somebody waits for it and not before.
    pub(super) on_the_way: Mutex<Vec<(u32, [u64; BLOCK])>>,
    /// The device cannot be made to wait.
    pub(super) flush_fails: AtomicBool,
    /// How often all pages were looked at.
    pub(super) looks: AtomicUsize,
    /// Jobs that nobody claimed.
    pub(super) unclaimed: AtomicUsize,
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
pub(super) struct Decode {
    pub(super) handle: EngineHandle,
    pub(super) control: Arc<Control>,
    pub(super) metrics: EngineMetrics,
    pub(super) wires: Arc<Wires>,
    pub(super) post: Post,
    pub(super) jobs: Mutex<Receiver<HandoffId>>,
    pub(super) said: Mutex<Receiver<ToPrefill>>,
}

pub(super) fn decode(config: EngineConfig, threshold: usize) -> Decode {
    decode_with(config, threshold, PATIENT)
}

pub(super) const PATIENT: LendingConfig = LendingConfig {
    mailbox_slots: 16,
    timeouts: LenderTimeouts { unclaimed: MINUTE, silent: MINUTE, stalled: MINUTE, release: MINUTE },
};

pub(super) fn decode_with(config: EngineConfig, threshold: usize, lending: LendingConfig) -> Decode {
    decode_by(FakeRunner::new, config, threshold, lending)
}

pub(super) fn decode_by(
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
    pub(super) fn next_job(&self) -> HandoffId {
        self.jobs.lock().unwrap().recv_timeout(MINUTE).unwrap()
    }

    pub(super) fn hears(&self) -> ToPrefill {
        self.said.lock().unwrap().recv_timeout(MINUTE).unwrap()
    }

    pub(super) fn says(&self, message: ToDecode) {
        self.post.lender(LenderEvent::Message { session: SESSION, worker: WORKER, message });
    }

    /// Claims a job and returns the grant.
    pub(super) fn claim(&self, handoff: HandoffId) -> Grant {
        self.claim_if_there(handoff).expect("the claim is not refused")
    }

    /// Claims a job that may have been taken back. Returns the grant, if it was not.
    pub(super) fn claim_if_there(&self, handoff: HandoffId) -> Option<Grant> {
        self.says(ToDecode::Claim { handoff });
        let ToPrefill::Grant(grant) = self.hears() else { return None };
        let permitted = self.wires.permitted.lock().unwrap();
        let (slot, epoch, pages) = permitted.last().unwrap();
        assert_eq!((*slot, *epoch, &pages[..]), (grant.slot, grant.epoch, &grant.pages[..]));
        grant.check(self.handle.config().block_size as u32).unwrap();
        Some(grant)
    }

    pub(super) fn ends(&self, grant: &Grant, status: Status) {
        let word = MailboxWord::new(grant.epoch, status);
        self.wires.words[grant.slot.0 as usize].store(word.raw(), Ordering::Release);
    }

    #[track_caller]
    pub(super) fn wait_until(&self, holds: impl Fn(Snapshot) -> bool) {
        wait_until(|| holds(self.handle.snapshot()));
    }
}

/// Copies pages from one made-up cache to the other as they are computed.
pub(super) struct Copier {
    pub(super) from: Arc<Control>,
    pub(super) to: Arc<Control>,
    pub(super) grant: Grant,
    pub(super) block_size: usize,
    pub(super) copied: usize,
    pub(super) done: Sender<Grant>,
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
pub(super) fn serve(decode: &Decode, handoff: HandoffId, prefill: &EngineHandle, control: &Arc<Control>) {
    serve_granted(decode, decode.claim(handoff), prefill, control);
}

pub(super) fn serve_granted(decode: &Decode, grant: Grant, prefill: &EngineHandle, control: &Arc<Control>) {
    let grant = compute(grant, prefill, control, &decode.control);
    decode.ends(&grant, Status::Done);
}

/// The same, but for the last word, with pages for `to`.
pub(super) fn compute(grant: Grant, prefill: &EngineHandle, control: &Arc<Control>, to: &Arc<Control>) -> Grant {
    let (done, finished) = channel();
    let block_size = prefill.config().block_size;
    let first_page = grant.first as usize / block_size;
    let (from, to) = (control.clone(), to.clone());
    let exporter = Copier { from, to, grant: grant.clone(), block_size, copied: first_page, done };
    let request =
        PrefillRequest { tokens: grant.tokens.clone(), salt: grant.salt, first_page, exporter: Box::new(exporter) };
    let _handle = prefill.prefill(request).unwrap();
    finished.recv_timeout(MINUTE).unwrap()
}
