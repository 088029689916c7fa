//! What was measured, for people and for programs.

use serde::Serialize;

use super::Steps;
use crate::{cli::BenchArgs, worker::BareEngine};

/// One measurement.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "measured", rename_all = "snake_case")]
pub(super) enum Row {
    Prefill {
        tokens: usize,
        rounds: usize,
        milliseconds: f64,
        tokens_per_second: f64,
    },
    Decode {
        sequences: usize,
        context: usize,
        steps: usize,
        step_milliseconds: f64,
        step_milliseconds_p99: f64,
        tokens_per_second: f64,
        gigabytes_read_per_second: f64,
    },
}

impl Row {
    /// From the seconds that each round took.
    pub(super) fn prefill(tokens: usize, seconds: &[f64]) -> Self {
        let median = percentile(seconds, 50);
        let (rounds, milliseconds, tokens_per_second) = (seconds.len(), median * 1e3, tokens as f64 / median);
        Self::Prefill { tokens, rounds, milliseconds, tokens_per_second }
    }

    /// From how long steps took, in the middle of which a sequence had `context` tokens.
    pub(super) fn decode(bare: &BareEngine, sequences: usize, context: usize, steps: &Steps) -> Self {
        let bytes = bare.step_bytes as f64 + (sequences * context * bare.token_bytes) as f64;
        let median = percentile(&steps.means, 50);
        Self::Decode {
            sequences,
            context,
            steps: steps.gaps.len(),
            step_milliseconds: median * 1e3,
            step_milliseconds_p99: percentile(&steps.gaps, 99) * 1e3,
            tokens_per_second: sequences as f64 / median,
            gigabytes_read_per_second: bytes / median / 1e9,
        }
    }

    /// The names of its columns, and what is in them.
    fn columns(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Prefill { tokens, milliseconds, tokens_per_second, .. } => vec![
                ("prefill, tokens", tokens.to_string()),
                ("ms", format!("{milliseconds:.2}")),
                ("tokens/s", format!("{tokens_per_second:.1}")),
            ],
            Self::Decode {
                sequences,
                context,
                step_milliseconds,
                step_milliseconds_p99,
                tokens_per_second,
                gigabytes_read_per_second,
                ..
            } => vec![
                ("decode, sequences", sequences.to_string()),
                ("context", context.to_string()),
                ("ms a step", format!("{step_milliseconds:.2}")),
                ("p99", format!("{step_milliseconds_p99:.2}")),
                ("tokens/s", format!("{tokens_per_second:.1}")),
                ("GB/s read", format!("{gigabytes_read_per_second:.1}")),
            ],
        }
    }
}

/// Prints rows as they come.
pub(super) struct Report {
    pub(super) json: bool,
}

impl Report {
    /// Says what is measured.
    pub(super) fn start(&self, bare: &BareEngine, args: &BenchArgs) {
        if self.json {
            return;
        }
        let BareEngine { name, device, step_bytes, token_bytes, .. } = bare;
        let config = bare.engine.config();
        println!(
            "engine {}, {name} on {device}: {:.1} MB of weights a step, {:.1} KB of keys and values a token, pages of \
             {} tokens, steps of up to {}; medians of {} rounds",
            env!("CARGO_PKG_VERSION"),
            *step_bytes as f64 / 1e6,
            *token_bytes as f64 / 1e3,
            config.block_size,
            config.max_num_batched_tokens,
            args.rounds,
        );
    }

    /// Prints a row, the names of its columns before it if it is the first of its kind.
    pub(super) fn print(&self, row: &Row, first: bool) {
        if self.json {
            // Numbers and names: there is nothing that could fail.
            println!("{}", serde_json::to_string(row).unwrap_or_default());
            return;
        }
        let columns = row.columns();
        let line = |cells: Vec<&str>| cells.iter().map(|cell| format!("{cell:>18}")).collect::<String>();
        if first {
            println!("\n{}", line(columns.iter().map(|(name, _)| *name).collect()));
        }
        println!("{}", line(columns.iter().map(|(_, cell)| cell.as_str()).collect()));
    }
}

/// The value that `percent` of `values` do not exceed. There is one at least.
fn percentile(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[(values.len() * percent).div_ceil(100).saturating_sub(1)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_of_json_says_what_it_is() {
        let json: serde_json::Value =
            serde_json::from_str(&serde_json::to_string(&Row::prefill(100, &[0.5, 0.1, 0.25])).unwrap()).unwrap();
        assert_eq!((&json["measured"], json["tokens"].as_u64()), (&"prefill".into(), Some(100)));
        assert_eq!((json["milliseconds"].as_f64(), json["tokens_per_second"].as_f64()), (Some(250.0), Some(400.0)));
    }

    #[test]
    fn percentiles_are_values_that_were_measured() {
        let values: Vec<f64> = (1..=200).rev().map(f64::from).collect();
        assert_eq!((percentile(&values, 50), percentile(&values, 99), percentile(&[7.0], 99)), (100.0, 198.0, 7.0));
    }
}
