//! What each kernel of a layer is for, and the least it has to do. Which kernels there are, the layer says
//! ([`super::layer`]); here they are recognised, and one that is not is an error rather than a row that is missing.

use anyhow::{Result, bail};
use engine_kernels::{KvDType, cuda::Noted};

use super::{
    Shape,
    row::{FMA_PER_MS, MMA_PER_MS, WGMMA_PER_MS, Work},
};

/// Bytes of an element of activations.
const WIDE: usize = 4;
/// Of one that is rounded, and of a weight.
const NARROW: usize = 2;

/// How much a step computes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size {
    pub(super) shape: Shape,
    pub(super) rows: usize,
    /// Tokens whose keys and values are read, or written.
    pub(super) tokens: usize,
    /// Of a token and one that it sees.
    pub(super) pairs: usize,
    /// What keys and values are.
    pub(super) cache: KvDType,
}

/// A product of a layer.
#[derive(Debug, Clone, Copy)]
struct Product {
    what: &'static str,
    cols: usize,
    features: usize,
    /// Bytes of a row of sums, with what is done to them in the same kernel if there are few rows.
    fused: usize,
}

/// A kernel's purpose and work.
pub(super) type Purpose = (String, Work);

fn is_tensor(kernel: &str) -> bool {
    kernel.starts_with("product_") || kernel.starts_with("hopper_gemm_")
}

impl Size {
    /// Bytes of keys and values of a layer.
    pub(super) fn pages_bytes(&self) -> usize {
        2 * self.cache.bytes() * self.tokens * self.shape.heads.kv_heads * self.shape.heads.head_dim
    }

    /// Of attention in a layer: multiplications and additions, of queries by keys and of weights by values.
    pub(super) fn attention_operations(&self) -> usize {
        4 * self.pairs * self.shape.heads.q_width()
    }

    /// What the kernels of a layer do, one by one.
    pub(super) fn of_layer(&self, kernels: &[Noted]) -> Result<Vec<Purpose>> {
        let Shape { hidden, ffn, heads, .. } = self.shape;
        let (qkv, q, added) = (heads.qkv_width(), heads.q_width(), 2 * WIDE * hidden);
        let products = [
            Product { what: "q, k and v", cols: hidden, features: qkv, fused: WIDE * qkv },
            Product { what: "output", cols: q, features: hidden, fused: added },
            Product { what: "gate and up", cols: hidden, features: 2 * ffn, fused: WIDE * ffn },
            Product { what: "down", cols: ffn, features: hidden, fused: added },
        ];
        self.of(kernels, &products)
    }

    /// The same of the end of a step.
    pub(super) fn of_end(&self, kernels: &[Noted]) -> Result<Vec<Purpose>> {
        let Shape { hidden, vocabulary, .. } = self.shape;
        self.of(kernels, &[Product { what: "logits", cols: hidden, features: vocabulary, fused: WIDE * vocabulary }])
    }

    fn of(&self, kernels: &[Noted], products: &[Product]) -> Result<Vec<Purpose>> {
        let Self { rows, shape: Shape { hidden, ffn, heads, .. }, .. } = *self;
        let (qkv, q) = (heads.qkv_width(), heads.q_width());
        // Those to come, and the last one.
        let mut products = products.iter();
        let (mut last, mut features, mut segments) = ("", 0, 1);
        let mut is_rotated = false;
        let mut purposes = Vec::with_capacity(kernels.len());
        for (index, noted) in kernels.iter().enumerate() {
            let kernel = noted.kernel();
            // What makes the activations of a product on tensor cores rounds them.
            let is_rounded = kernels.get(index + 1).is_some_and(|next| is_tensor(next.kernel()));
            let made = if is_rounded { NARROW } else { WIDE };
            // Bytes of each row, and of all together, and operations.
            let (what, of_row, of_all, operations) = match kernel {
                _ if kernel.starts_with("rms_norm") => ("norm", (WIDE + made) * hidden, 0, 0),
                _ if kernel.starts_with("add_rms_norm") => ("norm", (3 * WIDE + made) * hidden, 0, 0),
                _ if kernel.starts_with("skinny_") || is_tensor(kernel) => {
                    let Some(product) = products.next() else { bail!("{kernel} is one product too many") };
                    (last, features, segments) = (product.what, product.features, noted.grid()[2]);
                    let of_row = if is_tensor(kernel) {
                        NARROW * product.cols + segments * WIDE * features
                    } else {
                        WIDE * product.cols + product.fused
                    };
                    let weights = product.cols * features;
                    (product.what, of_row, NARROW * weights, 2 * rows * weights)
                }
                "add_segments" => ("segments", (segments + 1) * WIDE * features, 0, 0),
                _ if kernel.starts_with("rope_and_cache_") => {
                    is_rotated = true;
                    ("rotation", WIDE * (qkv + q) + self.cache.bytes() * (qkv - q), 0, 0)
                }
                _ if kernel.contains("attention_") => {
                    let read = if is_rotated { q } else { qkv };
                    ("attention", WIDE * read + made * q, self.pages_bytes(), self.attention_operations())
                }
                _ if kernel.starts_with("round_rows_") => {
                    let cols = products.as_slice().first().map_or(0, |product| product.cols);
                    ("rounding", (WIDE + NARROW) * cols, 0, 0)
                }
                _ if kernel.starts_with("silu_mul") => ("gated activation", (2 * WIDE + made) * ffn, 0, 0),
                "select_rows" => ("rows that are asked for", 2 * WIDE * hidden, 0, 0),
                _ => bail!("nobody knows what {kernel} does"),
            };
            let per_ms = match kernel {
                _ if kernel.starts_with("hopper_") => WGMMA_PER_MS,
                _ if kernel.starts_with("product_") || kernel.starts_with("prefill_") => MMA_PER_MS,
                _ => FMA_PER_MS,
            };
            let what = if kernel == "add_segments" { format!("{what} of {last}") } else { what.into() };
            purposes.push((what, Work { bytes: rows * of_row + of_all, operations, per_ms }));
        }
        match products.next() {
            Some(Product { what, .. }) => bail!("no kernel computes {what}"),
            None => Ok(purposes),
        }
    }
}

