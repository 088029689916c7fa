//! Drawing a token from one row of logits, in a handful of passes and without sorting the vocabulary.
//!
//! Whatever is filtered by `top_k`, `top_p` and `min_p`, what remains is a leading part of the tokens ordered by
//! likelihood. So each filter only has to find where that part ends: a [`key()`] to cut at.

mod key;
mod scan;

use key::{key, logit_and_id};
use scan::Weighing;

use crate::sampling::{finite_or_impossible, penalized, uniform};
use crate::{RowTask, SampleRow, Sampled, SamplingParams, TokenMask};

/// Working memory of one thread for [`sample_row`].
#[derive(Debug)]
pub(crate) struct SampleScratch {
    /// Candidates, as [`key()`]s.
    keys: Vec<u64>,
    /// Sums of weights, one a block of logits.
    sums: Vec<f64>,
    /// Weights of all tokens, whole blocks of them.
    weights: Vec<f32>,
    /// The logits as the model gave them, where they are still wanted after penalties.
    raw: Vec<f32>,
    /// How often each token was seen; all 0 between rows.
    seen: Vec<u32>,
}

impl SampleScratch {
    /// Room for rows of `vocab` logits.
    pub(crate) fn new(vocab: usize) -> Self {
        Self {
            keys: Vec::with_capacity(vocab),
            sums: vec![0.0; vocab.div_ceil(scan::BLOCK)],
            weights: vec![0.0; vocab.next_multiple_of(scan::BLOCK)],
            raw: vec![0.0; vocab],
            seen: vec![0; vocab],
        }
    }
}

/// Samples or scores one row, which it overwrites. Allocates nothing.
pub(crate) fn sample_row(logits: &mut [f32], row: &SampleRow<'_>, scratch: &mut SampleScratch) -> Sampled {
    let mut sampled = Sampled::default();
    let peak = clean_peak(logits);
    if peak.logit == f32::NEG_INFINITY {
        sampled.impossible = true;
        return sampled;
    }
    let Some(wanted) = row.logprobs else {
        let picked = pick(logits, peak, row, scratch);
        (sampled.token, sampled.impossible) = (picked.unwrap_or(0), picked.is_none());
        return sampled;
    };

    let weighing = Weighing { max: peak.logit, inverse_temperature: 1.0, cut: key::KEEP_ALL };
    let log_sum = libm::log(scan::weigh(logits, &weighing, &mut scratch.sums));
    let logprob = |logit: f32| match logit {
        f32::NEG_INFINITY => f32::NEG_INFINITY,
        logit => (logit as f64 - peak.logit as f64 - log_sum) as f32,
    };
    let top = (wanted as usize).min(logits.len()).min(sampled.top.len());
    if top > 0 {
        scan::likeliest(logits, top, &mut scratch.keys);
        scratch.keys.sort_unstable_by(|a, b| b.cmp(a));
        for (slot, &key) in sampled.top.iter_mut().zip(&scratch.keys) {
            let (logit, id) = logit_and_id(key);
            *slot = (id, logprob(logit));
        }
        sampled.top_len = top as u32;
    }
    scratch.raw[..logits.len()].copy_from_slice(logits);
    let picked = pick(logits, peak, row, scratch);
    (sampled.token, sampled.impossible) = (picked.unwrap_or(0), picked.is_none());
    sampled.logprob = logprob(scratch.raw[sampled.token as usize]);
    sampled
}

/// The token of a row whose highest logit is `peak`; `None` if what the request asks for leaves none.
fn pick(logits: &mut [f32], peak: scan::Peak, row: &SampleRow<'_>, scratch: &mut SampleScratch) -> Option<u32> {
    let (params, suppress, mask) = match row.task {
        RowTask::Score { token } => return Some(token),
        RowTask::Sample { params, suppress, mask } => (params, suppress, mask),
    };
    if let Some(mask) = mask {
        forbid(logits, mask);
    }
    let adjusted = adjust(logits, params, suppress, row, &mut scratch.seen);
    let peak = if adjusted || mask.is_some() { clean_peak(logits) } else { peak };
    if peak.logit == f32::NEG_INFINITY {
        return None;
    }
    if params.temperature == 0.0 {
        return Some(peak.id);
    }
    let position = row.prompt.len() + row.output.len();
    Some(draw(logits, params, peak.logit, position as u64, scratch))
}

/// The peak of a row after making every logit of it finite or -inf.
fn clean_peak(logits: &mut [f32]) -> scan::Peak {
    let peak = scan::peak(logits);
    if !peak.dirty {
        return peak;
    }
    for logit in logits.iter_mut() {
        *logit = finite_or_impossible(*logit);
    }
    scan::peak(logits)
}

/// Makes every token impossible that the mask does not allow.
fn forbid(logits: &mut [f32], mask: &TokenMask) {
    let words = mask.words();
    assert!(words.len() >= logits.len().div_ceil(32), "a mask has a bit for every token");
    for (logits, &word) in logits.chunks_mut(32).zip(words) {
        match word {
            u32::MAX => {}
            // As most are.
            0 => logits.fill(f32::NEG_INFINITY),
            _ => {
                let forbidden = logits.iter_mut().enumerate().filter(|(bit, _)| word >> bit & 1 == 0);
                forbidden.for_each(|(_, logit)| *logit = f32::NEG_INFINITY);
            }
        }
    }
}

