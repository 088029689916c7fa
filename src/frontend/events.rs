//! A worker's event stream taken apart: what is for the client, and what is for the journal.

use std::mem;

use bytes::{Bytes, BytesMut};
use memchr::{memchr, memmem};
use tokio::sync::OwnedSemaphorePermit;

use crate::{
    api::progress::{JOURNAL_BYTES_MAX, PROGRESS_PREFIX},
    http::MemoryBudget,
};

/// Bytes of an event that has not ended; far above what one can have, log-probabilities included.
const EVENT_BYTES_MAX: usize = 64 << 20;
/// Memory of a journal at first. It doubles as the journal grows.
const JOURNAL_BYTES_MIN: usize = 4 << 10;

/// Takes a worker's stream apart: events go on to the client, comments about progress into the journal. It looks for
/// the ends of lines and at their first bytes, at nothing else. A journal line counts once its event is whole, and only
/// whole events go on: whatever a worker's death cuts in two was neither delivered nor noted.
pub(super) struct Splitter {
    /// The beginning of an event.
    partial: BytesMut,
    /// All progress so far, a line each.
    journal: Vec<u8>,
    /// Memory for it, as far as it has room.
    reservation: Option<OwnedSemaphorePermit>,
    /// What all answers' journals share.
    memory: MemoryBudget,
    /// Whether the journal was given up, for having grown too long or for want of memory. The answer goes on, and
    /// cannot move any more.
    incomplete: bool,
    /// Whether any data has gone on to the client.
    pub(super) started: bool,
    /// Whether `[DONE]` has.
    pub(super) done: bool,
}

/// A worker sent what is no stream of events.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Malformed;

impl Splitter {
    /// Keeps its journal in `memory`.
    pub(super) fn new(memory: MemoryBudget) -> Self {
        Self {
            partial: BytesMut::new(),
            journal: Vec::new(),
            reservation: None,
            memory,
            incomplete: false,
            started: false,
            done: false,
        }
    }

    /// Takes bytes as they come, and returns what is for the client; nothing, perhaps.
    pub(super) fn push(&mut self, data: Bytes) -> Result<Bytes, Malformed> {
        if self.partial.is_empty() {
            return self.split(data);
        }
        // An event ends with an empty line. Until there is one, what was searched is not searched again: large events
        // come in many pieces.
        let searched = self.partial.len() - 1;
        self.partial.extend_from_slice(&data);
        if self.partial.len() <= EVENT_BYTES_MAX && memmem::find(&self.partial[searched..], b"\n\n").is_none() {
            return Ok(Bytes::new());
        }
        let whole = mem::take(&mut self.partial).freeze();
        self.split(whole)
    }

    fn split(&mut self, data: Bytes) -> Result<Bytes, Malformed> {
        let mut out = Forward::default();
        let mut at = 0;
        while at < data.len() {
            let Some(event) = Event::find(&data[at..]) else {
                if data.len() - at > EVENT_BYTES_MAX {
                    return Err(Malformed);
                }
                self.partial.extend_from_slice(&data[at..]);
                break;
            };
            self.note(&data[at..at + event.data]);
            let body = &data[at + event.data..at + event.end];
            self.started |= body.starts_with(b"data:");
            self.done |= body.starts_with(b"data: [DONE]");
            out.add(&data, at + event.data..at + event.end);
            at += event.end;
        }
        Ok(out.into_bytes())
    }

    fn note(&mut self, comments: &[u8]) {
        if self.incomplete {
            return;
        }
        if !self.make_room(comments.len()) {
            (self.journal, self.reservation, self.incomplete) = (Vec::new(), None, true);
            return;
        }
        let mut rest = comments;
        while let Some(end) = memchr(b'\n', rest) {
            // Without the colon and the space.
            self.journal.extend_from_slice(&rest[2..=end]);
            rest = &rest[end + 1..];
        }
    }

    /// Lets the journal have so many bytes more. Returns whether it may.
    fn make_room(&mut self, bytes: usize) -> bool {
        let room = self.reservation.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let needed = self.journal.len() + bytes;
        if needed <= room {
            return true;
        }
        if needed > JOURNAL_BYTES_MAX {
            return false;
        }
        let wanted = needed.next_power_of_two().max(JOURNAL_BYTES_MIN);
        let Some(more) = self.memory.reserve(wanted - room) else { return false };
        self.journal.reserve_exact(wanted - self.journal.len());
        match &mut self.reservation {
            Some(reservation) => reservation.merge(more),
            None => self.reservation = Some(more),
        }
        true
    }

