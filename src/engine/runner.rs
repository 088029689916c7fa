use engine_kernels::{Backend, Batch, KernelError, KvLayout, KvPages, SampleRow, Sampled};
use engine_models::{ForwardLimits, Model};

/// A step failed, for instance because the device did; the engine ends with it.
#[derive(Debug, thiserror::Error)]
#[error("a step failed: {0}")]
pub struct RunnerError(pub String);

/// Computes steps. The engine thread owns it; [`ModelRunner`] is the real one.
pub trait Runner: Send + 'static {
    /// Computes `batch`, then samples or scores each of `batch.logit_rows` into `out`, in order; `row(i)` says what is
    /// wanted of the i-th. Calls `layer_done` with each layer whose keys and values of this step are in the cache; they
    /// stay as they are until another step writes them.
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError>;

    /// Computing steps without waiting for them, if it can.
    fn ahead(&mut self) -> Option<&mut dyn RunsAhead> {
        None
    }
}

/// A runner whose device computes on its own, so that the next step can be planned and launched meanwhile.
pub trait RunsAhead {
    /// Does what [`Runner::execute`] does but sample, and wait. Two steps may be on their way at a time. In the second,
    /// tokens that the first draws are [`Batch::PLACEHOLDER`].
    fn launch(&mut self, batch: &Batch, layer_done: &mut dyn FnMut(usize)) -> Result<(), RunnerError>;

    /// Samples what was launched last, without waiting. Rows' outputs may end with what the step before draws, as
    /// [`Batch::PLACEHOLDER`].
    fn draw<'a>(&mut self, batch: &Batch, row: &(dyn Fn(usize) -> SampleRow<'a> + Sync)) -> Result<(), RunnerError>;

    /// Waits for the earlier one, and says what was sampled. The later one need not be drawn yet.
    fn collect(&mut self, out: &mut [Sampled]) -> Result<(), RunnerError>;
}

impl Runner for Box<dyn Runner> {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        (**self).execute(batch, row, out, layer_done)
    }

    fn ahead(&mut self) -> Option<&mut dyn RunsAhead> {
        (**self).ahead()
    }
}

/// A [`RunsAhead`] is handed out only where [`Backend::ahead`] is `Some`.
const IS_AHEAD: &str = "the backend draws ahead";

/// A model, the backend that computes it, and its KV cache.
pub struct ModelRunner<B: Backend> {
    pub(super) backend: B,
    pub(super) model: Model<B>,
    pub(super) cache: B::KvCache,
    pub(super) max_logit_rows: usize,
}

impl<B: Backend> ModelRunner<B> {
    /// Reserves the KV cache, and room for what steps give. `limits` is what the model was loaded with.
    pub fn new(mut backend: B, model: Model<B>, layout: KvLayout, limits: ForwardLimits) -> Result<Self, KernelError> {
        assert!(limits.max_logit_rows > 0, "a step needs logits");
        let cache = backend.kv_cache(layout)?;
        if let Some(ahead) = backend.ahead() {
            ahead.make_room(limits.max_tokens);
        }
        backend.check()?;
        Ok(Self { backend, model, cache, max_logit_rows: limits.max_logit_rows })
    }

    /// Where the pages are, if the backend lets others reach them.
    pub fn pages(&self) -> Option<KvPages> {
        self.backend.kv_pages(&self.cache)
    }
}

impl<B: Backend> Runner for ModelRunner<B> {
    fn execute<'a>(
        &mut self,
        batch: &Batch,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
        layer_done: &mut dyn FnMut(usize),
    ) -> Result<(), RunnerError> {
        let Self { backend, model, cache, max_logit_rows } = self;
        model.forward(backend, cache, batch, layer_done);
        // A prompt's log-probabilities can want logits of every row, too many to hold at once: tile by tile.
        for (tile, rows) in batch.logit_rows.chunks(*max_logit_rows).enumerate() {
            let first = tile * *max_logit_rows;
            let logits = model.logits(backend, rows);
            backend.sample(logits, &|i| row(first + i), &mut out[first..first + rows.len()]);
        }
        backend.check().map_err(|error| RunnerError(error.to_string()))
    }

    fn ahead(&mut self) -> Option<&mut dyn RunsAhead> {
        if self.backend.ahead().is_some() { Some(self) } else { None }
    }
}

impl<B: Backend> RunsAhead for ModelRunner<B> {
    fn launch(&mut self, batch: &Batch, layer_done: &mut dyn FnMut(usize)) -> Result<(), RunnerError> {
        self.model.forward(&mut self.backend, &mut self.cache, batch, layer_done);
        self.backend.check().map_err(|error| RunnerError(error.to_string()))
    }

    fn draw<'a>(&mut self, batch: &Batch, row: &(dyn Fn(usize) -> SampleRow<'a> + Sync)) -> Result<(), RunnerError> {
        let Self { backend, model, max_logit_rows, .. } = self;
        for (tile, rows) in batch.logit_rows.chunks(*max_logit_rows).enumerate() {
            let first = tile * *max_logit_rows;
            let logits = model.logits(backend, rows);
            backend.ahead().expect(IS_AHEAD).draw(logits, first, &|i| row(first + i));
        }
        backend.ahead().expect(IS_AHEAD).fetch(batch.logit_rows.len());
        backend.check().map_err(|error| RunnerError(error.to_string()))
    }

    fn collect(&mut self, out: &mut [Sampled]) -> Result<(), RunnerError> {
        self.backend.ahead().expect(IS_AHEAD).collect(out);
        self.backend.check().map_err(|error| RunnerError(error.to_string()))
    }
}
