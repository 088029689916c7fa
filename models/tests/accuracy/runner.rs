use std::path::Path;

use engine_cuda_emulated::{Emulated, EmulatedBackend};
use engine_kernels::cpu::{CpuBackend, CpuOptions};
use engine_kernels::reference::ReferenceBackend;
use engine_kernels::{Backend, Batch, KvDType, KvLayout};
use engine_models::{ForwardLimits, LoadedModel, ModelSource, OpenOptions};

use crate::stats::argmax;

/// Tokens of a page; not a divisor of [`CHUNK`], so that chunks begin and end inside pages.
const BLOCK_SIZE: usize = 16;
/// Tokens of a step.
const CHUNK: usize = 100;

/// A model in a backend with room for one sequence at a time.
pub(crate) struct Runner<B: Backend> {
    backend: B,
    loaded: LoadedModel<B>,
    cache: B::KvCache,
    table: Vec<u32>,
    position: usize,
    vocabulary: usize,
}

pub(crate) fn reference_backend() -> ReferenceBackend {
    ReferenceBackend
}

pub(crate) fn cpu_backend() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: 2, level: None })
}

pub(crate) fn cuda_backend() -> EmulatedBackend {
    EmulatedBackend::new(Emulated::default())
}

impl<B: Backend> Runner<B> {
    /// Loads the model at `path` for sequences of up to `positions` tokens, with the KV cache the engine would choose
    /// for it unless `kv_dtype` says otherwise.
    pub(crate) fn load(mut backend: B, path: &Path, positions: usize, kv_dtype: Option<KvDType>) -> Self {
        let source = ModelSource::open(path.to_str().unwrap(), &OpenOptions::default()).unwrap();
        let limits = ForwardLimits { max_tokens: CHUNK, max_logit_rows: CHUNK, max_positions: positions };
        let loaded = source.load(&mut backend, limits).unwrap();
        let config = loaded.model.config();
        let blocks = positions.div_ceil(BLOCK_SIZE);
        let layout = KvLayout {
            layers: config.layers,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            block_size: BLOCK_SIZE,
            blocks,
            dtype: kv_dtype.unwrap_or(loaded.kv_dtype),
        };
        let vocabulary = config.vocab_size;
        let cache = backend.kv_cache(layout).unwrap();
        // Backwards: a page's number must not matter.
        let table = (0..blocks as u32).rev().collect();
        Self { backend, loaded, cache, table, position: 0, vocabulary }
    }

    /// Forgets the sequence.
    pub(crate) fn restart(&mut self) {
        self.position = 0;
    }

    /// Computes the next tokens of the sequence, and shows the logits after each of them to `see(index, logits)`.
    pub(crate) fn push(&mut self, tokens: &[u32], mut see: impl FnMut(usize, &[f32])) {
        for (number, chunk) in tokens.chunks(CHUNK).enumerate() {
            let mut batch = Batch::default();
            batch.push(chunk, self.position as u32, &self.table, 0);
            self.loaded.model.forward(&mut self.backend, &mut self.cache, &batch, &mut |_| ());
            let logits = self.loaded.model.logits(&mut self.backend, &batch.logit_rows);
            let values = self.backend.read(logits);
            for (i, row) in values.chunks_exact(self.vocabulary).enumerate() {
                see(number * CHUNK + i, row);
            }
            self.position += chunk.len();
        }
    }

    /// The logits after each of the next tokens.
    pub(crate) fn logits(&mut self, tokens: &[u32]) -> Vec<Vec<f32>> {
        let mut rows = Vec::with_capacity(tokens.len());
        self.push(tokens, |_, row| rows.push(row.to_vec()));
        rows
    }

    /// Continues greedily from logits.
    pub(crate) fn greedy(&mut self, logits: &[f32], count: usize) -> Vec<u32> {
        let mut tokens = vec![argmax(logits) as u32];
        while tokens.len() < count {
            let next = self.logits(&tokens[tokens.len() - 1..]);
            tokens.push(argmax(&next[0]) as u32);
        }
        tokens
    }
}