    /// How far the answer has got: another value whenever it gets further.
    pub(super) fn progress(&self) -> (bool, usize) {
        (self.started, self.journal.len())
    }

    /// What another worker needs to go on: `None` if it cannot.
    pub(super) fn journal(&self) -> Option<Bytes> {
        let known = !self.journal.is_empty() || !self.started;
        (known && !self.incomplete && !self.done).then(|| Bytes::copy_from_slice(&self.journal))
    }

    /// Forgets half an event: the worker that sent it is gone.
    pub(super) fn cut(&mut self) {
        self.partial.clear();
    }
}

/// Where an event at the beginning of some bytes has its parts.
struct Event {
    /// The end of the comments about progress, hence the start of what goes on.
    data: usize,
    /// The end of the empty line after it.
    end: usize,
}

impl Event {
    /// `None`: not all of it is there.
    fn find(bytes: &[u8]) -> Option<Self> {
        let mut line = 0;
        while bytes[line..].starts_with(PROGRESS_PREFIX) {
            line += memchr(b'\n', &bytes[line..])? + 1;
        }
        let data = line;
        loop {
            let length = memchr(b'\n', &bytes[line..])?;
            line += length + 1;
            if length == 0 {
                return Some(Self { data, end: line });
            }
        }
    }
}

/// What goes on: a part of what came, not copied, unless it has gaps.
#[derive(Default)]
struct Forward {
    one: Bytes,
    several: BytesMut,
}

impl Forward {
    fn add(&mut self, data: &Bytes, range: std::ops::Range<usize>) {
        if self.one.is_empty() && self.several.is_empty() {
            self.one = data.slice(range);
        } else {
            if self.several.is_empty() {
                self.several.reserve(data.len());
                self.several.extend_from_slice(&mem::take(&mut self.one));
            }
            self.several.extend_from_slice(&data[range]);
        }
    }

