//! Memory the kernels work in.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::UnsafeCell;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;

/// Start of a cache line, and of a 512-bit vector.
const ALIGNMENT: usize = 64;

/// A fixed number of plain values, zero at first, aligned to 64 bytes. Large ones take memory only as they are written.
pub(crate) struct Aligned<T> {
    allocation: NonNull<u8>,
    start: NonNull<T>,
    len: usize,
}

/// Types for which all bits zero is a value, and that need no drop.
pub(crate) trait Plain: Copy + Send + Sync + 'static {}
impl Plain for u8 {}
impl Plain for i8 {}
impl Plain for i32 {}
impl Plain for f32 {}

// SAFETY: an `Aligned` owns its memory as a `Vec` does.
unsafe impl<T: Plain> Send for Aligned<T> {}
// SAFETY: shared access only reads.
unsafe impl<T: Plain> Sync for Aligned<T> {}

impl<T: Plain> Aligned<T> {
    /// `len` zeros.
    pub(crate) fn zeroed(len: usize) -> Self {
        if len == 0 {
            return Self { allocation: NonNull::dangling(), start: NonNull::dangling(), len };
        }
        let layout = layout::<T>(len);
        // SAFETY: the layout is not empty.
        let Some(allocation) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        // SAFETY: at most `ALIGNMENT - 1` further on, which `layout` made room for.
        let start = unsafe { allocation.add(allocation.align_offset(ALIGNMENT)) };
        Self { allocation, start: start.cast(), len }
    }

    /// Makes room for `len` values; what was there is lost if it grows.
    pub(crate) fn grow(&mut self, len: usize) {
        if len > self.len {
            *self = Self::zeroed(len);
        }
    }
}

/// Room for `len` values at an aligned start. Asks for no more than the allocator's own alignment, because only then
/// does it hand out fresh pages without writing zeros to them.
fn layout<T>(len: usize) -> Layout {
    let bytes = len.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(ALIGNMENT));
    let layout = bytes.and_then(|bytes| Layout::from_size_align(bytes, 16).ok());
    layout.expect("a buffer is smaller than the address space")
}

impl<T> Drop for Aligned<T> {
    fn drop(&mut self) {
        if self.len > 0 {
            // SAFETY: `zeroed` allocated with this very layout.
            unsafe { dealloc(self.allocation.as_ptr(), layout::<T>(self.len)) }
        }
    }
}

impl<T: Plain> Deref for Aligned<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: `len` initialised values, or none.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Aligned<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: `len` initialised values, or none, and the access is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }
}

/// A working buffer `[rows, cols]`, row-major without gaps, rows varying up to a maximum.
pub struct Activations {
    data: Aligned<f32>,
    rows: usize,
    rows_max: usize,
    cols: usize,
}

impl Activations {
    pub(crate) fn new(rows_max: usize, cols: usize) -> Self {
        Self { data: Aligned::zeroed(rows_max * cols), rows: 0, rows_max, cols }
    }

    /// Rows it holds now.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Says how many rows it holds from now on; their contents are unspecified.
    pub(crate) fn set_rows(&mut self, rows: usize) {
        assert!(rows <= self.rows_max, "{rows} rows do not fit into a buffer of {}", self.rows_max);
        self.rows = rows;
    }

    /// All rows, `[rows, cols]`.
    pub(crate) fn values(&self) -> &[f32] {
        &self.data[..self.rows * self.cols]
    }

    /// All rows, `[rows, cols]`.
    pub(crate) fn values_mut(&mut self) -> &mut [f32] {
        &mut self.data[..self.rows * self.cols]
    }
}

/// Values that several threads write to, each its own part.
pub(crate) struct Shared<'a, T> {
    start: *mut T,
    len: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

impl<T> Clone for Shared<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Shared<'_, T> {}

// SAFETY: `slice` makes its callers promise that parts do not overlap, so this is a `&mut [T]` cut in pieces.
unsafe impl<T: Send> Send for Shared<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(values: &'a mut [T]) -> Self {
        Self { start: values.as_mut_ptr(), len: values.len(), lifetime: std::marker::PhantomData }
    }

    /// `len` values from `start` on.
    ///
    /// # Safety
    /// While the result is in use, no other overlaps it.
    #[inline(always)]
    #[allow(clippy::mut_from_ref, reason = "the point of the type; disjointness is the caller's promise")]
    pub(crate) unsafe fn slice(&self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), len) }
    }
}

/// One value for each thread of the pool.
pub(crate) struct PerThread<T>(Vec<UnsafeCell<T>>);

// SAFETY: `get` makes its callers promise that each value is used by one thread at a time.
unsafe impl<T: Send> Sync for PerThread<T> {}

impl<T> PerThread<T> {
    pub(crate) fn new(threads: usize, make: impl Fn() -> T) -> Self {
        Self((0..threads).map(|_| UnsafeCell::new(make())).collect())
    }

    /// The value of `thread`.
    ///
    /// # Safety
    /// Nobody else uses this thread's value at the same time: true for the thread number a pool hands to a job, within
    /// one chunk.
    #[allow(clippy::mut_from_ref, reason = "the point of the type; exclusiveness is the caller's promise")]
    pub(crate) unsafe fn get(&self, thread: usize) -> &mut T {
        // SAFETY: exclusive by the caller's promise.
        unsafe { &mut *self.0[thread].get() }
    }

    /// All values.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().map(UnsafeCell::get_mut)
    }
}
