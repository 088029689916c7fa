//! A prefill worker: a real [`Borrower`], an engine that computes chunk by chunk, and writers (in `wire`) that take
//! their time.

use std::{collections::VecDeque, rc::Rc, time::Duration};

use engine::handoff::{
    Borrower, BorrowerAction, BorrowerConfig, BorrowerEvent, BorrowerTimeouts, DeliveryId, Grant, HandoffId, SessionId,
    ToDecode, ToPrefill, WorkerId,
};

use crate::{
    model::{LAYERS, PAGE_TOKENS, content, page_hashes},
    mutation::Mutation,
    wire::{Task, Word, Write},
    world::{Event, Life, MS, Process, World, note},
};

pub(crate) const MODEL_KEY: &str = "simulated";

pub(crate) struct Prefill {
    pub(crate) life: Life,
    pub(crate) borrower: Borrower,
    computing: Vec<Computing>,
    /// Nothing is computed before this.
    pub(crate) hung_until: u64,
    inbox: VecDeque<Heard>,
    draining: bool,
    actions: Vec<BorrowerAction>,
}

/// A prompt that is being computed.
struct Computing {
    session: SessionId,
    grant: Grant,
    hashes: Vec<u64>,
    /// Pages of the grant computed so far.
    pages: usize,
}

/// What the engine of a prefill worker finds when it looks.
pub(crate) enum Heard {
    Connected { decode: WorkerId, session: SessionId },
    ConnectFailed { decode: WorkerId, gone: bool },
    Message { session: SessionId, message: Box<ToPrefill> },
    Closed { session: SessionId },
    Wrote { handoff: HandoffId, writes: u64 },
    WriteFailed { handoff: HandoffId },
    Posted { handoff: HandoffId },
    Delivered { delivery: DeliveryId, attempt: u32, payload: Rc<[u8]> },
}

impl Prefill {
    pub(crate) fn new(world: &mut World) -> Self {
        let config = BorrowerConfig {
            model_key: MODEL_KEY.into(),
            block_size: PAGE_TOKENS as u32,
            jobs_max: world.rng.within(1, 4) as usize,
            timeouts: BorrowerTimeouts { claim: Duration::from_millis(80), keep_alive: Duration::from_millis(30) },
        };
        Self {
            life: Life::new(world.new_worker()),
            borrower: Borrower::new(config),
            computing: vec![],
            hung_until: 0,
            inbox: VecDeque::new(),
            draining: false,
            actions: vec![],
        }
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.borrower.held() > 0 || !self.computing.is_empty() || !self.inbox.is_empty()
    }
}

impl World {
    pub(crate) fn tell_prefill(&mut self, prefill: usize, heard: Heard) {
        self.prefills[prefill].inbox.push_back(heard);
        self.wake(Process::Prefill(prefill));
    }

    pub(crate) fn deliver(&mut self, prefill: usize, life: u32, delivery: DeliveryId, attempt: u32, payload: Rc<[u8]>) {
        // If nobody is there any more, the job waits for its ack, in vain.
        if self.prefills[prefill].life.alive && self.prefills[prefill].life.number == life {
            self.tell_prefill(prefill, Heard::Delivered { delivery, attempt, payload });
        }
    }

    /// One round of the engine thread. `true` if there will be something to do in the next.
    pub(crate) fn prefill_turn(&mut self, prefill: usize) -> bool {
        while let Some(heard) = self.prefills[prefill].inbox.pop_front() {
            let event = match heard {
                Heard::Connected { decode, session } => BorrowerEvent::Connected { decode, session },
                Heard::ConnectFailed { decode, gone } => {
                    BorrowerEvent::ConnectFailed { decode, gone, pause: Duration::ZERO }
                }
                Heard::Message { session, message } => BorrowerEvent::Message { session, message: *message },
                Heard::Closed { session } => BorrowerEvent::SessionClosed { session },
                Heard::Wrote { handoff, writes } => BorrowerEvent::Wrote { handoff, writes },
                Heard::WriteFailed { handoff } => BorrowerEvent::WriteFailed { handoff },
                Heard::Posted { handoff } => BorrowerEvent::Posted { handoff },
                Heard::Delivered { delivery, attempt, payload } => {
                    self.take_job(prefill, delivery, attempt, &payload);
                    continue;
                }
            };
            self.inform_borrower(prefill, event);
        }
        self.compute(prefill);
        self.inform_borrower(prefill, BorrowerEvent::Tick);
        self.pull(prefill);
        let worker = &self.prefills[prefill];
        if worker.draining && worker.borrower.held() == 0 {
            self.kill_prefill(prefill);
            let after = self.rng.within(10 * MS, 100 * MS);
            self.at(self.now + after, Event::Restart(Process::Prefill(prefill)));
            return false;
        }
        worker.is_busy() || self.queue.len() > 0
    }

