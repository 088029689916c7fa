//! Posters over lanes that are made up, and do what was posted when they are told to.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::{Arc, Mutex};
use std::task::Context;

use futures::FutureExt;
use proptest::prelude::*;

use super::*;
use crate::handoff::Status;
use crate::handoff::{Epoch, MailboxSlot};
use crate::transfer::PageCopy;
use crate::transfer::rdma::{CHAIN_MAX, RdmaError, RequestLimits};
use crate::transfer::runs::coalesce;

const SHAPE: RegionShape = RegionShape { layers: 2, pages: 128, page_bytes: 16 };
const LIMITS: RequestLimits = RequestLimits { bytes_max: 40, pieces_max: 3 };

/// The decode worker's memory: where each byte came from, and the words, each with the memory that was visible when it
/// was written.
struct Peer {
    memory: Vec<Option<u64>>,
    words: Vec<(MailboxSlot, MailboxWord, Vec<Option<u64>>)>,
    /// Pages are in another device's memory than words.
    apart: bool,
    /// Writes by lane that the adapter has taken, and that are not in memory yet.
    on_the_way: Vec<Vec<(u64, u64)>>,
}

enum Request {
    Write(u64, Vec<Piece>),
    Word(MailboxSlot, MailboxWord),
    ReadBack,
}

/// What a lane was given: requests, and whether the peer's adapter has taken them. It may take them in any order, as
/// networks with several ways have it; they are complete in the order in which they were posted.
type Taken = VecDeque<(Request, bool)>;

struct FakeLane {
    _alive: Arc<()>,
    apart: bool,
    depth: usize,
    chain: Vec<Request>,
    posted: Rc<RefCell<Taken>>,
    chains: Rc<RefCell<Vec<usize>>>,
    added: u64,
    done: Rc<RefCell<u64>>,
    broken: Rc<RefCell<bool>>,
}

impl Lane for FakeLane {
    fn is_apart(&self) -> bool {
        self.apart
    }

    fn room(&self) -> usize {
        let under_way = (self.added - *self.done.borrow()) as usize;
        (CHAIN_MAX - self.chain.len()).min(self.depth - under_way)
    }

    fn limits(&self) -> RequestLimits {
        LIMITS
    }

    fn write(&mut self, to: u64, pieces: &[Piece]) {
        self.add(Request::Write(to, pieces.to_vec()));
    }

    fn word(&mut self, slot: MailboxSlot, word: MailboxWord) {
        self.add(Request::Word(slot, word));
    }

    fn read_back(&mut self) {
        self.add(Request::ReadBack);
    }

    fn prove(&mut self) {
        self.add(Request::ReadBack);
    }

