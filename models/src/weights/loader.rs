use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::time::{Duration, Instant};

use engine_kernels::{Backend, DType, Matrix};
use indicatif::{HumanBytes, ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::{Tensor, WeightSource, floats};
use crate::ModelError;

/// What was loaded.
#[derive(Debug, Clone, PartialEq)]
pub struct LoadReport {
    /// Weights, tied ones counted once.
    pub parameters: u64,
    /// Bytes they take in the files.
    pub file_bytes: u64,
    /// Bytes the backend keeps for the matrices.
    pub memory_bytes: u64,
    /// Of those, the bytes that every step reads: all but an embedding that is no output projection as well.
    pub step_bytes: u64,
    /// Element types and the share of the parameters stored in each, largest first.
    pub dtypes: Vec<(DType, f64)>,
    /// Tensors in the files that the architecture has no use for.
    pub unused_tensors: usize,
    /// Time it took.
    pub elapsed: Duration,
}

impl fmt::Display for LoadReport {
    /// `135 M parameters (Q4_1 79 %, Q8_0 21 %), 93.8 MiB in files, 102.1 MiB in memory, 0.4 s`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parameters = self.parameters as f64;
        match parameters {
            n if n >= 1e9 => write!(f, "{:.2} B parameters (", n / 1e9)?,
            n if n >= 1e6 => write!(f, "{:.0} M parameters (", n / 1e6)?,
            n => write!(f, "{n} parameters (")?,
        }
        // Norms are a sliver of f32 in every model; only what can be seen in a whole percentage is worth naming.
        let shares = self.dtypes.iter().filter(|(_, share)| *share >= 0.005);
        for (i, (dtype, share)) in shares.enumerate() {
            write!(f, "{}{dtype:?} {:.0} %", if i == 0 { "" } else { ", " }, share * 100.0)?;
        }
        let (file, memory) = (HumanBytes(self.file_bytes), HumanBytes(self.memory_bytes));
        write!(f, "), {file} in files, {memory} in memory, {:.1} s", self.elapsed.as_secs_f64())
    }
}

/// Hands tensors over to a backend one after the other, checks their shapes, and keeps count.
pub(crate) struct Loader<'a, B: Backend> {
    source: &'a dyn WeightSource,
    backend: &'a mut B,
    bar: ProgressBar,
    used: HashSet<String>,
    elements: BTreeMap<String, (DType, u64)>,
    file_bytes: u64,
    memory_bytes: u64,
    step_bytes: u64,
    started: Instant,
}

impl<'a, B: Backend> Loader<'a, B> {
    /// A loader that shows a bar on standard error if `progress` is set and that is a terminal.
    pub(crate) fn new(source: &'a dyn WeightSource, backend: &'a mut B, progress: bool) -> Self {
        let target = if progress { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(source.total_bytes()), target);
        let style = ProgressStyle::with_template("loading [{wide_bar}] {bytes}/{total_bytes}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        Self {
            source,
            backend,
            bar,
            used: HashSet::new(),
            elements: BTreeMap::new(),
            file_bytes: 0,
            memory_bytes: 0,
            step_bytes: 0,
            started: Instant::now(),
        }
    }

    /// The backend, for what is not a weight.
    pub(crate) fn backend(&mut self) -> &mut B {
        self.backend
    }

    /// A matrix of `cols` columns made of tensors stacked along their rows: names and row counts. Each step reads it.
    pub(crate) fn linear(&mut self, parts: &[(&str, usize)], cols: usize) -> Result<B::Linear, ModelError> {
        let weight = self.table(parts, cols)?;
        self.step_bytes += self.backend.linear_bytes(&weight) as u64;
        Ok(weight)
    }

    /// The same for one of which a step reads a few rows.
    pub(crate) fn table(&mut self, parts: &[(&str, usize)], cols: usize) -> Result<B::Linear, ModelError> {
        let tensors: Vec<_> =
            parts.iter().map(|&(name, rows)| self.take(name, &[rows, cols])).collect::<Result<_, _>>()?;
        let first = parts.first().map_or("", |part| part.0);
        let error = |source| ModelError::Kernel { name: first.into(), source };
        let matrices: Vec<_> = tensors
            .iter()
            .zip(parts)
            .map(|(tensor, &(_, rows))| Matrix::new(tensor.dtype, rows, cols, &tensor.data))
            .collect::<Result<_, _>>()
            .map_err(error)?;
        let weight = self.backend.linear_weight(&matrices).map_err(error)?;
        self.memory_bytes += self.backend.linear_bytes(&weight) as u64;
        Ok(weight)
    }

    /// A vector made of tensors one after the other: names and lengths.
    pub(crate) fn vector(&mut self, parts: &[(&str, usize)]) -> Result<B::Vector, ModelError> {
        let mut values = Vec::new();
        for &(name, len) in parts {
            let tensor = self.take(name, &[len])?;
            if tensor.dtype.is_quantized() {
                let found = format!("{:?}", tensor.dtype);
                return Err(ModelError::TensorType { name: name.into(), found, advice: " for a norm or bias" });
            }
            values.extend(floats(tensor.dtype, &tensor.data));
        }
        Ok(self.backend.vector(&values))
    }

    /// Notes that a tensor is known and deliberately left alone, so that it is not reported as unused.
    pub(crate) fn leave(&mut self, name: &str) {
        self.used.insert(name.into());
    }

    fn take(&mut self, name: &str, shape: &[usize]) -> Result<Tensor<'a>, ModelError> {
        let source = self.source;
        let tensor = source.tensor(name, shape)?;
        if tensor.shape != shape {
            return Err(ModelError::TensorShape { name: name.into(), expected: shape.into(), actual: tensor.shape });
        }
        let elements: usize = shape.iter().product();
        self.elements.entry(format!("{:?}", tensor.dtype)).or_insert((tensor.dtype, 0)).1 += elements as u64;
        self.file_bytes += tensor.file_bytes as u64;
        self.used.insert(name.into());
        self.bar.inc(tensor.file_bytes as u64);
        Ok(tensor)
    }

    /// Sums up.
    pub(crate) fn finish(self) -> Result<LoadReport, ModelError> {
        self.bar.finish_and_clear();
        let unused = self.source.unused(&self.used)?;
        if !unused.is_empty() {
            let examples = &unused[..unused.len().min(3)];
            tracing::warn!(
                count = unused.len(),
                ?examples,
                "the model's files hold tensors its architecture does not use"
            );
        }
        let parameters: u64 = self.elements.values().map(|(_, count)| count).sum();
        let mut dtypes: Vec<_> =
            self.elements.into_values().map(|(dtype, count)| (dtype, count as f64 / parameters as f64)).collect();
        dtypes.sort_by(|a, b| b.1.total_cmp(&a.1));
        Ok(LoadReport {
            parameters,
            file_bytes: self.file_bytes,
            memory_bytes: self.memory_bytes,
            step_bytes: self.step_bytes,
            dtypes,
            unused_tensors: unused.len(),
            elapsed: self.started.elapsed(),
        })
    }
}
