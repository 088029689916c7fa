//! The threads that hand a device's pages to sessions which do not know when a device has computed them. There is one
//! for sessions whose adapters read the device themselves, and one that brings pages to host memory, from where the
//! other sessions send them.
//!
//! Each does what it is told in order, so a loan's word is handed to the session behind its pages. It waits for what
//! computes the pages; the one that stages also for copies, and for room in the ring, which comes back as sessions are
//! done with pages. A peer that takes none for a while thus holds up the others' pages, until its session is closed for
//! want of a sign of life; their messages go past it.

use std::collections::HashMap;
use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use engine_kernels::cuda::{DriverError, Mark};
use engine_kernels::{PageCopies, PageRun};

use super::copier::Work;
use super::reply::Reply;
use super::writer::Inner;
use crate::handoff::{Epoch, MailboxSlot, MailboxWord, SessionId};
use crate::transfer::frame::Loan;
use crate::transfer::runs::coalesce;
use crate::transfer::{PageCopy, RegionShape, StagingRing, WriteError};

/// When pages can be read: the end of what computes them, unless the device has failed.
pub(super) type Ready = Result<Box<dyn Mark>, DriverError>;

/// Something to do for a session.
pub(super) enum Task {
    /// When they are computed, stage pages if need be, and have them written. In the order of layers and then of the
    /// peer's pages.
    Write { session: Arc<Inner>, loan: Loan, copies: Vec<PageCopy>, ready: Ready, reply: Reply },
    /// Have a loan's last word posted, after its pages.
    Complete { session: Arc<Inner>, loan: Loan, word: MailboxWord, reply: Reply },
}

/// Starts the thread that stages; it ends when nobody can send it tasks any more.
pub(super) fn start(ring: StagingRing) -> io::Result<Sender<Task>> {
    let copies = ring.pages.copies().map_err(io::Error::other)?;
    let room = Arc::new(Room::new(ring.region.shape()));
    spawn("engine-stager", Some(Staging { ring, copies, room }))
}

/// The same of the thread that leaves pages where they are.
pub(super) fn start_in_place() -> io::Result<Sender<Task>> {
    spawn("engine-waiter", None)
}

fn spawn(name: &str, staging: Option<Staging>) -> io::Result<Sender<Task>> {
    let (tasks, queue) = mpsc::channel();
    let stager = Stager { staging, failed: HashMap::new() };
    thread::Builder::new().name(name.into()).spawn(move || stager.run(&queue))?;
    Ok(tasks)
}

struct Stager {
    /// Where pages are brought before they are handed over, unless they stay where they are.
    staging: Option<Staging>,
    /// Each slot's last loan of which a page could not be handed over: nothing more is done under it.
    failed: HashMap<(SessionId, MailboxSlot), Epoch>,
}

struct Staging {
    ring: StagingRing,
    copies: PageCopies,
    room: Arc<Room>,
}

impl Stager {
    fn run(mut self, queue: &Receiver<Task>) {
        for task in queue {
            match task {
                Task::Write { session, loan, copies, ready, reply } => {
                    let gather = Arc::new(Gather::new(reply));
                    let staged = match self.has_failed(&session, loan) {
                        true => Err(WriteError::Device),
                        false => self.write(&session, loan, copies, ready, &gather),
                    };
                    if staged == Err(WriteError::Device) {
                        self.failed.insert((session.session, loan.0), loan.1);
                    }
                    gather.part_done(staged);
                }
                Task::Complete { session, loan, reply, .. } if self.has_failed(&session, loan) => {
                    reply.send(Err(WriteError::Device));
                }
                Task::Complete { session, loan, word, reply } => session.submit(Work::Complete(loan, word, reply)),
            }
        }
    }

    /// Hands pages over when they are computed.
    fn write(
        &self,
        session: &Arc<Inner>,
        loan: Loan,
        copies: Vec<PageCopy>,
        ready: Ready,
        gather: &Arc<Gather>,
    ) -> Result<(), WriteError> {
        ready.and_then(|mark| mark.wait()).map_err(|error| failed(&error))?;
        gather.computed();
        if let Some(staging) = &self.staging {
            return staging.write(session, loan, &copies, gather);
        }
        let runs = coalesce(copies, session.local, session.remote)?;
        session.submit(Work::Write(loan, runs, None, gather.part()));
        Ok(())
    }

