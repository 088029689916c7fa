//! `engine bench-kernels`: how long the CUDA kernels take on the device at hand, for the shapes of real models: whole
//! decoding steps, and each kernel that a layer launches by itself, for some numbers of rows and for prompts, beside
//! the bandwidth that a copy reaches there. It prints rows of a table, each as it is measured, for `benches/results`.
//! Weights are made up: no model is needed.

#[cfg(feature = "cuda")]
mod clock;
#[cfg(any(feature = "cuda", test))]
mod layer;
#[cfg(any(feature = "cuda", test))]
mod model;
#[cfg(any(feature = "cuda", test))]
mod row;
#[cfg(feature = "cuda")]
mod steps;
#[cfg(any(feature = "cuda", test))]
mod work;

use anyhow::Result;
use engine_kernels::AttentionShape;

use crate::cli::{BenchKernelsArgs, ShapeArg};

/// What of a model determines how long its kernels take.
#[derive(Debug, Clone, Copy)]
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "nothing is measured without devices"))]
struct Shape {
    name: &'static str,
    /// Whether it is only there to see that all works.
    is_small: bool,
    hidden: usize,
    ffn: usize,
    layers: usize,
    vocabulary: usize,
    heads: AttentionShape,
}

#[cfg(any(feature = "cuda", test))]
impl Shape {
    /// Weights of a layer.
    fn layer_weights(&self) -> usize {
        self.hidden * (self.heads.qkv_width() + self.heads.q_width() + 3 * self.ffn)
    }
}

impl From<ShapeArg> for Shape {
    fn from(shape: ShapeArg) -> Self {
        let of = |name, [hidden, ffn, layers, vocabulary]: [usize; 4], [heads, kv_heads, head_dim]: [usize; 3]| Self {
            name,
            is_small: shape == ShapeArg::Tiny,
            hidden,
            ffn,
            layers,
            vocabulary,
            heads: AttentionShape { heads, kv_heads, head_dim },
        };
        match shape {
            ShapeArg::Qwen3Small => of("Qwen3-0.6B", [1024, 3072, 28, 151_936], [16, 8, 128]),
            ShapeArg::Qwen3Large => of("Qwen3-8B", [4096, 12_288, 36, 151_936], [32, 8, 128]),
            ShapeArg::Qwen3Larger => of("Qwen3-14B", [5120, 17_408, 40, 151_936], [40, 8, 128]),
            ShapeArg::Llama3 => of("Llama-3-8B", [4096, 14_336, 32, 128_256], [32, 8, 128]),
            ShapeArg::Tiny => of("tiny", [64, 96, 2, 100], [2, 1, 64]),
        }
    }
}

/// Measures and prints.
#[cfg(feature = "cuda")]
pub fn run(args: &BenchKernelsArgs) -> Result<()> {
    for (index, &shape) in args.shape.iter().enumerate() {
        let shape = Shape::from(shape);
        let mut clock = clock::Clock::new(shape.is_small)?;
        if index == 0 {
            print!("{}", clock.heading());
        }
        let model = model::Model::new(&mut clock.backend, &shape)?;
        steps::measure(&mut clock, shape, &model)?;
    }
    Ok(())
}

/// Says where there is something to measure.
#[cfg(not(feature = "cuda"))]
pub fn run(_: &BenchKernelsArgs) -> Result<()> {
    anyhow::bail!("this engine was built without CUDA and has no kernels to measure; `make cuda` builds one that has")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shapes_are_those_of_the_models_that_they_are_named_after() {
        // Parameters of a model, in millions, as its name has them; embeddings are tied in the first.
        for (shape, tables, millions) in [
            (ShapeArg::Qwen3Small, 1, 596),
            (ShapeArg::Qwen3Large, 2, 8190),
            (ShapeArg::Qwen3Larger, 2, 14_768),
            (ShapeArg::Llama3, 2, 8030),
        ] {
            let of = Shape::from(shape);
            let all = (tables * of.vocabulary * of.hidden + of.layers * of.layer_weights()) / 1_000_000;
            assert!(all.abs_diff(millions) <= millions / 500 + 1, "{shape:?}: {all} million");
        }
    }
}
