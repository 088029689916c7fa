//! A load generator: clients that stream completions and note when each piece arrived.

use std::io::BufRead;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use crate::http;

/// Tokens of each prompt.
pub(crate) const PROMPT_TOKENS: usize = 256;
/// Tokens of each answer.
pub(crate) const OUTPUT_TOKENS: usize = 128;

/// What one burst of load saw. Times are in seconds.
#[derive(Default)]
pub(crate) struct Load {
    /// Output tokens of all clients, by the servers' own count, per second of the whole burst.
    pub(crate) tokens_per_second: f64,
    /// From sending a request to its first token.
    pub(crate) first_token: Vec<f64>,
    /// Between one piece of text and the next of the same answer.
    pub(crate) gaps: Vec<f64>,
}

/// One answer.
struct Answer {
    tokens: u64,
    first_token: f64,
    gaps: Vec<f64>,
}

/// Lets `clients` clients send `requests` requests in all, each client one after the other, each request on a
/// connection of its own with a prompt nobody sent before (`seed` tells bursts apart).
pub(crate) fn burst(address: &str, model: &str, clients: usize, requests: usize, seed: u64) -> Result<Load> {
    let next = AtomicU64::new(0);
    let start = Instant::now();
    let answers = std::thread::scope(|scope| {
        let handles: Vec<_> = (0..clients)
            .map(|_| {
                let next = &next;
                scope.spawn(move || -> Result<Vec<Answer>> {
                    let mut answers = Vec::new();
                    loop {
                        let request = next.fetch_add(1, Ordering::Relaxed);
                        if request >= requests as u64 {
                            return Ok(answers);
                        }
                        answers.push(complete(address, model, seed.wrapping_mul(1 << 20).wrapping_add(request))?);
                    }
                })
            })
            .collect();
        let mut answers = Vec::new();
        for handle in handles {
            answers.extend(handle.join().expect("a client panicked")?);
        }
        anyhow::Ok(answers)
    })?;
    let elapsed = start.elapsed().as_secs_f64();
    let tokens: u64 = answers.iter().map(|answer| answer.tokens).sum();
    ensure!(
        tokens == (requests * OUTPUT_TOKENS) as u64,
        "{address} gave {tokens} tokens for {requests} requests of {OUTPUT_TOKENS}"
    );
    Ok(Load {
        tokens_per_second: tokens as f64 / elapsed,
        first_token: answers.iter().map(|answer| answer.first_token).collect(),
        gaps: answers.into_iter().flat_map(|answer| answer.gaps).collect(),
    })
}

fn complete(address: &str, model: &str, seed: u64) -> Result<Answer> {
    let body = json!({
        "model": model,
        "prompt": prompt(seed),
        "max_tokens": OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": true,
        "stream": true,
        "stream_options": { "include_usage": true },
    });
    let start = Instant::now();
    let response = http::post(address, "/v1/completions", &body.to_string())?;
    let mut answer = Answer { tokens: 0, first_token: f64::NAN, gaps: Vec::with_capacity(OUTPUT_TOKENS) };
    let mut last: Option<Instant> = None;
    for line in response.lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" {
            break;
        }
        let now = Instant::now();
        let event: Value = serde_json::from_str(data)?;
        if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
            answer.tokens = tokens;
        }
        if event["choices"][0]["text"].as_str().is_none_or(str::is_empty) {
            continue;
        }
        match last.replace(now) {
            None => answer.first_token = (now - start).as_secs_f64(),
            Some(before) => answer.gaps.push((now - before).as_secs_f64()),
        }
    }
    ensure!(last.is_some(), "{address} sent no text");
    Ok(answer)
}

/// A prompt of token ids that no other seed has: random text would cost the tokenizer and have no exact length.
/// Ids from 1,000 to 20,000 are ordinary words in every vocabulary we serve.
fn prompt(seed: u64) -> Vec<u32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..PROMPT_TOKENS)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            1000 + (state >> 33) as u32 % 19_000
        })
        .collect()
}
