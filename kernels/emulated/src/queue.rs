//! Work that waits until somebody waits for it.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_uint, c_void};
use std::sync::Arc;

use super::Refusal;
use super::mover::Busy;
use engine_kernels::KvRegion;
use engine_kernels::cuda::{AdapterAccess, Arg, Boxes, DriverError, TensorMap};

unsafe extern "C" {
    fn simt_kinds(kernel: *const c_char) -> *const c_char;
    fn simt_begin(
        kernel: *const c_char,
        grid: *const c_uint,
        threads: c_uint,
        shared: c_uint,
        args: *const *const c_void,
        seed: u64,
    );
    fn simt_leave();
    fn simt_launch(
        kernel: *const c_char,
        grid: *const c_uint,
        threads: c_uint,
        shared: c_uint,
        args: *const *const c_void,
        seed: u64,
    ) -> *const c_char;
    fn simt_map(
        start: u64,
        rows: u64,
        cols: u64,
        row_bytes: u64,
        box_rows: c_uint,
        box_cols: c_uint,
        words: *mut [u64; 16],
    ) -> *const c_char;
}

/// Columns of a box: 128 bytes.
const BOX_COLS: c_uint = 64;

/// One thing that was enqueued.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    Copy {
        from: usize,
        to: usize,
        bytes: usize,
    },
    /// A copy from host memory of the caller's own.
    Upload {
        region: KvRegion,
        at: usize,
        to: usize,
        bytes: usize,
    },
    Kernel {
        name: CString,
        grid: [c_uint; 3],
        block: c_uint,
        shared: c_uint,
        maps: Vec<TensorMap>,
        args: Vec<Arg>,
    },
}

/// A stream of work, run as late as it may be.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: std::collections::VecDeque<Work>,
    /// What was run, and so the number of the first of `waiting`.
    run: u64,
    pub(crate) captured: Option<Vec<Work>>,
    /// Where recordings fail.
    pub(crate) refusal: Option<Refusal>,
    /// Multiprocessors it says it has, if a test says so.
    pub(crate) processors: Option<usize>,
    /// Bytes it says are free; all, if nothing is set.
    pub(crate) free: Option<usize>,
    /// So many bytes are more than any allocation has, if a test says so.
    pub(crate) too_large: Option<usize>,
    /// Recordings that were asked for.
    pub(crate) recordings: u64,
    /// Start and length of everything that is allocated.
    allocations: BTreeMap<usize, usize>,
    failure: Option<DriverError>,
    /// Allocations opened by their handles.
    pub(crate) opened: usize,
    /// Nobody can tell when copies beside the computing are over.
    pub(crate) copies_lost: bool,
    /// Events that were made.
    pub(crate) events: u64,
    /// Kernels that were run.
    pub(crate) launches: u64,
    /// What adapters may do, if a test says so.
    pub(crate) adapter_access: Option<AdapterAccess>,
    /// Adapters do not get to see what is copied to its memory, as where something between the two has other bytes.
    pub(crate) unseen: bool,
    /// It does not get to see what adapters write there.
    pub(crate) unreached: bool,
    /// What was prepared for adapters last.
    pub(crate) open_to_adapters: Option<usize>,
    /// Files that stand for memory which were handed out.
    pub(crate) dma_bufs: u64,
    /// How often adapters' writes were waited for.
    pub(crate) flushes: u64,
    /// Keeps whoever waits for a mark waiting.
    pub(crate) busy: Arc<Busy>,
}

pub(crate) fn failed(operation: impl Into<String>, reason: impl Into<String>) -> DriverError {
    DriverError::Failed { operation: operation.into(), reason: reason.into() }
}

impl Queue {
    /// From now on everything fails.
    pub(crate) fn break_down(&mut self) {
        self.failure = Some(failed("anything", "the device is broken"));
    }

    /// What has failed, if something has.
    pub(crate) fn state(&self) -> Result<(), DriverError> {
        self.failure.clone().map_or(Ok(()), Err)
    }

    /// Whether everything before number `end` has run.
    pub(crate) fn has_run(&self, end: u64) -> bool {
        self.run >= end
    }

    /// The number of the next thing that is enqueued.
    pub(crate) fn end(&self) -> u64 {
        self.run + self.waiting.len() as u64
    }