    fn pull(&mut self, prefill: usize) {
        if self.prefills[prefill].borrower.room() == 0 || self.rng.per_mille(300) {
            return;
        }
        if let Some((delivery, attempt, payload)) = self.queue.pull(self.now) {
            let life = self.prefills[prefill].life.number;
            note!(self, "prefill {prefill} pulls {delivery:?}");
            let after = self.rng.within(100, 3 * MS);
            self.at(self.now + after, Event::Deliver { prefill, life, delivery, attempt, payload });
        }
    }

    fn take_job(&mut self, prefill: usize, delivery: DeliveryId, attempt: u32, payload: &[u8]) {
        if self.mutation == Some(Mutation::EarlyAck) {
            self.ack(prefill, delivery);
        }
        let worker = &mut self.prefills[prefill];
        let now = worker.life.clock(self.now);
        let mut actions = std::mem::take(&mut worker.actions);
        worker.borrower.deliver(delivery, attempt, payload, now, &mut actions);
        self.carry_out_all(prefill, actions);
    }

    pub(crate) fn inform_borrower(&mut self, prefill: usize, event: BorrowerEvent) {
        let worker = &mut self.prefills[prefill];
        let now = worker.life.clock(self.now);
        let mut actions = std::mem::take(&mut worker.actions);
        worker.borrower.on(event, now, &mut actions);
        self.carry_out_all(prefill, actions);
    }

    fn carry_out_all(&mut self, prefill: usize, mut actions: Vec<BorrowerAction>) {
        for action in actions.drain(..) {
            self.obey(prefill, action);
        }
        self.prefills[prefill].actions = actions;
    }

    fn obey(&mut self, prefill: usize, action: BorrowerAction) {
        note!(self, "prefill {prefill}: {action:?}");
        match action {
            BorrowerAction::Connect { decode, addresses } => {
                let life = self.prefills[prefill].life.number;
                let place = addresses.as_u64().unwrap_or(0) as usize;
                let after = self.rng.within(200, 5 * MS);
                self.at(self.now + after, Event::Connect { prefill, life, place, decode });
            }
            BorrowerAction::Send { session, mut message } => {
                if let ToDecode::Progress { moved, .. } = &mut message
                    && self.mutation == Some(Mutation::AlwaysMoving)
                {
                    *moved = self.now as u32;
                }
                self.say_to_decode(session, message);
            }
            BorrowerAction::Prefill { session, grant } => {
                let hashes = page_hashes(&grant.tokens);
                self.prefills[prefill].computing.push(Computing { session, grant, hashes, pages: 0 });
            }
            BorrowerAction::Cancel { handoff } => self.stop(prefill, handoff),
            BorrowerAction::Complete { session, handoff, slot, word } => {
                let grant = &self.prefills[prefill].computing;
                let epoch = grant.iter().find(|computing| computing.grant.handoff == handoff);
                let Some(epoch) = epoch.map(|computing| computing.grant.epoch) else {
                    return self.fail("a prefill worker completes what it does not compute");
                };
                self.prefills[prefill].computing.retain(|computing| computing.grant.handoff != handoff);
                self.hand_to_writer(session, Task::Word(Word { handoff, slot, epoch, word }));
            }
            BorrowerAction::Ack { delivery } => {
                if self.mutation != Some(Mutation::EarlyAck) {
                    self.ack(prefill, delivery);
                }
            }
            BorrowerAction::Nak { delivery, delay } => {
                if !self.rng.per_mille(20) {
                    let until = self.now + delay.as_micros() as u64;
                    self.queue.postpone(delivery, until, self.now);
                }
            }
            BorrowerAction::InProgress { delivery } => {
                self.queue.postpone(delivery, self.now + crate::queue::ACK_WAIT, self.now);
            }
            BorrowerAction::Forget { .. } | BorrowerAction::Refuse { .. } => {}
        }
    }

