//! A decode worker: a real [`Lender`], pages with contents, and a ledger of its own of who may write to which.

use std::collections::VecDeque;

use engine::handoff::{
    Epoch, Grant, HANDOFFS_MAX, HandoffId, Lender, LenderAction, LenderEvent, LenderTimeouts, Limits, MailboxSlot,
    MailboxWord, Outcome, Policy, SessionId, Status, ToDecode, ToPrefill, WorkerId,
};

use crate::{
    model::{Content, LAYERS, PAGE_TOKENS},
    mutation::Mutation,
    wire::{Transport, Word, Write},
    world::{Ending, Event, Life, LinkId, MS, Process, World, note},
};

/// Pages of a worker. Few, so that they are scarce, and a late write meets another request.
const PAGES: usize = 20;
const SLOTS: usize = 4;
const TIMEOUTS: LenderTimeouts = LenderTimeouts {
    unclaimed: std::time::Duration::from_millis(300),
    silent: std::time::Duration::from_millis(120),
    stalled: std::time::Duration::from_millis(250),
    release: std::time::Duration::from_millis(60),
};

pub(crate) struct Decode {
    pub(crate) life: Life,
    pub(crate) lender: Lender<usize, Vec<u32>>,
    pub(crate) limits: Limits,
    pub(crate) memory: [[Content; LAYERS]; PAGES],
    mailbox: [MailboxWord; SLOTS],
    /// Kept apart from the lender's own books: who may write to a page.
    ledger: [Option<Loan>; PAGES],
    /// What the transport accepts.
    lends: Vec<(Loan, Vec<u32>)>,
    pub(crate) free: Vec<u32>,
    pub(crate) published: Vec<Published>,
    /// In order of arrival.
    pub(crate) requests: Vec<Request>,
    /// Handoffs whose jobs the queue said that it has taken.
    pub(crate) enqueued: Vec<HandoffId>,
    inbox: VecDeque<Heard>,
    actions: Vec<LenderAction<usize, Vec<u32>>>,
}

/// A grant, as this worker's memory knows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Loan {
    link: LinkId,
    slot: MailboxSlot,
    epoch: Epoch,
}

/// A full page of the prefix index.
pub(crate) struct Published {
    pub(crate) hash: u64,
    pub(crate) page: u32,
    pub(crate) users: u32,
}

pub(crate) struct Request {
    pub(crate) client: usize,
    /// Pages of the prefix index it uses: its first ones.
    pub(crate) shared: Vec<u32>,
    /// Pages of its own, unless they are lent.
    pub(crate) own: Vec<u32>,
    pub(crate) state: State,
    pub(crate) lost_handoffs: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// For pages.
    Waiting,
    HandedOff {
        handoff: HandoffId,
        granted: bool,
    },
    Prefilling {
        until: u64,
    },
    Decoding {
        position: usize,
        until: u64,
    },
}

/// What the engine of a decode worker finds when it looks.
pub(crate) enum Heard {
    Message { session: SessionId, worker: WorkerId, message: Box<ToDecode> },
    Revoked { session: SessionId, slot: MailboxSlot, epoch: Epoch },
    Closed { session: SessionId },
    Fenced { session: SessionId },
    PublishFailed { handoff: HandoffId },
    WorkerGone { worker: WorkerId },
    HungUp { client: usize },
}

impl Decode {
    pub(crate) fn new(world: &mut World) -> Self {
        let policy = match world.rng.below(4) {
            0 => Policy::Threshold,
            1 => Policy::Auto,
            _ => Policy::Always,
        };
        Self {
            life: Life::new(world.new_worker()),
            lender: Lender::new(SLOTS as u32, TIMEOUTS),
            limits: Limits { policy, max_local_prefill_length: 8, ..Limits::default() },
            memory: [[0; LAYERS]; PAGES],
            mailbox: [MailboxWord::EMPTY; SLOTS],
            ledger: [None; PAGES],
            lends: vec![],
            free: (0..PAGES as u32).collect(),
            published: vec![],
            requests: vec![],
            enqueued: vec![],
            inbox: VecDeque::new(),
            actions: vec![],
        }
    }