    pub(crate) fn push(&mut self, work: Work) -> Result<(), DriverError> {
        self.check(&work)?;
        match &mut self.captured {
            Some(_) if self.refusal == Some(Refusal::Amid) => {
                return Err(failed("enqueueing", "the recording was spoilt"));
            }
            Some(captured) => captured.push(work),
            None => self.waiting.push_back(work),
        }
        Ok(())
    }

    /// Runs everything before number `end`.
    pub(crate) fn run_until(&mut self, end: u64) -> Result<(), DriverError> {
        if self.captured.is_some() {
            return Err(failed("waiting", "a recording is under way"));
        }
        while self.run < end && self.failure.is_none() {
            let Some(work) = self.waiting.pop_front() else { break };
            self.run += 1;
            if let (Work::Kernel { .. }, Some(next)) = (&work, self.waiting.front())
                && self.run < end
            {
                self.begin(next);
            }
            if let Err(error) = self.execute(&work) {
                self.failure = Some(error);
                // SAFETY: whatever was begun stays where it is.
                unsafe { simt_leave() };
            }
        }
        self.failure.clone().map_or(Ok(()), Err)
    }

    pub(crate) fn run_all(&mut self) -> Result<(), DriverError> {
        self.run_until(self.end())
    }

    pub(crate) fn allocated(&mut self, start: usize, bytes: usize) {
        self.allocations.insert(start, bytes);
    }

    pub(crate) fn freed(&mut self, start: usize) {
        self.allocations.remove(&start);
    }

    pub(crate) fn bytes_allocated(&self) -> usize {
        self.allocations.values().sum()
    }

    /// Whether `bytes` from `start` on are all in one allocation.
    pub(crate) fn holds(&self, start: usize, bytes: usize) -> bool {
        let allocation = self.allocations.range(..=start).next_back();
        allocation.is_some_and(|(&first, &len)| start - first <= len && bytes <= len - (start - first))
    }

    /// What a kernel is told of a matrix, if all of it is in one allocation.
    pub(crate) fn map(&self, boxes: &Boxes) -> Result<TensorMap, DriverError> {
        let mut map = TensorMap([0; 16]);
        let Boxes { start, rows, cols, row_bytes, box_rows } = *boxes;
        let box_rows = c_uint::try_from(box_rows).unwrap_or(c_uint::MAX);
        // SAFETY: writes there, and points to a string that ends and lives as long as the program, or to nothing.
        let mistake = unsafe {
            simt_map(start.0, rows as u64, cols as u64, row_bytes as u64, box_rows, BOX_COLS, &raw mut map.0)
        };
        let operation = format!("describing {boxes:?}");
        if !mistake.is_null() {
            // SAFETY: as above.
            return Err(failed(operation, unsafe { CStr::from_ptr(mistake) }.to_string_lossy()));
        }
        if !self.holds_matrix(&map) {
            return Err(failed(operation, "it is not in one allocation"));
        }
        Ok(map)
    }

    fn holds_matrix(&self, map: &TensorMap) -> bool {
        // As `Map` of simt/hopper.h has it.
        let [_, start, rows, cols, row_bytes, ..] = map.0.map(|word| word as usize);
        rows.checked_sub(1).is_some_and(|others| self.holds(start, others * row_bytes + 2 * cols))
    }

