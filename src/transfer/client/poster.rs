//! What a session over RDMA has to do, in order: posted to the adapters as they have room, and answered as they are
//! done.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::task::{Poll, ready};

use super::reply::Reply;
use super::revoked::Revoked;
use crate::handoff::MailboxWord;
use crate::transfer::frame::{Frame, Loan};
use crate::transfer::rdma::{LANES_MAX, Lane, Piece, Requests};
use crate::transfer::runs::RunCopy;
use crate::transfer::{RegionShape, WriteError};

/// Rounds of posting and looking before the session's other business has its turn.
const ROUNDS_MAX: usize = 8;

/// How many requests of each lane.
type Marks = [u64; LANES_MAX];

/// Writes of one session, over one lane for each adapter it is striped over.
///
/// One rule makes pages arrive before what speaks of them: nothing that lets somebody read or reuse pages is posted or
/// sent while what was posted before may still be under way. Requests of a queue pair are complete in order, but a
/// network that takes packets by several ways, and an adapter that places them as they come, may have the memory of a
/// later write change before that of an earlier one. So a loan's word waits until everything before it is acknowledged,
/// after which one adapter's writes to one memory keep their order; and where another path is taken, through a second
/// adapter, to the memory of another device or through the session's connection, until it was read back from the memory
/// that it was written to as well.
pub(super) struct Poster<L> {
    // Dropped first: nothing is read from our pages any more when those who wait hear that the session has ended.
    lanes: Vec<L>,
    /// To be posted.
    queue: VecDeque<Operation>,
    /// Posted, and to be answered in this order.
    posted: VecDeque<Posted>,
    /// Requests of each lane that are complete, when last looked at.
    complete: Marks,
    /// Each slot's last loan that was taken back.
    revoked: Revoked,
    /// The lane that gets the next write.
    next_lane: usize,
    /// Requests of each lane that are known to be in the peer's memory, not only with its adapter.
    settled: Marks,
    /// Whether what is complete is being read back.
    reading_back: bool,
    /// There is more to do that no event will tell of.
    unfinished: bool,
    /// Of the request that is being made.
    pieces: Vec<Piece>,
    local: RegionShape,
    remote: RegionShape,
}

enum Operation {
    Write(Loan, Requests, Reply),
    Complete(Loan, MailboxWord, Reply),
    Send(Frame),
}

/// What follows when everything that was posted before it is complete.
struct Posted {
    marks: Marks,
    then: Then,
}

enum Then {
    Answer(Reply, Result<(), WriteError>),
    Send(Frame),
}

impl<L: Lane> Poster<L> {
    /// `lanes` are connected; there is one at least, and no more than [`LANES_MAX`].
    pub(super) fn new(lanes: Vec<L>, local: RegionShape, remote: RegionShape) -> Self {
        Self {
            lanes,
            queue: VecDeque::new(),
            posted: VecDeque::new(),
            complete: [0; LANES_MAX],
            revoked: Revoked::default(),
            next_lane: 0,
            settled: [0; LANES_MAX],
            reading_back: false,
            unfinished: false,
            pieces: Vec::new(),
            local,
            remote,
        }
    }

    /// Returns when each lane has written to the peer's memory and read from it, which proves that both adapters reach
    /// each other, and with packets as large as they come.
    pub(super) async fn prove(&mut self) -> io::Result<()> {
        self.lanes.iter_mut().for_each(Lane::prove);
        self.ring()?;
        loop {
            self.look()?;
            if self.is_complete(&self.added()) {
                self.settled = self.added();
                return Ok(());
            }
            self.event().await?;
        }
    }

    /// Ends the connections, and then tells those who wait: nothing is read from our pages any more. Blocks.
    pub(super) fn close(self) {
        let Self { lanes, queue, posted, .. } = self;
        // All of them, even if one cannot be ended.
        let ended: Vec<_> = lanes.into_iter().map(Lane::close).collect();
        if let Some(error) = ended.into_iter().find_map(Result::err) {
            tracing::error!(%error, "pages that are being written stay as they are: their adapter cannot be stopped");
            std::mem::forget((queue, posted));
        }
    }

    /// Takes on a write; `runs` are coalesced.
    pub(super) fn write(&mut self, loan: Loan, runs: Vec<RunCopy>, reply: Reply) {
        if self.is_revoked(loan) {
            return reply.send(Err(WriteError::Revoked));
        }
        self.queue.push_back(Operation::Write(loan, Requests::new(runs, self.local, self.remote), reply));
    }

    /// Takes on a loan's last word.
    pub(super) fn complete(&mut self, loan: Loan, word: MailboxWord, reply: Reply) {
        if self.is_revoked(loan) {
            return reply.send(Err(WriteError::Revoked));
        }
        self.queue.push_back(Operation::Complete(loan, word, reply));
    }

    /// Takes on a frame that is to follow everything before it.
    pub(super) fn send(&mut self, frame: Frame) {
        self.queue.push_back(Operation::Send(frame));
    }

    /// Posts nothing more under this loan. [`Frame::Stopped`] follows what was posted.
    pub(super) fn revoke(&mut self, loan: Loan) {
        self.revoked.add(loan);
        let marks = self.added();
        for operation in std::mem::take(&mut self.queue) {
            match operation {
                Operation::Write(of, _, reply) | Operation::Complete(of, _, reply) if of == loan => {
                    // Part of the first may be under way.
                    self.posted.push_back(Posted { marks, then: Then::Answer(reply, Err(WriteError::Revoked)) });
                }
                other => self.queue.push_back(other),
            }
        }
        self.queue.push_front(Operation::Send(Frame::Stopped(loan)));
    }