    /// Whether the transport would let this through.
    pub(crate) fn accepts(&self, link: LinkId, slot: MailboxSlot, epoch: Epoch, page: Option<u32>) -> bool {
        let loan = Loan { link, slot, epoch };
        let mut lends = self.lends.iter().filter(|(lent, _)| *lent == loan);
        lends.any(|(_, pages)| page.is_none_or(|page| pages.contains(&page)))
    }

    pub(crate) fn revoke(&mut self, link: LinkId, slot: MailboxSlot, epoch: Epoch) {
        self.lends.retain(|(lent, _)| *lent != Loan { link, slot, epoch });
    }

    pub(crate) fn forget_session(&mut self, link: LinkId) {
        self.lends.retain(|(lent, _)| lent.link != link);
    }

    /// Whether somebody waits for this handoff to be claimed.
    pub(crate) fn offers(&self, handoff: HandoffId) -> bool {
        self.requests.iter().any(|request| request.state == State::HandedOff { handoff, granted: false })
    }

    pub(crate) fn page(&mut self) -> Option<u32> {
        self.free.pop().or_else(|| {
            let unused = self.published.iter().position(|published| published.users == 0)?;
            Some(self.published.remove(unused).page)
        })
    }
}

impl World {
    pub(crate) fn tell_decode(&mut self, decode: usize, heard: Heard) {
        self.decodes[decode].inbox.push_back(heard);
        self.wake(Process::Decode(decode));
    }

    pub(crate) fn publish_failed(&mut self, decode: usize, life: u32, handoff: HandoffId) {
        if self.decodes[decode].life.number == life {
            self.tell_decode(decode, Heard::PublishFailed { handoff });
        }
    }

    pub(crate) fn lease_ends(&mut self, worker: WorkerId) {
        for decode in 0..self.decodes.len() {
            if self.decodes[decode].life.alive {
                self.tell_decode(decode, Heard::WorkerGone { worker });
            }
        }
    }

    /// One round of the engine thread. `true` if there will be something to do in the next.
    pub(crate) fn decode_turn(&mut self, decode: usize) -> bool {
        // Words and messages race; either may be seen first.
        let words_first = self.rng.per_mille(500);
        if words_first {
            self.poll(decode);
        }
        while let Some(heard) = self.decodes[decode].inbox.pop_front() {
            let event = match heard {
                Heard::Message { session, worker, message } => {
                    LenderEvent::Message { session, worker, message: *message }
                }
                Heard::Revoked { session, slot, epoch } => LenderEvent::Revoked { session, slot, epoch },
                Heard::Closed { session } => LenderEvent::SessionClosed { session },
                Heard::Fenced { session } => LenderEvent::SessionFenced { session },
                Heard::PublishFailed { handoff } => LenderEvent::EnqueueFailed { handoff },
                Heard::WorkerGone { worker } => self.lease_lost(decode, worker),
                Heard::HungUp { client } => {
                    self.forget(decode, client);
                    continue;
                }
            };
            self.inform(decode, event);
        }
        if !words_first {
            self.poll(decode);
        }
        for handoff in self.gone_jobs(decode) {
            self.inform(decode, LenderEvent::JobGone { handoff });
        }
        self.inform(decode, LenderEvent::Tick);
        self.advance(decode);
        self.check_pages(decode);
        let Decode { requests, lender, inbox, .. } = &self.decodes[decode];
        !requests.is_empty() || lender.open() > 0 || !inbox.is_empty()
    }

    /// Handoffs that wait to be claimed although no job is left on the queue, which has taken theirs.
    fn gone_jobs(&self, decode: usize) -> Vec<HandoffId> {
        if self.now < self.queue.down_until || self.queue.len() > 0 {
            return vec![];
        }
        let Decode { requests, enqueued, .. } = &self.decodes[decode];
        let unclaimed = |request: &Request| match request.state {
            State::HandedOff { handoff, granted: false } if enqueued.contains(&handoff) => Some(handoff),
            _ => None,
        };
        requests.iter().filter_map(unclaimed).collect()
    }

