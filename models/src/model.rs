use engine_kernels::{Attention, AttentionShape, Backend, Batch, Projection, QkNorm, Residual, RmsNorm, WarmUp};

use crate::weights::{Loader, WeightSource};
use crate::{LoadReport, ModelConfig, ModelError, rope};

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

/// A loaded model: its weights and working buffers in backend `B`. The decoder Llama, Mistral, Qwen2 and Qwen3 share
/// (pre-norm, rotary positions, grouped query heads, SwiGLU), in terms of a backend's fused operations. q, k and v are
/// one product, gate and up another.
pub struct Model<B: Backend> {
    config: ModelConfig,
    shape: AttentionShape,
    embedding: B::Linear,
    layers: Vec<Layer<B>>,
    norm: B::Vector,
    /// `None`: the embedding is the output projection too.
    head: Option<B::Linear>,
    rope: B::Rope,
    buffers: Buffers<B>,
}

struct Layer<B: Backend> {
    attention_norm: B::Vector,
    qkv: B::Linear,
    qkv_bias: Option<B::Vector>,
    q_norm: Option<B::Vector>,
    k_norm: Option<B::Vector>,
    output: B::Linear,
    output_bias: Option<B::Vector>,
    mlp_norm: B::Vector,
    gate_up: B::Linear,
    gate_up_bias: Option<B::Vector>,
    down: B::Linear,
    down_bias: Option<B::Vector>,
}

/// Made once at the largest size of a step.
struct Buffers<B: Backend> {
    /// What attention and MLP add to; after the last layer, its norm is the final hidden states. `[tokens, hidden]`.
    residual: Residual<B::Activations>,
    /// `[tokens, qkv_width]`.
    qkv: B::Activations,
    /// `[tokens, q_width]`.
    attention: B::Activations,
    /// `[tokens, 2 × intermediate]`.
    gate_up: B::Activations,
    /// `[tokens, intermediate]`.
    mlp: B::Activations,
    /// Hidden states logits are wanted of, `[rows, hidden]`.
    selected: B::Activations,
    /// `[rows, vocabulary]`.
    logits: B::Activations,
}

impl<B: Backend> Buffers<B> {
    fn new(backend: &mut B, config: &ModelConfig, shape: AttentionShape, limits: ForwardLimits) -> Self {
        let (tokens, rows) = (limits.max_tokens, limits.max_logit_rows);
        Self {
            residual: Residual::new(backend, tokens, config.hidden_size),
            qkv: backend.activations(tokens, shape.qkv_width()),
            attention: backend.activations(tokens, shape.q_width()),
            gate_up: backend.activations(tokens, 2 * config.intermediate_size),
            mlp: backend.activations(tokens, config.intermediate_size),
            selected: backend.activations(rows, config.hidden_size),
            logits: backend.activations(rows, config.vocab_size),
        }
    }
}

impl<B: Backend> Model<B> {
    /// Loads all weights of `config` from `source` into `backend`.
    pub(crate) fn load(
        source: &dyn WeightSource,
        backend: &mut B,
        config: &ModelConfig,
        limits: ForwardLimits,
        progress: bool,
    ) -> Result<(Self, LoadReport), ModelError> {
        let shape = AttentionShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        let hidden = config.hidden_size;
        let mut loader = Loader::new(source, backend, progress);
        let embedding = [("model.embed_tokens.weight", config.vocab_size)];
        let embedding = match config.tie_word_embeddings {
            true => loader.linear(&embedding, hidden)?,
            false => loader.table(&embedding, hidden)?,
        };
        let layers =
            (0..config.layers).map(|index| Layer::load(&mut loader, config, index)).collect::<Result<_, _>>()?;
        let norm = loader.vector(&[("model.norm.weight", hidden)])?;
        let head = if config.tie_word_embeddings {
            loader.leave("lm_head.weight");
            None
        } else {
            Some(loader.linear(&[("lm_head.weight", config.vocab_size)], hidden)?)
        };
        let table = rope::table(config, limits.max_positions);
        let rope = loader.backend().rope(table);
        let buffers = Buffers::new(loader.backend(), config, shape, limits);
        let report = loader.finish()?;
        Ok((Self { config: config.clone(), shape, embedding, layers, norm, head, rope, buffers }, report))
    }
}

impl<B: Backend> Layer<B> {
    fn load(loader: &mut Loader<'_, B>, config: &ModelConfig, index: usize) -> Result<Self, ModelError> {
        let (hidden, inner, head_dim) = (config.hidden_size, config.intermediate_size, config.head_dim);
        let (q, kv) = (config.heads * head_dim, config.kv_heads * head_dim);
        let name = |rest: &str| format!("model.layers.{index}.{rest}");
        let weight = |module: &str| name(&format!("{module}.weight"));
        let bias = |module: &str| name(&format!("{module}.bias"));

        let qkv = [("self_attn.q_proj", q), ("self_attn.k_proj", kv), ("self_attn.v_proj", kv)];
        let gate_up = [("mlp.gate_proj", inner), ("mlp.up_proj", inner)];
        let output = [("self_attn.o_proj", hidden)];
        let down = [("mlp.down_proj", hidden)];

        let mut linear = |modules: &[(&str, usize)], cols: usize, biased: bool| {
            let names: Vec<_> = modules.iter().map(|&(module, rows)| (weight(module), rows)).collect();
            let parts: Vec<_> = names.iter().map(|(name, rows)| (name.as_str(), *rows)).collect();
            let matrix = loader.linear(&parts, cols)?;
            let names: Vec<_> = modules.iter().map(|&(module, rows)| (bias(module), rows)).collect();
            let parts: Vec<_> = names.iter().map(|(name, rows)| (name.as_str(), *rows)).collect();
            let bias = if biased { Some(loader.vector(&parts)?) } else { None };
            Ok::<_, ModelError>((matrix, bias))
        };
        let (qkv, qkv_bias) = linear(&qkv, hidden, config.qkv_bias)?;
        let (output, output_bias) = linear(&output, q, config.o_bias)?;
        let (gate_up, gate_up_bias) = linear(&gate_up, hidden, config.mlp_bias)?;
        let (down, down_bias) = linear(&down, inner, config.mlp_bias)?;

        let mut norm = |module: &str, len: usize| loader.vector(&[(&weight(module), len)]);
        let (mut q_norm, mut k_norm) = (None, None);
        if config.architecture.family().qk_norm {
            q_norm = Some(norm("self_attn.q_norm", head_dim)?);
            k_norm = Some(norm("self_attn.k_norm", head_dim)?);
        }
        Ok(Self {
            attention_norm: norm("input_layernorm", hidden)?,
            mlp_norm: norm("post_attention_layernorm", hidden)?,
            qkv,
            qkv_bias,
            q_norm,
            k_norm,
            output,
            output_bias,
            gate_up,
            gate_up_bias,
            down,
            down_bias,
        })
    }
}

