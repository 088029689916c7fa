//! Warming up: what a model's runner prepares before the first request comes.

use std::time::{Duration, Instant};

use engine_kernels::{Backend, Batch, RowTask, SampleRow, Sampled, SamplingParams, SequenceId, TokenMask, WarmUp};

use super::{EngineConfig, ModelRunner, RunnerError};

/// The sequence of all rows of a warm-up: no real one gets as far as this number.
pub(super) const NOBODY: SequenceId = SequenceId(u64::MAX);
/// Between two words about how far it is.
const PROGRESS_PAUSE: Duration = Duration::from_secs(2);

impl<B: Backend> ModelRunner<B> {
    /// Prepares for all steps within `config`, if the backend gains by it: on CUDA devices, memory is made for the
    /// largest there can be, and, for whoever `decodes`, for what is remembered of sequences with penalties; and steps
    /// in which sequences decode are recorded as graphs. Says in the log how far it is and what it took. No page is
    /// touched.
    pub fn warm_up(&mut self, config: &EngineConfig, decodes: bool) -> Result<WarmUp, RunnerError> {
        if decodes && let Some(ahead) = self.backend.ahead() {
            // Whether or not anything is recorded.
            ahead.make_room_for_penalties();
            self.backend.check().map_err(|error| RunnerError(error.to_string()))?;
        }
        let sizes = self.backend.warm_up_sizes(config.max_num_seqs);
        let Some(&largest) = sizes.last() else { return Ok(WarmUp::default()) };
        let started = Instant::now();
        let mut batch = Batch::default();
        // The largest step first: what room is made for it then lies where it will ever be, as recordings rely on.
        let pages = config.max_num_seqs * config.max_model_len.div_ceil(config.block_size);
        batch.push(&vec![0; config.max_num_batched_tokens], 0, &vec![0; pages], 0);
        let mut all = self.warm_up_step(&batch, config.vocab_size)?;
        if !decodes {
            tracing::info!(
                "made room for steps of {} tokens: {} MiB of the device's memory",
                config.max_num_batched_tokens,
                all.device_bytes >> 20
            );
            return Ok(all);
        }
        tracing::info!("recording steps in which 1 to {largest} sequences decode; --enforce-eager does without");
        let mut said = started;
        for size in sizes {
            batch.clear();
            (0..size).for_each(|_| batch.push(&[0], config.max_model_len as u32 - 1, &[0], 0));
            let WarmUp { recorded, device_bytes } = self.warm_up_step(&batch, config.vocab_size)?;
            all.recorded += recorded;
            all.device_bytes += device_bytes;
            if said.elapsed() > PROGRESS_PAUSE {
                said = Instant::now();
                tracing::info!("recorded {} steps, of up to {size} sequences of {largest}", all.recorded);
            }
        }
        if all.recorded == 0 {
            // The backend has said why.
            tracing::warn!("no step was recorded: all are computed kernel by kernel, which takes longer");
            return Ok(all);
        }
        tracing::info!(
            "recorded {} steps in which 1 to {largest} sequences decode, in {:.1} s; with what they work in they take \
             {} MiB of the device's memory",
            all.recorded,
            started.elapsed().as_secs_f64(),
            all.device_bytes >> 20
        );
        Ok(all)
    }

    /// One size of steps, and logits and tokens behind it.
    fn warm_up_step(&mut self, batch: &Batch, vocab_size: usize) -> Result<WarmUp, RunnerError> {
        let Self { backend, model, cache, max_logit_rows } = self;
        let warm_up = model.warm_up(backend, cache, batch);
        let rows = &batch.logit_rows[..batch.logit_rows.len().min(*max_logit_rows)];
        let logits = model.logits(backend, rows);
        let params = SamplingParams::default();
        // Room is made for the masks of as many rows, should all have grammars.
        let mask = TokenMask::all(vocab_size);
        let task = RowTask::Sample { params: &params, suppress: &[], mask: Some(&mask) };
        let row = |_| SampleRow { task, sequence: NOBODY, prompt: &[], output: &[], logprobs: None };
        backend.sample(logits, &row, &mut vec![Sampled::default(); rows.len()]);
        backend.check().map_err(|error| RunnerError(error.to_string()))?;
        Ok(warm_up)
    }
}