    fn poll(&mut self, decode: usize) {
        let unchecked = self.mutation == Some(Mutation::EpochUnchecked);
        let worker = &mut self.decodes[decode];
        let now = worker.life.clock(self.now);
        let (mailbox, ledger) = (&worker.mailbox, &worker.ledger);
        let load = |slot: MailboxSlot| {
            let word = mailbox[slot.0 as usize];
            let current = ledger.iter().flatten().find(|loan| loan.slot == slot);
            match current {
                Some(loan) if unchecked && word != MailboxWord::EMPTY => MailboxWord::new(loan.epoch, Status::Done),
                _ => word,
            }
        };
        let mut actions = std::mem::take(&mut worker.actions);
        worker.lender.poll(load, now, &mut actions);
        self.carry_out(decode, actions);
    }

    pub(crate) fn inform(&mut self, decode: usize, event: LenderEvent) {
        let worker = &mut self.decodes[decode];
        let now = worker.life.clock(self.now);
        let mut actions = std::mem::take(&mut worker.actions);
        worker.lender.on(event, now, &mut actions);
        self.carry_out(decode, actions);
    }

    fn carry_out(&mut self, decode: usize, mut actions: Vec<LenderAction<usize, Vec<u32>>>) {
        for action in actions.drain(..) {
            self.carry_out_one(decode, action);
        }
        self.decodes[decode].actions = actions;
    }

    fn carry_out_one(&mut self, decode: usize, action: LenderAction<usize, Vec<u32>>) {
        note!(self, "decode {decode}: {action:?}");
        match action {
            LenderAction::Grant { session, handoff, slot, epoch, request } => {
                self.tally.granted += 1;
                self.grant(decode, session, handoff, slot, epoch, request);
            }
            LenderAction::Unclaimed { .. } => {}
            LenderAction::Gone { session, handoff, why } => {
                if self.mutation == Some(Mutation::DoubleGrant) && self.grant_again(decode, session, handoff) {
                    return;
                }
                self.say_to_prefill(session, ToPrefill::Gone { handoff, why });
            }
            LenderAction::Reclaim { session, handoff, slot, epoch } => {
                self.say_to_prefill(session, ToPrefill::Release { handoff, epoch });
                self.revoke(session, slot, epoch);
            }
            LenderAction::Forget { session, slot, epoch } => {
                if self.mutation != Some(Mutation::GivenBackAndKept) {
                    self.decodes[decode].revoke(session.0 as LinkId, slot, epoch);
                }
            }
            LenderAction::Fence { session } => self.hang_up_decode(session.0 as LinkId),
            LenderAction::Resume { request, pages } => {
                self.unlend(decode, &pages);
                let until = self.now + self.rng.within(MS, 10 * MS);
                let Some(request) = self.handed_off(decode, request) else { return };
                request.own = pages;
                request.state = State::Decoding { position: 0, until };
            }
            LenderAction::Restart { request, pages, again } => {
                if let Some(pages) = &pages {
                    self.unlend(decode, pages);
                }
                let Some(request) = self.handed_off(decode, request) else { return };
                request.state = State::Waiting;
                // What nobody may try again is done here.
                request.lost_handoffs += if again { 1 } else { HANDOFFS_MAX };
                let (client, shared, own) =
                    (request.client, std::mem::take(&mut request.shared), pages.unwrap_or_default());
                let released = Request { client, shared, own, state: State::Waiting, lost_handoffs: 0 };
                self.give_back(decode, released, false);
            }
            LenderAction::Free { pages } => {
                self.unlend(decode, &pages);
                self.decodes[decode].free.extend(pages);
            }
            LenderAction::Count(outcome) => match outcome {
                Outcome::Completed => self.tally.completed += 1,
                Outcome::Released => self.tally.released += 1,
                Outcome::Failed => self.tally.failed += 1,
                Outcome::Fenced => self.tally.fenced += 1,
                Outcome::Expired => self.tally.expired += 1,
            },
        }
    }

