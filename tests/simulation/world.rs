//! The world: processes, what is under way between them, and the order in which it happens.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    rc::Rc,
    time::Duration,
};

use engine::handoff::{DeliveryId, Epoch, HandoffId, MailboxSlot, ToDecode, ToPrefill, WorkerId};

use crate::{
    decode::Decode,
    faults::{Fault, Strike},
    model::{ANSWER_TOKENS, Content, reference},
    mutation::Mutation,
    prefill::Prefill,
    queue::Queue,
    rng::Rng,
    wire::Link,
};

/// A millisecond, in the microseconds that time is counted in.
pub(crate) const MS: u64 = 1_000;
/// By then everything has come to rest, or never will.
const END: u64 = 30_000 * MS;

/// Index of a session, and its number on both sides.
pub(crate) type LinkId = usize;

/// A process, by role and index. It may restart; then it is another one in the same place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Process {
    Decode(usize),
    Prefill(usize),
}

/// What every process has, whatever its role.
pub(crate) struct Life {
    /// Its incarnation; events meant for an earlier one come to nothing.
    pub(crate) number: u32,
    pub(crate) alive: bool,
    pub(crate) stalled: bool,
    /// What would have happened to it while it was stalled.
    held: VecDeque<Event>,
    pub(crate) worker: WorkerId,
    /// Whether its next turn is planned.
    pub(crate) awake: bool,
    /// How far its clock has leapt from the world's, in microseconds.
    pub(crate) leapt: i64,
}

/// What happens next to somebody.
pub(crate) enum Event {
    Arrive(usize),
    Cancel(usize),
    Turn(Process, u32),
    WriterStep(LinkId),
    /// Something arrives at the decode worker's end of a session.
    ToDecode(LinkId, Cargo),
    ToPrefill(LinkId, Box<ToPrefill>),
    /// The prefill worker's transport hears that a loan was taken back.
    TakenBack(LinkId, MailboxSlot, Epoch),
    /// What a prefill worker's adapter was given comes to the decode worker's.
    Lands(LinkId, u64),
    /// The decode worker's end notices that the session is over.
    HangUpDecode(LinkId),
    HangUpPrefill(LinkId),
    /// The decode worker's transport learns that the peer can write no more.
    Fenced(LinkId),
    Connect {
        prefill: usize,
        life: u32,
        place: usize,
        decode: WorkerId,
    },
    Deliver {
        prefill: usize,
        life: u32,
        delivery: DeliveryId,
        attempt: u32,
        payload: Rc<[u8]>,
    },
    PublishFailed {
        decode: usize,
        life: u32,
        handoff: HandoffId,
    },
    LeaseEnds(WorkerId),
    Fault(Fault),
    Resume(Process),
    Restart(Process),
}

/// What travels to a decode worker. Over shared memory, only messages do.
pub(crate) enum Cargo {
    Message(Box<ToDecode>),
    Write(crate::wire::Write),
    Word(crate::wire::Word),
    /// The writer has stopped for a loan that was taken back.
    Stopped(MailboxSlot, Epoch),
}

struct Scheduled {
    at: u64,
    number: u64,
    event: Event,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        (self.at, self.number) == (other.at, other.number)
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// Somebody with a prompt, who must hear of it exactly once.
pub(crate) struct Client {
    pub(crate) prompt: Rc<[u32]>,
    expected: [Content; ANSWER_TOKENS],
    pub(crate) ended: Option<Ending>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    Answered,
    /// The decode worker died, and said nothing; the frontend does.
    Error,
    Cancelled,
}

/// What a schedule came to.
#[derive(Debug, Default, Clone, Copy)]
pub(crate) struct Tally {
    pub(crate) answered: u64,
    pub(crate) errors: u64,
    pub(crate) cancelled: u64,
    pub(crate) granted: u64,
    pub(crate) completed: u64,
    pub(crate) released: u64,
    pub(crate) failed: u64,
    pub(crate) fenced: u64,
    pub(crate) expired: u64,
    pub(crate) writes: u64,
    /// Writes that the transport kept from memory.
    pub(crate) sunk: u64,
    pub(crate) struck: u64,
    pub(crate) events: u64,
}

pub(crate) struct World {
    pub(crate) rng: Rng,
    /// Microseconds since the beginning.
    pub(crate) now: u64,
    heap: BinaryHeap<Reverse<Scheduled>>,
    scheduled: u64,
    pub(crate) decodes: Vec<Decode>,
    pub(crate) prefills: Vec<Prefill>,
    pub(crate) links: Vec<Link>,
    pub(crate) queue: Queue,
    pub(crate) clients: Vec<Client>,
    pub(crate) mutation: Option<Mutation>,
    pub(crate) strike: Option<Strike>,
    pub(crate) tally: Tally,
    pub(crate) violation: Option<String>,
    workers: u64,
    handoffs: u128,
    trace: bool,
}

/// Notes what happens, if somebody wants to read it.
macro_rules! note {
    ($world:expr, $($what:tt)*) => {
        if $world.is_traced() {
            eprintln!("{:>10.3} ms  {}", $world.now as f64 / 1_000.0, format_args!($($what)*));
        }
    };
}
pub(crate) use note;

impl Life {
    pub(crate) fn new(worker: WorkerId) -> Self {
        Self { number: 0, alive: true, stalled: false, held: VecDeque::new(), worker, awake: false, leapt: 0 }
    }

