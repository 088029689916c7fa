//! The handoff under a deterministic simulation: real state machines of both sides, and around them a queue, a network,
//! shared memory, processes, clocks and clients that do whatever such things do at their worst, in an order that a seed
//! decides. (The idea, and that a model's answers betray a wrong write, are FoundationDB's and TigerBeetle's.)
//!
//! Checked after each event: no write lands in a page that is not lent to that writer under that grant; every page is
//! free, published, owned, lent or in quarantine, once; no job is taken off the queue while somebody waits for it;
//! every request ends once, with the right tokens or with an error. And at rest: nothing is open.
//!
//! ```sh
//! cargo test --test simulation                            # a few thousand schedules
//! SIMULATION_SEEDS=1000000 cargo test --release --test simulation schedules
//! SIMULATION_SEED=4711 cargo test --test simulation schedules -- --nocapture      # one, told in full
//! ```

mod decode;
mod faults;
mod model;
mod mutation;
mod prefill;
mod queue;
#[path = "../support/random.rs"]
mod random;
mod rng;
mod serving;
mod wire;
mod world;

use std::{
    env,
    sync::atomic::{AtomicU64, Ordering},
    thread,
    time::{Duration, Instant},
};

use faults::Strike;
use mutation::Mutation;
use world::{Tally, World};

/// Schedules that `make test` plays.
const SEEDS: u64 = 5_000;
/// Schedules in which one thing goes wrong that has a test of its own.
const SEEDS_OF_A_STRIKE: u64 = 1_000;
/// Schedules within which a mistake in the protocol must show.
const SEEDS_TO_NOTICE: u64 = 3_000;

fn number(variable: &str) -> Option<u64> {
    let value = env::var(variable).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{variable}={value} is no number")))
}

fn play(seed: u64) -> Tally {
    World::play(seed, None, false).unwrap_or_else(|violation| {
        panic!(
            "seed {seed}: {violation}\n\
             To see it again: SIMULATION_SEED={seed} cargo test --test simulation schedules -- --nocapture"
        )
    })
}

#[test]
fn all_schedules_keep_every_promise() {
    if let Some(seed) = number("SIMULATION_SEED") {
        let played = World::play(seed, None, true);
        eprintln!("seed {seed}: {played:?}");
        return assert!(played.is_ok());
    }
    let mut sum = Tally::default();
    let seeds = number("SIMULATION_SEEDS").unwrap_or(SEEDS);
    for seed in 0..seeds {
        sum.add(play(seed));
    }
    println!("{seeds} schedules: {sum:?}");
    // A simulation in which nothing happens holds every promise.
    for (what, count) in [
        ("answered", sum.answered),
        ("errors", sum.errors),
        ("cancelled", sum.cancelled),
        ("completed", sum.completed),
        ("released", sum.released),
        ("failed", sum.failed),
        ("fenced", sum.fenced),
        ("expired", sum.expired),
        ("sunk", sum.sunk),
    ] {
        assert!(count * 100 > seeds, "{what}: only {count} times in {seeds} schedules");
    }
}

#[test]
fn a_schedule_plays_the_same_every_time() {
    for seed in 0..50 {
        assert_eq!(format!("{:?}", play(seed)), format!("{:?}", play(seed)));
    }
}

fn is_noticed(mutation: Mutation) {
    let noticed = (0..SEEDS_TO_NOTICE).find_map(|seed| Some((seed, World::play(seed, Some(mutation), false).err()?)));
    let (seed, violation) = noticed.unwrap_or_else(|| panic!("{mutation:?} went unnoticed"));
    println!("{mutation:?}, seed {seed}: {violation}");
}

#[test]
fn an_unchecked_epoch_is_noticed() {
    is_noticed(Mutation::EpochUnchecked);
}

#[test]
fn a_page_freed_at_a_timeout_without_a_fence_is_noticed() {
    is_noticed(Mutation::FreedAtTimeout);
}