impl<B: Backend> Model<B> {
    /// Its shape.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Runs all layers over `batch` and writes the batch's keys and values to `cache`. Calls `layer_done` with the
    /// number of each layer, in order, once its keys and values are there, while the layer's products are still to
    /// come: whoever sends them elsewhere does so beside the rest of the pass. The final hidden states stay in the
    /// model for [`Model::logits`]; where the batch wants no logits, the pass ends with the last keys and values.
    pub fn forward(
        &mut self,
        backend: &mut B,
        cache: &mut B::KvCache,
        batch: &Batch,
        layer_done: &mut dyn FnMut(usize),
    ) {
        self.with_step(backend, cache, batch, layer_done, |backend, operations| backend.step(batch, operations));
    }

    /// Prepares for passes over batches as large as this one ([`Backend::warm_up`]). What [`Model::logits`] gives then
    /// is of no use.
    pub fn warm_up(&mut self, backend: &mut B, cache: &mut B::KvCache, batch: &Batch) -> WarmUp {
        self.with_step(backend, cache, batch, &mut |_| (), |backend, operations| backend.warm_up(batch, operations))
    }

    /// Logits `[rows.len(), vocab_size]` of the named rows of the last [`Model::forward`]. At most
    /// [`ForwardLimits::max_logit_rows`] rows a call: whoever wants more calls again.
    pub fn logits(&mut self, backend: &mut B, rows: &[u32]) -> &mut B::Activations {
        let b = &mut self.buffers;
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        backend.select_rows(b.residual.normed(), rows, &mut b.selected);
        backend.linear(&b.selected, head, None, &mut b.logits);
        &mut b.logits
    }

    /// Does something with a step and its operations; what came of it.
    fn with_step<R>(
        &mut self,
        backend: &mut B,
        cache: &mut B::KvCache,
        batch: &Batch,
        layer_done: &mut dyn FnMut(usize),
        step: impl FnOnce(&mut B, &mut dyn FnMut(&mut B)) -> R,
    ) -> R {
        let Self { config, shape, embedding, layers, norm, rope, buffers: b, .. } = self;
        let (shape, eps) = (*shape, config.rms_norm_eps);
        let scale = 1.0 / (config.head_dim as f32).sqrt();

        let mut layers_done = 0;
        let outcome = step(backend, &mut |backend| {
            backend.embed(embedding, batch, b.residual.start());
            for (index, layer) in layers.iter().enumerate() {
                let rms_norm = RmsNorm { weight: &layer.attention_norm, eps };
                backend.norm_linear(&mut b.residual, rms_norm, &layer.qkv, layer.qkv_bias.as_ref(), &mut b.qkv);
                let qk_norm = layer.q_norm.as_ref().zip(layer.k_norm.as_ref()).map(|(q, k)| QkNorm { q, k, eps });
                let mut stored = |backend: &B| {
                    if !backend.is_recording() {
                        layer_done(index);
                        layers_done = index + 1;
                    }
                };
                if index + 1 == layers.len() && batch.logit_rows.is_empty() {
                    // Keys and values are all that is wanted of this step: part of a prompt, or one of another worker.
                    backend.rope_and_cache(&mut b.qkv, shape, qk_norm, rope, cache, index, batch);
                    return stored(backend);
                }
                let output = Projection { weight: &layer.output, bias: layer.output_bias.as_ref() };
                let attention = Attention { shape, scale, norm: qk_norm, rope, output };
                let (qkv, mixed, residual) = (&mut b.qkv, &mut b.attention, &mut b.residual);
                backend.add_attention(qkv, attention, cache, index, batch, mixed, residual, &mut stored);

                let rms_norm = RmsNorm { weight: &layer.mlp_norm, eps };
                let gate_up = Projection { weight: &layer.gate_up, bias: layer.gate_up_bias.as_ref() };
                let down = Projection { weight: &layer.down, bias: layer.down_bias.as_ref() };
                backend.add_mlp(&mut b.residual, rms_norm, gate_up, down, [&mut b.gate_up, &mut b.mlp]);
            }
            backend.norm(&mut b.residual, RmsNorm { weight: norm, eps });
        });
        // What was recorded or replayed is only enqueued by now.
        (layers_done..layers.len()).for_each(layer_done);
        outcome
    }
}

#[cfg(test)]
mod tests;
