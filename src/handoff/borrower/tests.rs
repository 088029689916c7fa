use super::*;
use crate::handoff::Gone;

const SECOND: Duration = Duration::from_secs(1);
const DAVE: WorkerId = WorkerId(4);
const S: SessionId = SessionId(1);
const H: HandoffId = HandoffId(7);
const SLOT: MailboxSlot = MailboxSlot(3);
const EPOCH: Epoch = Epoch::FIRST;

struct Bench {
    borrower: Borrower,
    now: Duration,
}

impl Bench {
    fn new() -> Self {
        let timeouts = BorrowerTimeouts::default();
        let config = BorrowerConfig { model_key: "k".into(), block_size: 4, jobs_max: 3, timeouts };
        Self { borrower: Borrower::new(config), now: SECOND }
    }

    /// With the job of `H` claimed.
    fn claimed() -> Self {
        let mut bench = Self::new();
        assert_eq!(bench.deliver(1, H), ["connect"]);
        assert_eq!(bench.on(BorrowerEvent::Connected { decode: DAVE, session: S }), ["claim"]);
        bench
    }

    /// And granted: nine tokens, three pages.
    fn granted() -> Self {
        let mut bench = Self::claimed();
        assert_eq!(bench.grant(S, grant()), ["prefill"]);
        bench
    }

    /// And so many writes under way.
    fn writing(writes: u64) -> Self {
        let mut bench = Self::granted();
        assert_eq!(bench.on(BorrowerEvent::Writing { handoff: H, writes }), [""; 0]);
        bench
    }

    fn deliver(&mut self, delivery: u64, handoff: HandoffId) -> Vec<String> {
        let job = Job {
            handoff,
            decode: DAVE,
            model_key: "k".into(),
            addresses: serde_json::Value::Null,
            prompt_tokens: 10,
            traceparent: None,
        };
        self.deliver_bytes(delivery, &job.encode())
    }

    fn deliver_bytes(&mut self, delivery: u64, bytes: &[u8]) -> Vec<String> {
        let mut actions = vec![];
        self.borrower.deliver(DeliveryId(delivery), 1, bytes, self.now, &mut actions);
        actions.iter().map(tell).collect()
    }

    fn on(&mut self, event: BorrowerEvent) -> Vec<String> {
        let mut actions = vec![];
        self.borrower.on(event, self.now, &mut actions);
        actions.iter().map(tell).collect()
    }

    fn grant(&mut self, session: SessionId, grant: Grant) -> Vec<String> {
        self.on(BorrowerEvent::Message { session, message: ToPrefill::Grant(grant) })
    }

    fn gone(&mut self) -> Vec<String> {
        let message = ToPrefill::Gone { handoff: H, why: Gone::Claimed };
        self.on(BorrowerEvent::Message { session: S, message })
    }

    fn ask_release(&mut self) -> Vec<String> {
        self.on(BorrowerEvent::Message { session: S, message: ToPrefill::Release { handoff: H, epoch: EPOCH } })
    }

    fn computed(&mut self, tokens: u32) -> Vec<String> {
        self.on(BorrowerEvent::Computed { handoff: H, tokens })
    }

    fn pass(&mut self, seconds: u32) -> Vec<String> {
        let mut all = vec![];
        for _ in 0..seconds {
            self.now += SECOND;
            all.extend(self.on(BorrowerEvent::Tick));
        }
        all
    }
}

fn grant() -> Grant {
    Grant { handoff: H, slot: SLOT, epoch: EPOCH, tokens: (0..9).collect(), salt: None, first: 0, pages: vec![5, 6, 7] }
}

/// An action in few words.
fn tell(action: &BorrowerAction) -> String {
    match action {
        BorrowerAction::Connect { .. } => "connect".into(),
        BorrowerAction::Send { message, .. } => match message {
            ToDecode::Claim { .. } => "claim".into(),
            ToDecode::Progress { moved, .. } => format!("progress {moved}"),
            ToDecode::Released { .. } => "released".into(),
            ToDecode::Failed { reason, .. } => format!("failed: {reason}"),
            ToDecode::Measure { .. } => "measure".into(),
        },
        BorrowerAction::Prefill { .. } => "prefill".into(),
        BorrowerAction::Cancel { .. } => "cancel".into(),
        BorrowerAction::Complete { slot, word, .. } => {
            assert_eq!((*slot, word.status_of(EPOCH)), (SLOT, Some(Status::Done)));
            "complete".into()
        }
        BorrowerAction::Ack { delivery } => format!("ack {}", delivery.0),
        BorrowerAction::Nak { delivery, delay } => format!("nak {} for {delay:?}", delivery.0),
        BorrowerAction::InProgress { delivery } => format!("in progress {}", delivery.0),
        BorrowerAction::Forget { delivery } => format!("forget {}", delivery.0),
        BorrowerAction::Refuse { .. } => "refuse".into(),
    }
}