#[cfg(test)]
mod tests {
    use engine_cuda_emulated::{Emulated, EmulatedDevice};
    use engine_kernels::cuda::{CudaBackend, Driver};
    use engine_kernels::{AttentionShape, Backend, KvLayout};
    use engine_models::{ForwardLimits, LoadFormat, LoadedModel, ModelSource, OpenOptions};

    use super::super::layer::{Kernels, Step};
    use super::super::model::Model;
    use super::*;

    /// Qwen3-0.6B's, with fewer layers, and hardly a vocabulary.
    const SHAPE: Shape = Shape {
        name: "two layers",
        is_small: true,
        hidden: 1024,
        ffn: 3072,
        layers: 2,
        vocabulary: 40,
        heads: AttentionShape { heads: 16, kv_heads: 8, head_dim: 128 },
    };
    const BLOCKS: usize = 200;

    /// With as many multiprocessors as an H100, for which products are cut.
    fn device<const HOPPER: bool>() -> EmulatedDevice<HOPPER> {
        let device = EmulatedDevice::default();
        device.set_processors(132);
        device
    }

    fn names(kernels: &[Noted]) -> Vec<&str> {
        kernels.iter().map(Noted::kernel).collect()
    }

    /// A model of that shape.
    fn loaded<D: Driver>(backend: &mut CudaBackend<D>) -> LoadedModel<CudaBackend<D>> {
        let config = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/shapes/qwen3-0.6b/config.json");
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(config).unwrap()).unwrap();
        config["num_hidden_layers"] = SHAPE.layers.into();
        config["vocab_size"] = SHAPE.vocabulary.into();
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let options = OpenOptions { load_format: LoadFormat::Dummy, ..OpenOptions::default() };
        let source = ModelSource::open(folder.path().to_str().unwrap(), &options).unwrap();
        source.load(backend, ForwardLimits { max_tokens: 2048, max_logit_rows: 64, max_positions: 4096 }).unwrap()
    }

    fn compare_with_a_model<const HOPPER: bool>() {
        let (mut backend, mut others) = (CudaBackend::new(device::<HOPPER>()), CudaBackend::new(device::<HOPPER>()));
        let weights = Model::new(&mut backend, &SHAPE).unwrap();
        let mut loaded = loaded(&mut others);
        let (layers, heads) = (SHAPE.layers, SHAPE.heads);
        let (kv_heads, head_dim, dtype) = (heads.kv_heads, heads.head_dim, KvDType::BF16);
        let layout = KvLayout { layers, kv_heads, head_dim, block_size: 64, blocks: BLOCKS, dtype };
        let mut cache = others.kv_cache(layout).unwrap();
        for (rows, decodes) in
            [1, 4, 5, 16, 20, 64].map(|rows| (rows, true)).into_iter().chain([(20, false), (2048, false)])
        {
            let mut step = match decodes {
                true => Step::decode(&mut backend, SHAPE, &weights, [rows, 130], KvDType::BF16).unwrap(),
                false => Step::prompt(&mut backend, SHAPE, &weights, [rows, 7]).unwrap(),
            };
            let Kernels { layers, ends } = step.kernels(&mut backend);
            let layer = names(&layers[0]);
            assert_eq!(step.size.of_layer(&layers[0]).unwrap().len(), layer.len());
            assert!(layers.iter().all(|other| names(other) == layer));

            if !decodes {
                // Or a model would end with the last layer's keys and values.
                step.batch.logit_rows.push(rows as u32 - 1);
            }
            let batch = &step.batch;
            let launched = others.note(&mut |backend| {
                loaded.model.forward(backend, &mut cache, batch, &mut |_| ());
                if decodes {
                    loaded.model.logits(backend, &batch.logit_rows);
                }
            });
            let launched = names(&launched);
            // The embedding, a layer, whose first norm adds nothing up, and another.
            let (first, rest) = launched[1..].split_at(layer.len());
            let (second, rest) = rest.split_at(layer.len());
            assert_eq!(first[1..], layer[1..], "{rows} rows");
            assert_eq!(second, layer, "{rows} rows");
            assert!(ends.iter().all(|other| names(other) == names(&ends[0])));
            if let Some(end) = ends.first() {
                assert_eq!(rest, names(end), "{rows} rows");
                assert_eq!(step.size.of_end(end).unwrap().len(), rest.len());
            }
        }
    }

    #[test]
    fn a_layer_launches_what_a_model_does_and_all_of_it_has_a_row() {
        compare_with_a_model::<false>();
        compare_with_a_model::<true>();
    }

    #[test]
    fn kernels_move_as_much_as_the_architecture_says() {
        // Of one row, of 64 that decode, and of a prompt, in MB.
        let expected: [&[f64]; 3] = [
            &[8.4, 0.0, 4.2, 12.6, 6.3],
            &[0.9, 10.6, 3.1, 1.6, 5.5, 1.3, 0.9, 15.9, 4.7, 2.0, 8.3, 1.8],
            &[29.4, 46.1, 58.7, 41.9, 25.2, 21.0, 29.4, 67.1, 62.9, 27.3],
        ];
        let mut backend = CudaBackend::new(device::<true>());
        let weights = Model::new(&mut backend, &SHAPE).unwrap();
        let mut steps = [
            Step::decode(&mut backend, SHAPE, &weights, [1, 1], KvDType::BF16).unwrap(),
            Step::decode(&mut backend, SHAPE, &weights, [64, 1], KvDType::BF16).unwrap(),
            Step::prompt(&mut backend, SHAPE, &weights, [2048, 0]).unwrap(),
        ];
        for (step, expected) in steps.iter_mut().zip(expected) {
            let kernels = step.kernels(&mut backend).layers.remove(0);
            let purposes = step.size.of_layer(&kernels).unwrap();
            let megabytes: Vec<f64> =
                purposes.iter().map(|(_, work)| (work.bytes as f64 / 1e5).round() / 10.0).collect();
            assert_eq!(megabytes, expected, "{purposes:?}");
        }
        // Of a prompt's 2,098,176 pairs of tokens attention multiplies 16 heads of 128 twice; wgmma does.
        let kernels = steps[2].kernels(&mut backend).layers.remove(0);
        let purposes = steps[2].size.of_layer(&kernels).unwrap();
        let of = |what: &str| purposes.iter().find(|(purpose, _)| purpose == what).unwrap().1;
        for (what, operations) in [("attention", 4 * 2_098_176 * 2048), ("q, k and v", 2 * 2048 * 1024 * 4096)] {
            assert_eq!((of(what).operations, of(what).per_ms), (operations, WGMMA_PER_MS), "{what}");
        }
        let few = steps[0].kernels(&mut backend).layers.remove(0);
        assert!(steps[0].size.of_layer(&few).unwrap().iter().all(|(_, work)| work.per_ms == FMA_PER_MS));
    }

    #[test]
    fn of_a_cache_of_eight_bits_attention_reads_half_as_much() {
        let mut backend = CudaBackend::new(Emulated::default());
        let weights = Model::new(&mut backend, &SHAPE).unwrap();
        let mut of = |cache: KvDType| {
            let mut step = Step::decode(&mut backend, SHAPE, &weights, [4, 130], cache).unwrap();
            let kernels = step.kernels(&mut backend).layers.remove(0);
            let purposes = step.size.of_layer(&kernels).unwrap();
            let names: Vec<String> = kernels.iter().map(|noted| noted.kernel().to_owned()).collect();
            std::iter::zip(names, purposes).collect::<Vec<_>>()
        };
        let (wide, narrow) = (of(KvDType::BF16), of(KvDType::F8));
        let differing: Vec<_> = std::iter::zip(&wide, &narrow).filter(|(wide, narrow)| wide != narrow).collect();
        let [((wide, (_, before)), (narrow, (what, after)))] = &differing[..] else { panic!("{differing:?}") };
        assert_eq!((&wide[..], &narrow[..], &what[..]), ("attention_2x16_bf16", "attention_2x16_f8", "attention"));
        // Keys and values of 8 heads of 128.
        assert_eq!(before.bytes - after.bytes, 4 * 130 * 2 * 8 * 128);
    }

    #[test]
    fn a_kernel_that_nobody_knows_and_a_product_that_is_missing_are_errors() {
        let mut backend = CudaBackend::new(Emulated::default());
        let weights = Model::new(&mut backend, &SHAPE).unwrap();
        let mut step = Step::decode(&mut backend, SHAPE, &weights, [1, 1], KvDType::BF16).unwrap();
        let Kernels { layers, ends } = step.kernels(&mut backend);
        let error = |kernels: &[Noted]| step.size.of_layer(kernels).unwrap_err().to_string();
        assert_eq!(error(&layers[0][..4]), "no kernel computes down");
        assert!(error(&[&layers[0][..], &ends[0]].concat()).ends_with("one product too many"));
        let mut x = backend.activations(1, SHAPE.hidden);
        let embedding = backend.note(&mut |backend| backend.embed(weights.head.of(0), &step.batch, &mut x));
        assert_eq!(error(&embedding), "nobody knows what embed_bf16 does");
    }
}
