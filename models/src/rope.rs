//! Rotary frequencies of a model, with every scaling it may declare. The formulas, and the precision of each step, are
//! those of `modeling_rope_utils.py` in transformers, so that angles agree to the last bit or nearly. Powers and
//! logarithms are the crate `libm`'s, not the platform's: they are the same bits on every machine.

use std::f32::consts::TAU;

use engine_kernels::RopeTable;

use crate::{ModelConfig, RopeScaling};

/// The table for positions `0..max_positions`.
pub(crate) fn table(config: &ModelConfig, max_positions: usize) -> RopeTable {
    let (frequencies, scale) = frequencies(config.rope.theta, config.head_dim, &config.rope.scaling);
    RopeTable::new(&frequencies, scale, max_positions)
}

/// Angular frequency of each pair (radians a position), `[head_dim / 2]`, and the factor of cos and sin.
fn frequencies(theta: f32, head_dim: usize, scaling: &RopeScaling) -> (Vec<f32>, f32) {
    let wavelengths: Vec<f32> =
        (0..head_dim / 2).map(|i| libm::powf(theta, (2 * i) as f32 / head_dim as f32)).collect();
    let plain = wavelengths.iter().map(|w| 1.0 / w);
    match scaling {
        RopeScaling::None => (plain.collect(), 1.0),
        RopeScaling::Linear { factor } => (plain.map(|f| f / factor).collect(), 1.0),
        RopeScaling::PerFrequency { factors } => (plain.zip(factors).map(|(f, factor)| f / factor).collect(), 1.0),
        &RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position } => {
            let original = original_max_position as f32;
            let stretched = plain.map(|f| {
                let wavelength = TAU / f;
                if wavelength > original / low_freq_factor {
                    f / factor
                } else if wavelength < original / high_freq_factor {
                    f
                } else {
                    let smooth = (original / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor);
                    (1.0 - smooth) * f / factor + smooth * f
                }
            });
            (stretched.collect(), 1.0)
        }
        &RopeScaling::Yarn { factor, beta_fast, beta_slow, attention_factor, original_max_position, truncate } => {
            let ramp = YarnRamp::new(theta, head_dim, beta_fast, beta_slow, original_max_position, truncate);
            let blended = wavelengths.iter().enumerate().map(|(i, w)| {
                let keep = 1.0 - ramp.at(i);
                1.0 / (factor * w) * (1.0 - keep) + 1.0 / w * keep
            });
            let temperature = if factor <= 1.0 { 1.0 } else { 0.1 * libm::logf(factor) + 1.0 };
            (blended.collect(), attention_factor.unwrap_or(temperature))
        }
    }
}

/// How far each pair is interpolated: 0 for those that turn often within the original context, 1 for those that hardly
/// turn.
struct YarnRamp {
    low: f64,
    high: f64,
}

impl YarnRamp {
    fn new(
        theta: f32,
        head_dim: usize,
        beta_fast: f32,
        beta_slow: f32,
        original_max_position: usize,
        truncate: bool,
    ) -> Self {
        // The pair that turns `rotations` times within the original context; in f64, as Python computes it.
        let pair = |rotations: f32| {
            let turns = original_max_position as f64 / (f64::from(rotations) * std::f64::consts::TAU);
            head_dim as f64 * libm::log(turns) / (2.0 * libm::log(f64::from(theta)))
        };
        let (mut low, mut high) = (pair(beta_fast), pair(beta_slow));
        if truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let (low, high) = (low.max(0.0), high.min(head_dim as f64 - 1.0));
        // Keeps the slope finite.
        Self { low, high: if low == high { high + 0.001 } else { high } }
    }

    fn at(&self, pair: usize) -> f32 {
        (((pair as f32) - self.low as f32) / (self.high - self.low) as f32).clamp(0.0, 1.0)
    }
}

#[cfg(test)]
mod tests;
