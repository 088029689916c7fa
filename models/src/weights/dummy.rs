use std::borrow::Cow;
use std::collections::HashSet;

use engine_kernels::DType;
use half::{bf16, f16};

use super::{Tensor, WeightSource};
use crate::ModelError;
use crate::config::quantization::Fp8;

/// Made-up weights for measuring a shape: uniform around zero with the spread trained models begin with, norms of 1.
/// Each tensor depends on the seed and its own name alone, and exists only while the backend takes it over.
pub(crate) struct DummyWeights {
    /// Seed of all tensors.
    pub(crate) seed: u64,
    /// Element type: F32, F16 or BF16.
    pub(crate) dtype: DType,
    /// Whether projections are of eight-bit floats instead, and which are not.
    pub(crate) fp8: Option<Fp8>,
    /// Parameters of the model, for progress.
    pub(crate) parameters: u64,
    /// Shapes of its projections.
    pub(crate) projections: Vec<[usize; 2]>,
}

/// Standard deviation: `initializer_range` of all these models.
const DEVIATION: f32 = 0.02;
/// Half the width of a uniform distribution with it.
const SPREAD: f32 = DEVIATION * 1.732_050_8;
/// The deviation of E4M3 of any bits.
const DEVIATION_OF_BITS: f32 = 107.24;

impl DummyWeights {
    /// Bytes of all where projections of eight-bit floats, none of which is excepted, take `stored` bytes.
    pub(crate) fn bytes_as(&self, stored: impl Fn(DType, &[usize]) -> usize) -> u64 {
        let eights = if self.fp8.is_some() { &self.projections[..] } else { &[] };
        let weights: u64 = eights.iter().map(|[rows, cols]| (rows * cols) as u64).sum();
        let others = (self.parameters - weights) * self.dtype.block_bytes() as u64;
        others + eights.iter().map(|shape| stored(DType::F8, shape) as u64).sum::<u64>()
    }

    /// Rows of eight-bit floats: any bits but NaN's, with a scale that gives them the spread of the others.
    fn eight_bits(mut state: u64, shape: &[usize]) -> Vec<u8> {
        let cols = shape.last().copied().unwrap_or(0);
        let rows = shape.iter().product::<usize>() / cols.max(1);
        let mut data = Vec::with_capacity(rows * DType::F8.row_bytes(cols));
        for _ in 0..rows {
            for start in (0..cols).step_by(DType::F8.block_len()) {
                data.extend((DEVIATION / DEVIATION_OF_BITS).to_le_bytes());
                let (begin, len) = (data.len(), DType::F8.block_len());
                data.resize(begin + len, 0);
                for eight in data[begin..begin + len.min(cols - start)].chunks_mut(8) {
                    let bits = split_mix(&mut state).to_le_bytes();
                    eight.copy_from_slice(&bits[..eight.len()]);
                    eight.iter_mut().for_each(|quant| *quant ^= u8::from(*quant & 0x7f == 0x7f));
                }
            }
        }
        data
    }
}

impl WeightSource for DummyWeights {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError> {
        let elements = shape.iter().product::<usize>();
        // FNV-1a keeps tensors of one seed apart.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let mut state = self.seed ^ hash;
        if self.fp8.as_ref().is_some_and(|fp8| fp8.quantizes(name)) {
            let data = Self::eight_bits(state, shape);
            return Ok(Tensor { dtype: DType::F8, shape: shape.into(), data: Cow::Owned(data), file_bytes: elements });
        }
        let mut data = Vec::with_capacity(elements * self.dtype.block_bytes());
        let is_norm = name.contains("norm.");
        for start in (0..elements).step_by(4) {
            let bits = split_mix(&mut state);
            for lane in 0..(elements - start).min(4) {
                let uniform = f32::from((bits >> (16 * lane)) as i16) / 32768.0;
                let value = if is_norm { 1.0 } else { uniform * SPREAD };
                match self.dtype {
                    DType::F16 => data.extend(f16::from_f32(value).to_le_bytes()),
                    DType::BF16 => data.extend(bf16::from_f32(value).to_le_bytes()),
                    _ => data.extend(value.to_le_bytes()),
                }
            }
        }
        let file_bytes = data.len();
        Ok(Tensor { dtype: self.dtype, shape: shape.into(), data: Cow::Owned(data), file_bytes })
    }

    fn total_bytes(&self) -> u64 {
        self.bytes_as(|_, shape| shape.iter().product())
    }

    fn unused(&self, _: &HashSet<String>) -> Result<Vec<String>, ModelError> {
        Ok(Vec::new())
    }
}

/// SplitMix64 (Steele, Lea and Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Of one type, for tests.
#[cfg(test)]
impl DummyWeights {
    pub(crate) fn of(dtype: DType, seed: u64) -> Self {
        Self { seed, dtype, fp8: None, parameters: 0, projections: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use engine_kernels::Matrix;
    use engine_kernels::reference::dequantize;

    use super::*;
    use crate::weights::floats;

    #[test]
    fn a_seed_gives_the_same_weights_again_and_tensors_differ() {
        let weights = |seed, name: &str| {
            let source = DummyWeights::of(DType::BF16, seed);
            floats(DType::BF16, &source.tensor(name, &[3, 7]).unwrap().data)
        };
        assert_eq!(weights(1, "a"), weights(1, "a"));
        assert_ne!(weights(1, "a"), weights(1, "b"));
        assert_ne!(weights(1, "a"), weights(2, "a"));
        assert!(weights(1, "a").iter().all(|x| x.abs() <= SPREAD * 1.01));
        assert_eq!(weights(1, "model.norm.weight"), [1.0; 21]);
    }

    #[test]
    fn projections_of_eight_bit_floats_are_spread_like_others() {
        let fp8 = Some(Fp8 { block: None, except: vec!["model.layers.1".into()] });
        let source = DummyWeights { fp8, ..DummyWeights::of(DType::BF16, 1) };
        let projection = source.tensor("model.layers.0.mlp.up_proj.weight", &[300, 200]).unwrap();
        let values = dequantize(&Matrix::new(projection.dtype, 300, 200, &projection.data).unwrap());
        assert_eq!(projection.dtype, DType::F8);
        let mean_square = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
        assert!((mean_square.sqrt() - 0.02).abs() < 1e-3, "{}", mean_square.sqrt());
        for name in ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight"] {
            assert_eq!(source.tensor(name, &[3, 7]).unwrap().dtype, DType::BF16, "{name}");
        }
    }
}