    /// Posts what there is room for, and answers what is done; frames whose turn has come are left in `frames`.
    pub(super) fn advance(&mut self, frames: &mut Vec<Frame>) -> io::Result<()> {
        for _ in 0..ROUNDS_MAX {
            let looked = self.look()?;
            let posted = self.post()?;
            if !self.answer(frames) && !looked && !posted {
                self.unfinished = false;
                return Ok(());
            }
        }
        self.unfinished = true;
        Ok(())
    }

    /// Waits until [`Poster::advance`] may have something to do. Cancel safe.
    pub(super) async fn event(&mut self) -> io::Result<()> {
        poll_fn(|context| {
            if self.unfinished {
                ready!(tokio::task::coop::poll_proceed(context)).made_progress();
                return Poll::Ready(Ok(()));
            }
            let mut woken = Poll::Pending;
            for lane in &mut self.lanes {
                // All of them are asked, so that each knows whom to wake.
                if let Poll::Ready(event) = lane.poll_event(context) {
                    event?;
                    woken = Poll::Ready(Ok(()));
                }
            }
            woken
        })
        .await
    }

    /// Looks at what is complete; whether more is.
    fn look(&mut self) -> io::Result<bool> {
        let before = self.complete;
        for (complete, lane) in self.complete.iter_mut().zip(&mut self.lanes) {
            *complete = lane.completed()?;
        }
        Ok(self.complete != before)
    }

    /// Posts what there is room for; whether anything was posted, or came to its turn.
    fn post(&mut self) -> io::Result<bool> {
        let before = (self.added(), self.queue.len());
        while let Some(operation) = self.queue.pop_front() {
            let then = match operation {
                Operation::Write(loan, mut requests, reply) => {
                    let posted = self.post_write(&mut requests);
                    if !matches!(posted, Ok(true)) {
                        // After an error too: who waits is told when the lanes are gone.
                        self.queue.push_front(Operation::Write(loan, requests, reply));
                        posted?;
                        break;
                    }
                    Then::Answer(reply, Ok(()))
                }
                Operation::Complete(loan, word, reply) => {
                    // Over several lanes, the word's does not keep the order of the others; nor does a way to one
                    // device's memory that of the way to another's.
                    let apart = self.lanes.len() > 1 || self.lanes[0].is_apart();
                    if !self.arrived(apart) {
                        self.queue.push_front(Operation::Complete(loan, word, reply));
                        break;
                    }
                    self.lanes[0].word(loan.0, word);
                    Then::Answer(reply, Ok(()))
                }
                Operation::Send(frame) => {
                    // The connection does not keep the adapters' order.
                    if !self.arrived(true) {
                        self.queue.push_front(Operation::Send(frame));
                        break;
                    }
                    Then::Send(frame)
                }
            };
            self.posted.push_back(Posted { marks: self.added(), then });
        }
        self.ring()?;
        Ok(before != (self.added(), self.queue.len()))
    }

    /// Whether all of it is posted.
    fn post_write(&mut self, requests: &mut Requests) -> io::Result<bool> {
        loop {
            let Some(free) = self.free_lane()? else { return Ok(requests.is_empty()) };
            let lane = &mut self.lanes[free];
            let Some(to) = requests.next(lane.limits(), &mut self.pieces) else { return Ok(true) };
            lane.write(to, &self.pieces);
            self.reading_back = false;
            self.next_lane = (free + 1) % self.lanes.len();
        }
    }

    /// Whether everything that was posted is acknowledged, and if that is not enough, `in_memory`. There is room then.
    fn arrived(&mut self, in_memory: bool) -> bool {
        let added = self.added();
        if self.settled == added {
            return true;
        }
        if !self.is_complete(&added) {
            return false;
        }
        if !in_memory {
            return true;
        }
        if !std::mem::replace(&mut self.reading_back, true) {
            self.lanes.iter_mut().for_each(Lane::read_back);
            return false;
        }
        (self.reading_back, self.settled) = (false, added);
        true
    }

    /// The next lane that has room.
    fn free_lane(&mut self) -> io::Result<Option<usize>> {
        let lanes = self.lanes.len();
        let find =
            |lanes_of: &[L], from: usize| (from..from + lanes).map(|i| i % lanes).find(|&i| lanes_of[i].room() > 0);
        if let Some(free) = find(&self.lanes, self.next_lane) {
            return Ok(Some(free));
        }
        // A lane may be full of requests that are chained and not posted yet.
        self.ring()?;
        Ok(find(&self.lanes, self.next_lane))
    }

    fn ring(&mut self) -> io::Result<()> {
        self.lanes.iter_mut().try_for_each(Lane::ring)
    }

    /// Answers what is complete; whether anything was.
    fn answer(&mut self, frames: &mut Vec<Frame>) -> bool {
        let mut answered = false;
        while let Some(Posted { then, .. }) = self.posted.pop_front_if(|first| reached(&self.complete, &first.marks)) {
            answered = true;
            match then {
                Then::Answer(reply, result) => reply.send(result),
                Then::Send(frame) => frames.push(frame),
            }
        }
        answered
    }

    fn added(&self) -> Marks {
        std::array::from_fn(|i| self.lanes.get(i).map_or(0, Lane::added))
    }

    fn is_complete(&self, marks: &Marks) -> bool {
        reached(&self.complete, marks)
    }

    fn is_revoked(&self, loan: Loan) -> bool {
        self.revoked.holds(loan)
    }
}

fn reached(complete: &Marks, marks: &Marks) -> bool {
    complete.iter().zip(marks).all(|(complete, mark)| complete >= mark)
}

#[cfg(test)]
mod tests;