    fn handed_off(&mut self, decode: usize, client: usize) -> Option<&mut Request> {
        let requests = &mut self.decodes[decode].requests;
        let waiting = |request: &Request| request.client == client && matches!(request.state, State::HandedOff { .. });
        let index = requests.iter().position(waiting);
        if index.is_none() {
            self.fail(format!("the lender speaks of client {client}, who does not wait for it"));
        }
        index.map(|index| &mut self.decodes[decode].requests[index])
    }

    fn grant(
        &mut self,
        decode: usize,
        session: SessionId,
        handoff: HandoffId,
        slot: MailboxSlot,
        epoch: Epoch,
        client: usize,
    ) {
        let prompt = self.clients[client].prompt.clone();
        let link = session.0 as LinkId;
        let open = self.links[link].decode_open;
        let Some(request) = self.handed_off(decode, client) else { return };
        request.state = State::HandedOff { handoff, granted: true };
        let first = (request.shared.len() * PAGE_TOKENS) as u32;
        let worker = &mut self.decodes[decode];
        let Some(pages) = worker.lender.pages(slot).cloned() else {
            return self.fail("a grant without pages");
        };
        let tokens = prompt[..prompt.len() - 1].to_vec();
        let loan = Loan { link, slot, epoch };
        if open {
            for &page in &pages {
                worker.ledger[page as usize] = Some(loan);
            }
            worker.lends.push((loan, pages.clone()));
        }
        self.say_to_prefill(
            session,
            ToPrefill::Grant(Grant { handoff, slot, epoch, tokens, salt: None, first, pages }),
        );
    }

    /// The mistake of granting to whoever asks.
    fn grant_again(&mut self, decode: usize, session: SessionId, handoff: HandoffId) -> bool {
        let worker = &self.decodes[decode];
        let granted = State::HandedOff { handoff, granted: true };
        let Some(request) = worker.requests.iter().find(|request| request.state == granted) else { return false };
        let client = request.client;
        let of_client = |slot: &u32| worker.lender.pages(MailboxSlot(*slot)).is_some_and(|pages| !pages.is_empty());
        let loans = (0..SLOTS as u32).filter(of_client).map(MailboxSlot);
        let first = (request.shared.len() * PAGE_TOKENS) as u32;
        let wanted = (self.clients[client].prompt.len() - 1 - first as usize).div_ceil(PAGE_TOKENS);
        let like = |&slot: &MailboxSlot| worker.lender.pages(slot).is_some_and(|pages| pages.len() == wanted);
        let Some(slot) = loans.into_iter().find(like) else { return false };
        let Some(pages) = worker.lender.pages(slot).cloned() else { return false };
        let Some(loan) = worker.ledger[pages[0] as usize] else { return false };
        let tokens = self.clients[client].prompt[..self.clients[client].prompt.len() - 1].to_vec();
        let second = Loan { link: session.0 as LinkId, ..loan };
        self.decodes[decode].lends.push((second, pages.clone()));
        let grant = Grant { handoff, slot, epoch: loan.epoch, tokens, salt: None, first, pages };
        self.say_to_prefill(session, ToPrefill::Grant(grant));
        true
    }

    fn lease_lost(&mut self, decode: usize, worker: WorkerId) -> LenderEvent {
        if self.mutation == Some(Mutation::LeaseLossIsDeath) {
            let mine = |link: &crate::wire::Link| link.decode == decode && link.worker == worker && !link.dead;
            if let Some(link) = self.links.iter().rposition(mine) {
                return LenderEvent::SessionFenced { session: SessionId(link as u64) };
            }
        }
        LenderEvent::WorkerGone { worker }
    }

    fn unlend(&mut self, decode: usize, pages: &[u32]) {
        for &page in pages {
            self.decodes[decode].ledger[page as usize] = None;
        }
    }

