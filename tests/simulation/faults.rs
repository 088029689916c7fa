//! What goes wrong, and when.

use crate::world::{Event, MS, Process, World, note};

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// `kill -9`, and a new process in the same place later.
    Kill(Process),
    /// `kill -STOP`, and `-CONT` later. Its clock may have been set, or not, in between.
    Stall(Process),
    /// A prefill worker's engine computes nothing for a while, or never again, and the rest of it lives on.
    Hang(usize),
    /// A prefill worker is told to leave, and another comes.
    Drain(usize),
    /// A prefill worker that is well loses its lease and gets another.
    LoseLease(usize),
    /// A process's clock leaps, either way.
    Leap(Process),
    /// Some session breaks.
    Cut,
    /// Nothing gets through some session for a while.
    Part,
    QueueDown,
    QueueFull,
    /// Somebody publishes what is no job.
    Poison,
    /// Somebody publishes a job of a worker that is no more.
    Stale,
    /// Some job is on the queue twice.
    Duplicate,
}

/// The one fault that is planned in a schedule, as soon as it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strike {
    /// A prefill worker dies when the last of a prompt's pages is written, and the word is not.
    DeathBeforeTheWord,
    /// A write of a prompt fails to post after others of it went through.
    FailureAmongWrites,
}

impl World {
    /// Everything that will go wrong; all of it in the first half second.
    pub(crate) fn plan_faults(&mut self) {
        let faults = match self.rng.below(4) {
            0 => 0,
            1 => self.rng.below(3),
            _ => self.rng.within(2, 9),
        };
        for _ in 0..faults {
            let fault = self.some_fault();
            let at = self.rng.below(500 * MS);
            self.at(at, Event::Fault(fault));
        }
    }

    fn some_fault(&mut self) -> Fault {
        let prefill = self.rng.index(self.prefills.len());
        let process = if self.rng.per_mille(700) {
            Process::Prefill(prefill)
        } else {
            Process::Decode(self.rng.index(self.decodes.len()))
        };
        match self.rng.below(17) {
            0..=2 => Fault::Kill(process),
            3..=6 => Fault::Stall(process),
            7 => Fault::Drain(prefill),
            8 => Fault::LoseLease(prefill),
            9 => Fault::Leap(process),
            10 => Fault::Cut,
            11 => Fault::Part,
            12 => Fault::QueueDown,
            13 => Fault::QueueFull,
            14 => Fault::Duplicate,
            15 => Fault::Hang(prefill),
            _ if self.rng.per_mille(500) => Fault::Poison,
            _ => Fault::Stale,
        }
    }

    pub(crate) fn strike(&mut self, fault: Fault) {
        note!(self, "fault: {fault:?}");
        match fault {
            Fault::Kill(process) => self.kill(process),
            Fault::Stall(process) => self.stall(process),
            Fault::Hang(prefill) => {
                let forever = self.rng.per_mille(500);
                let until = if forever { u64::MAX } else { self.now + self.rng.within(50 * MS, 1_000 * MS) };
                self.prefills[prefill].hung_until = until;
            }
            Fault::Drain(prefill) => {
                if self.is_well(Process::Prefill(prefill)) {
                    self.drain_prefill(prefill);
                }
            }
            Fault::LoseLease(prefill) => {
                if self.is_well(Process::Prefill(prefill)) {
                    let new = self.new_worker();
                    let lost = std::mem::replace(&mut self.prefills[prefill].life.worker, new);
                    self.at(self.now, Event::LeaseEnds(lost));
                }
            }
            Fault::Leap(process) => {
                let leap = self.rng.within(10 * MS, 10_000 * MS) as i64;
                let back = self.rng.per_mille(500);
                self.life(process).leapt += if back { -leap } else { leap };
            }
            Fault::Cut => {
                if let Some(link) = self.some_link() {
                    self.cut(link);
                }
            }
            Fault::Part => {
                if let Some(link) = self.some_link() {
                    self.links[link].parted_until = self.now + self.rng.within(10 * MS, 400 * MS);
                }
            }
            Fault::QueueDown => self.queue.down_until = self.now + self.rng.within(10 * MS, 400 * MS),
            Fault::QueueFull => self.queue.full_until = self.now + self.rng.within(10 * MS, 400 * MS),
            Fault::Poison => {
                let poison: &[u8] = if self.rng.per_mille(500) { b"\x00\xff" } else { br#"{"schema":7,"jobs":[]}"# };
                self.queue.publish(None, poison.into(), self.now);
                self.wake_prefills();
            }
            Fault::Stale => {
                let job = engine::handoff::Job {
                    handoff: engine::handoff::HandoffId(u128::MAX),
                    decode: engine::handoff::WorkerId(u64::MAX),
                    model_key: crate::prefill::MODEL_KEY.into(),
                    addresses: 0.into(),
                    prompt_tokens: 9,
                    traceparent: None,
                };
                self.queue.publish(Some(job.handoff), job.encode().into(), self.now);
                self.wake_prefills();
            }
            Fault::Duplicate => {
                let jobs = self.queue.len();
                if jobs > 0 {
                    let index = self.rng.index(jobs);
                    self.queue.duplicate(index, self.now);
                }
            }
        }
    }

    pub(crate) fn kill(&mut self, process: Process) {
        if !self.life(process).alive {
            return;
        }
        match process {
            Process::Decode(decode) => self.kill_decode(decode),
            Process::Prefill(prefill) => self.kill_prefill(prefill),
        }
        let after = self.rng.within(10 * MS, 400 * MS);
        self.at(self.now + after, Event::Restart(process));
    }

    pub(crate) fn restart(&mut self, process: Process) {
        match process {
            Process::Decode(decode) => self.restart_decode(decode),
            Process::Prefill(prefill) => self.restart_prefill(prefill),
        }
    }

    fn stall(&mut self, process: Process) {
        if self.is_well(process) {
            self.life(process).stalled = true;
            let until = self.now + self.rng.within(5 * MS, 700 * MS);
            self.at(until, Event::Resume(process));
        }
    }

    fn is_well(&mut self, process: Process) -> bool {
        let life = self.life(process);
        life.alive && !life.stalled
    }

    fn some_link(&mut self) -> Option<usize> {
        let open: Vec<_> = (0..self.links.len()).filter(|&link| self.links[link].prefill_open).collect();
        if open.is_empty() { None } else { Some(open[self.rng.index(open.len())]) }
    }

    fn wake_prefills(&mut self) {
        for prefill in 0..self.prefills.len() {
            self.wake(Process::Prefill(prefill));
        }
    }
}
