//! How long steps take, may take while answers are being generated, and what that leaves for prompts.

use std::time::Duration;

use crate::{handoff::Forecast, scheduler::Candidate};

/// Prompt tokens of a step before anything was measured, and at least.
const CHUNK_MIN: usize = 16;
/// What the latest step counts for in a mean.
const WEIGHT: f64 = 0.2;
/// Prompt tokens of a step that counts in full for what one takes; one with fewer counts for less, in proportion.
const TELLING_TOKENS: f64 = 32.0;
/// After this many steps with prompts beside decodes, two go nearly without prompts, to measure what decoding takes by
/// now: while prompts keep coming no other step would show it.
const MIXED_MAX: u32 = 32;
/// A step counts as this many times what was expected at most: what is beyond that was something else's.
const STALL: f64 = 4.0;
/// About how many seconds a step may take in which nobody decodes: whatever arrives meanwhile waits for its end, be it
/// a short prompt or the claim of a prefill worker, which soon gives up.
const ALONE_MAX: f64 = 1.0;

/// What steps take on this machine with this model, as measured, and what follows for prompts.
///
/// It cuts them into chunks such that a step in which others decode takes about as long as their readers accept between
/// two tokens: 512 are milliseconds on one machine and seconds on another. (A token budget from a target for the time
/// between tokens is Sarathi-Serve's.) Where nobody decodes, a step is to take no more than about a second. And it
/// predicts what a prompt would take here. Only where and when tokens are computed depends on it, never which ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Seconds a step should take.
    target: f64,
    /// Prompt tokens of a step at most.
    step_max: usize,
    /// Seconds of a step that only decodes, lately.
    decode_step: Option<f64>,
    /// Seconds of a prompt token, lately.
    prompt_token: Option<f64>,
    /// Steps with both since the last that only decoded.
    mixed: u32,
    /// What the first of the two steps took that go nearly without prompts after [`MIXED_MAX`] of these.
    probe: Option<f64>,
    /// Prompt tokens of a step in which nobody decodes.
    alone: usize,
}

impl Pace {
    pub(super) fn new(target: Duration, step_max: usize) -> Self {
        let target = target.as_secs_f64();
        Self { target, step_max, decode_step: None, prompt_token: None, mixed: 0, probe: None, alone: step_max }
    }

    /// How long a step should take from now on.
    pub(super) fn set_target(&mut self, target: Duration) {
        self.target = target.as_secs_f64();
    }

    /// A step took so long, and computed so many prompt tokens beside `decodes` tokens of answers.
    pub(super) fn stepped(&mut self, prompt_tokens: usize, decodes: usize, took: Duration) {
        let took = took.as_secs_f64();
        // One prompt token, such as the last of a prompt that was found, is one answer more.
        if prompt_tokens <= 1 {
            return self.decoded(took);
        }
        let tokens = prompt_tokens as f64;
        // What a step takes whatever it computes weighs the more on a token the fewer there are.
        let telling = (tokens / TELLING_TOKENS).min(1.0);
        if decodes == 0 {
            // Only a step that took too long says that it was too large: a few tokens take a while too.
            let fit = ((ALONE_MAX * tokens / took) as usize).max(CHUNK_MIN).min(self.step_max);
            self.alone = if took > ALONE_MAX { fit } else { self.alone.max(fit) };
            return observe(&mut self.prompt_token, took / tokens, WEIGHT * telling);
        }
        self.mixed += 1;
        match (&mut self.decode_step, &mut self.prompt_token) {
            // Nobody knows which of the two it was that took longer or shorter: both did, in proportion.
            (Some(decoding), Some(token)) if *token > 0.0 => {
                let expected = *decoding + *token * tokens;
                let change = WEIGHT * ((took / expected).min(STALL) - 1.0);
                *decoding *= 1.0 + change;
                *token *= 1.0 + change * telling;
            }
            (decoding, token) => {
                let rest = (took - decoding.unwrap_or(0.0)).max(0.0);
                observe(token, rest / tokens, WEIGHT * telling);
            }
        }
    }

    /// A step that only decoded took so many seconds.
    fn decoded(&mut self, took: f64) {
        if self.mixed < MIXED_MAX {
            let took = self.decode_step.map_or(took, |decoding| took.min(STALL * decoding));
            observe(&mut self.decode_step, took, WEIGHT);
        } else if let Some(first) = self.probe.take() {
            // What was known before so many steps with prompts is of the past. One of the two may have been held up.
            self.decode_step = Some(first.min(took));
        } else {
            self.probe = Some(took);
            return;
        }
        self.mixed = 0;
    }

    /// Prompt tokens of the next step in which others decode.
    pub(super) fn chunk(&self) -> usize {
        if self.mixed >= MIXED_MAX { 1 } else { self.fair_chunk() }
    }

