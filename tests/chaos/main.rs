//! Chaos: clients ask a cluster whose workers and services are killed, stopped, drained and started again all the time.
//!
//! Whatever a client got whole is what one process answers, bit for bit; what it got in part is the beginning of that;
//! and nobody waits beyond the deadline. Afterwards nothing is left: no page owned, lent or in quarantine, no job on
//! the queue, no memory that grew.
//!
//! ```sh
//! cargo test --test chaos                                                       # half a minute
//! SOAK_SECONDS=600 cargo test --release --test chaos -- --ignored --nocapture   # ten minutes
//! CHAOS_SEED=4711 cargo test --test chaos -- --nocapture                        # the same mischief, nearly
//! ```

#[path = "../cell/mod.rs"]
mod cell;
mod clients;
mod clock;
mod mischief;
#[path = "../program/mod.rs"]
mod program;
mod random;
mod seats;
#[path = "../services/mod.rs"]
mod services;
mod story;
#[path = "../support/mod.rs"]
mod support;

use std::{thread, time::Duration};

use cell::{Cell, Model, pages, wait_for_decode_workers, wait_until_idle};
use clients::Clients;
use clock::Clock;
use engine::cluster::Role;
use mischief::{Guard, harm_service, harm_worker};
use program::Server;
use random::Random;
use seats::Seat;
use story::Story;

const CLIENTS: usize = 32;
const DECODE_WORKERS: usize = 3;
const PREFILL_WORKERS: usize = 3;
/// Lines of the frontend's log that are told when the test fails.
const LAST_WORDS: usize = 300;
/// How much the resident memory of a process may grow from before the storm to after it. Its caches are full by then;
/// what remains is the allocator's.
const GROWTH_BYTES_MAX: usize = 48 << 20;

/// Tells, should the test fail, what a server has written last.
struct LastWords<'a>(&'a Server);

impl Drop for LastWords<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let log = self.0.log();
            let lines: Vec<_> = log.lines().collect();
            println!("the frontend's last words:\n{}", lines[lines.len().saturating_sub(LAST_WORDS)..].join("\n"));
        }
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok()?.parse().ok()
}

fn chaos(duration: Duration) {
    let seed = number("CHAOS_SEED").unwrap_or_else(|| rand::random::<u32>().into());
    println!(
        "CHAOS_SEED={seed}: {} s, {CLIENTS} clients, {DECODE_WORKERS} decode and {PREFILL_WORKERS} prefill workers",
        duration.as_secs()
    );
    let mut cell = Cell::of(Model::made_up(4, 2, 2048));
    let clock = Clock::start();
    let clients = Clients::new(&cell.model, seed, clock.clone());
    let frontend = cell.frontend(&[]);
    let _last_words = LastWords(&frontend);
    let seats = |role, count| (0..count).map(|number| Seat::new(&cell, role, number)).collect::<Vec<_>>();
    let (decodes, prefills) = (seats(Role::Decode, DECODE_WORKERS), seats(Role::Prefill, PREFILL_WORKERS));
    let settled = |cell: &Cell| {
        wait_for_decode_workers(&frontend, DECODE_WORKERS);
        decodes.iter().for_each(|seat| seat.with(|decode| cell.wait_for_prefill_workers(decode, PREFILL_WORKERS)));
    };
    let at_rest = || decodes.iter().chain(&prefills).for_each(|seat| seat.with(wait_until_idle));
    settled(&cell);

    // Everybody once, so that caches and buffers have had their size.
    clients.everything_once(&frontend).check_quiet();
    at_rest();
    let memory_before = memory(&frontend, &decodes, &prefills);

    let (story, guard) = (Story::new(clock.clone()), Guard::new(&cell, &decodes, clock.clone()));
    let until = clock.now() + duration;
    let (tally, nats_was_killed) = thread::scope(|scope| {
        let random = move |lane| Random::of(seed, lane);
        for (lane, seat) in (0..).zip(decodes.iter().chain(&prefills)) {
            let (story, guard) = (&story, &guard);
            scope.spawn(move || harm_worker(seat, guard, story, random(lane), until));
        }
        let [_etcd, nats] =
            [(100, &mut cell.etcd, "etcd"), (101, &mut cell.nats, "NATS")].map(|(lane, service, name)| {
                let story = &story;
                scope.spawn(move || harm_service(service, name, story, random(lane), until))
            });
        (clients.storm(&frontend, CLIENTS, until), nats.join().unwrap())
    });
    println!("{story}\n{tally}");
    let moved = ["retries", "migrations", "broken"]
        .map(|what| format!("{} {what}", frontend.metric(&format!("engine_frontend_{what}_total"))));
    println!("frontend: {}", moved.join(", "));

    // Nobody does anything about what has happened.
    let quiet = clock.now();
    settled(&cell);
    at_rest();
    clients.everything_once(&frontend).check_quiet();
    at_rest();
    guard.wait_until_the_queue_is_empty(&cell.nats.url(), nats_was_killed);
    println!("all quiet after {:?}", clock.now() - quiet);
    for seat in decodes.iter().chain(&prefills) {
        let kept = seat.with(|worker| pages(worker, "free") + pages(worker, "cached"));
        assert_eq!(kept, seat.pages as f64, "{} lost pages", seat.name());
    }
    for ((name, before), (_, after)) in memory_before.iter().zip(memory(&frontend, &decodes, &prefills)) {
        println!("{name}: {} KiB resident before, {} KiB after", before >> 10, after >> 10);
        assert!(after.saturating_sub(*before) < GROWTH_BYTES_MAX, "{name} grew from {before} to {after} bytes");
    }
    tally.check_storm();
}

/// Resident bytes of the frontend and of all workers. Workers that are killed now and then are young; the first of
/// either role is only ever stopped, and as old as the frontend.
fn memory(frontend: &Server, decodes: &[Seat], prefills: &[Seat]) -> Vec<(String, usize)> {
    let worker = |seat: &Seat| (seat.name().to_owned(), seat.with(Server::resident_bytes));
    let frontend = ("frontend".to_owned(), frontend.resident_bytes());
    std::iter::once(frontend).chain(decodes.iter().chain(prefills).map(worker)).collect()
}

#[test]
fn clients_get_right_answers_whatever_is_killed_and_stopped() {
    chaos(Duration::from_secs(30));
}

#[test]
#[ignore = "takes minutes: `make soak`"]
fn clients_get_right_answers_whatever_is_killed_and_stopped_for_long() {
    chaos(Duration::from_secs(number("SOAK_SECONDS").unwrap_or(600)));
}
