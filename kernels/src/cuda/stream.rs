//! The driver, up to its first failure.

use std::cell::RefCell;

use super::driver::{ARGS_MAX, Arg, Driver, DriverError, Launch};
use super::noted::Noted;

/// A driver's stream whose operations return nothing: as on the device itself, a failure comes up later, when somebody
/// asks. After it nothing more is done.
#[derive(Debug)]
pub(super) struct Stream<D> {
    driver: D,
    failure: RefCell<Option<DriverError>>,
    /// Kernels, while they are noted and not enqueued.
    noted: RefCell<Option<Vec<Noted>>>,
}

impl<D: Driver> Stream<D> {
    pub(super) fn new(driver: D) -> Self {
        Self { driver, failure: RefCell::default(), noted: RefCell::default() }
    }

    pub(super) fn driver(&self) -> &D {
        &self.driver
    }

    /// What has failed, if something has.
    pub(super) fn check(&self) -> Result<(), DriverError> {
        self.failure.borrow().clone().map_or(Ok(()), Err)
    }

    /// Goes on as if nothing had failed; what it was.
    pub(super) fn forgive(&self) -> Option<DriverError> {
        self.failure.take()
    }

    /// Does something with the driver, unless something failed before.
    pub(super) fn attempt<T>(&self, operation: impl FnOnce(&D) -> Result<T, DriverError>) -> Option<T> {
        if self.failure.borrow().is_some() {
            return None;
        }
        operation(&self.driver).inspect_err(|error| *self.failure.borrow_mut() = Some(error.clone())).ok()
    }

    /// Enqueues a kernel, if there is anything to compute.
    pub(super) fn launch(&self, kernel: &str, grid: [usize; 3], block: usize, args: &[Arg]) {
        self.enqueue(&Launch { kernel, grid, block, args, ..Launch::default() });
    }

    /// The same, for kernels that take more than arguments.
    pub(super) fn enqueue(&self, launch: &Launch<'_>) {
        // Here, so that devices that are emulated demand it too.
        assert!(launch.maps.len() + launch.args.len() <= ARGS_MAX, "{} has too many arguments", launch.kernel);
        if launch.grid.contains(&0) {
            return;
        }
        if let Some(noted) = &mut *self.noted.borrow_mut() {
            return noted.push(Noted::new(launch));
        }
        self.attempt(|driver| driver.launch(launch));
    }

    /// From here to [`Stream::end_noting`], kernels are noted instead of being enqueued.
    pub(super) fn begin_noting(&self) {
        self.noted.replace(Some(Vec::new()));
    }

    pub(super) fn end_noting(&self) -> Vec<Noted> {
        self.noted.take().unwrap_or_default()
    }
}
