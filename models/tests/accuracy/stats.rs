use std::fmt;

/// The highest value, the lowest index on ties.
pub(crate) fn argmax(values: &[f32]) -> usize {
    let best = values.iter().enumerate().fold((0, f32::NEG_INFINITY), |b, (i, &v)| if v > b.1 { (i, v) } else { b });
    best.0
}

/// `ln(sum(exp(logits)))`.
pub(crate) fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = f64::from(logits[argmax(logits)]);
    max + logits.iter().map(|&x| (f64::from(x) - max).exp()).sum::<f64>().ln()
}

/// Regrets of many positions, in nats.
pub(crate) struct Regrets(Vec<f64>);

impl Regrets {
    pub(crate) fn new(mut regrets: Vec<f64>) -> Self {
        assert!(!regrets.is_empty() && regrets.iter().all(|&regret| regret >= 0.0));
        regrets.sort_by(f64::total_cmp);
        Self(regrets)
    }

    /// Regrets of `ours` against the reference's logits, row by row.
    pub(crate) fn of_logits<'a>(rows: impl Iterator<Item = (&'a Vec<f32>, &'a Vec<f32>)>) -> Self {
        let regret = |(ours, theirs): (&Vec<f32>, &Vec<f32>)| {
            f64::from(theirs[argmax(theirs)]) - f64::from(theirs[argmax(ours)])
        };
        Self::new(rows.map(regret).collect())
    }

    pub(crate) fn mean(&self) -> f64 {
        self.0.iter().sum::<f64>() / self.0.len() as f64
    }

    pub(crate) fn p99(&self) -> f64 {
        self.0[(self.0.len() * 99).div_ceil(100) - 1]
    }

    fn agreement(&self) -> f64 {
        self.0.iter().filter(|&&regret| regret == 0.0).count() as f64 / self.0.len() as f64
    }
}

impl fmt::Display for Regrets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let worst = self.0[self.0.len() - 1];
        write!(f, "{} positions, same best token at {:.1} %, ", self.0.len(), 100.0 * self.agreement())?;
        write!(f, "regret mean {:.5}, p99 {:.4}, worst {worst:.4} nat", self.mean(), self.p99())
    }
}
