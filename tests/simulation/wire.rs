//! Sessions. Over TCP everything is one ordered stream, and the receiver writes to memory, into pages it knows to be
//! lent. Over shared memory messages are a stream, and the prefill worker's writer writes to memory, wherever it likes.
//! Over RDMA they are a stream too, and what the writer posts is on its way beside it, and lands in any order, whatever
//! becomes of the stream or the writer's process, until the decode worker's adapter is told to refuse it.

use std::collections::VecDeque;

use engine::handoff::{Epoch, HandoffId, MailboxSlot, MailboxWord, SessionId, ToDecode, ToPrefill, WorkerId};

use crate::{
    decode::Heard,
    faults::Strike,
    model::Content,
    mutation::Mutation,
    prefill,
    world::{Cargo, Event, LinkId, MS, Process, World, note},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Transport {
    SharedMemory,
    Rdma,
    Tcp,
}

pub(crate) struct Link {
    pub(crate) decode: usize,
    pub(crate) prefill: usize,
    /// Who the prefill worker said it was.
    pub(crate) worker: WorkerId,
    pub(crate) transport: Transport,
    pub(crate) decode_open: bool,
    pub(crate) prefill_open: bool,
    /// The decode worker it led to is no more, nor is its memory.
    pub(crate) dead: bool,
    /// Broken in the middle: what is under way is lost.
    cut: bool,
    /// Nothing arrives before this.
    pub(crate) parted_until: u64,
    /// When the last thing sent each way arrives: later ones arrive later.
    to_decode: u64,
    to_prefill: u64,
    /// What the prefill worker's writer has before it.
    writer: VecDeque<Task>,
    /// What it has posted to its adapter, and when all of it has landed.
    under_way: Vec<(u64, Task)>,
    posted: u64,
    to_memory: u64,
    /// The decode worker's adapter refuses what still comes.
    refused: bool,
    /// Whose page it wrote, or posted, last.
    wrote: Option<HandoffId>,
    /// Loans taken back: the writer does nothing more for them.
    revoked: Vec<(MailboxSlot, Epoch)>,
    stepping: bool,
}

impl Link {
    /// What is not done yet.
    fn tasks(&self) -> impl Iterator<Item = &Task> {
        self.writer.iter().chain(self.under_way.iter().map(|(_, task)| task))
    }
}

/// What a writer does, in order.
pub(crate) enum Task {
    Write(Write),
    Word(Word),
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Write {
    pub(crate) handoff: HandoffId,
    pub(crate) slot: MailboxSlot,
    pub(crate) epoch: Epoch,
    pub(crate) page: u32,
    pub(crate) layer: usize,
    pub(crate) content: Content,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Word {
    pub(crate) handoff: HandoffId,
    pub(crate) slot: MailboxSlot,
    pub(crate) epoch: Epoch,
    pub(crate) word: MailboxWord,
}

impl Task {
    pub(crate) fn handoff(&self) -> HandoffId {
        match self {
            Self::Write(Write { handoff, .. }) | Self::Word(Word { handoff, .. }) => *handoff,
        }
    }

    /// What the writer hears when it is done.
    fn done(&self) -> prefill::Heard {
        match *self {
            Self::Write(Write { handoff, .. }) => prefill::Heard::Wrote { handoff, writes: 1 },
            Self::Word(Word { handoff, .. }) => prefill::Heard::Posted { handoff },
        }
    }

    fn of_write(&self) -> Option<HandoffId> {
        match self {
            Self::Write(Write { handoff, .. }) => Some(*handoff),
            Self::Word(_) => None,
        }
    }

    fn loan(&self) -> (MailboxSlot, Epoch) {
        match self {
            Self::Write(Write { slot, epoch, .. }) | Self::Word(Word { slot, epoch, .. }) => (*slot, *epoch),
        }
    }
}

impl World {
    pub(crate) fn connect(&mut self, prefill: usize, life: u32, place: usize, decode: WorkerId) {
        let asking = &self.prefills[prefill].life;
        if !asking.alive || asking.number != life {
            return;
        }
        let worker = asking.worker;
        let answering = &self.decodes[place].life;
        let (there, same) = (answering.alive && !answering.stalled, answering.worker == decode);
        let heard = if !there || !same || self.rng.per_mille(20) {
            // Another process in its place says so; of an unanswered call nobody knows what it means.
            let gone = !same && (there || self.rng.per_mille(500));
            prefill::Heard::ConnectFailed { decode, gone }
        } else {
            let transport = [Transport::SharedMemory, Transport::Rdma, Transport::Tcp][self.rng.below(3) as usize];
            self.links.push(Link {
                decode: place,
                prefill,
                worker,
                transport,
                decode_open: true,
                prefill_open: true,
                dead: false,
                cut: false,
                parted_until: 0,
                to_decode: self.now,
                to_prefill: self.now,
                writer: VecDeque::new(),
                under_way: vec![],
                posted: 0,
                to_memory: self.now,
                refused: false,
                wrote: None,
                revoked: vec![],
                stepping: false,
            });
            let link = self.links.len() - 1;
            note!(self, "session {link}: prefill {prefill} to decode {place} over {transport:?}");
            prefill::Heard::Connected { decode, session: SessionId(link as u64) }
        };
        self.tell_prefill(prefill, heard);
    }

    fn delay(&mut self) -> u64 {
        if self.rng.per_mille(30) { self.rng.within(10 * MS, 100 * MS) } else { self.rng.within(50, 3 * MS) }
    }

    /// When something sent now arrives at the decode worker's end.
    fn arrival_at_decode(&mut self, link: LinkId) -> u64 {
        let arrival = self.now + self.delay();
        let link = &mut self.links[link];
        link.to_decode = link.to_decode.max(arrival).max(link.parted_until);
        link.to_decode
    }

    fn arrival_at_prefill(&mut self, link: LinkId) -> u64 {
        let arrival = self.now + self.delay();
        let link = &mut self.links[link];
        link.to_prefill = link.to_prefill.max(arrival).max(link.parted_until);
        link.to_prefill
    }

    fn send_to_decode(&mut self, link: LinkId, cargo: Cargo) {
        if self.links[link].prefill_open {
            let arrival = self.arrival_at_decode(link);
            self.at(arrival, Event::ToDecode(link, cargo));
        }
    }

    pub(crate) fn say_to_decode(&mut self, session: SessionId, message: ToDecode) {
        self.send_to_decode(session.0 as LinkId, Cargo::Message(Box::new(message)));
    }

    pub(crate) fn say_to_prefill(&mut self, session: SessionId, message: ToPrefill) {
        let link = session.0 as LinkId;
        if self.links[link].decode_open {
            let arrival = self.arrival_at_prefill(link);
            self.at(arrival, Event::ToPrefill(link, Box::new(message)));
        }
    }

    /// Gives the writer of a session something to do; `false` if there is no session any more.
    pub(crate) fn hand_to_writer(&mut self, session: SessionId, task: Task) -> bool {
        let link = session.0 as LinkId;
        if !self.links[link].prefill_open {
            return false;
        }
        let ahead = self.mutation == Some(Mutation::WordBeforeData) && matches!(task, Task::Word(_));
        let writer = &mut self.links[link].writer;
        if ahead {
            writer.push_front(task)
        } else {
            writer.push_back(task)
        }
        self.step_later(link);
        true
    }

    fn step_later(&mut self, link: LinkId) {
        let idle = self.links[link].writer.is_empty();
        if !idle && !std::mem::replace(&mut self.links[link].stepping, true) {
            let takes = if self.rng.per_mille(10) { 40 * MS } else { self.rng.within(20, MS) };
            self.at(self.now + takes, Event::WriterStep(link));
        }
    }

    /// Discards what the writer was to write for a handoff, and says how many writes that were.
    pub(crate) fn discard(&mut self, session: SessionId, handoff: HandoffId) -> u64 {
        let writer = &mut self.links[session.0 as LinkId].writer;
        let before = writer.len();
        writer.retain(|task| task.handoff() != handoff || matches!(task, Task::Word(_)));
        (before - writer.len()) as u64
    }

    /// Whether a prefill worker's writers have anything left to do for a handoff.
    pub(crate) fn is_writing(&self, prefill: usize, handoff: HandoffId) -> bool {
        let mut links = self.links.iter().filter(|link| link.prefill == prefill && link.prefill_open);
        links.any(|link| link.tasks().any(|task| task.handoff() == handoff))
    }

    pub(crate) fn writer_step(&mut self, link: LinkId) {
        self.links[link].stepping = false;
        if !self.links[link].prefill_open {
            return;
        }
        let Some(task) = self.links[link].writer.pop_front() else { return };
        let prefill = self.links[link].prefill;
        let (write, transport) = (task.of_write(), self.links[link].transport);
        let among_others = write.is_some() && self.links[link].wrote == write;
        if write.is_some() && self.rng.per_mille(2) || among_others && self.strikes(Strike::FailureAmongWrites) {
            note!(self, "a write on session {link} fails to post");
            return self.hang_up_prefill(link);
        }
        if write.is_none() && !self.must_wait(link, &task) && self.strikes(Strike::DeathBeforeTheWord) {
            return self.kill(Process::Prefill(prefill));
        }
        self.links[link].wrote = write.or(self.links[link].wrote);
        if self.links[link].revoked.contains(&task.loan()) {
            self.tell_prefill(prefill, prefill::Heard::WriteFailed { handoff: task.handoff() });
            return self.step_later(link);
        }
        match transport {
            Transport::Rdma if self.must_wait(link, &task) => self.links[link].writer.push_front(task),
            Transport::Rdma => {
                let lands = self.now + self.delay();
                let on = &mut self.links[link];
                on.posted += 1;
                on.to_memory = on.to_memory.max(lands);
                on.under_way.push((on.posted, task));
                let number = on.posted;
                self.at(lands, Event::Lands(link, number));
            }
            Transport::SharedMemory => {
                self.perform(link, &task);
                self.tell_prefill(prefill, task.done());
            }
            Transport::Tcp => {
                let done = task.done();
                let cargo = match task {
                    Task::Write(write) => Cargo::Write(write),
                    Task::Word(word) => Cargo::Word(word),
                };
                self.send_to_decode(link, cargo);
                self.tell_prefill(prefill, done);
            }
        }
        self.step_later(link);
    }

    /// Whether a word's data is not acknowledged yet.
    fn must_wait(&self, link: LinkId, task: &Task) -> bool {
        let posted = !self.links[link].under_way.is_empty();
        matches!(task, Task::Word(_)) && posted && self.mutation != Some(Mutation::WordUnacknowledged)
    }

    fn perform(&mut self, link: LinkId, task: &Task) {
        match *task {
            Task::Write(write) => self.write(link, write),
            Task::Word(word) => self.post(link, word),
        }
    }

    /// What is under way between adapters comes to the decode worker's.
    pub(crate) fn lands(&mut self, link: LinkId, number: u64) {
        let Link { prefill, prefill_open, refused, .. } = self.links[link];
        let Some(place) = self.links[link].under_way.iter().position(|(of, _)| *of == number) else { return };
        let (_, task) = self.links[link].under_way.swap_remove(place);
        if refused {
            self.tally.sunk += 1;
            // Its adapter tells the writer, which is the end of the session there.
            return self.hang_up_prefill(link);
        }
        self.perform(link, &task);
        if prefill_open {
            self.tell_prefill(prefill, task.done());
        }
    }

    /// The decode worker's transport takes a loan back. The receiver of a stream can do so alone; otherwise it takes
    /// the peer, whose writer then says that it stopped.
    pub(crate) fn revoke(&mut self, session: SessionId, slot: MailboxSlot, epoch: Epoch) {
        let link = session.0 as LinkId;
        let Link { decode, transport, decode_open, .. } = self.links[link];
        if !decode_open {
            return;
        }
        if transport == Transport::Tcp || self.mutation == Some(Mutation::FreedAtTimeout) {
            self.decodes[decode].revoke(link, slot, epoch);
            self.tell_decode(decode, Heard::Revoked { session, slot, epoch });
        }
        let arrival = self.arrival_at_prefill(link);
        self.at(arrival, Event::TakenBack(link, slot, epoch));
    }

    /// The prefill worker's transport hears that a loan was taken back.
    pub(crate) fn taken_back(&mut self, link: LinkId, slot: MailboxSlot, epoch: Epoch) {
        let Link { transport, prefill_open, cut, .. } = self.links[link];
        if prefill_open && !cut {
            self.links[link].revoked.push((slot, epoch));
            if transport != Transport::Tcp {
                // After what is under way has landed, of which the writer hears before it says so.
                self.links[link].to_decode = self.links[link].to_decode.max(self.links[link].to_memory);
                self.send_to_decode(link, Cargo::Stopped(slot, epoch));
            }
        }
    }

    /// At the decode worker's end of a stream.
    pub(crate) fn land(&mut self, link: LinkId, cargo: Cargo) {
        let Link { decode, worker, decode_open, cut, .. } = self.links[link];
        if !decode_open || cut {
            return;
        }
        let session = SessionId(link as u64);
        match cargo {
            Cargo::Message(message) => {
                note!(self, "decode {decode} hears on {link}: {message:?}");
                self.tell_decode(decode, Heard::Message { session, worker, message });
            }
            // The receiver knows what is lent, and lets the rest go by.
            Cargo::Write(write) if self.decodes[decode].accepts(link, write.slot, write.epoch, Some(write.page)) => {
                self.write(link, write);
            }
            Cargo::Word(word) if self.decodes[decode].accepts(link, word.slot, word.epoch, None) => {
                self.decodes[decode].revoke(link, word.slot, word.epoch);
                self.post(link, word);
            }
            Cargo::Write(_) | Cargo::Word(_) => self.tally.sunk += 1,
            Cargo::Stopped(slot, epoch) => self.tell_decode(decode, Heard::Revoked { session, slot, epoch }),
        }
    }

    pub(crate) fn hear_prefill(&mut self, link: LinkId, message: ToPrefill) {
        let Link { prefill, prefill_open, cut, .. } = self.links[link];
        if prefill_open && !cut {
            note!(self, "prefill {prefill} hears on {link}: {message:?}");
            let session = SessionId(link as u64);
            self.tell_prefill(prefill, prefill::Heard::Message { session, message: Box::new(message) });
        }
    }

    /// The decode worker's end goes down, by itself or because the other did.
    pub(crate) fn hang_up_decode(&mut self, link: LinkId) {
        let Link { decode, transport, prefill_open, .. } = self.links[link];
        if !std::mem::replace(&mut self.links[link].decode_open, false) {
            return;
        }
        note!(self, "session {link} is closed at decode {decode}");
        self.decodes[decode].forget_session(link);
        let session = SessionId(link as u64);
        self.tell_decode(decode, Heard::Closed { session });
        let alone = matches!(transport, Transport::Tcp | Transport::Rdma);
        if alone || !prefill_open || self.mutation == Some(Mutation::ClosedIsFenced) {
            self.fence_soon(link);
        }
        if prefill_open {
            let arrival = self.arrival_at_prefill(link);
            self.at(arrival, Event::HangUpPrefill(link));
        }
    }

    /// The prefill worker's end goes down: its writer stops, and only then does the other side hear of it.
    pub(crate) fn hang_up_prefill(&mut self, link: LinkId) {
        let Link { prefill, .. } = self.links[link];
        if !std::mem::replace(&mut self.links[link].prefill_open, false) {
            return;
        }
        note!(self, "session {link} is closed at prefill {prefill}");
        let writer = std::mem::take(&mut self.links[link].writer);
        let under_way: Vec<HandoffId> = self.links[link].tasks().filter_map(Task::of_write).collect();
        for handoff in writer.iter().filter_map(Task::of_write).chain(under_way) {
            self.tell_prefill(prefill, prefill::Heard::Wrote { handoff, writes: 1 });
        }
        self.tell_prefill(prefill, prefill::Heard::Closed { session: SessionId(link as u64) });
        self.other_end_is_gone(link);
    }

    /// The prefill worker's end is no more, orderly or by death. What it sent before may still arrive.
    fn other_end_is_gone(&mut self, link: LinkId) {
        let Link { transport, decode_open, .. } = self.links[link];
        if decode_open {
            let arrival = self.arrival_at_decode(link);
            self.at(arrival, Event::HangUpDecode(link));
        } else if transport == Transport::SharedMemory {
            self.fence_soon(link);
        }
    }

    fn fence_soon(&mut self, link: LinkId) {
        let after = self.rng.below(20 * MS);
        self.at(self.now + after, Event::Fenced(link));
    }

    pub(crate) fn fenced(&mut self, link: LinkId) {
        let decode = self.links[link].decode;
        self.links[link].refused = self.mutation != Some(Mutation::NotRefused);
        // A decode worker that restarted has other sessions.
        if !self.links[link].dead {
            note!(self, "session {link} is fenced at decode {decode}");
            self.tell_decode(decode, Heard::Fenced { session: SessionId(link as u64) });
        }
    }

    /// A session breaks in the middle; each end notices in its own time.
    pub(crate) fn cut(&mut self, link: LinkId) {
        self.links[link].cut = true;
        let (one, other) = (self.rng.within(MS, 200 * MS), self.rng.within(MS, 200 * MS));
        self.at(self.now + one, Event::HangUpDecode(link));
        self.at(self.now + other, Event::HangUpPrefill(link));
    }

    /// A prefill worker's process is gone. No instruction of it is executed after this.
    pub(crate) fn prefill_died(&mut self, prefill: usize) {
        for link in 0..self.links.len() {
            if self.links[link].prefill == prefill && std::mem::replace(&mut self.links[link].prefill_open, false) {
                self.links[link].writer.clear();
                self.other_end_is_gone(link);
            }
        }
    }

    /// A decode worker's process is gone, and its memory with it.
    pub(crate) fn decode_died(&mut self, decode: usize) {
        for link in 0..self.links.len() {
            if self.links[link].decode == decode && !std::mem::replace(&mut self.links[link].dead, true) {
                self.links[link].decode_open = false;
                let arrival = self.arrival_at_prefill(link);
                self.at(arrival, Event::HangUpPrefill(link));
            }
        }
    }
}