    /// A write of a prefill worker reaches memory. It must be to a page lent to that very worker under that very grant.
    pub(crate) fn write(&mut self, link: LinkId, write: Write) {
        let decode = self.links[link].decode;
        if self.links[link].dead {
            return;
        }
        self.tally.writes += 1;
        let Write { slot, epoch, page, layer, content, .. } = write;
        let worker = &mut self.decodes[decode];
        worker.memory[page as usize][layer] = content;
        if worker.ledger[page as usize] != Some(Loan { link, slot, epoch }) {
            let holder = worker.ledger[page as usize];
            self.fail(format!("decode {decode}: session {link} writes {write:?}, but the page is lent to {holder:?}"));
        }
    }

    pub(crate) fn post(&mut self, link: LinkId, Word { slot, word, .. }: Word) {
        let decode = self.links[link].decode;
        if !self.links[link].dead {
            note!(self, "session {link} posts {word:?} in {slot:?}");
            self.decodes[decode].mailbox[slot.0 as usize] = word;
            self.wake(Process::Decode(decode));
        }
    }

    /// Free, published, owned, lent and quarantined pages are all pages, each once.
    fn check_pages(&mut self, decode: usize) {
        let Decode { free, published, requests, lender, .. } = &self.decodes[decode];
        let lent = lender.lent().flat_map(|(pages, _)| pages);
        let owned = requests.iter().flat_map(|request| &request.own);
        let published = published.iter().map(|published| &published.page);
        let mut seen = 0u64;
        let mut twice = 0u64;
        for &page in free.iter().chain(published).chain(owned).chain(lent) {
            twice |= seen & 1 << page;
            seen |= 1 << page;
        }
        if seen != (1 << PAGES) - 1 || twice != 0 {
            self.fail(format!("decode {decode}: pages seen {seen:b}, and twice {twice:b}"));
        }
        self.check_record(decode);
    }

    /// Where the receiver writes, its record of what may be written is the fence: no loan is in it that is over.
    fn check_record(&mut self, decode: usize) {
        let Decode { lends, ledger, .. } = &self.decodes[decode];
        let over = lends.iter().find(|(loan, pages)| {
            self.links[loan.link].transport == Transport::Tcp
                && pages.iter().any(|&page| ledger[page as usize] != Some(*loan))
        });
        if let Some((loan, _)) = over {
            let what = format!("decode {decode} would let {loan:?} be written under, which is over");
            self.fail(what);
        }
    }

    pub(crate) fn check_decode_rests(&mut self, decode: usize) {
        let Decode { requests, lender, published, ledger, .. } = &self.decodes[decode];
        let (waiting, open) = (requests.len(), lender.open());
        let used = published.iter().filter(|published| published.users > 0).count();
        let lent = ledger.iter().flatten().count();
        if waiting + open + used + lent > 0 {
            self.fail(format!(
                "decode {decode} at rest: {waiting} requests, {open} loans, {used} pages used, {lent} lent"
            ));
        }
        self.check_pages(decode);
    }

    /// A decode worker's process is gone; a frontend takes its requests elsewhere, or tells their clients.
    pub(crate) fn kill_decode(&mut self, decode: usize) {
        note!(self, "decode {decode} dies");
        let requests = std::mem::take(&mut self.decodes[decode].requests);
        let life = &mut self.decodes[decode].life;
        life.die();
        self.decode_died(decode);
        for Request { client, .. } in requests {
            if self.rng.per_mille(500) {
                let after = self.rng.within(MS, 50 * MS);
                self.at(self.now + after, Event::Arrive(client));
            } else if self.clients[client].ended.is_none() {
                self.end(client, Ending::Error);
            }
        }
    }

    pub(crate) fn restart_decode(&mut self, decode: usize) {
        let mut born = Decode::new(self);
        born.life.number = self.decodes[decode].life.number + 1;
        born.limits = self.decodes[decode].limits;
        self.decodes[decode] = born;
        note!(self, "decode {decode} is back as {:?}", self.decodes[decode].life.worker);
    }
}
