//! A driver that does nothing but take the time.

use std::cell::Cell;
use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use engine_kernels::cuda::{Address, Boxes, Driver, DriverError, HostMemory, Launch, Memory, Mover, TensorMap};

/// A device whose steps take a given time, and which nobody has.
pub(crate) struct Idle {
    step: Duration,
    /// When all that was launched is done.
    done: Cell<Instant>,
    /// How long it had nothing to do before each step.
    gaps: Arc<Mutex<Vec<Duration>>>,
    allocated: Cell<u64>,
}

impl Idle {
    pub(crate) fn new(step: Duration, gaps: Arc<Mutex<Vec<Duration>>>) -> Self {
        Self { step, done: Cell::new(Instant::now()), gaps, allocated: Cell::new(1 << 40) }
    }
}

impl fmt::Debug for Idle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Idle")
    }
}

/// Memory that is not there.
pub(crate) struct Nowhere(u64);

impl Memory for Nowhere {
    fn address(&self) -> Address {
        Address(self.0)
    }
}

/// Host memory that is.
pub(crate) struct Words(Box<[Cell<u128>]>);

impl HostMemory for Words {
    fn start(&self) -> *mut u8 {
        self.0.as_ptr() as *mut u8
    }
}

impl Driver for Idle {
    type Memory = Nowhere;
    type HostMemory = Words;
    type Event = Instant;
    type Graph = ();

    fn name(&self) -> String {
        "nobody's".into()
    }

    fn processors(&self) -> usize {
        132
    }

    fn has_wgmma(&self) -> bool {
        false
    }

    fn tensor_map(&self, _: &Boxes) -> Result<TensorMap, DriverError> {
        unreachable!("without wgmma nobody copies boxes")
    }

    fn memory(&self) -> Result<(usize, usize), DriverError> {
        Ok((1 << 36, 1 << 36))
    }

    fn allocate(&self, bytes: usize) -> Result<Nowhere, DriverError> {
        let start = self.allocated.get();
        self.allocated.set(start + bytes.next_multiple_of(256) as u64);
        Ok(Nowhere(start))
    }

    fn allocate_host(&self, bytes: usize) -> Result<Words, DriverError> {
        Ok(Words((0..bytes.div_ceil(16)).map(|_| Cell::new(0)).collect()))
    }

    fn write(&self, _: &[u8], _: Address) -> Result<(), DriverError> {
        Ok(())
    }

    fn read(&self, _: Address, _: &mut [u8]) -> Result<(), DriverError> {
        Ok(())
    }

    fn upload(&self, _: &Words, _: Address, _: usize) -> Result<(), DriverError> {
        Ok(())
    }

    fn download(&self, _: Address, _: &Words, _: usize) -> Result<(), DriverError> {
        Ok(())
    }

    fn launch(&self, _: &Launch<'_>) -> Result<(), DriverError> {
        Ok(())
    }

    fn record(&self, _: Option<Instant>) -> Result<Instant, DriverError> {
        Ok(self.done.get())
    }

    fn wait(&self, done: &Instant) -> Result<(), DriverError> {
        // As the real one does: it takes a core.
        while Instant::now() < *done {
            std::hint::spin_loop();
        }
        Ok(())
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        self.wait(&self.done.get())
    }

    fn begin_capture(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn end_capture(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn mover(&self) -> Arc<dyn Mover> {
        unreachable!("nobody moves pages")
    }

    fn replay(&self, (): &()) -> Result<(), DriverError> {
        let (now, done) = (Instant::now(), self.done.get());
        if let Ok(mut gaps) = self.gaps.lock() {
            gaps.push(now.saturating_duration_since(done));
        }
        self.done.set(now.max(done) + self.step);
        Ok(())
    }
}
