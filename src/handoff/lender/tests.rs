use super::*;

const SECOND: Duration = Duration::from_secs(1);
const ALICE: (SessionId, WorkerId) = (SessionId(1), WorkerId(11));
const BOB: (SessionId, WorkerId) = (SessionId(2), WorkerId(22));
const H: HandoffId = HandoffId(7);

/// A lender whose pages are a text, and whose request is a number.
struct Bench {
    lender: Lender<u32, &'static str>,
    mailbox: [MailboxWord; 2],
    now: Duration,
}

type Actions = Vec<LenderAction<u32, &'static str>>;

impl Bench {
    fn new() -> Self {
        let lender = Lender::new(2, LenderTimeouts::default());
        Self { lender, mailbox: [MailboxWord::EMPTY; 2], now: SECOND }
    }

    /// With `H` lent for request 1.
    fn queued() -> Self {
        let mut bench = Self::new();
        bench.lender.lend(H, 1, "pages", bench.now).unwrap();
        bench
    }

    /// And granted to Alice.
    fn granted() -> (Self, MailboxSlot, Epoch) {
        let mut bench = Self::queued();
        let actions = bench.claim(ALICE, H);
        let [LenderAction::Grant { session: SessionId(1), handoff: H, slot, epoch, request: 1 }] = actions[..] else {
            panic!("{actions:?}")
        };
        (bench, slot, epoch)
    }

    /// And given up after silence, so that its pages are in quarantine.
    fn quarantined() -> (Self, MailboxSlot, Epoch) {
        let (mut bench, slot, epoch) = Self::granted();
        let actions = bench.pass(11);
        let (session, handoff) = (ALICE.0, H);
        assert_eq!(
            actions,
            [
                LenderAction::Restart { request: 1, pages: None, again: true },
                LenderAction::Reclaim { session, handoff, slot, epoch }
            ]
        );
        (bench, slot, epoch)
    }

    fn on(&mut self, event: LenderEvent) -> Actions {
        let mut actions = vec![];
        self.lender.on(event, self.now, &mut actions);
        actions
    }

    fn says(&mut self, (session, worker): (SessionId, WorkerId), message: ToDecode) -> Actions {
        self.on(LenderEvent::Message { session, worker, message })
    }

    fn claim(&mut self, who: (SessionId, WorkerId), handoff: HandoffId) -> Actions {
        self.says(who, ToDecode::Claim { handoff })
    }

    fn poll(&mut self) -> Actions {
        let mut actions = vec![];
        self.lender.poll(|slot| self.mailbox[slot.0 as usize], self.now, &mut actions);
        actions
    }

    /// Seconds, looking at the clock once in each.
    fn pass(&mut self, seconds: u32) -> Actions {
        let mut all = vec![];
        for _ in 0..seconds {
            self.now += SECOND;
            all.extend(self.on(LenderEvent::Tick));
        }
        all
    }
}

fn back(outcome: Outcome) -> Actions {
    let again = !matches!(outcome, Outcome::Failed | Outcome::Expired);
    vec![LenderAction::Restart { request: 1, pages: Some("pages"), again }, LenderAction::Count(outcome)]
}

/// The same, of a job that nobody claimed.
fn unclaimed() -> Actions {
    let mut actions = vec![LenderAction::Unclaimed { handoff: H }];
    actions.extend(back(Outcome::Expired));
    actions
}

fn freed(outcome: Outcome) -> Actions {
    vec![LenderAction::Free { pages: "pages" }, LenderAction::Count(outcome)]
}

/// What follows when Alice gives them back herself: the transport hears of it first.
fn given_back((slot, epoch): (MailboxSlot, Epoch), then: Actions) -> Actions {
    let mut actions = vec![LenderAction::Forget { session: ALICE.0, slot, epoch }];
    actions.extend(then);
    actions
}

#[test]
fn a_completed_handoff_resumes_its_request_with_its_pages() {
    let (mut bench, slot, epoch) = Bench::granted();
    assert_eq!(bench.poll(), []);
    bench.mailbox[slot.0 as usize] = MailboxWord::new(epoch, Status::Done);
    assert_eq!(
        bench.poll(),
        [LenderAction::Resume { request: 1, pages: "pages" }, LenderAction::Count(Outcome::Completed)]
    );
    assert_eq!(bench.poll(), []);
    assert_eq!(bench.lender.open(), 0);
}