/// Biases, suppression and penalties. Whether anything may have changed.
fn adjust(
    logits: &mut [f32],
    params: &SamplingParams,
    suppress: &[u32],
    row: &SampleRow<'_>,
    seen: &mut [u32],
) -> bool {
    for &(id, bias) in &params.logit_bias {
        logits[id as usize] += bias;
    }
    for &id in suppress {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    let penalties = params.penalises();
    if penalties {
        const IN_PROMPT: u32 = 1 << 31;
        let prompt = if params.repetition_penalty != 1.0 { row.prompt } else { &[] };
        prompt.iter().for_each(|&id| seen[id as usize] = IN_PROMPT);
        row.output.iter().for_each(|&id| seen[id as usize] += 1);
        for &id in prompt.iter().chain(row.output) {
            // Taking the count back makes this happen once a token, and leaves all counts 0.
            let times = std::mem::take(&mut seen[id as usize]);
            if times > 0 {
                logits[id as usize] = penalized(logits[id as usize], times & !IN_PROMPT, params);
            }
        }
    }
    penalties || !params.logit_bias.is_empty() || !suppress.is_empty()
}

/// Draws from logits of which at least one, `max`, is finite, and none is NaN or +inf.
fn draw(logits: &[f32], params: &SamplingParams, max: f32, position: u64, scratch: &mut SampleScratch) -> u32 {
    let SampleScratch { keys, sums, weights, .. } = scratch;
    // Finite, so that the likeliest token weighs e^(0 · x) = 1 however small the temperature.
    let inverse_temperature = (1.0 / params.temperature).min(f32::MAX);
    let mut weighing = Weighing { max, inverse_temperature, cut: key::KEEP_ALL };
    let top_k = params.top_k as usize;
    let filters_k = (1..logits.len()).contains(&top_k);
    if filters_k {
        scan::likeliest(logits, top_k, keys);
        weighing.cut = keys[top_k - 1];
    }
    if params.top_p < 1.0 {
        weighing.cut = if filters_k {
            let wanted = params.top_p as f64 * mass(keys, &weighing);
            nucleus(keys, &weighing, wanted)
        } else {
            nucleus_of_all(logits, &weighing, params, keys, weights)
        };
    }
    if params.min_p > 0.0 {
        // The key below all others with that logit, so that all of them are kept.
        let lowest = key(logit_of_weight(params.min_p as f64, max, params.temperature), u32::MAX as usize);
        weighing.cut = weighing.cut.max(lowest);
    }
    let total = scan::weigh(logits, &weighing, sums);
    scan::invert(logits, &weighing, sums, uniform(params.seed, position) * total)
}

/// The lowest logit that weighs at least `weight` (the likeliest token weighs 1).
fn logit_of_weight(weight: f64, max: f32, temperature: f32) -> f32 {
    let exact = max as f64 + temperature as f64 * libm::log(weight);
    let nearest = exact as f32;
    if (nearest as f64) < exact { nearest.next_up() } else { nearest }
}

fn mass(keys: &[u64], weighing: &Weighing) -> f64 {
    keys.iter().map(|&key| weighing.weight(logit_and_id(key).0) as f64).sum()
}

/// [`nucleus`] of the whole vocabulary: first narrows down where it ends, by the masses above a few bars at a time,
/// until few enough tokens are left to select among.
fn nucleus_of_all(
    logits: &[f32],
    weighing: &Weighing,
    params: &SamplingParams,
    keys: &mut Vec<u64>,
    weights: &mut [f32],
) -> u64 {
    const FEW: usize = 1024;
    let total = scan::weigh_all(logits, weighing, weights);
    let wanted = params.top_p as f64 * total;
    // Tokens lighter than this have, all together, less than the mass that may be left out.
    let lightest = (1.0 - params.top_p as f64) * total / logits.len() as f64;
    let lowest = logit_of_weight(lightest, weighing.max, params.temperature).next_down();
    // The nucleus ends at a token whose logit is in `from..to`; those from `to` up weigh `reached`.
    let (mut from, mut to, mut reached) = (lowest.max(f32::MIN), f32::INFINITY, 0.0);
    // Three passes divide the range by hundreds; what they cannot divide are ties.
    for _ in 0..3 {
        if scan::count(logits, from, to) <= FEW {
            break;
        }
        let (low, high) = (from as f64, to.min(weighing.max) as f64);
        let bars = std::array::from_fn(|i| (high - (high - low) * (i + 1) as f64 / (scan::BARS + 1) as f64) as f32);
        let masses = scan::masses(logits, weights, &bars);
        for (bar, mass) in bars.into_iter().zip(masses) {
            if mass >= wanted {
                from = bar;
                break;
            }
            (to, reached) = (bar, mass);
        }
    }
    scan::collect(logits, from, to, keys);
    if keys.is_empty() {
        // Only rounding can leave nobody to complete the mass.
        return key(to, u32::MAX as usize);
    }
    nucleus(keys, weighing, wanted - reached)
}

/// The key of the token that completes `wanted` when weights are added up from the likeliest down: quickselect by mass
/// instead of by count. Reorders `keys`.
fn nucleus(keys: &mut [u64], weighing: &Weighing, wanted: f64) -> u64 {
    let (mut from, mut to) = (0, keys.len());
    let mut reached = 0.0;
    while to - from > 64 {
        let middle = (to - from) / 2;
        keys[from..to].select_nth_unstable_by(middle, |a, b| b.cmp(a));
        let upper = mass(&keys[from..=from + middle], weighing);
        if reached + upper >= wanted {
            to = from + middle + 1;
        } else {
            reached += upper;
            from += middle + 1;
        }
    }
    keys[from..to].sort_unstable_by(|a, b| b.cmp(a));
    for &key in &keys[from..to] {
        reached += weighing.weight(logit_and_id(key).0) as f64;
        if reached >= wanted {
            return key;
        }
    }
    keys[to - 1]
}

#[cfg(test)]
mod tests;
