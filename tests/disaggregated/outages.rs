//! Services that are away for longer than everybody's patience, and nothing to do for as long.

use std::{
    thread,
    time::{Duration, Instant},
};

use crate::{
    cell::{Cell, Model, ask, join, prefills, registered, wait_for_decode_workers, wait_until_idle},
    program::Server,
};
use engine::cluster::WorkerFilter;

/// Longer than leases, heartbeats and requests for jobs last.
const SHORT: Duration = Duration::from_secs(12);
/// Longer than anything lasts but what is set by hour and day.
const LONG: Duration = Duration::from_secs(75);

struct Site {
    cell: Cell,
    decode: Server,
    prefill: Server,
    frontend: Server,
    alone: Server,
    asked: usize,
}

impl Site {
    fn start() -> Self {
        let cell = Cell::of(Model::made_up(2, 2, 2048));
        let decode = cell.decode(&["--max-local-prefill-length", "64"]);
        let (prefill, frontend, alone) = (cell.prefill(&[]), cell.frontend(&[]), cell.alone());
        wait_for_decode_workers(&frontend, 1);
        cell.wait_for_prefill_worker(&decode);
        let mut site = Self { cell, decode, prefill, frontend, alone, asked: 0 };
        site.ask(true);
        site
    }

    /// A long prompt that is new, and a short one. Whether the long one was prefilled elsewhere must be as expected.
    fn ask(&mut self, remotely: bool) {
        let before = prefills(&self.decode, "remote");
        self.ask_whoever_computes();
        let after = prefills(&self.decode, "remote");
        assert_eq!(after > before, remotely, "question {}\n{}", self.asked, self.decode.log());
    }

    fn ask_whoever_computes(&mut self) {
        self.asked += 1;
        for length in [20, 200] {
            let prompt = self.cell.prompt(self.asked, length);
            assert_eq!(ask(&self.frontend, &prompt), ask(&self.alone, &prompt), "question {}", self.asked);
        }
    }

    /// Without anybody's doing everything works as before.
    fn recovers(&mut self) {
        let before = prefills(&self.decode, "remote");
        let started = Instant::now();
        while prefills(&self.decode, "remote") == before {
            assert!(
                started.elapsed() < Duration::from_secs(120),
                "nothing is prefilled elsewhere\n{}",
                self.decode.log()
            );
            self.ask_whoever_computes();
        }
        // Both are registered, and whoever comes is seen.
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let cluster = join(&self.cell).await;
            registered(&cluster, WorkerFilter::default(), |workers| workers.len() == 2).await;
        });
        let _another = self.cell.decode(&["--max-local-prefill-length", "64"]);
        wait_for_decode_workers(&self.frontend, 2);
        wait_until_idle(&self.decode);
        wait_until_idle(&self.prefill);
    }
}

fn without(etcd: bool, nats: bool, time: Duration) {
    let mut site = Site::start();
    if etcd {
        site.cell.etcd.kill();
    }
    if nats {
        site.cell.nats.kill();
    }
    let started = Instant::now();
    while started.elapsed() < time {
        // Whoever knew a prefill worker still knows it; without a queue that is no use.
        site.ask(!nats);
        thread::sleep(Duration::from_millis(200));
    }
    if etcd {
        site.cell.etcd.restart();
    }
    if nats {
        site.cell.nats.restart();
    }
    site.recovers();
}

fn outages(time: Duration) {
    thread::scope(|scope| {
        for (etcd, nats) in [(true, false), (false, true), (true, true)] {
            scope.spawn(move || without(etcd, nats, time));
        }
    });
}

fn silence(time: Duration) {
    let mut site = Site::start();
    thread::sleep(time);
    site.ask(true);
    site.recovers();
}

#[test]
fn without_etcd_or_nats_or_both_everything_is_answered_and_afterwards_all_is_well() {
    outages(SHORT);
}

#[test]
fn after_a_silence_longer_than_every_lease_prompts_are_handed_off_as_before() {
    silence(SHORT);
}

#[test]
#[ignore = "takes minutes: `make soak`"]
fn over_a_minute_without_etcd_or_nats_or_both() {
    outages(LONG);
}

#[test]
#[ignore = "takes minutes: `make soak`"]
fn over_a_minute_of_silence() {
    silence(LONG);
}
