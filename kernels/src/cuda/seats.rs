//! What sequences have touched stays on the device from one step to the next: a sequence with penalties that decodes
//! sends its latest token, not its whole context. Who sits where is decided here, in the order in which steps are
//! enqueued, which is that in which the device computes them.

use std::collections::HashMap;

use crate::SequenceId;

/// Sequences that have a seat at a time. (The suite, `kernels/suite/src/sampling.rs`, draws for more, and for one with
/// more tokens than a seat holds.)
pub(super) const SEATS: usize = 256;
/// Tokens that a seat holds, each once (`kernels/cuda/sample.cu`): those of some 100,000 of prose. With what stands in
/// front of them, a seat is 256 KiB.
pub(super) const SEAT_TOKENS: usize = 16_383;

/// Who has the seats.
pub(super) struct Seats {
    taken: Vec<Seat>,
    by_sequence: HashMap<SequenceId, usize>,
    /// Steps so far.
    now: u64,
}

struct Seat {
    sequence: SequenceId,
    /// Tokens of its sequence, prompt and output, that were looked at.
    looked_at: usize,
    /// What is listed at most: only the device knows which of the latest were listed before.
    listed: usize,
    suppressed: Vec<u32>,
    /// The latest step that it was part of.
    used: u64,
}

impl Seats {
    pub(super) fn new() -> Self {
        Self { taken: Vec::with_capacity(SEATS), by_sequence: HashMap::with_capacity(SEATS), now: 0 }
    }

    /// Whatever is enqueued from now on is of the next step.
    pub(super) fn next_step(&mut self) {
        self.now += 1;
    }

    /// The seat of a sequence of so many tokens, if what is listed there still holds and all but the latest token was
    /// looked at: then the device counts that in, and nothing else is to be sent.
    pub(super) fn go_on(&mut self, sequence: SequenceId, tokens: usize, suppressed: &[u32]) -> Option<usize> {
        let &place = self.by_sequence.get(&sequence)?;
        let seat = &mut self.taken[place];
        let holds = seat.looked_at + 1 == tokens && seat.listed < SEAT_TOKENS && seat.suppressed == suppressed;
        // Rows of one step are drawn side by side.
        if !holds || seat.used == self.now {
            return None;
        }
        (seat.looked_at, seat.listed, seat.used) = (tokens, seat.listed + 1, self.now);
        Some(place)
    }

    /// A seat for a sequence of so many tokens, for which `listed` are sent: its own, one that nobody has, or that of
    /// who was away for longest. Who was part of the last step keeps it, lest more sequences than there are seats take
    /// them from each other for ever.
    pub(super) fn move_in(
        &mut self,
        sequence: SequenceId,
        tokens: usize,
        listed: usize,
        suppressed: &[u32],
    ) -> Option<usize> {
        if listed > SEAT_TOKENS {
            return None;
        }
        let own = self.by_sequence.get(&sequence).copied();
        if own.is_none() && self.taken.len() < SEATS {
            self.taken.push(Seat {
                sequence,
                looked_at: tokens,
                listed,
                suppressed: suppressed.to_vec(),
                used: self.now,
            });
            self.by_sequence.insert(sequence, self.taken.len() - 1);
            return Some(self.taken.len() - 1);
        }
        let place = own.or_else(|| (0..SEATS).min_by_key(|&place| self.taken[place].used))?;
        let seat = &mut self.taken[place];
        let steps_away = self.now - seat.used;
        if steps_away < if own.is_some() { 1 } else { 2 } {
            return None;
        }
        self.by_sequence.remove(&seat.sequence);
        self.by_sequence.insert(sequence, place);
        (seat.sequence, seat.looked_at, seat.listed, seat.used) = (sequence, tokens, listed, self.now);
        seat.suppressed.clear();
        seat.suppressed.extend_from_slice(suppressed);
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SEVEN: SequenceId = SequenceId(7);

    #[test]
    fn a_sequence_goes_on_token_by_token_where_it_sits() {
        let mut seats = Seats::new();
        assert_eq!(seats.go_on(SEVEN, 10, &[]), None);
        let place = seats.move_in(SEVEN, 10, 9, &[]);
        assert!(place.is_some());
        for tokens in 11..20 {
            seats.next_step();
            assert_eq!(seats.go_on(SEVEN, tokens, &[]), place);
        }
        seats.next_step();
        // The same again, more than one token later, or with other tokens suppressed: what is listed is not what holds.
        assert_eq!(seats.go_on(SEVEN, 19, &[]), None);
        assert_eq!(seats.go_on(SEVEN, 21, &[]), None);
        assert_eq!(seats.go_on(SEVEN, 20, &[3]), None);
        assert_eq!(seats.move_in(SEVEN, 20, 12, &[3]), place);
        seats.next_step();
        assert_eq!(seats.go_on(SEVEN, 21, &[3]), place);
    }

    #[test]
    fn two_rows_of_a_step_never_share_a_seat() {
        let mut seats = Seats::new();
        assert!(seats.move_in(SEVEN, 10, 9, &[]).is_some());
        assert_eq!((seats.go_on(SEVEN, 11, &[]), seats.move_in(SEVEN, 11, 9, &[])), (None, None));
        seats.next_step();
        assert!(seats.go_on(SEVEN, 11, &[]).is_some());
        assert_eq!((seats.go_on(SEVEN, 12, &[]), seats.move_in(SEVEN, 12, 9, &[])), (None, None));
    }

    #[test]
    fn who_takes_part_keeps_the_seat_and_who_stays_away_loses_it() {
        let mut seats = Seats::new();
        let (newcomer, away) = (SequenceId(SEATS as u64), SequenceId(100));
        let all = || (0..SEATS as u64).map(SequenceId);
        let places: Vec<_> = all().map(|sequence| seats.move_in(sequence, 5, 5, &[])).collect();
        assert!(places.iter().all(Option::is_some));
        assert_eq!(seats.move_in(newcomer, 5, 5, &[]), None);
        seats.next_step();
        // In front of all others, and no seat is taken from those who have yet to come.
        assert_eq!(seats.move_in(newcomer, 6, 5, &[]), None);
        for (sequence, &place) in all().zip(&places).filter(|(sequence, _)| *sequence != away) {
            assert_eq!(seats.go_on(sequence, 6, &[]), place);
        }
        seats.next_step();
        assert_eq!(seats.move_in(newcomer, 7, 5, &[]), places[100]);
        assert_eq!(seats.go_on(away, 6, &[]), None);
        seats.next_step();
        assert_eq!(seats.go_on(newcomer, 8, &[]), places[100]);
    }

    #[test]
    fn a_list_never_outgrows_its_seat() {
        let mut seats = Seats::new();
        assert_eq!(seats.move_in(SEVEN, 20_000, SEAT_TOKENS + 1, &[]), None);
        assert!(seats.move_in(SEVEN, 20_000, SEAT_TOKENS - 1, &[]).is_some());
        seats.next_step();
        assert!(seats.go_on(SEVEN, 20_001, &[]).is_some());
        seats.next_step();
        assert_eq!(seats.go_on(SEVEN, 20_002, &[]), None);
        // Looked at anew, for tokens may have come again.
        assert!(seats.move_in(SEVEN, 20_002, SEAT_TOKENS - 1, &[]).is_some());
    }
}
