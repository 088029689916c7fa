//! Memory that faults where it ends.

use std::ffi::c_void;
use std::ptr::{NonNull, null_mut};

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

const PAGE: usize = 4096;
/// What device allocations are aligned to here: the largest load there is. (On devices it is 256.)
const ALIGNMENT: usize = 16;

/// Zeroed memory between inaccessible pages. It ends where the second of them begins, give or take its alignment, so
/// that a kernel that reads or writes beyond it faults.
#[derive(Debug)]
pub(crate) struct Guarded {
    map: NonNull<c_void>,
    map_bytes: usize,
    start: usize,
}

// SAFETY: it owns its memory as a `Vec` does.
unsafe impl Send for Guarded {}
// SAFETY: nothing is accessed through shared references.
unsafe impl Sync for Guarded {}

impl Guarded {
    pub(crate) fn new(bytes: usize) -> Option<Self> {
        let used = bytes.checked_next_multiple_of(PAGE)?;
        let map_bytes = used.checked_add(2 * PAGE)?;
        // SAFETY: a new mapping, somewhere.
        let map = unsafe { mmap_anonymous(null_mut(), map_bytes, ProtFlags::empty(), MapFlags::PRIVATE) }.ok()?;
        let map = NonNull::new(map)?;
        let guarded =
            Self { map, map_bytes, start: map.as_ptr() as usize + PAGE + (used - bytes.next_multiple_of(ALIGNMENT)) };
        // SAFETY: whole pages of our own mapping.
        unsafe { mprotect(map.as_ptr().byte_add(PAGE), used, MprotectFlags::READ | MprotectFlags::WRITE) }.ok()?;
        Some(guarded)
    }

    pub(crate) fn start(&self) -> usize {
        self.start
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        // SAFETY: our own mapping, which nobody uses any more. A failure leaks it.
        let _ = unsafe { munmap(self.map.as_ptr(), self.map_bytes) };
    }
}
