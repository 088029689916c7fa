//! A driver that remembers what was launched, so that what goes wrong has a name.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::Arc;

use engine_kernels::cuda::{Address, Boxes, Driver, DriverError, Launch, Mover, Start, TensorMap};

/// What this thread did on devices. A check runs on one thread.
#[derive(Debug, Default)]
struct Memory {
    suspects: Vec<String>,
    failure: Option<String>,
    ever: BTreeSet<String>,
}

thread_local! {
    static MEMORY: RefCell<Memory> = RefCell::default();
}

/// Everything before this is nobody's fault.
pub(crate) fn forget() {
    MEMORY.with_borrow_mut(|memory| {
        memory.suspects.clear();
        memory.failure = None;
    });
}

/// Results were compared and found good: whatever computed them is beyond suspicion.
pub(crate) fn held() {
    MEMORY.with_borrow_mut(|memory| memory.suspects.clear());
}

pub(crate) fn suspects() -> Vec<String> {
    MEMORY.with_borrow(|memory| memory.suspects.clone())
}

pub(crate) fn failure() -> Option<String> {
    MEMORY.with_borrow(|memory| memory.failure.clone())
}

/// Names of the kernels this thread has launched so far, on devices that were watched.
pub fn kernels_run() -> BTreeSet<String> {
    MEMORY.with_borrow(|memory| memory.ever.clone())
}

fn launched(kernel: &str) {
    MEMORY.with_borrow_mut(|memory| {
        if !memory.suspects.iter().any(|known| known == kernel) {
            memory.suspects.push(kernel.to_owned());
        }
        if !memory.ever.contains(kernel) {
            memory.ever.insert(kernel.to_owned());
        }
    });
}

/// A driver that is watched.
#[derive(Debug)]
pub struct Watched<D> {
    driver: D,
    /// What was launched into the recording that is under way.
    recording: RefCell<Option<Vec<String>>>,
}

/// A recording, and the kernels in it.
pub struct WatchedGraph<G> {
    graph: G,
    kernels: Vec<String>,
}

impl<D: Start> Watched<D> {
    /// A device, watched.
    ///
    /// # Panics
    ///
    /// There is none: whoever runs checks has looked.
    pub fn start() -> Self {
        let driver = D::start().unwrap_or_else(|error| panic!("{error}"));
        Self { driver, recording: RefCell::default() }
    }
}

impl<D> Watched<D> {
    /// Passes a result on, and keeps the first failure: what follows from it says less.
    fn noted<T>(result: Result<T, DriverError>) -> Result<T, DriverError> {
        result.inspect_err(|error| {
            MEMORY.with_borrow_mut(|memory| {
                memory.failure.get_or_insert_with(|| error.to_string());
            });
        })
    }
}

impl<D: Driver> Driver for Watched<D> {
    type Memory = D::Memory;
    type HostMemory = D::HostMemory;
    type Event = D::Event;
    type Graph = WatchedGraph<D::Graph>;

    fn name(&self) -> String {
        self.driver.name()
    }

    fn processors(&self) -> usize {
        self.driver.processors()
    }

    fn has_wgmma(&self) -> bool {
        self.driver.has_wgmma()
    }

    fn tensor_map(&self, boxes: &Boxes) -> Result<TensorMap, DriverError> {
        Self::noted(self.driver.tensor_map(boxes))
    }

    fn memory(&self) -> Result<(usize, usize), DriverError> {
        Self::noted(self.driver.memory())
    }

    fn allocate(&self, bytes: usize) -> Result<Self::Memory, DriverError> {
        Self::noted(self.driver.allocate(bytes))
    }

    fn allocate_host(&self, bytes: usize) -> Result<Self::HostMemory, DriverError> {
        Self::noted(self.driver.allocate_host(bytes))
    }

    fn write(&self, from: &[u8], to: Address) -> Result<(), DriverError> {
        Self::noted(self.driver.write(from, to))
    }

    fn read(&self, from: Address, to: &mut [u8]) -> Result<(), DriverError> {
        Self::noted(self.driver.read(from, to))
    }

    fn upload(&self, from: &Self::HostMemory, to: Address, bytes: usize) -> Result<(), DriverError> {
        Self::noted(self.driver.upload(from, to, bytes))
    }

    fn download(&self, from: Address, to: &Self::HostMemory, bytes: usize) -> Result<(), DriverError> {
        Self::noted(self.driver.download(from, to, bytes))
    }

    fn launch(&self, launch: &Launch<'_>) -> Result<(), DriverError> {
        launched(launch.kernel);
        let result = self.driver.launch(launch);
        match &mut *self.recording.borrow_mut() {
            // As with what begins and ends a recording: one that fails is no failure of the device.
            Some(recording) => {
                recording.push(launch.kernel.to_owned());
                result
            }
            None => Self::noted(result),
        }
    }

    fn record(&self, used: Option<Self::Event>) -> Result<Self::Event, DriverError> {
        Self::noted(self.driver.record(used))
    }

    fn wait(&self, event: &Self::Event) -> Result<(), DriverError> {
        Self::noted(self.driver.wait(event))
    }

    fn synchronize(&self) -> Result<(), DriverError> {
        Self::noted(self.driver.synchronize())
    }

    fn begin_capture(&self) -> Result<(), DriverError> {
        self.driver.begin_capture()?;
        self.recording.replace(Some(Vec::new()));
        Ok(())
    }

    fn end_capture(&self) -> Result<Self::Graph, DriverError> {
        let kernels = self.recording.take().unwrap_or_default();
        self.driver.end_capture().map(|graph| WatchedGraph { graph, kernels })
    }

    fn mover(&self) -> Arc<dyn Mover> {
        self.driver.mover()
    }

    fn replay(&self, graph: &Self::Graph) -> Result<(), DriverError> {
        graph.kernels.iter().for_each(|kernel| launched(kernel));
        Self::noted(self.driver.replay(&graph.graph))
    }
}