    fn ring(&mut self) -> io::Result<()> {
        if *self.broken.borrow() {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        if !self.chain.is_empty() {
            self.chains.borrow_mut().push(self.chain.len());
        }
        self.posted.borrow_mut().extend(self.chain.drain(..).map(|request| (request, false)));
        Ok(())
    }

    fn added(&self) -> u64 {
        self.added
    }

    fn completed(&mut self) -> io::Result<u64> {
        Ok(*self.done.borrow())
    }

    fn poll_event(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn close(self) -> Result<(), RdmaError> {
        if *self.broken.borrow() { Err(RdmaError::Peer) } else { Ok(()) }
    }
}

impl FakeLane {
    fn add(&mut self, request: Request) {
        assert!(self.room() > 0, "a request without room for it");
        self.added += 1;
        self.chain.push(request);
    }
}

/// What a lane was given, and how much of it is complete.
type Handle = (Rc<RefCell<Taken>>, Rc<RefCell<u64>>);

/// The adapters: what the tests let happen.
struct Fabric {
    peer: Rc<RefCell<Peer>>,
    lanes: Vec<Handle>,
    /// Requests of each chain that was posted.
    chains: Rc<RefCell<Vec<usize>>>,
    /// Whether posting and closing fail.
    broken: Rc<RefCell<bool>>,
    /// Of this and the lanes.
    alive: Arc<()>,
}

fn start(lanes: usize, depth: usize) -> (Poster<FakeLane>, Fabric) {
    start_to(lanes, depth, false)
}

fn start_to(lanes: usize, depth: usize, apart: bool) -> (Poster<FakeLane>, Fabric) {
    let (memory, on_the_way) = (vec![None; SHAPE.total_bytes()], vec![Vec::new(); lanes]);
    let peer = Peer { memory, words: Vec::new(), apart, on_the_way };
    let (peer, chains, broken, alive) = (Rc::new(RefCell::new(peer)), Rc::default(), Rc::default(), Arc::new(()));
    let lane = |_| FakeLane {
        _alive: alive.clone(),
        apart,
        depth,
        chain: Vec::new(),
        posted: Rc::default(),
        chains: Rc::clone(&chains),
        added: 0,
        done: Rc::default(),
        broken: Rc::clone(&broken),
    };
    let lanes: Vec<_> = (0..lanes).map(lane).collect();
    let handles = lanes.iter().map(|lane| (lane.posted.clone(), lane.done.clone())).collect();
    (Poster::new(lanes, SHAPE, SHAPE), Fabric { peer, lanes: handles, chains, broken, alive })
}

impl Fabric {
    /// Lets the peer's adapter take one of a lane's requests, of those that wait the one that `which` picks. What it
    /// took before is then in memory: one adapter keeps the order of what it does there. That does not go for a word to
    /// other memory.
    fn take(&self, lane: usize, which: usize) -> bool {
        let (posted, done) = &self.lanes[lane];
        let mut posted = posted.borrow_mut();
        let waiting: Vec<usize> = (0..posted.len()).filter(|&i| !posted[i].1).collect();
        let Some(&picked) = waiting.get(which % waiting.len().max(1)) else { return false };
        posted[picked].1 = true;
        let mut peer = self.peer.borrow_mut();
        match &posted[picked].0 {
            Request::Write(to, pieces) => {
                let from = pieces.iter().flat_map(|piece| piece.offset..piece.offset + u64::from(piece.bytes));
                peer.on_the_way[lane].extend((*to..).zip(from));
            }
            Request::Word(slot, word) => {
                if !peer.apart {
                    peer.settle(lane);
                }
                let seen = peer.memory.clone();
                peer.words.push((*slot, *word, seen));
            }
            Request::ReadBack => peer.settle(lane),
        }
        while posted.pop_front_if(|(_, taken)| *taken).is_some() {
            *done.borrow_mut() += 1;
        }
        true
    }

    /// Lets all lanes' requests be taken, in order.
    fn take_all(&self) -> bool {
        let mut any = false;
        for lane in 0..self.lanes.len() {
            while self.take(lane, 0) {
                any = true;
            }
        }
        any
    }

    fn settle(&self) {
        (0..self.lanes.len()).for_each(|lane| self.peer.borrow_mut().settle(lane));
    }

    /// Whether anything may still be written to these pages.
    fn is_under_way(&self, pages: std::ops::Range<u32>) -> bool {
        let inside = |to: u64| pages.contains(&((to as usize % SHAPE.layer_stride() / SHAPE.page_bytes) as u32));
        let peer = self.peer.borrow();
        let waits =
            |(request, taken): &(Request, bool)| matches!(request, Request::Write(to, _) if !taken && inside(*to));
        self.lanes.iter().any(|(posted, _)| posted.borrow().iter().any(waits))
            || peer.on_the_way.iter().flatten().any(|&(to, _)| inside(to))
    }
}

impl Peer {
    fn settle(&mut self, lane: usize) {
        for (to, from) in std::mem::take(&mut self.on_the_way[lane]) {
            self.memory[to as usize] = Some(from);
        }
    }

    /// Whether pages hold what was to be written.
    fn holds(memory: &[Option<u64>], copies: &[PageCopy]) -> bool {
        copies.iter().all(|copy| {
            let at = |page: u32| copy.layer as usize * SHAPE.layer_stride() + page as usize * SHAPE.page_bytes;
            (0..SHAPE.page_bytes).all(|i| memory[at(copy.remote) + i] == Some((at(copy.local) + i) as u64))
        })
    }
}

/// What was answered, in order.
type Answers = Arc<Mutex<Vec<(usize, Result<(), WriteError>)>>>;

fn reply(answers: &Answers, number: usize) -> Reply {
    let answers = answers.clone();
    Reply::new(move |result| answers.lock().unwrap().push((number, result.map(drop))))
}

fn epoch(number: u32) -> Epoch {
    Epoch::new(number).unwrap()
}

fn pages(pages: impl IntoIterator<Item = (u32, u32)>) -> Vec<PageCopy> {
    let copy = |layer: u32| move |(local, remote): (u32, u32)| PageCopy { layer, local, remote };
    let pages: Vec<_> = pages.into_iter().collect();
    (0..SHAPE.layers as u32).flat_map(|layer| pages.iter().copied().map(copy(layer))).collect()
}

fn runs(copies: &[PageCopy]) -> Vec<RunCopy> {
    coalesce(copies.to_vec(), SHAPE, SHAPE).unwrap()
}

#[test]
fn nothing_is_proved_before_every_adapter_has_been_answered() {
    let (mut poster, fabric) = start(2, 8);
    assert!(poster.prove().now_or_never().is_none(), "nobody has answered");
    assert_eq!(fabric.chains.borrow()[..], [1, 1], "each has asked");
    *fabric.broken.borrow_mut() = true;
    assert!(poster.prove().now_or_never().is_some_and(|proved| proved.is_err()));
}

#[test]
fn scattered_pages_go_128_with_one_doorbell_and_the_word_when_all_are_acknowledged() {
    let (mut poster, fabric) = start(1, 512);
    let (answers, mut frames) = (Answers::default(), Vec::new());
    let (loan, copies) = ((MailboxSlot(1), epoch(1)), pages((0..64).map(|i| (2 * i, 2 * i))));
    poster.write(loan, runs(&copies), reply(&answers, 0));
    poster.complete(loan, MailboxWord::new(loan.1, Status::Done), reply(&answers, 1));
    poster.advance(&mut frames).unwrap();
    assert_eq!(*fabric.chains.borrow(), [128]);
    // All but the first, which comes last.
    for _ in 1..128 {
        fabric.take(0, 1);
        poster.advance(&mut frames).unwrap();
    }
    assert!(answers.lock().unwrap().is_empty() && fabric.chains.borrow().len() == 1);
    fabric.take(0, 0);
    poster.advance(&mut frames).unwrap();
    assert_eq!(*answers.lock().unwrap(), [(0, Ok(()))]);
    fabric.take_all();
    poster.advance(&mut frames).unwrap();
    assert_eq!(*answers.lock().unwrap(), [(0, Ok(())), (1, Ok(()))]);
    let peer = fabric.peer.borrow();
    let [(slot, _, seen)] = &peer.words[..] else { panic!("one word") };
    assert!(*slot == MailboxSlot(1) && Peer::holds(seen, &copies));
}

#[test]
fn over_several_lanes_the_word_waits_until_the_data_of_each_was_read_back() {
    let (mut poster, fabric) = start(3, 64);
    let (answers, mut frames) = (Answers::default(), Vec::new());
    let (loan, copies) = ((MailboxSlot(0), epoch(1)), pages((0..6).map(|i| (i, 2 * i))));
    poster.write(loan, runs(&copies), reply(&answers, 0));
    poster.complete(loan, MailboxWord::new(loan.1, Status::Done), reply(&answers, 1));
    poster.advance(&mut frames).unwrap();
    // The first lane is done with all it has long before the others are.
    while fabric.take(0, 0) {
        poster.advance(&mut frames).unwrap();
    }
    assert!(fabric.peer.borrow().words.is_empty());
    while fabric.take_all() {
        poster.advance(&mut frames).unwrap();
    }
    let peer = fabric.peer.borrow();
    assert!(peer.words.len() == 1 && Peer::holds(&peer.words[0].2, &copies));
    assert_eq!(*answers.lock().unwrap(), [(0, Ok(())), (1, Ok(()))]);
}

#[test]
fn a_word_to_other_memory_than_the_pages_waits_until_these_were_read_back() {
    let (mut poster, fabric) = start_to(1, 64, true);
    let (answers, mut frames) = (Answers::default(), Vec::new());
    let (loan, copies) = ((MailboxSlot(0), epoch(1)), pages([(0, 0)]));
    poster.write(loan, runs(&copies), reply(&answers, 0));
    poster.complete(loan, MailboxWord::new(loan.1, Status::Done), reply(&answers, 1));
    poster.advance(&mut frames).unwrap();
    assert!(fabric.take(0, 0) && fabric.take(0, 0));
    poster.advance(&mut frames).unwrap();
    assert_eq!(*answers.lock().unwrap(), [(0, Ok(()))], "all is acknowledged");
    assert!(matches!(fabric.lanes[0].0.borrow().front(), Some((Request::ReadBack, false))), "before the word comes");
    while fabric.take_all() {
        poster.advance(&mut frames).unwrap();
    }
    let peer = fabric.peer.borrow();
    assert!(peer.words.len() == 1 && Peer::holds(&peer.words[0].2, &copies));
}

#[test]
fn what_finds_no_room_waits_for_it() {
    let (mut poster, fabric) = start(1, 2);
    let (answers, mut frames) = (Answers::default(), Vec::new());
    let copies = pages((0..16).map(|i| (i, 2 * i)));
    poster.write((MailboxSlot(0), epoch(1)), runs(&copies), reply(&answers, 0));
    poster.advance(&mut frames).unwrap();
    for taken in 0..copies.len() {
        assert!(fabric.lanes[0].0.borrow().len() <= 2);
        assert!(answers.lock().unwrap().is_empty(), "{taken} of {} are done", copies.len());
        assert!(fabric.take(0, 0));
        poster.advance(&mut frames).unwrap();
    }
    assert_eq!(*answers.lock().unwrap(), [(0, Ok(()))]);
}

#[test]
fn a_message_follows_what_was_written_before_it() {
    let (mut poster, fabric) = start(1, 64);
    let (answers, mut frames) = (Answers::default(), Vec::new());
    poster.write((MailboxSlot(0), epoch(1)), runs(&pages([(0, 0)])), reply(&answers, 0));
    poster.send(Frame::Message("after".into()));
    poster.advance(&mut frames).unwrap();
    assert!(fabric.take(0, 0) && fabric.take(0, 0));
    poster.advance(&mut frames).unwrap();
    assert!(frames.is_empty(), "what was written is with the adapter, and may not be in memory");
    fabric.take_all();
    poster.advance(&mut frames).unwrap();
    assert_eq!(frames, [Frame::Message("after".into())]);
}

#[test]
fn of_a_loan_that_is_taken_back_nothing_more_is_posted_and_stopped_follows_what_was() {
    let (mut poster, fabric) = start(1, 2);
    let (answers, mut frames) = (Answers::default(), Vec::new());
    let (loan, other) = ((MailboxSlot(0), epoch(1)), (MailboxSlot(1), epoch(1)));
    poster.write(loan, runs(&pages((0..8).map(|i| (i, 2 * i)))), reply(&answers, 0));
    poster.complete(loan, MailboxWord::new(loan.1, Status::Done), reply(&answers, 1));
    poster.write(other, runs(&pages([(3, 31)])), reply(&answers, 2));
    poster.advance(&mut frames).unwrap();
    poster.revoke(loan);
    poster.write(loan, runs(&pages([(0, 1)])), reply(&answers, 3));
    poster.advance(&mut frames).unwrap();
    assert_eq!(*answers.lock().unwrap(), [(3, Err(WriteError::Revoked))], "two writes of it are still under way");
    assert!(frames.is_empty());
    assert!(fabric.take(0, 0) && fabric.take(0, 0));
    poster.advance(&mut frames).unwrap();
    assert!(frames.is_empty());
    assert!(fabric.take(0, 0), "they are read back");
    poster.advance(&mut frames).unwrap();
    assert_eq!(frames, [Frame::Stopped(loan)]);
    fabric.take_all();
    poster.advance(&mut frames).unwrap();
    let revoked = Err(WriteError::Revoked);
    assert_eq!(*answers.lock().unwrap(), [(3, revoked), (0, revoked), (1, revoked), (2, Ok(()))]);
    fabric.settle();
    assert!(fabric.peer.borrow().words.is_empty());
}

#[test]
fn those_who_wait_hear_of_the_end_when_the_lanes_are_gone_also_if_posting_failed() {
    for broken in [false, true] {
        let (mut poster, fabric) = start(1, 2);
        let lanes = Arc::downgrade(&fabric.alive);
        let heard = Arc::new(Mutex::new(None));
        let hears = heard.clone();
        poster.write((MailboxSlot(0), epoch(1)), runs(&pages((0..8).map(|i| (i, 2 * i)))), {
            Reply::new(move |result| *hears.lock().unwrap() = Some((result, lanes.strong_count())))
        });
        *fabric.broken.borrow_mut() = broken;
        assert_eq!(poster.advance(&mut Vec::new()).is_err(), broken);
        assert_eq!(*heard.lock().unwrap(), None);
        *fabric.broken.borrow_mut() = false;
        drop(fabric);
        poster.close();
        assert_eq!(*heard.lock().unwrap(), Some((Err(WriteError::Closed), 0)));
    }
}

#[test]
fn where_an_adapter_cannot_be_stopped_nobody_is_told_that_it_was() {
    let (mut poster, fabric) = start(1, 2);
    let answers = Answers::default();
    poster.write((MailboxSlot(0), epoch(1)), runs(&pages([(0, 0)])), reply(&answers, 0));
    poster.advance(&mut Vec::new()).unwrap();
    *fabric.broken.borrow_mut() = true;
    poster.close();
    assert!(answers.lock().unwrap().is_empty());
}

/// What may happen to a poster.
#[derive(Debug, Clone)]
enum Step {
    Write(u32, Vec<(u32, u32)>),
    Complete(u32),
    Revoke(u32),
    Take(usize, usize),
}

fn step() -> impl Strategy<Value = Step> {
    let loan = 0..4u32;
    prop_oneof![
        4 => (loan.clone(), proptest::collection::vec(0..32u32, 1..8), 0..24u32).prop_map(|(loan, from, first)| {
            // Each loan has pages of its own.
            Step::Write(loan, (first..).zip(from).map(|(to, from)| (from, loan * 8 + to % 8)).collect())
        }),
        2 => loan.clone().prop_map(Step::Complete),
        1 => loan.prop_map(Step::Revoke),
        6 => (0..3usize, 0..8usize).prop_map(|(lane, which)| Step::Take(lane, which)),
    ]
}

proptest! {
    #[test]
    fn whatever_happens_words_follow_their_data_and_everybody_is_answered(
        lanes in 1..4usize,
        depth in 1..12usize,
        apart: bool,
        steps in proptest::collection::vec(step(), 1..60),
    ) {
        let (mut poster, fabric) = start_to(lanes, depth, apart);
        let (answers, mut frames) = (Answers::default(), Vec::new());
        // What each loan was to write, until it ended.
        let mut written: Vec<Option<Vec<PageCopy>>> = vec![Some(Vec::new()); 4];
        let mut completed = Vec::new();
        let (mut asked, mut revoked) = (0, 0);
        for step in steps {
            let loan = |number: u32| (MailboxSlot(number), epoch(1));
            match step {
                Step::Write(number, mut copies) => if let Some(written) = &mut written[number as usize] {
                    copies.sort_unstable_by_key(|&(_, to)| to);
                    copies.dedup_by_key(|&mut (_, to)| to);
                    copies.retain(|&(_, to)| !written.iter().any(|old| old.remote == to));
                    let copies = pages(copies);
                    written.extend(&copies);
                    poster.write(loan(number), runs(&copies), reply(&answers, asked));
                    asked += 1;
                }
                Step::Complete(number) => if let Some(copies) = written[number as usize].take() {
                    completed.push((MailboxSlot(number), copies));
                    poster.complete(loan(number), MailboxWord::new(epoch(1), Status::Done), reply(&answers, asked));
                    asked += 1;
                }
                Step::Revoke(number) => if written[number as usize].take().is_some() {
                    poster.revoke(loan(number));
                    revoked += 1;
                }
                Step::Take(lane, which) => {
                    fabric.take(lane % lanes, which);
                }
            }
            let before = frames.len();
            poster.advance(&mut frames).unwrap();
            for frame in &frames[before..] {
                let Frame::Stopped((MailboxSlot(number), _)) = frame else { panic!("{frame:?}") };
                prop_assert!(!fabric.is_under_way(number * 8..number * 8 + 8), "stopped, and still writing");
            }
        }
        while fabric.take_all() {
            poster.advance(&mut frames).unwrap();
        }
        poster.advance(&mut frames).unwrap();
        let mut numbers: Vec<usize> = answers.lock().unwrap().iter().map(|&(number, _)| number).collect();
        numbers.sort_unstable();
        prop_assert_eq!(numbers, (0..asked).collect::<Vec<_>>());
        prop_assert_eq!(frames.len(), revoked);
        let peer = fabric.peer.borrow();
        prop_assert_eq!(peer.words.len(), completed.len());
        for ((slot, _, seen), (of, copies)) in peer.words.iter().zip(&completed) {
            prop_assert!(slot == of && Peer::holds(seen, copies));
        }
    }
}