    pub(crate) fn die(&mut self) {
        (self.alive, self.stalled, self.awake) = (false, false, false);
        self.held.clear();
    }

    pub(crate) fn clock(&self, now: u64) -> Duration {
        Duration::from_micros(now.saturating_add_signed(self.leapt))
    }
}

impl Tally {
    pub(crate) fn add(&mut self, other: Self) {
        self.answered += other.answered;
        self.errors += other.errors;
        self.cancelled += other.cancelled;
        self.granted += other.granted;
        self.completed += other.completed;
        self.released += other.released;
        self.failed += other.failed;
        self.fenced += other.fenced;
        self.expired += other.expired;
        self.writes += other.writes;
        self.sunk += other.sunk;
        self.struck += other.struck;
        self.events += other.events;
    }
}

impl World {
    /// Plays one schedule through, until nothing is left to happen or something is wrong.
    pub(crate) fn play(seed: u64, mutation: Option<Mutation>, trace: bool) -> Result<Tally, String> {
        let mut world = Self::new(seed, mutation, trace);
        world.populate();
        world.plan_faults();
        world.finish()
    }

    /// Plays one in which no fault is planned but this.
    pub(crate) fn play_with(seed: u64, strike: Strike, mutation: Option<Mutation>) -> Result<Tally, String> {
        let mut world = Self::new(seed, mutation, false);
        world.strike = Some(strike);
        world.populate();
        world.finish()
    }

    fn new(seed: u64, mutation: Option<Mutation>, trace: bool) -> Self {
        Self {
            rng: Rng::new(seed),
            now: 0,
            heap: BinaryHeap::with_capacity(256),
            scheduled: 0,
            decodes: vec![],
            prefills: vec![],
            links: Vec::with_capacity(16),
            queue: Queue::default(),
            clients: vec![],
            mutation,
            strike: None,
            tally: Tally::default(),
            violation: None,
            workers: 0,
            handoffs: 0,
            trace,
        }
    }

    fn finish(mut self) -> Result<Tally, String> {
        self.run();
        match self.violation {
            Some(violation) => Err(violation),
            None => Ok(self.tally),
        }
    }

    /// Whether it is time for `strike`, which comes once.
    pub(crate) fn strikes(&mut self, strike: Strike) -> bool {
        let due = self.strike == Some(strike);
        if due {
            self.strike = None;
            self.tally.struck += 1;
        }
        due
    }

    fn populate(&mut self) {
        for _ in 0..self.rng.within(1, 2) {
            let decode = Decode::new(self);
            self.decodes.push(decode);
        }
        for _ in 0..self.rng.within(1, 3) {
            let prefill = Prefill::new(self);
            self.prefills.push(prefill);
        }
        for client in 0..self.rng.within(3, 10) as usize {
            // Of few families, so that prefixes are met again, and some to the last token.
            let family = self.rng.below(3) as u32;
            let (shared, own) = (self.rng.below(20) as u32, self.rng.below(12) as u32);
            let tail = (shared..=shared + own).map(|position| position << 8 | client as u32);
            let prompt: Rc<[u32]> = (0..shared).map(|position| 1 << 24 | family << 16 | position).chain(tail).collect();
            let prompt = match self.clients.last() {
                Some(last) if self.rng.per_mille(100) => last.prompt.clone(),
                _ => prompt,
            };
            let expected = reference(&prompt);
            self.clients.push(Client { prompt, expected, ended: None });
            let arrival = self.rng.below(300 * MS);
            self.at(arrival, Event::Arrive(client));
            if self.rng.per_mille(150) {
                let patience = self.rng.below(200 * MS);
                self.at(arrival + patience, Event::Cancel(client));
            }
        }
    }

    fn run(&mut self) {
        while let Some(Reverse(Scheduled { at, event, .. })) = self.heap.pop() {
            self.now = at;
            self.tally.events += 1;
            if self.now > END {
                self.fail("it does not come to rest");
            }
            self.dispatch(event);
            if self.violation.is_some() {
                return;
            }
        }
        self.check_rest();
    }

