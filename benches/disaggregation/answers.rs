//! Whether prompts that are handed off get the answers of one process.

use std::io::Read;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::cluster::{Engine, Pair, Services, Worker};
use crate::http;
use crate::model::Model;

/// Prompts, and tokens of each answer.
const PROMPTS: u64 = 8;
const TOKENS: usize = 64;
/// How many of the likeliest tokens are told.
const LIKELIEST: usize = 5;
/// Two steps of different sizes add up in different orders. Where the likeliest tokens are nearer to each other than
/// that, in nats, either may win; farther, something is wrong.
const MARGIN_MAX: f64 = 0.05;

/// What was seen.
pub(crate) struct Alike {
    pub(crate) answers: usize,
    pub(crate) tokens: usize,
    /// Of them, those that are the same to the end.
    pub(crate) equal: usize,
    /// Between the two tokens where an answer parts from the other, in one process.
    pub(crate) margin_max: f64,
}

/// Asks one process and a pair, and fails where they part without being near.
pub(crate) fn compare(engine: &Engine, model: &Model, long: usize) -> Result<Alike> {
    let services = Services::start();
    let alone = Worker::alone(engine, model, &[0])?;
    let pair = Pair::start(engine, &services, "answers", model, engine.way())?;
    let mut alike = Alike { answers: PROMPTS as usize, tokens: TOKENS, equal: 0, margin_max: 0.0 };
    for number in 0..PROMPTS {
        // On borders of pages and beside them.
        let prompt = model.prompt(long - 13 * number as usize, 3_000_000 + number);
        let [one, other] = [answer(&alone.address, &prompt)?, answer(&pair.decode.address, &prompt)?];
        match margin(&one, &other)? {
            None => alike.equal += 1,
            Some(margin) => {
                ensure!(margin <= MARGIN_MAX, "answer {number} parts where its tokens are {margin} nat apart");
                alike.margin_max = alike.margin_max.max(margin);
            }
        }
    }
    let handed_off = pair.decode.metric("engine_prefills_total{where=\"remote\"}")?;
    ensure!(handed_off == PROMPTS as f64, "{handed_off} of {PROMPTS} prompts were handed off");
    Ok(alike)
}

/// The log-probabilities part of an answer.
fn answer(address: &str, prompt: &[u32]) -> Result<Value> {
    let body = json!({
        "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": true, "logprobs": LIKELIEST,
    });
    let mut text = String::new();
    http::post(address, "/v1/completions", &body.to_string())?.read_to_string(&mut text)?;
    let mut answer: Value = serde_json::from_str(&text)?;
    Ok(answer["choices"][0]["logprobs"].take())
}

/// Where two answers part, how far apart the two tokens are in the first of them.
fn margin(one: &Value, other: &Value) -> Result<Option<f64>> {
    let tokens = |of: &Value| of["tokens"].as_array().filter(|all| all.len() == TOKENS).cloned();
    let [mine, theirs] = [tokens(one), tokens(other)].map(|all| all.context("an answer is short of tokens"));
    let (mine, theirs) = (mine?, theirs?);
    let Some(at) = mine.iter().zip(&theirs).position(|(mine, theirs)| mine != theirs) else { return Ok(None) };
    let likelihood = |token: &Value| one["top_logprobs"][at][token.as_str().unwrap_or_default()].as_f64();
    // One that is not among the likeliest is far away.
    Ok(Some(match (likelihood(&mine[at]), likelihood(&theirs[at])) {
        (Some(mine), Some(theirs)) => mine - theirs,
        _ => f64::INFINITY,
    }))
}
