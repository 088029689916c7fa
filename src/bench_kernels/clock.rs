//! Times of work on a device.

use std::time::{Duration, Instant};

use anyhow::Result;
use engine_cuda_device::Device;
use engine_kernels::{
    Backend,
    cuda::{CudaBackend, Driver, DriverError},
};

use super::row::{Time, Work, heading, row};

type Cuda = CudaBackend<Device>;

/// Calls of what is measured that a recording holds, at most: as many as there are copies of a weight.
const CALLS_MAX: usize = super::model::COPIES_MAX;
/// Replays of it, at most, in each of so many measurements, of which the median counts.
const REPLAYS_MAX: usize = 100;
const MEASUREMENTS: usize = 5;
/// Milliseconds of a measurement, as far as calls and replays decide.
const ENOUGH_MS: f64 = 10.0;
/// How long a device that was idle is kept busy before anything counts: its clocks take a while to rise.
const WARM_UP: Duration = Duration::from_secs(1);

/// A device, and how fast it copies.
pub(super) struct Clock {
    pub(super) backend: Cuda,
    bandwidth: f64,
}

impl Clock {
    /// The first device there is.
    pub(super) fn new(is_small: bool) -> Result<Self> {
        let mut clock = Self { backend: Cuda::new(Device::new(0)?), bandwidth: 0.0 };
        let (rows, cols) = if is_small { (4, 64) } else { (4096, 16_384) };
        // Of zeros: what they are does not change how fast they are copied.
        let mut x = clock.backend.activations(rows, cols);
        clock.backend.write(&vec![0.0; rows * cols], &mut x);
        let mut out = clock.backend.activations(rows, cols);
        let all: Vec<u32> = (0..rows as u32).collect();
        // Of all rows in order, of which the device is told nothing.
        let mut copy = |backend: &mut Cuda| backend.select_rows(&x, &all, &mut out);
        let started = Instant::now();
        while !is_small && started.elapsed() < WARM_UP {
            clock.about(&mut copy)?;
        }
        let time = clock.time(|backend, _| copy(backend))?;
        clock.bandwidth = (2 * rows * cols * 4) as f64 / time.milliseconds / 1e6;
        Ok(clock)
    }

    /// What stands above the rows.
    pub(super) fn heading(&self) -> String {
        let device = self.backend.driver();
        heading(&device.name(), self.bandwidth, device.memory_bandwidth())
    }

    /// Prints a row of what was measured.
    pub(super) fn print(&self, what: &str, time: Time, work: Work) {
        println!("{}", row(what, time, work, self.bandwidth));
    }

    /// The time of one call of `work`, which enqueues kernels and nothing else, and is told how often it was called
    /// before. Some calls are recorded, and the recording is replayed: launched one by one, kernels follow each other
    /// as fast as the host launches them, one in 2 to 4 µs, and small ones take less. Where kernels start before the
    /// one ahead has ended, as they do in steps, it is the time from one's end to the next one's.
    pub(super) fn time(&mut self, mut work: impl FnMut(&mut Cuda, usize)) -> Result<Time> {
        let mut called = 0;
        let mut call = |backend: &mut Cuda| {
            work(backend, called);
            called += 1;
        };
        let about = self.about(&mut call)?;
        let calls = often(about, CALLS_MAX);
        let recorded = self.backend.record(&mut |backend| (0..calls).for_each(|_| call(backend)));
        match recorded {
            Ok(graph) => {
                let mut replay = |backend: &mut Cuda| backend.driver().replay(&graph);
                self.between(1, &mut replay)?;
                let replays = often(about * calls as f64, REPLAYS_MAX);
                let milliseconds = self.median(replays, &mut replay)? / calls as f64;
                Ok(Time { milliseconds, is_recorded: true })
            }
            Err(error) => {
                tracing::warn!(%error, "what is measured cannot be recorded: the host's launches are in its time");
                self.launched(about, &mut call)
            }
        }
    }

    /// The same of work that cannot be recorded: of a step, which sends its plan and has recordings itself.
    pub(super) fn time_with_host(&mut self, mut work: impl FnMut(&mut Cuda)) -> Result<Time> {
        let about = self.about(&mut work)?;
        self.launched(about, &mut work)
    }

    /// Milliseconds of a call, at a first look.
    fn about(&mut self, call: &mut dyn FnMut(&mut Cuda)) -> Result<f64> {
        let mut call = |backend: &mut Cuda| {
            call(backend);
            Ok(())
        };
        // Not counted: memory is made room in, and steps are recorded when they come again.
        self.between(2, &mut call)?;
        // The host may be held up in one.
        let looks = [self.between(1, &mut call)?, self.between(1, &mut call)?, self.between(1, &mut call)?];
        Ok(looks.into_iter().fold(f64::INFINITY, f64::min))
    }

    fn launched(&mut self, about: f64, call: &mut dyn FnMut(&mut Cuda)) -> Result<Time> {
        let milliseconds = self.median(often(about, REPLAYS_MAX), &mut |backend| {
            call(backend);
            Ok(())
        })?;
        Ok(Time { milliseconds, is_recorded: false })
    }

    fn median(&mut self, times: usize, work: &mut dyn FnMut(&mut Cuda) -> Result<(), DriverError>) -> Result<f64> {
        let mut measured: Vec<f64> = (0..MEASUREMENTS).map(|_| self.between(times, work)).collect::<Result<_>>()?;
        measured.sort_by(f64::total_cmp);
        Ok(measured[MEASUREMENTS / 2])
    }

    /// Milliseconds of one `work` of so many, from one event to another.
    fn between(&mut self, times: usize, work: &mut dyn FnMut(&mut Cuda) -> Result<(), DriverError>) -> Result<f64> {
        let Self { backend, .. } = self;
        let start = backend.driver().record_time()?;
        for _ in 0..times {
            work(backend)?;
        }
        let end = backend.driver().record_time()?;
        backend.driver().wait(&end)?;
        backend.check()?;
        Ok(f64::from(backend.driver().milliseconds(&start, &end)?) / times as f64)
    }
}

/// How often something of so many milliseconds is done, to be measured.
fn often(milliseconds: f64, most: usize) -> usize {
    ((ENOUGH_MS / milliseconds).ceil() as usize).clamp(1, most)
}