    /// Prompt tokens of the next step in which nobody decodes.
    pub(super) fn chunk_alone(&self) -> usize {
        self.alone
    }

    /// What prefilling a prompt here would take, once that was measured.
    pub(super) fn forecast(&self, candidate: Candidate) -> Option<Forecast> {
        let prompt_token = self.prompt_token?;
        let own = candidate.tokens - candidate.cached;
        let tokens = candidate.queued + own;
        let computing = tokens as f64 * prompt_token;
        if candidate.decoding == 0 {
            return Some(Forecast { first_token: seconds(computing)?, gap: None });
        }
        let chunk = self.fair_chunk().min(self.step_max.saturating_sub(candidate.decoding)).max(1);
        let decoding = self.decode_step.unwrap_or(0.0);
        Some(Forecast {
            first_token: seconds(computing + tokens.div_ceil(chunk) as f64 * decoding)?,
            // Those before it are computed here in any case. And where decoding alone takes longer than it should, that
            // is no prompt's fault.
            gap: match decoding < self.target {
                true => Some(seconds(decoding + chunk.min(own) as f64 * prompt_token)?),
                false => None,
            },
        })
    }

    /// Prompts get as much time as decoding itself at least, however long that takes, so that they get done.
    fn fair_chunk(&self) -> usize {
        let Some(prompt_token) = self.prompt_token else { return CHUNK_MIN };
        let decoding = self.decode_step.unwrap_or(0.0);
        let time = (self.target - decoding).max(decoding);
        // What is too large for the type is cut to its largest value.
        ((time / prompt_token) as usize).max(CHUNK_MIN).min(self.step_max)
    }
}

fn observe(mean: &mut Option<f64>, sample: f64, weight: f64) {
    *mean = Some(mean.map_or(sample, |mean| mean + (sample - mean) * weight));
}