    fn into_bytes(self) -> Bytes {
        if self.several.is_empty() { self.one } else { self.several.freeze() }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const STREAM: &str = ": {\"id\":\"a\"}\n: {\"i\":0}\ndata: {\"x\":1}\n\n\
                          \n\
                          : {\"i\":0,\"t\":[1,2]}\ndata: {\"text\":\": {\"}\n\n\
                          data: plain\n\n\
                          : {\"i\":0,\"f\":true}\ndata: end\n\ndata: [DONE]\n\n";
    const CLIENT: &str = "data: {\"x\":1}\n\n\ndata: {\"text\":\": {\"}\n\ndata: plain\n\ndata: end\n\n\
                          data: [DONE]\n\n";
    const JOURNAL: &str = "{\"id\":\"a\"}\n{\"i\":0}\n{\"i\":0,\"t\":[1,2]}\n{\"i\":0,\"f\":true}\n";

    fn fresh() -> Splitter {
        Splitter::new(MemoryBudget::of(1 << 20))
    }

    fn push(splitter: &mut Splitter, bytes: &[u8]) -> Vec<u8> {
        splitter.push(Bytes::copy_from_slice(bytes)).unwrap().to_vec()
    }

    #[test]
    fn progress_is_kept_and_the_rest_goes_on() {
        let mut splitter = fresh();
        assert_eq!(push(&mut splitter, STREAM.as_bytes()), CLIENT.as_bytes());
        assert_eq!(splitter.journal, JOURNAL.as_bytes());
        assert!(splitter.done && splitter.journal().is_none());
    }

    #[test]
    fn an_event_on_its_own_is_not_copied() {
        let data = Bytes::from_static(b": {\"i\":0}\ndata: x\n\n");
        let out = fresh().push(data.clone()).unwrap();
        assert_eq!(out.as_ptr(), data[10..].as_ptr());
        assert_eq!(&out[..], b"data: x\n\n");
    }

    #[test]
    fn half_an_event_is_neither_delivered_nor_noted() {
        for cut in 0..STREAM.len() {
            let mut splitter = fresh();
            let out = push(&mut splitter, &STREAM.as_bytes()[..cut]);
            // As many events went out as the journal has.
            assert!(CLIENT.as_bytes().starts_with(&out));
            let whole = STREAM[..cut].rfind("\n\n").map_or(0, |end| end + 2);
            let mut reference = fresh();
            assert_eq!(push(&mut reference, &STREAM.as_bytes()[..whole]), out);
            assert_eq!(reference.journal, splitter.journal);
            splitter.cut();
            assert_eq!(push(&mut splitter, &STREAM.as_bytes()[whole..]), &CLIENT.as_bytes()[out.len()..]);
            assert_eq!(splitter.journal, JOURNAL.as_bytes());
        }
    }

    #[test]
    fn an_answer_without_progress_cannot_be_continued_once_begun() {
        let mut splitter = fresh();
        assert_eq!(splitter.journal(), Some(Bytes::new()));
        push(&mut splitter, b"\n");
        assert_eq!(splitter.journal(), Some(Bytes::new()));
        push(&mut splitter, b"data: x\n\n");
        assert_eq!(splitter.journal(), None);
    }

    #[test]
    fn a_sign_of_life_is_no_progress_and_an_event_is() {
        let mut splitter = fresh();
        let mut goes_on = |bytes: &[u8]| {
            let before = splitter.progress();
            push(&mut splitter, bytes);
            splitter.progress() != before
        };
        assert!(!goes_on(b"\n"));
        assert!(!goes_on(b": {\"id\":\"a\"}\ndata:"), "it is not whole");
        assert!(goes_on(b" x\n\n"));
        assert!(!goes_on(b"\n"));
        assert!(goes_on(b"\n: {\"i\":0,\"t\":[1]}\ndata: y\n\n"), "both came in one piece");
    }

    #[test]
    fn an_answer_without_memory_for_its_journal_goes_on_and_cannot_move() {
        let memory = MemoryBudget::of(3 * JOURNAL_BYTES_MIN);
        let [mut long, mut short] = [(); 2].map(|()| Splitter::new(memory.clone()));
        let line = |bytes: usize| format!(": {{{}}}\ndata: x\n\n", "1".repeat(bytes));
        let goes_on = |splitter: &mut Splitter, bytes: usize| {
            assert_eq!(push(splitter, line(bytes).as_bytes()), b"data: x\n\n");
            (splitter.journal().is_some(), memory.used())
        };
        assert_eq!(goes_on(&mut short, 1), (true, JOURNAL_BYTES_MIN));
        assert_eq!(goes_on(&mut long, JOURNAL_BYTES_MIN), (true, 3 * JOURNAL_BYTES_MIN));
        assert_eq!(goes_on(&mut long, JOURNAL_BYTES_MIN), (false, JOURNAL_BYTES_MIN), "it has freed what it had");
        assert_eq!(goes_on(&mut long, 1), (false, JOURNAL_BYTES_MIN), "it would lack something");
        assert_eq!(goes_on(&mut short, JOURNAL_BYTES_MIN), (true, 2 * JOURNAL_BYTES_MIN));
        drop(short);
        assert_eq!(memory.used(), 0);
    }

    #[test]
    fn a_journal_that_grows_too_long_frees_its_memory() {
        let memory = MemoryBudget::of(2 * JOURNAL_BYTES_MAX);
        let mut splitter = Splitter::new(memory.clone());
        let event = format!(": {{{}}}\ndata: x\n\n", "1".repeat(8 << 20));
        let event = Bytes::from(event);
        (0..7).for_each(|_| drop(splitter.push(event.clone()).unwrap()));
        assert!(splitter.journal().is_some());
        assert_eq!(memory.used(), JOURNAL_BYTES_MAX);
        assert_eq!(splitter.push(event).unwrap(), "data: x\n\n");
        assert_eq!((splitter.journal(), memory.used()), (None, 0));
    }

    proptest! {
        #[test]
        fn pieces_may_be_cut_anywhere(cuts in prop::collection::vec(0..STREAM.len(), 0..8)) {
            let mut cuts = cuts;
            cuts.extend([0, STREAM.len()]);
            cuts.sort_unstable();
            let (mut splitter, mut out) = (fresh(), Vec::new());
            for pair in cuts.windows(2) {
                out.extend(push(&mut splitter, &STREAM.as_bytes()[pair[0]..pair[1]]));
            }
            prop_assert_eq!(out, CLIENT.as_bytes());
            prop_assert_eq!(&splitter.journal[..], JOURNAL.as_bytes());
        }
    }
}
