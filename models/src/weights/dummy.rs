use std::borrow::Cow;
use std::collections::HashSet;

use engine_kernels::DType;
use half::{bf16, f16};

use super::{Tensor, WeightSource};
use crate::ModelError;

/// Made-up weights for measuring a shape: uniform around zero with the spread trained models begin with, norms of 1.
/// Each tensor depends on the seed and its own name alone, and exists only while the backend takes it over.
pub(crate) struct DummyWeights {
    /// Seed of all tensors.
    pub(crate) seed: u64,
    /// Element type: F32, F16 or BF16.
    pub(crate) dtype: DType,
    /// Parameters of the model, for progress.
    pub(crate) parameters: u64,
}

/// Half the width of the distribution: a standard deviation of 0.02, `initializer_range` of all these models.
const SPREAD: f32 = 0.02 * 1.732_050_8;

impl WeightSource for DummyWeights {
    fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor<'_>, ModelError> {
        let elements = shape.iter().product::<usize>();
        let mut data = Vec::with_capacity(elements * self.dtype.block_bytes());
        // FNV-1a keeps tensors of one seed apart.
        let hash =
            name.bytes().fold(0xcbf2_9ce4_8422_2325, |h: u64, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
        let mut state = self.seed ^ hash;
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
        Ok(Tensor { dtype: self.dtype, shape: shape.into(), data: Cow::Owned(data) })
    }

    fn total_bytes(&self) -> u64 {
        self.parameters * self.dtype.block_bytes() as u64
    }

    fn unused(&self, _: &HashSet<String>) -> Vec<String> {
        Vec::new()
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weights::floats;

    #[test]
    fn a_seed_gives_the_same_weights_again_and_tensors_differ() {
        let weights = |seed, name: &str| {
            let source = DummyWeights { seed, dtype: DType::BF16, parameters: 0 };
            floats(DType::BF16, &source.tensor(name, &[3, 7]).unwrap().data)
        };
        assert_eq!(weights(1, "a"), weights(1, "a"));
        assert_ne!(weights(1, "a"), weights(1, "b"));
        assert_ne!(weights(1, "a"), weights(2, "a"));
        assert!(weights(1, "a").iter().all(|x| x.abs() <= SPREAD * 1.01));
        assert_eq!(weights(1, "model.norm.weight"), [1.0; 21]);
    }
}
