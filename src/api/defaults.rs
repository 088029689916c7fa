use std::ops::RangeInclusive;

use engine_models::GenerationDefaults;

pub(crate) const TEMPERATURE: RangeInclusive<f64> = 0.0..=2.0;
/// 0 itself is refused besides.
pub(crate) const TOP_P: RangeInclusive<f64> = 0.0..=1.0;
pub(crate) const MIN_P: RangeInclusive<f64> = 0.0..=1.0;
/// Factors that keep logits finite.
pub(crate) const REPETITION_PENALTY: RangeInclusive<f64> = 0.01..=100.0;

/// Sampling parameters for requests that leave them out: the model's own recommendation, else OpenAI's defaults.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Defaults {
    /// 0 to 2.
    pub temperature: f32,
    /// 0 keeps all tokens.
    pub top_k: u32,
    /// Above 0, at most 1.
    pub top_p: f32,
    /// 0 to 1.
    pub min_p: f32,
    /// 0.01 to 100; 1 is off.
    pub repetition_penalty: f32,
}

impl Default for Defaults {
    /// OpenAI's.
    fn default() -> Self {
        Self { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0 }
    }
}

impl Defaults {
    /// What a model's files recommend. A value that no request could ask for is logged and left out.
    pub fn recommended(by: &GenerationDefaults) -> Self {
        let openai = Self::default();
        let checked = |name: &str, value: Option<f32>, range: RangeInclusive<f64>, default: f32| match value {
            Some(value) if range.contains(&f64::from(value)) => value,
            Some(value) => {
                tracing::warn!(name, value, default, "the model recommends a value out of range; ignored");
                default
            }
            None => default,
        };
        Self {
            temperature: checked("temperature", by.temperature, TEMPERATURE, openai.temperature),
            top_k: by.top_k.unwrap_or(openai.top_k),
            top_p: checked("top_p", by.top_p, f64::from(f32::MIN_POSITIVE)..=1.0, openai.top_p),
            min_p: checked("min_p", by.min_p, MIN_P, openai.min_p),
            repetition_penalty: checked(
                "repetition_penalty",
                by.repetition_penalty,
                REPETITION_PENALTY,
                openai.repetition_penalty,
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_model_recommends_holds_where_a_request_could_ask_for_it() {
        let good = GenerationDefaults {
            temperature: Some(0.6),
            top_k: Some(20),
            top_p: Some(0.95),
            repetition_penalty: Some(1.05),
            ..GenerationDefaults::default()
        };
        let expected = Defaults { temperature: 0.6, top_k: 20, top_p: 0.95, min_p: 0.0, repetition_penalty: 1.05 };
        assert_eq!(Defaults::recommended(&good), expected);
        let bad = GenerationDefaults {
            temperature: Some(-1.0),
            top_p: Some(0.0),
            min_p: Some(f32::NAN),
            repetition_penalty: Some(0.0),
            ..GenerationDefaults::default()
        };
        assert_eq!(Defaults::recommended(&bad), Defaults::default());
    }
}
