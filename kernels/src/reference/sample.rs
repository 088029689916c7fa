use crate::sampling::{finite_or_impossible, penalized, uniform};
use crate::{RowTask, SampleRow, Sampled, SamplingParams, TokenMask};

/// Samples or scores one row straight from the definitions: sort everything, then filter.
pub(crate) fn sample_row(logits: &[f32], row: &SampleRow<'_>) -> Sampled {
    let logits: Vec<f32> = logits.iter().map(|&logit| finite_or_impossible(logit)).collect();
    let possible = logits.iter().any(|&logit| logit > f32::NEG_INFINITY);
    let token = match row.task {
        _ if !possible => None,
        RowTask::Score { token } => Some(token),
        RowTask::Sample { params, suppress, mask } => draw(&logits, params, suppress, mask, row),
    };
    let Some(token) = token else { return Sampled { impossible: true, ..Sampled::default() } };
    let mut sampled = Sampled { token, ..Sampled::default() };
    if let Some(wanted) = row.logprobs {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
        let sum: f64 = logits.iter().map(|&logit| (logit as f64 - max).exp()).sum();
        let logprob = |id: u32| match logits[id as usize] {
            f32::NEG_INFINITY => f32::NEG_INFINITY,
            logit => (logit as f64 - max - sum.ln()) as f32,
        };
        sampled.logprob = logprob(token);
        for (slot, &id) in sampled.top.iter_mut().zip(by_likelihood(&logits).iter().take(wanted as usize)) {
            *slot = (id, logprob(id));
            sampled.top_len += 1;
        }
    }
    sampled
}

/// All ids, the highest logit first, the lower id first on ties.
fn by_likelihood(logits: &[f32]) -> Vec<u32> {
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    // A stable sort leaves equal logits in the order of their ids; there are no NaNs here.
    ids.sort_by(|&a, &b| logits[b as usize].partial_cmp(&logits[a as usize]).expect("no NaN"));
    ids
}

/// A token, if any is possible.
fn draw(
    logits: &[f32],
    params: &SamplingParams,
    suppress: &[u32],
    mask: Option<&TokenMask>,
    row: &SampleRow<'_>,
) -> Option<u32> {
    let mut logits = logits.to_vec();
    if let Some(mask) = mask {
        for (id, logit) in logits.iter_mut().enumerate() {
            if !mask.allows(id as u32) {
                *logit = f32::NEG_INFINITY;
            }
        }
    }
    for &(id, bias) in &params.logit_bias {
        logits[id as usize] += bias;
    }
    for &id in suppress {
        logits[id as usize] = f32::NEG_INFINITY;
    }
    for (id, logit) in logits.iter_mut().enumerate() {
        let times = row.output.iter().filter(|&&token| token as usize == id).count() as u32;
        if times > 0 || row.prompt.contains(&(id as u32)) {
            *logit = penalized(*logit, times, params);
        }
        *logit = finite_or_impossible(*logit);
    }

    let order = by_likelihood(&logits);
    let best = order[0];
    let max = logits[best as usize] as f64;
    if max == f64::NEG_INFINITY {
        return None;
    }
    if params.temperature == 0.0 {
        return Some(best);
    }
    let weight = |id: u32| ((logits[id as usize] as f64 - max) / params.temperature as f64).exp();

    let mut kept = order;
    if params.top_k > 0 {
        kept.truncate(params.top_k as usize);
    }
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    if params.top_p < 1.0 {
        let mut reached = 0.0;
        let needed = kept.iter().position(|&id| {
            reached += weight(id);
            reached >= params.top_p as f64 * total
        });
        kept.truncate(needed.map_or(kept.len(), |last| last + 1));
    }
    kept.retain(|&id| weight(id) >= params.min_p as f64);

    // Inverse of the cumulative distribution, tokens in the order of their ids.
    kept.sort_unstable();
    let total: f64 = kept.iter().map(|&id| weight(id)).sum();
    let position = (row.prompt.len() + row.output.len()) as u64;
    let target = uniform(params.seed, position) * total;
    let mut reached = 0.0;
    let drawn = kept.iter().find(|&&id| {
        reached += weight(id);
        reached > target
    });
    Some(*drawn.unwrap_or(&best))
}