    fn dispatch(&mut self, event: Event) {
        if let Some(process) = self.whose(&event) {
            let life = self.life(process);
            if life.stalled {
                life.held.push_back(event);
                return;
            }
        }
        match event {
            Event::Arrive(client) => self.arrive(client),
            Event::Cancel(client) => self.cancel(client),
            Event::Turn(process, life) => self.turn(process, life),
            Event::WriterStep(link) => self.writer_step(link),
            Event::ToDecode(link, cargo) => self.land(link, cargo),
            Event::Lands(link, number) => self.lands(link, number),
            Event::ToPrefill(link, message) => self.hear_prefill(link, *message),
            Event::TakenBack(link, slot, epoch) => self.taken_back(link, slot, epoch),
            Event::HangUpDecode(link) => self.hang_up_decode(link),
            Event::HangUpPrefill(link) => self.hang_up_prefill(link),
            Event::Fenced(link) => self.fenced(link),
            Event::Connect { prefill, life, place, decode } => self.connect(prefill, life, place, decode),
            Event::Deliver { prefill, life, delivery, attempt, payload } => {
                self.deliver(prefill, life, delivery, attempt, payload);
            }
            Event::PublishFailed { decode, life, handoff } => self.publish_failed(decode, life, handoff),
            Event::LeaseEnds(worker) => self.lease_ends(worker),
            Event::Fault(fault) => self.strike(fault),
            Event::Resume(process) => self.resume(process),
            Event::Restart(process) => self.restart(process),
        }
    }

    /// The process whose doing an event is: it waits while that is stalled.
    fn whose(&self, event: &Event) -> Option<Process> {
        Some(match *event {
            Event::Turn(process, _) => process,
            Event::ToDecode(link, _) | Event::HangUpDecode(link) | Event::Fenced(link) => {
                Process::Decode(self.links[link].decode)
            }
            Event::WriterStep(link)
            | Event::ToPrefill(link, _)
            | Event::TakenBack(link, ..)
            | Event::HangUpPrefill(link) => Process::Prefill(self.links[link].prefill),
            Event::Connect { prefill, .. } | Event::Deliver { prefill, .. } => Process::Prefill(prefill),
            Event::PublishFailed { decode, .. } => Process::Decode(decode),
            _ => return None,
        })
    }

    fn turn(&mut self, process: Process, number: u32) {
        let life = self.life(process);
        if !life.alive || life.number != number {
            return;
        }
        life.awake = false;
        let busy = match process {
            Process::Decode(decode) => self.decode_turn(decode),
            Process::Prefill(prefill) => self.prefill_turn(prefill),
        };
        if busy {
            self.wake(process);
        }
    }

    /// Sees to it that a process looks after its affairs soon.
    pub(crate) fn wake(&mut self, process: Process) {
        let life = self.life(process);
        if life.alive && !life.awake {
            life.awake = true;
            let number = life.number;
            let step = self.rng.within(500, 9 * MS);
            self.at(self.now + step, Event::Turn(process, number));
        }
    }

    fn resume(&mut self, process: Process) {
        let life = self.life(process);
        life.stalled = false;
        let held = std::mem::take(&mut life.held);
        note!(self, "{process:?} resumes");
        for event in held {
            self.at(self.now, event);
        }
    }

    pub(crate) fn at(&mut self, at: u64, event: Event) {
        self.scheduled += 1;
        self.heap.push(Reverse(Scheduled { at: at.max(self.now), number: self.scheduled, event }));
    }

    pub(crate) fn life(&mut self, process: Process) -> &mut Life {
        match process {
            Process::Decode(index) => &mut self.decodes[index].life,
            Process::Prefill(index) => &mut self.prefills[index].life,
        }
    }

    pub(crate) fn new_worker(&mut self) -> WorkerId {
        self.workers += 1;
        WorkerId(self.workers)
    }

    pub(crate) fn new_handoff(&mut self) -> HandoffId {
        self.handoffs += 1;
        HandoffId(self.handoffs)
    }

    /// Ends a client's wait. Once.
    pub(crate) fn end(&mut self, client: usize, ending: Ending) {
        note!(self, "client {client}: {ending:?}");
        if let Some(ended) = self.clients[client].ended.replace(ending) {
            self.fail(format!("client {client} was told {ended:?}, and then {ending:?}"));
        }
        match ending {
            Ending::Answered => self.tally.answered += 1,
            Ending::Error => self.tally.errors += 1,
            Ending::Cancelled => self.tally.cancelled += 1,
        }
    }

    pub(crate) fn check_answer(&mut self, client: usize, position: usize, token: u64) {
        if self.clients[client].expected[position] != token {
            self.fail(format!("client {client} got a wrong token, number {position}"));
        }
    }

    pub(crate) fn fail(&mut self, what: impl Into<String>) {
        if self.violation.is_none() {
            let what = what.into();
            note!(self, "WRONG: {what}");
            self.violation = Some(what);
        }
    }

    pub(crate) fn is_traced(&self) -> bool {
        self.trace
    }

    /// When nothing is left to happen, nothing may be open.
    fn check_rest(&mut self) {
        for client in 0..self.clients.len() {
            if self.clients[client].ended.is_none() {
                self.fail(format!("client {client} was never told anything"));
            }
        }
        for decode in 0..self.decodes.len() {
            self.check_decode_rests(decode);
        }
        for prefill in &self.prefills {
            if prefill.is_busy() {
                let held = prefill.borrower.held();
                return self.fail(format!("a prefill worker still holds {held} jobs"));
            }
        }
        if self.queue.len() > 0 {
            self.fail(format!("{} jobs are left on the queue", self.queue.len()));
        }
    }
}
