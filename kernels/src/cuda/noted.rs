//! Kernels that are noted instead of being enqueued, for whoever wants to know what operations launch, and how long
//! each of it takes by itself.

use super::backend::CudaBackend;
use super::driver::{Arg, Driver, Launch, TensorMap};

/// A kernel, and all that it is launched with. It reads and writes where it was told to: whoever enqueues it has kept
/// the buffers.
#[derive(Debug, Clone)]
pub struct Noted {
    kernel: String,
    grid: [usize; 3],
    block: usize,
    shared: usize,
    maps: Vec<TensorMap>,
    args: Vec<Arg>,
}

impl Noted {
    pub(super) fn new(launch: &Launch<'_>) -> Self {
        let Launch { kernel, grid, block, shared, maps, args } = *launch;
        Self { kernel: kernel.into(), grid, block, shared, maps: maps.into(), args: args.into() }
    }

    /// Its name in `kernels/cuda`.
    pub fn kernel(&self) -> &str {
        &self.kernel
    }

    /// Its blocks.
    pub fn grid(&self) -> [usize; 3] {
        self.grid
    }
}

impl<D: Driver> CudaBackend<D> {
    /// The kernels that `operations` launch, none of which is enqueued. They send nothing to the device, and have been
    /// called before, so that all they need is where it will stay.
    pub fn note(&mut self, operations: &mut dyn FnMut(&mut Self)) -> Vec<Noted> {
        self.stream.begin_noting();
        operations(self);
        self.stream.end_noting()
    }

    /// Enqueues what was noted.
    pub fn enqueue(&mut self, noted: &Noted) {
        let Noted { kernel, grid, block, shared, maps, args } = noted;
        let (grid, block, shared) = (*grid, *block, *shared);
        self.stream.enqueue(&Launch { kernel, grid, block, shared, maps, args });
    }
}
