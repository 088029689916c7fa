use engine_kernels::{Backend, Batch, Rehearsed};

use crate::ModelConfig;

/// Largest step a model's working buffers are made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForwardLimits {
    /// Tokens of one step.
    pub max_tokens: usize,
    /// Rows of logits computed at once by [`Model::logits`].
    pub max_logit_rows: usize,
    /// Positions a sequence may reach: `--max-model-len`.
    pub max_positions: usize,
}

/// A loaded model: its weights and working buffers in backend `B`.
pub trait Model<B: Backend>: Send {
    /// Its shape.
    fn config(&self) -> &ModelConfig;

    /// Runs all layers over `batch` and writes the batch's keys and values to `cache`. Calls `layer_done` with the
    /// number of each layer, in order, once its keys and values are there, while the layer's products are still to
    /// come: whoever sends them elsewhere does so beside the rest of the pass. The final hidden states stay in the
    /// model for [`Model::logits`]; where the batch wants no logits, the pass ends with the last keys and values.
    fn forward(&mut self, backend: &mut B, cache: &mut B::KvCache, batch: &Batch, layer_done: &mut dyn FnMut(usize));

    /// Prepares for passes over batches as large as this one ([`Backend::rehearse`]). What [`Model::logits`] gives then
    /// is of no use.
    fn rehearse(&mut self, backend: &mut B, cache: &mut B::KvCache, batch: &Batch) -> Rehearsed;

    /// Logits `[rows.len(), vocab_size]` of the named rows of the last [`Model::forward`]. At most
    /// [`ForwardLimits::max_logit_rows`] rows a call: whoever wants more calls again.
    fn logits(&mut self, backend: &mut B, rows: &[u32]) -> &mut B::Activations;
}
