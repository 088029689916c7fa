use crate::{
    Batch, KernelError, KvLayout, KvPages, Matrix, Projection, Residual, RmsNorm, RopeTable, SampleRow, Sampled,
};

/// The heads of one attention layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    /// Query heads.
    pub heads: usize,
    /// Key/value heads; a divisor of `heads`.
    pub kv_heads: usize,
    /// Elements of one head.
    pub head_dim: usize,
}

impl AttentionShape {
    /// Width of a fused projection row: all query heads, then all key heads, then all value heads.
    pub const fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }

    /// Width of the attention output: `heads × head_dim`.
    pub const fn q_width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// RMS norms over each query and key head before rotation (Qwen3).
#[derive(Debug)]
pub struct QkNorm<'a, V> {
    /// Weight of the query norm, `[head_dim]`.
    pub q: &'a V,
    /// Weight of the key norm, `[head_dim]`.
    pub k: &'a V,
    /// Added to the mean square.
    pub eps: f32,
}

/// Attention of a layer: what is done with queries, keys and values, and with what comes of them.
#[derive(Debug)]
pub struct Attention<'a, L, V, R> {
    /// Its heads.
    pub shape: AttentionShape,
    /// What scores are multiplied by.
    pub scale: f32,
    /// Norms of heads, if there are such.
    pub norm: Option<QkNorm<'a, V>>,
    /// How heads are rotated.
    pub rope: &'a R,
    /// The product behind it.
    pub output: Projection<'a, L, V>,
}

/// What a warm-up ([`Backend::warm_up`]) left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WarmUp {
    /// Steps that were recorded.
    pub recorded: usize,
    /// Bytes of a device's memory that were taken.
    pub device_bytes: usize,
}