#[test]
fn a_failed_word_gives_the_pages_back() {
    let (mut bench, slot, epoch) = Bench::granted();
    bench.mailbox[slot.0 as usize] = MailboxWord::new(epoch, Status::Failed);
    assert_eq!(bench.poll(), back(Outcome::Failed));
}

#[test]
fn a_completion_of_an_old_epoch_counts_for_nothing() {
    let (mut bench, slot, epoch) = Bench::granted();
    bench.mailbox[slot.0 as usize] = MailboxWord::new(epoch, Status::Done);
    bench.poll();
    // The word stays where it is; the slot's next loan is of the next epoch.
    bench.lender.lend(HandoffId(8), 2, "more", bench.now).unwrap();
    bench.claim(BOB, HandoffId(8));
    assert_eq!(bench.lender.pages(slot), Some(&"more"));
    assert_eq!(bench.poll(), []);
    bench.mailbox[slot.0 as usize] = MailboxWord::new(epoch.next(), Status::Done);
    assert_eq!(bench.poll().len(), 2);
}

#[test]
fn a_word_before_the_grant_counts_for_nothing() {
    let mut bench = Bench::queued();
    bench.mailbox = [MailboxWord::new(Epoch::FIRST, Status::Done); 2];
    assert_eq!(bench.poll(), []);
}

#[test]
fn there_is_one_grant_in_the_life_of_a_handoff() {
    let (mut bench, slot, epoch) = Bench::granted();
    for who in [ALICE, BOB] {
        let gone = LenderAction::Gone { session: who.0, handoff: H, why: Gone::Claimed };
        assert_eq!(bench.claim(who, H), [gone]);
    }
    bench.on(LenderEvent::SessionClosed { session: ALICE.0 });
    let gone = LenderAction::Gone { session: BOB.0, handoff: H, why: Gone::Claimed };
    assert_eq!(bench.claim(BOB, H), [gone]);
    bench.on(LenderEvent::Revoked { session: ALICE.0, slot, epoch });
    let gone = LenderAction::Gone { session: BOB.0, handoff: H, why: Gone::Unknown };
    assert_eq!(bench.claim(BOB, H), [gone]);
}

#[test]
fn a_stale_job_costs_one_claim() {
    let mut bench = Bench::new();
    let gone = LenderAction::Gone { session: ALICE.0, handoff: HandoffId(99), why: Gone::Unknown };
    assert_eq!(bench.claim(ALICE, HandoffId(99)), [gone]);
}

#[test]
fn nobody_can_write_before_a_grant_so_pages_come_back_at_once() {
    let mut bench = Bench::queued();
    assert_eq!(bench.on(LenderEvent::EnqueueFailed { handoff: H }), back(Outcome::Expired));
    let mut bench = Bench::queued();
    assert_eq!(bench.on(LenderEvent::Withdraw { handoff: H }), freed(Outcome::Expired));
    let mut bench = Bench::queued();
    assert_eq!(bench.pass(29), []);
    assert_eq!(bench.pass(1), unclaimed());
}

#[test]
fn a_job_that_has_gone_from_the_queue_is_not_waited_for_unless_it_was_claimed_before() {
    let mut bench = Bench::queued();
    assert_eq!(bench.on(LenderEvent::JobGone { handoff: H }), unclaimed());
    assert_eq!(bench.on(LenderEvent::JobGone { handoff: H }), []);
    let (mut bench, ..) = Bench::granted();
    assert_eq!(bench.on(LenderEvent::JobGone { handoff: H }), []);
    assert_eq!(bench.lender.open(), 1);
}

#[test]
fn publishing_that_failed_too_late_does_not_matter() {
    let (mut bench, ..) = Bench::granted();
    assert_eq!(bench.on(LenderEvent::EnqueueFailed { handoff: H }), []);
    assert_eq!(bench.lender.open(), 1);
}

#[test]
fn a_silent_holder_costs_the_request_time_and_the_pages_patience() {
    let (mut bench, slot, epoch) = Bench::quarantined();
    assert_eq!(bench.lender.lent().collect::<Vec<_>>(), [(&"pages", true)]);
    // Silent still: fenced, which takes as long as it takes.
    let session = ALICE.0;
    assert_eq!(bench.pass(5), [LenderAction::Fence { session }]);
    assert_eq!(bench.pass(3_600), []);
    assert_eq!(bench.on(LenderEvent::SessionClosed { session }), []);
    assert_eq!(bench.lender.pages(slot), Some(&"pages"));
    assert_eq!(bench.on(LenderEvent::SessionFenced { session }), freed(Outcome::Fenced));
    assert_eq!(bench.on(LenderEvent::Revoked { session, slot, epoch }), []);
}