#[test]
fn a_job_is_acked_when_its_word_is_posted_and_not_before() {
    let mut bench = Bench::writing(4);
    assert_eq!(bench.computed(8), ["progress 1"]);
    assert_eq!(bench.on(BorrowerEvent::Writing { handoff: H, writes: 2 }), [""; 0]);
    assert_eq!(bench.computed(9), ["progress 2", "complete"]);
    assert_eq!(bench.on(BorrowerEvent::Wrote { handoff: H, writes: 6 }), [""; 0]);
    assert_eq!(bench.on(BorrowerEvent::Posted { handoff: H }), ["ack 1"]);
    assert_eq!(bench.borrower.held(), 0);
    // The session stays.
    assert_eq!(bench.deliver(2, HandoffId(8)), ["claim"]);
}

#[test]
fn a_refused_claim_takes_the_job_off_the_queue() {
    assert_eq!(Bench::claimed().gone(), ["ack 1"]);
    // One that answers an earlier claim of a job that was granted since says nothing.
    assert_eq!(Bench::granted().gone(), [""; 0]);
}

#[test]
fn pages_are_given_back_after_the_last_write_and_not_before() {
    let mut bench = Bench::writing(3);
    assert_eq!(bench.ask_release(), ["cancel"]);
    assert_eq!(bench.ask_release(), [""; 0]);
    assert_eq!(bench.computed(9), [""; 0]);
    assert_eq!(bench.on(BorrowerEvent::Wrote { handoff: H, writes: 2 }), [""; 0]);
    assert_eq!(bench.on(BorrowerEvent::Wrote { handoff: H, writes: 1 }), ["released", "ack 1"]);
    assert_eq!(Bench::granted().ask_release(), ["cancel", "released", "ack 1"]);
}

#[test]
fn what_cannot_be_computed_is_said_after_the_last_write_too() {
    let mut bench = Bench::writing(1);
    assert_eq!(bench.on(BorrowerEvent::Refused { handoff: H, reason: "too long".into() }), ["cancel"]);
    assert_eq!(bench.on(BorrowerEvent::Wrote { handoff: H, writes: 1 }), ["failed: too long", "ack 1"]);
    // Another worker may be luckier.
    let mut bench = Bench::writing(1);
    assert_eq!(bench.on(BorrowerEvent::ComputeFailed { handoff: H }), ["cancel"]);
    assert_eq!(bench.on(BorrowerEvent::Wrote { handoff: H, writes: 1 }), ["released", "ack 1"]);
}

#[test]
fn a_write_that_fails_after_others_voids_the_grant_and_the_word() {
    let failed = || BorrowerEvent::WriteFailed { handoff: H };
    let mut bench = Bench::writing(2);
    assert_eq!(bench.on(failed()), ["cancel"]);
    assert_eq!(bench.computed(9), [""; 0]);
    assert_eq!(bench.on(BorrowerEvent::Wrote { handoff: H, writes: 1 }), ["released", "ack 1"]);
    // Also when the word is with the writer, which must answer for it before the pages are given back.
    let mut bench = Bench::writing(2);
    bench.computed(9);
    assert_eq!(bench.on(BorrowerEvent::Wrote { handoff: H, writes: 1 }), [""; 0]);
    assert_eq!(bench.on(failed()), ["cancel"]);
    assert_eq!(bench.on(failed()), ["released", "ack 1"]);
}

#[test]
fn a_release_that_comes_too_late_is_answered_by_the_word() {
    let mut bench = Bench::writing(1);
    bench.computed(9);
    assert_eq!(bench.ask_release(), [""; 0]);
    assert_eq!(bench.on(BorrowerEvent::Posted { handoff: H }), ["ack 1"]);
}

#[test]
fn releases_of_other_epochs_and_sessions_are_not_ours() {
    let mut bench = Bench::writing(1);
    let message = ToPrefill::Release { handoff: H, epoch: EPOCH.next() };
    assert_eq!(bench.on(BorrowerEvent::Message { session: S, message }), [""; 0]);
    let message = ToPrefill::Release { handoff: H, epoch: EPOCH };
    assert_eq!(bench.on(BorrowerEvent::Message { session: SessionId(2), message }), [""; 0]);
}

#[test]
fn a_grant_nobody_waits_for_is_given_back() {
    let mut bench = Bench::claimed();
    assert_eq!(bench.pass(5).last().unwrap(), "nak 1 for 200ms");
    assert_eq!(bench.grant(S, grant()), ["released"]);
}

#[test]
fn a_grant_that_is_in_use_is_never_called_released() {
    let mut bench = Bench::writing(1);
    assert_eq!(bench.grant(S, grant()), [""; 0]);
}

#[test]
fn a_grant_that_makes_no_sense_is_a_failure() {
    let actions = Bench::claimed().grant(S, Grant { pages: vec![5], ..grant() });
    assert!(actions[0].starts_with("failed: a grant of 1 pages for tokens 0..9"), "{actions:?}");
    assert_eq!(actions[1..], ["ack 1"]);
}