    fn has_failed(&self, session: &Inner, (slot, epoch): Loan) -> bool {
        self.failed.get(&(session.session, slot)) == Some(&epoch)
    }
}

impl Staging {
    /// Stages pages, as many at a time as there is room for, and hands them to the session.
    fn write(
        &self,
        session: &Arc<Inner>,
        loan: Loan,
        mut copies: &[PageCopy],
        gather: &Arc<Gather>,
    ) -> Result<(), WriteError> {
        while !copies.is_empty() {
            if session.commands.is_closed() {
                return Err(WriteError::Closed);
            }
            let mut pieces = Vec::new();
            let mut enqueued = Ok(());
            while let Some(piece) = self.take(copies, pieces.is_empty()) {
                let (staged, rest) = copies.split_at(piece.count);
                enqueued = enqueued.and_then(|()| self.enqueue(staged, &piece));
                pieces.push((piece, staged));
                copies = rest;
            }
            // Waited for in any case: until then the copies write to the ring.
            if let Err(error) = self.copies.finish() {
                // They may still write: these pages of the ring are not used again.
                std::mem::forget(pieces);
                return Err(failed(&error));
            }
            enqueued.map_err(|error| failed(&error))?;
            for (piece, staged) in pieces {
                let copy = |(copy, local): (&PageCopy, u32)| PageCopy { local, ..*copy };
                let copies = staged.iter().zip(piece.first as u32..).map(copy).collect();
                let part = gather.part();
                let reply = Reply::new(move |result| {
                    drop(piece);
                    part.send(result.map(drop));
                });
                match coalesce(copies, self.ring.region.shape(), session.remote) {
                    Ok(runs) => session.submit(Work::Write(loan, runs, None, reply)),
                    Err(error) => reply.send(Err(error)),
                }
            }
        }
        Ok(())
    }

    /// Room for the first of `copies`, of one layer; waits for it if told to.
    fn take(&self, copies: &[PageCopy], wait: bool) -> Option<Piece> {
        let layer = copies.first()?.layer;
        let alike = copies.iter().take_while(|copy| copy.layer == layer).count();
        Room::take(&self.room, layer as usize, alike, wait)
    }

    fn enqueue(&self, staged: &[PageCopy], piece: &Piece) -> Result<(), DriverError> {
        let mut next = piece.first;
        let runs = staged.chunk_by(|a, b| a.local + 1 == b.local).map(|alike| {
            let (from, to, count) = (alike[0].local as usize, next, alike.len());
            next += count;
            PageRun { layer: piece.layer, from, to, count }
        });
        self.copies.download(runs, &self.ring.region)
    }
}

fn failed(error: &DriverError) -> WriteError {
    tracing::error!(%error, "pages cannot be copied from the device");
    WriteError::Device
}

/// Which pages of the ring are in use.
struct Room {
    layers: Mutex<Box<[LayerRoom]>>,
    changed: Condvar,
}

struct LayerRoom {
    used: Box<[bool]>,
    /// The next to be used.
    next: usize,
}

/// Pages of the ring that follow each other. Given back when it is dropped.
struct Piece {
    room: Arc<Room>,
    layer: usize,
    first: usize,
    count: usize,
}

impl Room {
    fn new(shape: RegionShape) -> Self {
        let layer = || LayerRoom { used: vec![false; shape.pages].into(), next: 0 };
        Self { layers: Mutex::new((0..shape.layers).map(|_| layer()).collect()), changed: Condvar::new() }
    }