#[test]
fn a_completion_before_its_data_is_noticed() {
    is_noticed(Mutation::WordBeforeData);
}

#[test]
fn a_double_grant_is_noticed() {
    is_noticed(Mutation::DoubleGrant);
}

#[test]
fn an_ack_before_completion_is_noticed() {
    is_noticed(Mutation::EarlyAck);
}

#[test]
fn a_release_while_writes_are_under_way_is_noticed() {
    is_noticed(Mutation::ReleasedWhileWriting);
}

#[test]
fn a_loan_that_was_given_back_and_can_be_written_under_is_noticed() {
    is_noticed(Mutation::GivenBackAndKept);
}

#[test]
fn a_worker_that_hangs_and_says_that_it_moves_is_noticed() {
    is_noticed(Mutation::AlwaysMoving);
}

#[test]
fn a_closed_session_taken_for_a_fenced_one_is_noticed() {
    is_noticed(Mutation::ClosedIsFenced);
}

#[test]
fn a_word_that_may_overtake_its_data_is_noticed() {
    is_noticed(Mutation::WordUnacknowledged);
}

#[test]
fn an_adapter_that_goes_on_writing_after_the_fence_is_noticed() {
    is_noticed(Mutation::NotRefused);
}

#[test]
fn a_lost_lease_taken_for_death_is_noticed() {
    is_noticed(Mutation::LeaseLossIsDeath);
}

/// In many schedules, whatever else is under way: everybody is answered.
fn is_survived(strike: Strike) {
    let mut sum = Tally::default();
    for seed in 0..SEEDS_OF_A_STRIKE {
        let played = World::play_with(seed, strike, None);
        sum.add(played.unwrap_or_else(|violation| panic!("{strike:?}, seed {seed}: {violation}")));
    }
    assert_eq!(sum.errors, 0, "no decode worker died");
    assert!(sum.struck * 2 > SEEDS_OF_A_STRIKE, "it hardly ever came to that: {sum:?}");
}

#[test]
fn a_prefill_worker_that_dies_after_its_data_and_before_the_word_costs_a_pause() {
    is_survived(Strike::DeathBeforeTheWord);
}

#[test]
fn a_write_that_fails_to_post_after_others_were_posted_costs_a_pause() {
    is_survived(Strike::FailureAmongWrites);
    // What was posted before lands when it likes, and must not be forgotten.
    let mut seeds = 0..SEEDS_TO_NOTICE;
    let (strike, mutation) = (Strike::FailureAmongWrites, Some(Mutation::NotRefused));
    assert!(seeds.any(|seed| World::play_with(seed, strike, mutation).is_err()), "late writes went unnoticed");
}

/// `make soak`: fresh seeds on every core, for `SOAK_SECONDS`.
#[test]
#[ignore = "runs for minutes"]
fn soak() {
    let limit = Duration::from_secs(number("SOAK_SECONDS").unwrap_or(120));
    let cores = thread::available_parallelism().map_or(1, |cores| cores.get());
    // A different part of the seeds each time; what fails is printed with its seed.
    let start = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |now| now.as_secs()) << 24;
    let next = AtomicU64::new(start);
    let began = Instant::now();
    let report = || {
        let (seeds, seconds) = (next.load(Ordering::Relaxed) - start, began.elapsed().as_secs_f64());
        println!("{seeds} schedules from seed {start}, {:.0} a second and core", seeds as f64 / seconds / cores as f64);
    };
    thread::scope(|scope| {
        for _ in 1..cores {
            scope.spawn(|| {
                while began.elapsed() < limit {
                    play(next.fetch_add(1, Ordering::Relaxed));
                }
            });
        }
        let mut reported = began;
        while began.elapsed() < limit {
            play(next.fetch_add(1, Ordering::Relaxed));
            if reported.elapsed() > Duration::from_secs(10) {
                report();
                reported = Instant::now();
            }
        }
    });
    report();
}
