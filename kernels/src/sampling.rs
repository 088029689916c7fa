use crate::TokenMask;

/// Most alternatives a request may ask log-probabilities for (OpenAI's limit for chat).
pub const MAX_TOP_LOGPROBS: usize = 20;

/// How the next token is drawn from its logits. Values are checked where requests enter; here they are trusted.
///
/// Order of application, as in vLLM: a grammar's mask, `logit_bias`, suppressed tokens, repetition, presence and
/// frequency penalties, temperature, then `top_k`, `top_p`, `min_p` each on what the previous one left. Of equally
/// likely tokens the lower id counts as the likelier. A logit that is NaN counts as impossible (-inf), +inf as the
/// largest finite number; if every token is impossible, the outcome says so ([`Sampled::impossible`]). The draw inverts
/// the cumulative distribution of the kept tokens, taken in the order of their ids.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy: the highest logit, the lowest id on ties.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches `top_p`; 1 keeps all.
    pub top_p: f32,
    /// Keep tokens at least `min_p` times as likely as the likeliest; 0 keeps all.
    pub min_p: f32,
    /// Divides positive and multiplies negative logits of tokens seen in prompt or output (Keskar et al. 2019); 1 is
    /// off.
    pub repetition_penalty: f32,
    /// Subtracted from the logits of tokens seen in the output; 0 is off.
    pub presence_penalty: f32,
    /// Subtracted once for each time a token was seen in the output; 0 is off.
    pub frequency_penalty: f32,
    /// Added to the logits of single tokens.
    pub logit_bias: Vec<(u32, f32)>,
    /// Seed of this request's random numbers. The draw depends on it and on the token's position alone, so neither the
    /// batch nor a preemption changes it.
    pub seed: u64,
}

impl Default for SamplingParams {
    /// Greedy.
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
        }
    }
}

impl SamplingParams {
    /// Whether tokens that were seen change the logits.
    pub(crate) fn penalises(&self) -> bool {
        self.repetition_penalty != 1.0 || self.presence_penalty != 0.0 || self.frequency_penalty != 0.0
    }
}

/// What to do with one row of logits.
#[derive(Debug, Clone, Copy)]
pub enum RowTask<'a> {
    /// Draw a token.
    Sample {
        /// How.
        params: &'a SamplingParams,
        /// Tokens that must not be drawn now (end-of-sequence below `min_tokens`).
        suppress: &'a [u32],
        /// The tokens that may be drawn at all, where a grammar says so. It covers the vocabulary at least; whatever
        /// stands behind that is not looked at.
        mask: Option<&'a TokenMask>,
    },
    /// The token is known (a prompt's log-probabilities): only look it up.
    Score {
        /// The known token.
        token: u32,
    },
}

/// Tells sequences apart. Backends may remember what they have seen of one: whatever is drawn for later under the same
/// number has the same parameters and prompt, and output that begins with what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId(pub u64);

/// One row to sample or score.
#[derive(Debug, Clone, Copy)]
pub struct SampleRow<'a> {
    /// What to do.
    pub task: RowTask<'a>,
    /// Whose row it is.
    pub sequence: SequenceId,
    /// Prompt of the request: its repetition penalty looks at it.
    pub prompt: &'a [u32],
    /// Tokens generated so far; for a backend that draws ahead, the last may be a
    /// [`Batch::PLACEHOLDER`](crate::Batch::PLACEHOLDER) and a row. `prompt.len() + output.len()` is the position
    /// drawn, which with the seed determines the random number.
    pub output: &'a [u32],
    /// Alternatives to report, at most [`MAX_TOP_LOGPROBS`]; `None`: not even the token's own log-probability is
    /// wanted, and `Sampled::logprob` is unspecified.
    pub logprobs: Option<u32>,
}

/// The outcome for one row. Log-probabilities are of the model's own distribution: natural logarithm, taken before any
/// mask, penalty, bias or temperature.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sampled {
    /// The token drawn (or scored).
    pub token: u32,
    /// No token could be drawn (or scored): the model gave only NaN and -inf, or everything else was suppressed or
    /// masked. The other fields mean nothing then, and whoever asked must not go on as if they did.
    pub impossible: bool,
    /// Its log-probability.
    pub logprob: f32,
    /// Valid entries in `top`.
    pub top_len: u32,
    /// The likeliest tokens and their log-probabilities, best first, lower id first on ties.
    pub top: [(u32, f32); MAX_TOP_LOGPROBS],
}

impl Default for Sampled {
    fn default() -> Self {
        Self { token: 0, impossible: false, logprob: 0.0, top_len: 0, top: [(0, 0.0); MAX_TOP_LOGPROBS] }
    }
}

/// A number in `[0, 1)` for the draw at `position` of a request: SplitMix64 (Steele, Lea and Flood 2014) used as a
/// counter based generator, its output function applied to the seed, stepped by the position, twice. It depends on its
/// two arguments alone, so nothing has to be stored, and any backend on any worker draws the same.
pub(crate) fn uniform(seed: u64, position: u64) -> f64 {
    let bits = mix(mix(seed).wrapping_add((position + 1).wrapping_mul(GOLDEN_GAMMA)));
    // The 53 bits an f64 holds exactly.
    (bits >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
}

const GOLDEN_GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(z: u64) -> u64 {
    let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The logit of a token that was seen in prompt or output, `times` in the output, after all penalties. Single
/// precision, in this order, on every backend: a greedy choice must not hang on how it was rounded.
pub(crate) fn penalized(logit: f32, times: u32, params: &SamplingParams) -> f32 {
    let r = params.repetition_penalty;
    let mut logit = if logit > 0.0 { logit / r } else { logit * r };
    if times > 0 {
        logit -= params.frequency_penalty * times as f32;
        logit -= params.presence_penalty;
    }
    logit
}

/// NaN counts as impossible, and +inf as the largest number there is.
pub(crate) fn finite_or_impossible(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}