    /// Takes a job off the queue, which nobody may be waiting for, or be at work on, any more.
    fn ack(&mut self, prefill: usize, delivery: DeliveryId) {
        if self.rng.per_mille(20) {
            return;
        }
        let Some(handoff) = self.queue.ack(delivery, self.now).and_then(|job| job.handoff) else { return };
        if self.decodes.iter().any(|decode| decode.life.alive && decode.offers(handoff)) {
            self.fail(format!("{handoff:?} was acked while its job was on offer"));
        }
        let mut computing = self.prefills[prefill].computing.iter();
        if computing.any(|computing| computing.grant.handoff == handoff) || self.is_writing(prefill, handoff) {
            self.fail(format!("{handoff:?} was acked before it was completed"));
        }
    }

    fn stop(&mut self, prefill: usize, handoff: HandoffId) {
        let computing = &mut self.prefills[prefill].computing;
        let Some(place) = computing.iter().position(|computing| computing.grant.handoff == handoff) else { return };
        let session = computing.remove(place).session;
        if self.mutation == Some(Mutation::ReleasedWhileWriting) {
            self.tell_prefill(prefill, Heard::Wrote { handoff, writes: u64::MAX });
        } else if self.rng.per_mille(500) {
            let writes = self.discard(session, handoff);
            self.tell_prefill(prefill, Heard::Wrote { handoff, writes });
        }
    }

    /// A step: the next chunk of some of the prompts.
    fn compute(&mut self, prefill: usize) {
        if self.now < self.prefills[prefill].hung_until {
            return;
        }
        let handoffs: Vec<_> =
            self.prefills[prefill].computing.iter().map(|computing| computing.grant.handoff).collect();
        for handoff in handoffs {
            if self.rng.per_mille(400) {
                continue;
            }
            if self.rng.per_mille(3) {
                let reason = "out of pages".into();
                self.inform_borrower(prefill, BorrowerEvent::Refused { handoff, reason });
                continue;
            }
            let chunk = self.rng.within(1, 4) as usize;
            let Some((writes, tokens)) = self.compute_chunk(prefill, handoff, chunk) else { continue };
            self.inform_borrower(prefill, BorrowerEvent::Writing { handoff, writes });
            self.inform_borrower(prefill, BorrowerEvent::Computed { handoff, tokens });
        }
    }

    /// Hands the writer a chunk, layer by layer. The writes it took, and the tokens computed by now.
    fn compute_chunk(&mut self, prefill: usize, handoff: HandoffId, chunk: usize) -> Option<(u64, u32)> {
        let computing = &mut self.prefills[prefill].computing;
        let computing = computing.iter_mut().find(|computing| computing.grant.handoff == handoff)?;
        let Grant { slot, epoch, first, .. } = computing.grant;
        let session = computing.session;
        let first_page = first as usize / PAGE_TOKENS;
        let from = computing.pages;
        let to = (from + chunk).min(computing.grant.pages.len());
        computing.pages = to;
        let tokens = ((first_page + to) * PAGE_TOKENS).min(computing.grant.tokens.len()) as u32;
        let pages = &computing.grant.pages[from..to];
        let hashes = &computing.hashes[first_page + from..first_page + to];
        let written: Vec<_> = pages.iter().copied().zip(hashes.iter().copied()).collect();
        let mut writes = 0;
        for layer in 0..LAYERS {
            for &(page, hash) in &written {
                let write = Write { handoff, slot, epoch, page, layer, content: content(hash, layer) };
                writes += u64::from(self.hand_to_writer(session, Task::Write(write)));
            }
        }
        Some((writes, tokens))
    }

    pub(crate) fn kill_prefill(&mut self, prefill: usize) {
        note!(self, "prefill {prefill} dies");
        let worker = &mut self.prefills[prefill];
        worker.life.die();
        worker.inbox.clear();
        worker.computing.clear();
        let gone = worker.life.worker;
        self.prefill_died(prefill);
        let lease = self.rng.within(10 * MS, 200 * MS);
        self.at(self.now + lease, Event::LeaseEnds(gone));
    }

    pub(crate) fn drain_prefill(&mut self, prefill: usize) {
        note!(self, "prefill {prefill} drains");
        self.prefills[prefill].draining = true;
        self.inform_borrower(prefill, BorrowerEvent::Drain);
        self.wake(Process::Prefill(prefill));
    }

    pub(crate) fn restart_prefill(&mut self, prefill: usize) {
        let mut born = Prefill::new(self);
        born.life.number = self.prefills[prefill].life.number + 1;
        self.prefills[prefill] = born;
        note!(self, "prefill {prefill} is back as {:?}", self.prefills[prefill].life.worker);
        self.wake(Process::Prefill(prefill));
    }
}
