//! What one tcp session may write: the receiver's own record of what it lent.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::RegionShape;
use super::super::frame::{Loan, Run, Violation};

/// The loans of one session.
#[derive(Default)]
pub(super) struct Loans(HashMap<Loan, State>);

enum State {
    /// May be written to. The pages, sorted.
    Lent(Box<[u32]>),
    /// Taken back; what the peer sent before it knew is read and thrown away until it says that it stopped.
    Revoked,
}

/// What to do with a data frame's bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Admission {
    /// Read them into the pages.
    Place,
    /// Read past them.
    Discard,
}

impl Loans {
    /// From now on the session may write to `pages` under this loan.
    pub(super) fn lend(&mut self, loan: Loan, pages: &Arc<[u32]>) {
        let mut pages: Box<[u32]> = pages[..].into();
        pages.sort_unstable();
        self.0.insert(loan, State::Lent(pages));
    }

    /// From now on it may not. Whether the peer has to be told, because it may still be sending.
    pub(super) fn revoke(&mut self, loan: Loan) -> bool {
        match self.0.get_mut(&loan) {
            Some(state @ State::Lent(_)) => {
                *state = State::Revoked;
                true
            }
            Some(State::Revoked) | None => false,
        }
    }

    /// The peer has given it back by itself. If it was taken back at the same time, its answer to that is still to
    /// come.
    pub(super) fn forget(&mut self, loan: Loan) {
        if let Some(State::Lent(_)) = self.0.get(&loan) {
            self.0.remove(&loan);
        }
    }

    /// The peer said that nothing more comes under a loan that was taken back.
    pub(super) fn stopped(&mut self, loan: Loan) -> Result<(), Violation> {
        match self.0.remove(&loan) {
            Some(State::Revoked) => Ok(()),
            Some(State::Lent(_)) | None => Err(Violation::NoSuchLoan),
        }
    }

    /// The peer ends a loan with a word. Whether the word counts.
    pub(super) fn complete(&mut self, loan: Loan) -> Result<bool, Violation> {
        match self.0.get(&loan) {
            Some(State::Lent(_)) => {
                self.0.remove(&loan);
                Ok(true)
            }
            Some(State::Revoked) => Ok(false),
            None => Err(Violation::NoSuchLoan),
        }
    }

