use std::collections::HashMap;

use crate::handoff::{Epoch, MailboxSlot};
use crate::transfer::frame::Loan;

/// The loans of a session that were taken back: each slot's last one. All earlier ones of the slot have ended with it,
/// since a slot is lent again only when its loan is resolved; so a write that was held up for a while, as where pages
/// are staged, is refused however many loans of its slot have come and gone meanwhile.
#[derive(Debug, Default)]
pub(super) struct Revoked(HashMap<MailboxSlot, Epoch>);

impl Revoked {
    /// Takes a loan back.
    pub(super) fn add(&mut self, (slot, epoch): Loan) {
        let last = self.0.entry(slot).or_insert(epoch);
        if epoch.is_later_than(*last) {
            *last = epoch;
        }
    }

    /// Whether nothing may be written under the loan any more.
    pub(super) fn holds(&self, (slot, epoch): Loan) -> bool {
        self.0.get(&slot).is_some_and(|last| !epoch.is_later_than(*last))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loan_that_was_taken_back_stays_so_when_later_ones_of_its_slot_are() {
        let loan = |slot, epoch| (MailboxSlot(slot), Epoch::new(epoch).unwrap());
        let mut revoked = Revoked::default();
        revoked.add(loan(3, 1));
        revoked.add(loan(3, 2));
        // Said late, as by a device that has failed.
        revoked.add(loan(3, 1));
        assert!(revoked.holds(loan(3, 1)) && revoked.holds(loan(3, 2)));
        assert!(!revoked.holds(loan(3, 3)) && !revoked.holds(loan(4, 1)));
        revoked.add(loan(4, u32::MAX));
        assert!(revoked.holds(loan(4, u32::MAX)) && !revoked.holds(loan(4, 1)), "epochs begin again");
    }
}
