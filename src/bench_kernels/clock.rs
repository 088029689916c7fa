//! Times of work on a device.

use anyhow::Result;
use engine_kernels::Backend;
use engine_kernels::cuda::{CudaBackend, Device, Driver};

use super::row::{Work, row};

pub(super) type Cuda = CudaBackend<Device>;

/// Repetitions of what is measured, at most, in each of so many measurements, of which the median counts.
const REPETITIONS_MAX: usize = 20;
const MEASUREMENTS: usize = 5;
/// Milliseconds of a measurement, as far as repetitions decide.
const ENOUGH_MS: f64 = 10.0;

/// A device, and how fast it copies.
pub(super) struct Clock {
    pub(super) backend: Cuda,
    bandwidth: f64,
    /// Whether shapes are small, to see that all works.
    pub(super) tiny: bool,
}

impl Clock {
    /// The first device there is.
    pub(super) fn new(tiny: bool) -> Result<Self> {
        let mut clock = Self { backend: Cuda::new(Device::new(0)?), bandwidth: 0.0, tiny };
        let (rows, cols) = if tiny { (4, 64) } else { (4096, 16_384) };
        let x = filled(&mut clock.backend, rows, cols);
        let mut out = clock.backend.activations(rows, cols);
        let all: Vec<u32> = (0..rows as u32).collect();
        let milliseconds = clock.time(|backend, _| backend.select_rows(&x, &all, &mut out))?;
        clock.bandwidth = (2 * rows * cols * 4) as f64 / milliseconds / 1e6;
        Ok(clock)
    }

    pub(super) fn device(&self) -> String {
        self.backend.driver().name()
    }

    /// GB/s that copying rows reaches, read and written.
    pub(super) fn bandwidth(&self) -> f64 {
        self.bandwidth
    }

    /// Prints a row of what was measured.
    pub(super) fn print(&self, what: &str, milliseconds: f64, work: Work) {
        println!("{}", row(what, milliseconds, work, self.bandwidth));
    }

    /// Milliseconds of one call of `work`, which only enqueues, and is told how often it was called before.
    pub(super) fn time(&mut self, mut work: impl FnMut(&mut Cuda, usize)) -> Result<f64> {
        let mut calls = 0;
        let mut of = |backend: &mut Cuda, repetitions: usize| -> Result<f64> {
            let start = backend.driver().record()?;
            for _ in 0..repetitions {
                work(backend, calls);
                calls += 1;
            }
            let end = backend.driver().record()?;
            backend.driver().wait(&end)?;
            backend.check()?;
            Ok(f64::from(backend.driver().milliseconds(&start, &end)?) / repetitions as f64)
        };
        // Not counted: memory is made room in, and steps are recorded when they come again.
        of(&mut self.backend, 2)?;
        let about = of(&mut self.backend, 1)?;
        let repetitions = ((ENOUGH_MS / about).ceil() as usize).clamp(1, REPETITIONS_MAX);
        let mut times: Vec<f64> =
            (0..MEASUREMENTS).map(|_| of(&mut self.backend, repetitions)).collect::<Result<_>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[MEASUREMENTS / 2])
    }
}

/// Activations with values around 0.
pub(super) fn filled(backend: &mut Cuda, rows: usize, cols: usize) -> <Cuda as Backend>::Activations {
    let mut x = backend.activations(rows, cols);
    backend.write(&values(rows * cols), &mut x);
    x
}

/// Values around 0.
pub(super) fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect()
}
