//! Many streaming clients for a while: everyone gets its own answer, nothing is left behind.
//!
//! `cargo test` runs it briefly. `make soak` runs it for `SOAK_SECONDS` with 64 clients.

mod program;
mod support;

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use program::Server;
use serde_json::{Value, json};
use support::SplitMix64;

/// How much resident memory may grow once every client has been served: buffers of the allocator and the pages of the
/// KV cache that were never touched before, which is why these are few and all touched by then.
const GROWTH_BYTES_MAX: usize = 64 << 20;

const SUBJECTS: [&str; 8] =
    ["the sea", "a lighthouse", "two brothers", "the number seven", "rain", "an old clock", "bread", "the north wind"];

/// A client's question: prompts and answers of mixed length, some of whose prompts begin alike.
fn question(number: usize) -> Value {
    let subject = SUBJECTS[number % SUBJECTS.len()];
    let prompt =
        format!("{}Story {number} is about {subject}. It goes:", "This is a long tale. ".repeat(number % 5 * 4));
    json!({"prompt": prompt, "temperature": 0, "max_tokens": 4 + number * 7 % 45, "stream": true})
}

fn text(event: &Value) -> &str {
    event["choices"][0]["text"].as_str().unwrap_or_else(|| panic!("no text in {event}"))
}

/// Asks, and hangs up after `patience` events. Returns what was read.
fn ask(server: &Server, question: &Value, patience: usize) -> String {
    server.stream("/v1/completions", question).take(patience).map(|event| text(&event).to_owned()).collect()
}

fn soak(clients: usize, duration: Duration) {
    // Fewer pages than all clients want: some are preempted.
    let server = Server::start(&["--max-model-len", "512", "--kv-blocks", "160", "--max-num-seqs", "32"]);
    let questions: Vec<Value> = (0..clients).map(question).collect();
    let alone: Vec<String> = questions.iter().map(|question| ask(&server, question, usize::MAX)).collect();
    server.wait_until_idle();
    let (answered, broken_off) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let wave = |until: Instant, disconnects: bool| {
        thread::scope(|scope| {
            for (number, (question, alone)) in questions.iter().zip(&alone).enumerate() {
                let (server, answered, broken_off) = (&server, &answered, &broken_off);
                scope.spawn(move || {
                    // A soak that fails is run again with the same numbers.
                    let mut random = SplitMix64::new(number as u64);
                    loop {
                        if disconnects && random.below(3) == 0 {
                            let part = ask(server, question, random.below(12) as usize);
                            assert!(alone.starts_with(&part), "client {number} read {part:?} of {alone:?}");
                            broken_off.fetch_add(1, Ordering::Relaxed);
                        } else {
                            assert_eq!(ask(server, question, usize::MAX), *alone, "client {number}");
                            answered.fetch_add(1, Ordering::Relaxed);
                        }
                        if Instant::now() >= until {
                            return;
                        }
                    }
                });
            }
        });
        server.wait_until_idle();
    };
    // Each client once, so that every buffer has had its size.
    wave(Instant::now(), false);
    let before = server.resident_bytes();
    wave(Instant::now() + duration / 2, false);
    wave(Instant::now() + duration / 2, true);
    let growth = server.resident_bytes().saturating_sub(before);
    println!(
        "{} answers, {} broken off, {} preemptions, resident memory grew by {} KiB",
        answered.into_inner(),
        broken_off.into_inner(),
        server.metric("engine_preemptions_total"),
        growth >> 10
    );
    assert!(growth < GROWTH_BYTES_MAX, "resident memory grew from {before} bytes by {growth}");
    let pages = |state| server.metric(&format!("engine_kv_pages{{state=\"{state}\"}}"));
    assert_eq!(pages("free") + pages("cached"), 160.0);
    server.signal("TERM");
    assert!(server.wait().success(), "{}", server.log());
}

#[test]
fn clients_do_not_mix_and_leave_nothing_behind() {
    soak(16, Duration::from_secs(10));
}

#[test]
#[ignore = "takes minutes: `make soak`"]
fn sixty_four_clients_do_not_mix_and_leave_nothing_behind() {
    let seconds = std::env::var("SOAK_SECONDS").ok().and_then(|seconds| seconds.parse().ok()).unwrap_or(120);
    soak(64, Duration::from_secs(seconds));
}