/// The fused operations one forward pass is made of.
///
/// Operations with a body are fusions: the default composes other operations; a backend may override it with fewer
/// kernels if the bits stay the same.
///
/// Every operation treats each row (token) by itself and reduces in an order that depends on that row's shape alone, so
/// a row's result is bit for bit the same whatever else is in the batch. Working buffers are made once, at the largest
/// size ([`Backend::activations`]); operations set the row count of what they write and allocate nothing.
pub trait Backend: Send + 'static {
    /// A weight matrix `[out, in]` in the layout this backend's kernels want.
    type Linear: Send + Sync;
    /// A vector of f32 weights: norms and biases.
    type Vector: Send + Sync;
    /// Cosines and sines for [`Backend::rope_and_cache`].
    type Rope: Send + Sync;
    /// A working buffer `[rows, cols]`, rows varying up to a maximum.
    type Activations: Send;
    /// Keys and values of all layers.
    type KvCache: Send;

    /// Takes over a weight; `parts` are stacked along their rows (q, k and v into one product), and may differ in type.
    /// The result keeps the file's precision: quantised blocks stay quantised.
    fn linear_weight(&mut self, parts: &[Matrix<'_>]) -> Result<Self::Linear, KernelError>;

    /// Bytes a weight occupies in this backend.
    fn linear_bytes(&self, weight: &Self::Linear) -> usize;

    /// Takes over a norm weight or bias.
    fn vector(&mut self, values: &[f32]) -> Self::Vector;

    /// Takes over a rotation table.
    fn rope(&mut self, table: RopeTable) -> Self::Rope;

    /// A buffer of `cols` columns for up to `rows_max` rows, holding no rows yet.
    fn activations(&mut self, rows_max: usize, cols: usize) -> Self::Activations;

    /// Reserves the KV cache.
    fn kv_cache(&mut self, layout: KvLayout) -> Result<Self::KvCache, KernelError>;

    /// Where a cache's pages are, for whoever moves pages between workers; none from a backend whose pages cannot be
    /// moved.
    fn kv_pages(&self, cache: &Self::KvCache) -> Option<KvPages>;

    /// Tells the backend of the step to come. Operations that take a batch are given this one until the next call.
    fn begin(&mut self, batch: &Batch);

    /// Begins a step and computes it by `operations`, which do the same with every batch of the same size that wants
    /// logits: a backend may record what they enqueue and later enqueue that again, without calling them.
    fn step(&mut self, batch: &Batch, operations: &mut dyn FnMut(&mut Self)) {
        self.begin(batch);
        operations(self);
    }

    /// Of how many sequences, up to so many, steps that decode should be prepared, smallest first; none where that is
    /// of no use.
    fn warm_up_sizes(&self, _sequences: usize) -> Vec<usize> {
        Vec::new()
    }

    /// Prepares for steps as large as `batch`, or a little smaller, by calling `operations`, perhaps several times:
    /// makes what they need, and records them if they decode. Contexts are no longer then than those of `batch`, and
    /// all block tables together no longer than its own. No page is written or read, and results are nobody's.
    fn warm_up(&mut self, _batch: &Batch, _operations: &mut dyn FnMut(&mut Self)) -> WarmUp {
        WarmUp::default()
    }

    /// Whether what is enqueued now is only recorded, and runs when [`Backend::step`] has ended: nothing of it is done,
    /// or can be waited for, before.
    fn is_recording(&self) -> bool {
        false
    }

    /// What has failed since the backend was made, if something has. Operations do not say so themselves, because on
    /// some devices they are only enqueued; results are meaningless from the failure on.
    fn check(&mut self) -> Result<(), KernelError>;

    /// `out[t] = table[batch.tokens[t]]`; sets `out` to `[tokens, hidden]`.
    fn embed(&mut self, table: &Self::Linear, batch: &Batch, out: &mut Self::Activations);

    /// `out = x / sqrt(mean(x²) + eps) * weight`, row by row (Zhang and Sennrich 2019).
    fn rms_norm(&mut self, x: &Self::Activations, weight: &Self::Vector, eps: f32, out: &mut Self::Activations);

    /// `residual += delta`, then `out = rms_norm(residual)`.
    fn add_rms_norm(
        &mut self,
        residual: &mut Self::Activations,
        delta: &Self::Activations,
        weight: &Self::Vector,
        eps: f32,
        out: &mut Self::Activations,
    );

    /// `out[t] = weight · x[t] + bias`; sets `out` to `[x.rows, weight.out]`.
    fn linear(
        &mut self,
        x: &Self::Activations,
        weight: &Self::Linear,
        bias: Option<&Self::Vector>,
        out: &mut Self::Activations,
    );

    /// For each token of `batch`: norms its query and key heads if asked to, rotates both to the token's position, and
    /// stores key and value in `layer` of the cache. `qkv` is `[tokens, shape.qkv_width()]`; its query part is updated
    /// in place, its key and value parts are unspecified afterwards.
    #[allow(clippy::too_many_arguments, reason = "one fused operation over everything attention needs")]
    fn rope_and_cache(
        &mut self,
        qkv: &mut Self::Activations,
        shape: AttentionShape,
        norm: Option<QkNorm<'_, Self::Vector>>,
        rope: &Self::Rope,
        cache: &mut Self::KvCache,
        layer: usize,
        batch: &Batch,
    );

    /// Causal attention of every query over its own sequence's pages: `out[t, h] = softmax(scale · q·K) V`, keys and
    /// values read from `layer` of the cache (this step's included, so a prefix hit and a fresh prefill read the same
    /// bits). Sets `out` to `[tokens, shape.q_width()]`.
    #[allow(clippy::too_many_arguments, reason = "one fused operation over everything attention needs")]
    fn attention(
        &mut self,
        qkv: &Self::Activations,
        shape: AttentionShape,
        scale: f32,
        cache: &Self::KvCache,
        layer: usize,
        batch: &Batch,
        out: &mut Self::Activations,
    );

    /// `out = silu(gate) * up` for `gate_up` of `[rows, 2 × ffn]`: gate first, then up.
    fn silu_mul(&mut self, gate_up: &Self::Activations, out: &mut Self::Activations);

    /// `residual[t] += weight · x[t] + bias`, which has to be followed by a norm: a backend may leave the addition to
    /// that.
    fn add_linear(
        &mut self,
        x: &Self::Activations,
        weight: &Self::Linear,
        bias: Option<&Self::Vector>,
        residual: &mut Residual<Self::Activations>,
    ) {
        self.linear(x, weight, bias, residual.delta());
    }

    /// `residual.normed = rms_norm(residual)`, row by row.
    fn norm(&mut self, residual: &mut Residual<Self::Activations>, norm: RmsNorm<'_, Self::Vector>) {
        let RmsNorm { weight, eps } = norm;
        let Residual { sum, delta, is_owed, normed } = residual;
        if std::mem::take(is_owed) {
            self.add_rms_norm(sum, delta, weight, eps, normed);
        } else {
            self.rms_norm(sum, weight, eps, normed);
        }
    }

    /// `out[t] = weight · rms_norm(residual[t]) + bias`. What `residual.normed` holds afterwards is unspecified.
    fn norm_linear(
        &mut self,
        residual: &mut Residual<Self::Activations>,
        norm: RmsNorm<'_, Self::Vector>,
        weight: &Self::Linear,
        bias: Option<&Self::Vector>,
        out: &mut Self::Activations,
    ) {
        self.norm(residual, norm);
        self.linear(&residual.normed, weight, bias, out);
    }

    /// `out[t] = silu(gate) * up`, gate and up the halves of `weight · rms_norm(residual[t]) + bias`. What
    /// `residual.normed` and `gate_up`, of `[tokens, 2 × ffn]`, hold afterwards is unspecified.
    fn norm_linear_silu_mul(
        &mut self,
        residual: &mut Residual<Self::Activations>,
        norm: RmsNorm<'_, Self::Vector>,
        weight: &Self::Linear,
        bias: Option<&Self::Vector>,
        gate_up: &mut Self::Activations,
        out: &mut Self::Activations,
    ) {
        self.norm_linear(residual, norm, weight, bias, gate_up);
        self.silu_mul(gate_up, out);
    }

    /// `residual[t] += down · (silu(gate) * up) + bias`, gate and up the halves of `gate_up · rms_norm(residual[t]) +
    /// bias`, to be followed by a norm. What `residual.normed` and the buffers, of `[tokens, 2 × ffn]` and of
    /// `[tokens, ffn]`, hold afterwards is unspecified.
    fn add_mlp(
        &mut self,
        residual: &mut Residual<Self::Activations>,
        norm: RmsNorm<'_, Self::Vector>,
        gate_up: Projection<'_, Self::Linear, Self::Vector>,
        down: Projection<'_, Self::Linear, Self::Vector>,
        [both, inner]: [&mut Self::Activations; 2],
    ) {
        self.norm_linear_silu_mul(residual, norm, gate_up.weight, gate_up.bias, both, inner);
        self.add_linear(inner, down.weight, down.bias, residual);
    }

    /// [`Backend::rope_and_cache`] and [`Backend::attention`], then `residual[t] += output · attention[t] + bias`, to
    /// be followed by a norm. Calls `stored` when keys and values are in the cache, or what stores them is enqueued.
    /// What `qkv` and `mixed`, of `[tokens, shape.q_width()]`, hold afterwards is unspecified.
    #[allow(clippy::too_many_arguments, reason = "one fused operation over everything attention needs")]
    fn add_attention(
        &mut self,
        qkv: &mut Self::Activations,
        attention: Attention<'_, Self::Linear, Self::Vector, Self::Rope>,
        cache: &mut Self::KvCache,
        layer: usize,
        batch: &Batch,
        mixed: &mut Self::Activations,
        residual: &mut Residual<Self::Activations>,
        stored: &mut dyn FnMut(&Self),
    ) {
        let Attention { shape, scale, norm, rope, output } = attention;
        self.rope_and_cache(qkv, shape, norm, rope, cache, layer, batch);
        stored(self);
        self.attention(qkv, shape, scale, cache, layer, batch, mixed);
        self.add_linear(mixed, output.weight, output.bias, residual);
    }

    /// `out[i] = x[rows[i]]`.
    fn select_rows(&mut self, x: &Self::Activations, rows: &[u32], out: &mut Self::Activations);

    /// Samples or scores each row of `logits` (`[rows, vocabulary]`, which it may overwrite) into `out[row]`; `row(i)`
    /// describes row `i` and may be called from several threads.
    fn sample<'a>(
        &mut self,
        logits: &mut Self::Activations,
        row: &(dyn Fn(usize) -> SampleRow<'a> + Sync),
        out: &mut [Sampled],
    );

    /// Drawing tokens without waiting for them, if it can.
    fn ahead(&mut self) -> Option<&mut dyn DrawsAhead<Self::Activations>> {
        None
    }

    /// Copies rows of a buffer out to the host: `[rows, cols]`, row-major. For tests and tools, not for the hot path.
    fn read(&self, x: &Self::Activations) -> Vec<f32>;

    /// Fills a buffer from the host; the inverse of [`Backend::read`].
    fn write(&mut self, values: &[f32], out: &mut Self::Activations);
}

/// A backend that only enqueues, so that the host can plan and enqueue the next step while the device computes one:
/// tokens drawn on the device are what the next step reads ([`Batch::PLACEHOLDER`], also at the end of a row's output),
/// and the host learns of them later.
///
/// A step is [`Backend::step`], [`DrawsAhead::draw`] for all of its rows, and [`DrawsAhead::fetch`]. One more may be
/// enqueued before its samples are collected, or as much of one as does not hang on these.
pub trait DrawsAhead<A> {
    /// Makes room for the samples of steps of up to so many rows. Everything that was fetched is collected before, as
    /// it is before [`Backend::sample`].
    fn make_room(&mut self, rows: usize);

    /// Makes room for what is remembered of sequences with penalties from one step to the next, if there is some to
    /// spare. Otherwise that is done for the first of them.
    fn make_room_for_penalties(&mut self);

    /// Enqueues sampling or scoring of each row of `logits`, which it may overwrite, as the rows from `first` on of the
    /// step's samples; `row(i)` describes row `i` of `logits`.
    fn draw<'a>(&mut self, logits: &mut A, first: usize, row: &(dyn Fn(usize) -> SampleRow<'a> + Sync));

    /// Ends the step, and enqueues a copy to the host of its samples: the first `rows`.
    fn fetch(&mut self, rows: usize);

    /// Waits for the end of the earliest step that was not collected, and for nothing behind it; its samples.
    fn collect(&mut self, out: &mut [Sampled]);
}