    /// Checks every page of a data frame before a byte of it is read. No page may be named twice.
    pub(super) fn admit(
        &self,
        loan: Loan,
        runs: &[Run],
        shape: RegionShape,
        frame_bytes_max: usize,
    ) -> Result<Admission, Violation> {
        let state = self.0.get(&loan).ok_or(Violation::NoSuchLoan)?;
        let mut pages = 0usize;
        let mut next = (0, 0);
        for run in runs {
            let Some(end) = run.page.checked_add(run.count) else { return Err(Violation::NotLent) };
            let inside = (run.layer as usize) < shape.layers && end as usize <= shape.pages && run.count > 0;
            if !inside || (run.layer, run.page) < next {
                return Err(Violation::NotLent);
            }
            next = (run.layer, end);
            pages += run.count as usize;
        }
        let bytes = pages.saturating_mul(shape.page_bytes);
        if bytes > frame_bytes_max {
            return Err(Violation::FrameTooLong(bytes));
        }
        let State::Lent(lent) = state else { return Ok(Admission::Discard) };
        let all_lent = runs.iter().all(|run| match lent.binary_search(&run.page) {
            // Sorted and distinct: the last of so many consecutive pages is there iff all are.
            Ok(first) => lent.get(first + run.count as usize - 1) == Some(&(run.page + run.count - 1)),
            Err(_) => false,
        });
        if all_lent { Ok(Admission::Place) } else { Err(Violation::NotLent) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handoff::{Epoch, MailboxSlot};

    const SHAPE: RegionShape = RegionShape { layers: 2, pages: 100, page_bytes: 10 };
    const LOAN: Loan = (MailboxSlot(4), Epoch::FIRST);

    fn run(layer: u32, page: u32, count: u32) -> Run {
        Run { layer, page, count }
    }

    fn admit(loans: &Loans, loan: Loan, runs: &[Run]) -> Result<Admission, Violation> {
        loans.admit(loan, runs, SHAPE, 100)
    }

    fn lent() -> Loans {
        let mut loans = Loans::default();
        loans.lend(LOAN, &Arc::from([30, 9, 10, 11, 31]));
        loans
    }

    #[test]
    fn what_was_lent_may_be_written_and_nothing_else() {
        let loans = lent();
        assert_eq!(admit(&loans, LOAN, &[run(0, 9, 3), run(0, 30, 2), run(1, 9, 1)]), Ok(Admission::Place));
        for bad in [run(0, 8, 1), run(0, 9, 4), run(0, 11, 2), run(2, 9, 1), run(0, 9, 0), run(0, u32::MAX, 2)] {
            assert_eq!(admit(&loans, LOAN, &[bad]), Err(Violation::NotLent), "{bad:?}");
        }
    }

    #[test]
    fn another_slot_or_epoch_is_another_loan() {
        let loans = lent();
        for loan in [(MailboxSlot(5), LOAN.1), (LOAN.0, LOAN.1.next())] {
            assert_eq!(admit(&loans, loan, &[run(0, 9, 1)]), Err(Violation::NoSuchLoan));
        }
    }

    #[test]
    fn a_frame_names_a_page_once() {
        let loans = lent();
        assert_eq!(admit(&loans, LOAN, &[run(0, 9, 2), run(0, 10, 1)]), Err(Violation::NotLent));
        assert_eq!(admit(&loans, LOAN, &[run(1, 9, 1), run(0, 9, 1)]), Err(Violation::NotLent));
    }

    #[test]
    fn a_frame_has_a_largest_size() {
        let mut loans = Loans::default();
        loans.lend(LOAN, &(0..20).collect());
        assert_eq!(admit(&loans, LOAN, &[run(0, 0, 10)]), Ok(Admission::Place));
        assert_eq!(admit(&loans, LOAN, &[run(0, 0, 11)]), Err(Violation::FrameTooLong(110)));
    }

    #[test]
    fn a_revoked_loan_swallows_what_was_under_way_until_the_peer_stopped() {
        let mut loans = lent();
        assert!(loans.revoke(LOAN));
        assert!(!loans.revoke(LOAN));
        assert_eq!(admit(&loans, LOAN, &[run(0, 9, 1)]), Ok(Admission::Discard));
        assert_eq!(loans.complete(LOAN), Ok(false));
        assert_eq!(loans.stopped(LOAN), Ok(()));
        assert_eq!(admit(&loans, LOAN, &[run(0, 9, 1)]), Err(Violation::NoSuchLoan));
    }

    #[test]
    fn a_loan_that_the_peer_gave_back_is_over() {
        let mut loans = lent();
        loans.forget(LOAN);
        assert!(loans.0.is_empty());
        assert_eq!(admit(&loans, LOAN, &[run(0, 9, 1)]), Err(Violation::NoSuchLoan));
        assert!(!loans.revoke(LOAN));
        // It crossed with taking it back, which the peer answers too.
        let mut loans = lent();
        loans.revoke(LOAN);
        loans.forget(LOAN);
        assert_eq!(loans.stopped(LOAN), Ok(()));
        assert!(loans.0.is_empty());
    }

    #[test]
    fn a_completed_loan_is_over() {
        let mut loans = lent();
        assert_eq!(loans.complete(LOAN), Ok(true));
        assert_eq!(loans.complete(LOAN), Err(Violation::NoSuchLoan));
        assert!(!loans.revoke(LOAN));
        assert_eq!(loans.stopped(LOAN), Err(Violation::NoSuchLoan));
        assert_eq!(admit(&loans, LOAN, &[run(0, 9, 1)]), Err(Violation::NoSuchLoan));
    }
}