fn seconds(seconds: f64) -> Option<Duration> {
    Duration::try_from_secs_f64(seconds).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(decode_ms: u64, prompt_token_ms: u64) -> Pace {
        let mut pace = Pace::new(Duration::from_millis(200), 512);
        pace.stepped(0, 8, Duration::from_millis(decode_ms));
        pace.stepped(100, 8, Duration::from_millis(decode_ms + 100 * prompt_token_ms));
        pace
    }

    #[test]
    fn prompts_get_the_time_that_decoding_leaves() {
        assert!((74..=75).contains(&pace(50, 2).chunk()));
    }

    #[test]
    fn where_decoding_takes_all_of_it_prompts_get_as_much_again() {
        assert!((149..=150).contains(&pace(300, 2).chunk()));
    }

    #[test]
    fn a_prompt_gets_on_however_slow_the_machine_is_and_before_anything_is_known() {
        assert_eq!(pace(50, 1_000).chunk(), CHUNK_MIN);
        assert_eq!(Pace::new(Duration::from_millis(200), 512).chunk(), CHUNK_MIN);
    }

    /// Steps beside decodes with as many prompt tokens as it says, each taking what `cost` says, in milliseconds, of
    /// the step's number and those tokens. Returns what they took, and the tokens of all.
    fn run(pace: &mut Pace, steps: usize, mut cost: impl FnMut(usize, f64) -> f64) -> (Vec<f64>, usize) {
        let mut tokens = 0;
        let took = (0..steps).map(|step| {
            let chunk = pace.chunk();
            tokens += chunk;
            let took = cost(step, chunk as f64);
            pace.stepped(chunk, 64, Duration::from_secs_f64(took / 1e3));
            took
        });
        (took.collect(), tokens)
    }

    fn longer_than(ms: f64, steps: &[f64]) -> usize {
        steps.iter().filter(|&&took| took > ms).count()
    }

    #[test]
    fn prompts_that_keep_coming_get_their_time_however_many_are_decoded_by_now() {
        let mut pace = pace(20, 2);
        let (_, tokens) = run(&mut pace, 98, |_, chunk| 300.0 + 2.0 * chunk);
        assert!(pace.chunk() > 40 && tokens > 100 * CHUNK_MIN, "{} and {tokens}", pace.chunk());
    }

    #[test]
    fn a_stall_of_a_step_that_decodes_makes_few_steps_longer() {
        let mut pace = pace(50, 2);
        pace.stepped(0, 8, Duration::from_secs(10));
        let (steps, _) = run(&mut pace, 150, |_, chunk| 50.0 + 2.0 * chunk);
        assert_eq!(longer_than(250.0, &steps), 0, "{steps:?}");
    }

    #[test]
    fn nor_does_one_of_a_step_that_is_to_tell_what_decoding_takes() {
        let mut pace = pace(50, 2);
        let mut probes = 0;
        let (steps, _) = run(&mut pace, 150, |_, chunk| {
            probes += usize::from(chunk == 1.0);
            let held_up = chunk == 1.0 && probes % 2 == 1;
            50.0 + 2.0 * chunk + if held_up { 250.0 } else { 0.0 }
        });
        assert!(probes >= 8 && longer_than(250.0, &steps) == probes / 2, "{steps:?}");
    }

    #[test]
    fn when_many_answers_end_steps_are_soon_what_they_should_be() {
        let mut pace = pace(180, 2);
        let (steps, _) = run(&mut pace, 150, |step, chunk| if step < 10 { 180.0 } else { 30.0 } + 2.0 * chunk);
        assert!(longer_than(250.0, &steps[10..]) <= 10, "{steps:?}");
    }

    #[test]
    fn a_step_for_a_single_token_says_nothing_about_prompts_and_a_short_one_little() {
        let mut pace = Pace::new(Duration::from_millis(200), 512);
        pace.stepped(512, 0, Duration::from_millis(512));
        for _ in 0..20 {
            pace.stepped(1, 0, Duration::from_millis(20));
        }
        assert_eq!(pace.chunk(), 180);
        pace.stepped(4, 0, Duration::from_millis(20));
        assert!(pace.chunk() > 150, "{}", pace.chunk());
    }

    #[test]
    fn a_machine_that_is_fast_beyond_measure_is_not_held_back() {
        let mut pace = Pace::new(Duration::from_millis(200), 512);
        pace.stepped(512, 0, Duration::ZERO);
        assert_eq!(pace.chunk(), 512);
    }

    #[test]
    fn a_step_in_which_nobody_decodes_is_cut_where_one_took_more_than_a_second() {
        let mut pace = Pace::new(Duration::from_millis(200), 512);
        assert_eq!(pace.chunk_alone(), 512);
        pace.stepped(512, 0, Duration::from_millis(8_500));
        assert_eq!(pace.chunk_alone(), 60);
        pace.stepped(60, 0, Duration::from_millis(1_250));
        assert_eq!(pace.chunk_alone(), 48);
        // The end of a prompt is short, and takes a while all the same.
        pace.stepped(3, 0, Duration::from_millis(600));
        assert_eq!(pace.chunk_alone(), 48);
        pace.stepped(48, 0, Duration::from_millis(500));
        assert_eq!(pace.chunk_alone(), 96);
        pace.stepped(2, 0, Duration::from_secs(10));
        assert_eq!(pace.chunk_alone(), CHUNK_MIN);
        // That was something else's.
        pace.stepped(CHUNK_MIN, 0, Duration::from_millis(10));
        assert_eq!(pace.chunk_alone(), 512);
    }

    fn prompt(tokens: usize, queued: usize, decoding: usize) -> Candidate {
        Candidate { tokens: tokens + 100, cached: 100, decoding, queued, lost: 0 }
    }

    fn takes(first_token_ms: u64, gap_ms: Option<u64>) -> Option<Forecast> {
        Some(Forecast { first_token: Duration::from_millis(first_token_ms), gap: gap_ms.map(Duration::from_millis) })
    }

    #[test]
    fn a_forecast_is_of_the_chunks_that_the_prompt_would_be_cut_into() {
        assert_eq!(Pace::new(Duration::from_millis(200), 512).forecast(prompt(1_000, 0, 0)), None);
        // 2 ms a token, and beside 40 ms of decoding 80 tokens a step.
        let pace = pace(40, 2);
        assert_eq!(pace.forecast(prompt(1_000, 500, 0)), takes(3_000, None));
        assert_eq!(pace.forecast(prompt(1_100, 500, 8)), takes(3_200 + 20 * 40, Some(200)));
        assert_eq!(pace.forecast(prompt(10, 0, 8)), takes(20 + 40, Some(60)));
        assert_eq!(pace.forecast(prompt(10, 1_590, 8)), takes(3_200 + 20 * 40, Some(60)));
        // Where nearly all of a step is decodes, the rest is all there is for prompts.
        assert_eq!(pace.forecast(prompt(100, 0, 502)), takes(200 + 10 * 40, Some(60)));
        assert_eq!(pace.forecast(prompt(100, 0, 512)), takes(200 + 100 * 40, Some(42)));
    }

    #[test]
    fn decoding_that_takes_more_than_half_of_the_target_takes_prompts_over_it() {
        let mut pace = pace(120, 2);
        assert_eq!(pace.forecast(prompt(1_200, 0, 8)), takes(2_400 + 20 * 120, Some(240)));
        pace.set_target(Duration::from_millis(320));
        assert_eq!(pace.forecast(prompt(1_200, 0, 8)), takes(2_400 + 12 * 120, Some(320)));
        // Decoding alone does that here, whatever becomes of the prompt.
        pace.set_target(Duration::from_millis(100));
        assert_eq!(pace.forecast(prompt(1_200, 0, 8)), takes(2_400 + 20 * 120, None));
    }
}