#[test]
fn a_job_that_cannot_be_read_comes_to_nobody_else() {
    assert_eq!(Bench::new().deliver_bytes(1, b"\0"), ["refuse", "ack 1"]);
    assert_eq!(Bench::new().deliver_bytes(1, br#"{"schema":99}"#), ["refuse", "ack 1"]);
}

#[test]
fn a_job_delivered_again_while_it_is_worked_on_is_one_job() {
    let mut bench = Bench::writing(1);
    assert_eq!(bench.deliver(2, H), ["forget 1"]);
    bench.computed(9);
    assert_eq!(bench.on(BorrowerEvent::Posted { handoff: H }), ["ack 2"]);
}

#[test]
fn a_session_that_closes_returns_unanswered_claims_and_uses_up_grants() {
    let closed = BorrowerEvent::SessionClosed { session: S };
    assert_eq!(Bench::claimed().on(closed.clone()), ["nak 1 for 200ms"]);
    let mut bench = Bench::writing(1);
    assert_eq!(bench.on(closed), ["cancel", "ack 1"]);
    assert_eq!(bench.on(BorrowerEvent::Wrote { handoff: H, writes: 1 }), [""; 0]);
    assert_eq!(bench.deliver(2, HandoffId(8)), ["connect"]);
}

#[test]
fn a_decode_worker_that_cannot_be_reached_is_tried_again_unless_it_is_gone() {
    for (gone, pause, expected) in
        [(false, Duration::ZERO, "nak 1 for 200ms"), (false, 7 * SECOND, "nak 1 for 7s"), (true, 7 * SECOND, "ack 1")]
    {
        let mut bench = Bench::new();
        bench.deliver(1, H);
        assert_eq!(bench.deliver(2, HandoffId(8)).len(), 0, "one attempt to connect is enough");
        let actions = bench.on(BorrowerEvent::ConnectFailed { decode: DAVE, gone, pause });
        assert_eq!(actions.len(), 2);
        assert_eq!(actions[0], expected);
    }
}

#[test]
fn signs_of_life_go_to_the_queue_and_to_the_decode_worker() {
    let mut bench = Bench::granted();
    assert_eq!(bench.pass(1), [""; 0]);
    assert_eq!(bench.pass(1), ["in progress 1", "progress 0"]);
    bench.computed(4);
    assert_eq!(bench.pass(2), ["in progress 1", "progress 1"]);
}

#[test]
fn signs_of_life_go_on_until_the_word_is_posted_but_not_for_what_is_given_up() {
    let mut bench = Bench::writing(1);
    bench.computed(9);
    // Over a slow link that takes longer than anybody waits for a silent worker.
    for _ in 0..10 {
        assert_eq!(bench.pass(2), ["in progress 1", "progress 0"]);
    }
    assert_eq!(bench.on(BorrowerEvent::Posted { handoff: H }), ["ack 1"]);
    let mut bench = Bench::writing(1);
    bench.ask_release();
    assert_eq!(bench.pass(2), ["in progress 1"]);
}

#[test]
fn signs_of_life_tell_whether_anything_moves_that_a_prompt_may_wait_for() {
    let mut bench = Bench::writing(3);
    let other = HandoffId(8);
    bench.deliver(2, other);
    assert_eq!(bench.grant(S, Grant { handoff: other, ..grant() }), ["prefill"]);
    let alive = |bench: &mut Bench| {
        let said = bench.pass(2);
        said.into_iter().filter(|said| said.starts_with("progress")).collect::<Vec<_>>()
    };
    assert_eq!(alive(&mut bench), ["progress 0", "progress 0"]);
    assert_eq!(alive(&mut bench), ["progress 0", "progress 0"]);
    // The other waits its turn, and that it comes nearer is enough.
    bench.computed(8);
    bench.on(BorrowerEvent::Wrote { handoff: H, writes: 1 });
    assert_eq!(alive(&mut bench), ["progress 2", "progress 2"]);
    // What is all with the writer waits for nothing that is computed.
    bench.computed(9);
    assert_eq!(alive(&mut bench), ["progress 1", "progress 3"]);
    bench.on(BorrowerEvent::Computed { handoff: other, tokens: 4 });
    assert_eq!(alive(&mut bench), ["progress 1", "progress 4"]);
    bench.on(BorrowerEvent::Wrote { handoff: H, writes: 1 });
    assert_eq!(alive(&mut bench), ["progress 2", "progress 5"]);
}

#[test]
fn draining_hands_back_what_is_not_begun_and_finishes_the_rest() {
    let mut bench = Bench::granted();
    bench.deliver(2, HandoffId(8));
    assert_eq!(bench.borrower.room(), 1);
    assert_eq!(bench.on(BorrowerEvent::Drain), ["nak 2 for 0ns"]);
    assert_eq!((bench.borrower.room(), bench.borrower.held()), (0, 1));
    assert_eq!(bench.deliver(3, HandoffId(9)), ["nak 3 for 0ns"]);
    bench.computed(9);
    assert_eq!(bench.on(BorrowerEvent::Posted { handoff: H }), ["ack 1"]);
    assert_eq!(bench.borrower.held(), 0);
}

#[test]
fn a_worker_that_is_full_takes_no_more() {
    let mut bench = Bench::new();
    for job in 0..3 {
        bench.deliver(job, HandoffId(u128::from(job)));
    }
    assert_eq!(bench.borrower.room(), 0);
    assert_eq!(bench.deliver(9, HandoffId(9)), ["nak 9 for 0ns"]);
}