    fn check(&self, work: &Work) -> Result<(), DriverError> {
        match work {
            Work::Copy { from, to, bytes } => {
                if !self.holds(*from, *bytes) || !self.holds(*to, *bytes) {
                    return Err(failed(format!("copying {bytes} bytes"), "they are not in one allocation"));
                }
            }
            Work::Upload { region, at, to, bytes } => {
                if at + bytes > region.shape().total_bytes() || !self.holds(*to, *bytes) {
                    return Err(failed(format!("copying {bytes} bytes"), "they are not in one allocation"));
                }
            }
            Work::Kernel { name, grid, block, maps, args, .. } => {
                let operation = || format!("launching {name:?} on {grid:?} blocks of {block}");
                // SAFETY: a string that ends; the result is one too, and lives as long as the program.
                let kinds = unsafe { simt_kinds(name.as_ptr()) };
                if kinds.is_null() {
                    return Err(failed(operation(), "there is no such kernel"));
                }
                // SAFETY: as above.
                let kinds = unsafe { CStr::from_ptr(kinds) }.to_bytes();
                let kind = |arg: &Arg| match arg {
                    Arg::Pointer(_) => b'p',
                    Arg::Int(_) => b'i',
                    Arg::Float(_) => b'f',
                };
                let given = maps.iter().map(|_| b'm').chain(args.iter().map(kind));
                if !given.eq(kinds.iter().copied()) {
                    return Err(failed(operation(), format!("{args:?} are not its arguments")));
                }
                for arg in args {
                    if let Arg::Pointer(address) = arg
                        && address.0 != 0
                        && !self.holds(address.0 as usize, 0)
                    {
                        return Err(failed(operation(), format!("{address:x?} is nobody's")));
                    }
                }
                if let Some(map) = maps.iter().find(|map| !self.holds_matrix(map)) {
                    return Err(failed(operation(), format!("the matrix of {map:?} is not in one allocation")));
                }
                // Limits of real devices.
                if *block > 1024 || grid[1] > 65_535 || grid[2] > 65_535 || grid[0] > i32::MAX as u32 {
                    return Err(failed(operation(), "no device has so large a grid or block"));
                }
            }
        }
        Ok(())
    }

    /// Starts the next kernel before the one ahead of it is run, as devices do.
    fn begin(&self, next: &Work) {
        if let Work::Kernel { name, grid, block, shared, maps, args } = next
            && self.check(next).is_ok()
        {
            let cells = cells(args);
            let seed = seed(self.launches + 2);
            // SAFETY: as in `execute`, which follows. The arguments are copied.
            unsafe {
                simt_begin(name.as_ptr(), grid.as_ptr(), *block, *shared, pointers(maps, &cells).as_ptr(), seed);
            }
        }
    }

    fn execute(&mut self, work: &Work) -> Result<(), DriverError> {
        // Memory may have been given back in the meantime.
        self.check(work)?;
        match work {
            Work::Copy { from, to, bytes } => {
                // SAFETY: checked above; nobody else touches this memory before waiting for the copy.
                unsafe { std::ptr::copy(*from as *const u8, *to as *mut u8, *bytes) };
            }
            Work::Upload { region, at, to, bytes } => {
                // SAFETY: checked above; nobody else touches either before waiting for the copy.
                unsafe { std::ptr::copy_nonoverlapping(region.base().add(*at), *to as *mut u8, *bytes) };
            }
            Work::Kernel { name, grid, block, shared, maps, args } => {
                self.launches += 1;
                let cells = cells(args);
                let seed = seed(self.launches);
                // SAFETY: the kernel takes such arguments (checked above). What it does with the pointers is what is
                // being tested: outside of allocations it faults.
                let error = unsafe {
                    simt_launch(name.as_ptr(), grid.as_ptr(), *block, *shared, pointers(maps, &cells).as_ptr(), seed)
                };
                if !error.is_null() {
                    // SAFETY: a string that ends and stays until this thread's next launch.
                    let reason = unsafe { CStr::from_ptr(error) }.to_string_lossy().into_owned();
                    return Err(failed(format!("kernel {name:?}"), reason));
                }
            }
        }
        Ok(())
    }
}

/// What kernels' arguments are, little-endian: a cell starts with its low word.
fn cells(args: &[Arg]) -> Vec<u64> {
    let cell = |arg: &Arg| match arg {
        Arg::Pointer(address) => address.0,
        Arg::Int(value) => u64::from(*value as u32),
        Arg::Float(value) => u64::from(value.to_bits()),
    };
    args.iter().map(cell).collect()
}

/// Where they are, behind the matrices that come first.
fn pointers(maps: &[TensorMap], cells: &[u64]) -> Vec<*const c_void> {
    let maps = maps.iter().map(|map| std::ptr::from_ref(map).cast());
    maps.chain(cells.iter().map(|cell| std::ptr::from_ref(cell).cast())).collect()
}

/// What the order of blocks and threads hangs on.
fn seed(launch: u64) -> u64 {
    launch.wrapping_mul(0x9e37_79b9_7f4a_7c15)
}