#[test]
fn signs_of_life_keep_a_loan_for_as_long_as_it_takes() {
    let (mut bench, _, epoch) = Bench::granted();
    for moved in 1..100 {
        assert_eq!(bench.pass(9), []);
        assert_eq!(bench.says(ALICE, ToDecode::Progress { handoff: H, epoch, moved }), []);
    }
    // Those of others do not.
    bench.says(BOB, ToDecode::Progress { handoff: H, epoch, moved: 100 });
    bench.says(ALICE, ToDecode::Progress { handoff: H, epoch: epoch.next(), moved: 100 });
    assert_eq!(bench.pass(10).len(), 2);
}

#[test]
fn a_holder_that_lives_but_does_not_move_is_given_up_as_a_silent_one_is() {
    let (mut bench, slot, epoch) = Bench::granted();
    let alive = |bench: &mut Bench, moved| {
        assert_eq!(bench.pass(2), []);
        assert_eq!(bench.says(ALICE, ToDecode::Progress { handoff: H, epoch, moved }), []);
    };
    // For so long nothing may move, and as long again after it has; that the count begins again is movement.
    for moved in [1, 7, u32::MAX, 3] {
        (0..29).for_each(|_| alive(&mut bench, moved));
    }
    assert_eq!(bench.pass(1), []);
    let (session, handoff) = (ALICE.0, H);
    assert_eq!(
        bench.pass(3),
        [
            LenderAction::Restart { request: 1, pages: None, again: true },
            LenderAction::Reclaim { session, handoff, slot, epoch }
        ]
    );
    // What it says then comes too late.
    bench.says(ALICE, ToDecode::Progress { handoff: H, epoch, moved: 4 });
    assert_eq!(bench.pass(5), [LenderAction::Fence { session }]);
}

#[test]
fn quarantine_ends_by_release_revocation_completion_or_fence() {
    let (mut bench, slot, epoch) = Bench::quarantined();
    let actions = bench.says(ALICE, ToDecode::Released { handoff: H, epoch });
    assert_eq!(actions, given_back((slot, epoch), freed(Outcome::Released)));
    let (mut bench, slot, epoch) = Bench::quarantined();
    assert_eq!(bench.on(LenderEvent::Revoked { session: ALICE.0, slot, epoch }), freed(Outcome::Released));
    let (mut bench, slot, epoch) = Bench::quarantined();
    bench.mailbox[slot.0 as usize] = MailboxWord::new(epoch, Status::Done);
    assert_eq!(bench.poll(), freed(Outcome::Released));
    let (mut bench, ..) = Bench::quarantined();
    assert_eq!(bench.on(LenderEvent::SessionFenced { session: ALICE.0 }), freed(Outcome::Fenced));
}

#[test]
fn only_the_holder_can_give_pages_back() {
    let (mut bench, slot, epoch) = Bench::granted();
    let released = ToDecode::Released { handoff: H, epoch };
    assert_eq!(bench.says(BOB, released.clone()), []);
    assert_eq!(bench.says(ALICE, ToDecode::Released { handoff: H, epoch: epoch.next() }), []);
    assert_eq!(bench.on(LenderEvent::Revoked { session: BOB.0, slot, epoch }), []);
    assert_eq!(bench.on(LenderEvent::Revoked { session: ALICE.0, slot: MailboxSlot(1_000), epoch }), []);
    assert_eq!(bench.on(LenderEvent::SessionFenced { session: BOB.0 }), []);
    assert_eq!(bench.says(ALICE, released), given_back((slot, epoch), back(Outcome::Released)));
}

#[test]
fn pages_that_their_holder_gives_back_are_out_of_the_transport_s_record_before_anybody_has_them() {
    for outcome in [Outcome::Released, Outcome::Failed] {
        let (mut bench, slot, epoch) = Bench::granted();
        let message = match outcome {
            Outcome::Failed => ToDecode::Failed { handoff: H, epoch, reason: "too long".into() },
            _ => ToDecode::Released { handoff: H, epoch },
        };
        assert_eq!(bench.says(ALICE, message.clone()), given_back((slot, epoch), back(outcome)));
        assert_eq!(bench.says(ALICE, message), [], "once");
    }
}

