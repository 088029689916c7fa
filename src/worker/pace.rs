//! How long a step may take while answers are being generated, and what that leaves for prompts.

use std::time::Duration;

/// Prompt tokens of a step before anything was measured, and at least.
const CHUNK_MIN: usize = 16;
/// What the latest step counts for in a mean.
const WEIGHT: f64 = 0.2;
/// Steps with prompts beside decodes after which one goes nearly without, to see what decoding takes by now: while prompts
/// keep coming there would be none.
const MIXED_MAX: u32 = 32;

/// Cuts prompts into chunks such that a step in which others decode takes about as long as their readers accept between two
/// tokens. How fast this machine computes prompts of this model is measured, as no number of tokens suits all: 512 are
/// milliseconds on one and seconds on another. (A token budget from a target for the time between tokens is Sarathi-Serve's.)
///
/// Only when tokens are computed depends on it, never which ones.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Seconds a step should take.
    target: f64,
    /// Seconds of a step that only decodes, lately.
    decode_step: Option<f64>,
    /// Seconds of a prompt token, lately.
    prompt_token: Option<f64>,
    /// Steps with both since the last that only decoded.
    mixed: u32,
}

impl Pace {
    pub(super) fn new(target: Duration) -> Self {
        Self { target: target.as_secs_f64(), decode_step: None, prompt_token: None, mixed: 0 }
    }

    /// A step took so long, and computed so many prompt tokens beside `decodes` tokens of answers.
    pub(super) fn stepped(&mut self, prompt_tokens: usize, decodes: usize, took: Duration) {
        let took = took.as_secs_f64();
        // One prompt token among answers is one answer more.
        if prompt_tokens <= usize::from(decodes > 0) {
            // What was known before so many steps with prompts is of the past.
            if self.mixed >= MIXED_MAX {
                self.decode_step = None;
            }
            observe(&mut self.decode_step, took);
            self.mixed = 0;
            return;
        }
        if decodes == 0 {
            observe(&mut self.prompt_token, took / prompt_tokens as f64);
            return;
        }
        self.mixed += 1;
        match &mut self.decode_step {
            // Decoding cannot take longer than the same and a prompt: there was a stall, or more to decode.
            Some(decoding) if took < *decoding => *decoding = took,
            decoding => observe(&mut self.prompt_token, (took - decoding.unwrap_or(0.0)) / prompt_tokens as f64),
        }
    }

    /// Prompt tokens of the next step in which others decode. They get as much time as decoding itself at least, however
    /// long that takes, so that prompts get done.
    pub(super) fn chunk(&self) -> usize {
        if self.mixed >= MIXED_MAX {
            return 1;
        }
        let Some(prompt_token) = self.prompt_token else { return CHUNK_MIN };
        let decoding = self.decode_step.unwrap_or(0.0);
        let time = (self.target - decoding).max(decoding);
        // What is too large for the type is cut to its largest value.
        ((time / prompt_token) as usize).max(CHUNK_MIN)
    }
}

fn observe(mean: &mut Option<f64>, sample: f64) {
    *mean = Some(mean.map_or(sample, |mean| mean + (sample - mean) * WEIGHT));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pace(decode_ms: u64, prompt_token_ms: u64) -> Pace {
        let mut pace = Pace::new(Duration::from_millis(200));
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
        assert_eq!(Pace::new(Duration::from_millis(200)).chunk(), CHUNK_MIN);
    }

    #[test]
    fn prompts_that_keep_coming_get_their_time_however_many_are_decoded_by_now() {
        let mut pace = pace(20, 2);
        let mut tokens = 0;
        for _ in 0..100 {
            let chunk = pace.chunk();
            tokens += chunk;
            pace.stepped(chunk, 64, Duration::from_millis(300 + 2 * chunk as u64));
        }
        assert!(pace.chunk() > 50 && tokens > 100 * CHUNK_MIN, "{} and {tokens}", pace.chunk());
    }

    #[test]
    fn after_a_stall_decoding_is_known_again_with_the_next_step() {
        let mut pace = pace(50, 2);
        pace.stepped(0, 8, Duration::from_secs(10));
        pace.stepped(70, 8, Duration::from_millis(190));
        assert!((90..=110).contains(&pace.chunk()), "{}", pace.chunk());
    }

    #[test]
    fn a_machine_that_is_fast_beyond_measure_is_not_held_back() {
        let mut pace = Pace::new(Duration::from_millis(200));
        pace.stepped(512, 0, Duration::ZERO);
        assert_eq!(pace.chunk(), usize::MAX);
    }
}