    fn layers(&self) -> MutexGuard<'_, Box<[LayerRoom]>> {
        // Nothing is left half done in it by a panic.
        self.layers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Up to `wanted` pages of a layer, one at least; if there is none, waits for it or gives none.
    fn take(this: &Arc<Self>, layer: usize, wanted: usize, wait: bool) -> Option<Piece> {
        let mut layers = this.layers();
        loop {
            let LayerRoom { used, next } = &mut layers[layer];
            // Pages whose peer takes its time, or for ever, are passed over.
            let pages = used.len();
            if let Some(first) = (*next..pages).chain(0..*next).find(|&page| !used[page]) {
                let count = used[first..].iter().take(wanted).take_while(|&&used| !used).count();
                used[first..first + count].fill(true);
                *next = (first + count) % pages;
                return Some(Piece { room: this.clone(), layer, first, count });
            }
            if !wait {
                return None;
            }
            layers = this.changed.wait(layers).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.room.layers()[self.layer].used[self.first..self.first + self.count].fill(false);
        self.room.changed.notify_all();
    }
}

/// Answers a write when all its parts are done: with the first failure, if there is one.
struct Gather(Mutex<Gathered>);

struct Gathered {
    /// Parts under way; one is the stager's own.
    parts: usize,
    result: Result<(), WriteError>,
    reply: Option<Reply>,
}

impl Gather {
    fn new(reply: Reply) -> Self {
        Self(Mutex::new(Gathered { parts: 1, result: Ok(()), reply: Some(reply) }))
    }

    fn gathered(&self) -> MutexGuard<'_, Gathered> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is written is computed since now.
    fn computed(&self) {
        self.gathered().reply.iter_mut().for_each(Reply::computed);
    }

    /// One more part: what is to be told how it went.
    fn part(self: &Arc<Self>) -> Reply {
        self.gathered().parts += 1;
        let gather = self.clone();
        Reply::new(move |result| gather.part_done(result.map(drop)))
    }

    fn part_done(&self, result: Result<(), WriteError>) {
        let mut gathered = self.gathered();
        gathered.result = gathered.result.and(result);
        gathered.parts -= 1;
        if gathered.parts == 0 {
            let (reply, result) = (gathered.reply.take(), gathered.result);
            drop(gathered);
            reply.into_iter().for_each(|reply| reply.send(result));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_of_the_ring_are_used_in_turn_and_only_once_at_a_time() {
        let room = Arc::new(Room::new(RegionShape { layers: 2, pages: 5, page_bytes: 8 }));
        let take =
            |layer, wanted| Room::take(&room, layer, wanted, false).map(|piece| (piece.first, piece.count, piece));
        let (first, count, three) = take(0, 3).unwrap();
        assert_eq!((first, count), (0, 3));
        let (first, count, two) = take(0, 9).unwrap();
        assert_eq!((first, count), (3, 2), "no further than the end");
        assert!(take(0, 1).is_none());
        assert_eq!(take(1, 1).map(|(first, count, _)| (first, count)), Some((0, 1)), "another layer's are others");
        drop(two);
        assert_eq!(take(0, 1).map(|(first, count, _)| (first, count)), Some((3, 1)), "past those that are in use");
        drop(three);
        assert_eq!(take(0, 9).map(|(first, count, _)| (first, count)), Some((4, 1)), "from the next on");
        assert_eq!(take(0, 9).map(|(first, count, _)| (first, count)), Some((0, 5)));
    }

    #[test]
    fn who_waits_for_room_gets_it_when_some_is_given_back() {
        let room = Arc::new(Room::new(RegionShape { layers: 1, pages: 1, page_bytes: 8 }));
        let held = Room::take(&room, 0, 1, false).unwrap();
        let waiting = thread::spawn({
            let room = room.clone();
            move || Room::take(&room, 0, 1, true).map(|piece| piece.first)
        });
        drop(held);
        assert_eq!(waiting.join().unwrap(), Some(0));
    }

    #[test]
    fn a_write_is_answered_once_with_its_first_failure() {
        let (sender, answers) = mpsc::channel();
        let gather = Arc::new(Gather::new(Reply::new(move |result| sender.send(result.map(drop)).unwrap())));
        gather.part().send(Err(WriteError::Revoked));
        assert!(answers.try_recv().is_err());
        gather.part_done(Err(WriteError::Closed));
        assert_eq!(answers.try_iter().collect::<Vec<_>>(), [Err(WriteError::Revoked)]);
    }
}
