//! A client that streams a completion and notes when each token came.

use std::io::BufRead;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::{Context, Result};
use serde_json::json;

use crate::http;

/// Streams an answer of `tokens` tokens until it ends or is to `stop`, and calls `token` as each comes.
pub(crate) fn stream(
    address: &str,
    prompt: &[u32],
    tokens: usize,
    stop: &AtomicBool,
    mut token: impl FnMut(Instant),
) -> Result<()> {
    let body = json!({
        "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": true, "stream": true,
    });
    // A token that completes no character gives no text, but an event.
    for line in http::post(address, "/v1/completions", &body.to_string())?.lines() {
        let line = line?;
        let Some(data) = line.strip_prefix("data: ") else { continue };
        if data == "[DONE]" || stop.load(Ordering::Relaxed) {
            break;
        }
        token(Instant::now());
    }
    Ok(())
}

/// Seconds to the first token of an answer that has no other.
pub(crate) fn first_token(address: &str, prompt: &[u32]) -> Result<f64> {
    let started = Instant::now();
    let mut first = None;
    stream(address, prompt, 1, &AtomicBool::new(false), |now| {
        first.get_or_insert((now - started).as_secs_f64());
    })?;
    first.with_context(|| format!("{address} sent no token"))
}
