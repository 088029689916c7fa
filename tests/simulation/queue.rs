//! What JetStream's work queue does, at its worst: at least once, in any order, and not at all when it is down.

use std::{collections::VecDeque, rc::Rc};

use engine::handoff::{DeliveryId, HandoffId};

/// Microseconds without an ack until a job is delivered again.
pub(crate) const ACK_WAIT: u64 = 150_000;
/// Deliveries until a job is given up.
pub(crate) const DELIVERIES_MAX: u32 = 5;

#[derive(Default)]
pub(crate) struct Queue {
    jobs: VecDeque<Queued>,
    next: u64,
    /// Nothing is taken, given or acknowledged before this.
    pub(crate) down_until: u64,
    /// Nothing is taken before this.
    pub(crate) full_until: u64,
}

pub(crate) struct Queued {
    number: u64,
    pub(crate) payload: Rc<[u8]>,
    /// `None`: poison.
    pub(crate) handoff: Option<HandoffId>,
    deliveries: u32,
    /// When it can be delivered, for the first time or again.
    ready: u64,
}

impl Queue {
    pub(crate) fn len(&self) -> usize {
        self.jobs.len()
    }

    pub(crate) fn publish(&mut self, handoff: Option<HandoffId>, payload: Rc<[u8]>, now: u64) -> bool {
        if now < self.down_until || now < self.full_until {
            return false;
        }
        self.jobs.push_back(Queued { number: self.next, payload, handoff, deliveries: 0, ready: now });
        self.next += 1;
        true
    }

    /// A second copy of some job, as publishing again after a lost answer makes it.
    pub(crate) fn duplicate(&mut self, index: usize, now: u64) {
        if let Some(job) = self.jobs.get(index) {
            let (handoff, payload) = (job.handoff, job.payload.clone());
            self.publish(handoff, payload, now);
        }
    }

    /// The next job, with the number of this delivery.
    pub(crate) fn pull(&mut self, now: u64) -> Option<(DeliveryId, u32, Rc<[u8]>)> {
        if now < self.down_until {
            return None;
        }
        // Delivered for the last time, and nobody said that it was done.
        self.jobs.retain(|job| job.deliveries < DELIVERIES_MAX || now < job.ready);
        let job = self.jobs.iter_mut().find(|job| job.ready <= now)?;
        job.deliveries += 1;
        job.ready = now + ACK_WAIT;
        Some((DeliveryId(job.number << 8 | u64::from(job.deliveries)), job.deliveries, job.payload.clone()))
    }

    /// Takes a job off, and says which it was.
    pub(crate) fn ack(&mut self, delivery: DeliveryId, now: u64) -> Option<Queued> {
        let index = self.reachable(delivery, now)?;
        self.jobs.remove(index)
    }

    pub(crate) fn postpone(&mut self, delivery: DeliveryId, until: u64, now: u64) {
        if let Some(index) = self.reachable(delivery, now) {
            self.jobs[index].ready = until;
        }
    }

    fn reachable(&self, delivery: DeliveryId, now: u64) -> Option<usize> {
        let number = delivery.0 >> 8;
        if now < self.down_until { None } else { self.jobs.iter().position(|job| job.number == number) }
    }
}