#[test]
fn a_closed_session_starts_the_request_again_and_keeps_the_pages_until_it_is_fenced() {
    let (mut bench, ..) = Bench::granted();
    let session = ALICE.0;
    assert_eq!(
        bench.on(LenderEvent::SessionClosed { session }),
        [LenderAction::Restart { request: 1, pages: None, again: true }]
    );
    assert_eq!(bench.pass(3_600), []);
    assert_eq!(bench.on(LenderEvent::SessionFenced { session }), freed(Outcome::Fenced));
}

#[test]
fn a_lost_lease_is_no_proof_of_death() {
    let (mut bench, slot, epoch) = Bench::granted();
    let actions = bench.on(LenderEvent::WorkerGone { worker: ALICE.1 });
    let (session, handoff) = (ALICE.0, H);
    assert_eq!(
        actions,
        [
            LenderAction::Restart { request: 1, pages: None, again: true },
            LenderAction::Reclaim { session, handoff, slot, epoch }
        ]
    );
    assert_eq!(bench.on(LenderEvent::WorkerGone { worker: ALICE.1 }), []);
    assert_eq!(bench.pass(5), [LenderAction::Fence { session }]);
}

#[test]
fn a_withdrawn_request_is_never_heard_of_again() {
    let (mut bench, slot, epoch) = Bench::granted();
    let (session, handoff) = (ALICE.0, H);
    assert_eq!(
        bench.on(LenderEvent::Withdraw { handoff: H }),
        [LenderAction::Reclaim { session, handoff, slot, epoch }]
    );
    assert_eq!(bench.on(LenderEvent::Withdraw { handoff: H }), []);
    bench.mailbox[slot.0 as usize] = MailboxWord::new(epoch, Status::Done);
    assert_eq!(bench.poll(), freed(Outcome::Released));
}

#[test]
fn without_a_slot_the_pages_come_back() {
    let mut bench = Bench::queued();
    bench.lender.lend(HandoffId(8), 2, "more", bench.now).unwrap();
    assert!(!bench.lender.can_lend());
    assert_eq!(bench.lender.lend(HandoffId(9), 3, "pages", bench.now), Err("pages"));
    // A quarantined loan holds its slot: a late word must not fall on another's.
    bench.claim(ALICE, H);
    bench.on(LenderEvent::Withdraw { handoff: H });
    assert!(!bench.lender.can_lend());
    bench.on(LenderEvent::SessionFenced { session: ALICE.0 });
    assert!(bench.lender.can_lend());
}

#[test]
fn a_leap_of_the_clock_ends_nobody_s_patience() {
    let (mut bench, ..) = Bench::granted();
    bench.now += 3_600 * SECOND;
    assert_eq!(bench.on(LenderEvent::Tick), []);
    bench.now = Duration::ZERO;
    assert_eq!(bench.on(LenderEvent::Tick), []);
    assert_eq!(bench.pass(10).len(), 2);
}

#[test]
fn pages_lent_to_who_measures_come_back_with_the_word_and_count_as_no_handoff() {
    let mut bench = Bench::new();
    let (slot, epoch) = bench.lender.lend_scratch(ALICE.0, ALICE.1, H, "pages", bench.now).unwrap();
    assert_eq!(bench.lender.lent().collect::<Vec<_>>(), [(&"pages", true)]);
    let refused = bench.lender.lend_scratch(BOB.0, BOB.1, HandoffId(8), "others", bench.now);
    assert_eq!(refused, Err("others"), "one at a time");
    bench.mailbox[slot.0 as usize] = MailboxWord::new(epoch, Status::Done);
    assert_eq!(bench.poll(), [LenderAction::Free { pages: "pages" }]);
    assert_eq!(bench.lender.open(), 0);
}

#[test]
fn who_measures_and_falls_silent_is_fenced_before_the_pages_come_back() {
    let mut bench = Bench::new();
    bench.lender.lend_scratch(ALICE.0, ALICE.1, H, "pages", bench.now).unwrap();
    assert_eq!(bench.pass(9), []);
    assert_eq!(bench.pass(2), [LenderAction::Fence { session: ALICE.0 }]);
    assert_eq!(bench.on(LenderEvent::SessionClosed { session: ALICE.0 }), []);
    assert_eq!(bench.on(LenderEvent::WorkerGone { worker: ALICE.1 }), []);
    assert_eq!(bench.on(LenderEvent::SessionFenced { session: ALICE.0 }), [LenderAction::Free { pages: "pages" }]);
}
