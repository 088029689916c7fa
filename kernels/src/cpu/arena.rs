//! Memory for weights.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

/// Start of a cache line, and of a 512-bit vector.
const ALIGNMENT: usize = 64;
/// Bytes that are reserved at once; memory is taken only as they are written.
const CHUNK: usize = 64 << 20;

/// Hands out memory for what is written once and read from end to end in every step, in large pages where the system
/// has them: 2 MiB of weights then take one entry of the translation buffer instead of 512. Matrices of small models
/// are smaller than that, so they lie one after the other.
#[derive(Default)]
pub(crate) struct Arena {
    chunk: Option<Arc<MmapRaw>>,
    /// Bytes of it that have been handed out.
    used: usize,
}

impl Arena {
    /// `len` zeros, aligned to 64 bytes.
    pub(crate) fn take(&mut self, len: usize) -> Piece {
        let room = len.next_multiple_of(ALIGNMENT);
        let begun = self.chunk.take().filter(|chunk| room <= chunk.len() - self.used);
        let chunk = begun.unwrap_or_else(|| {
            self.used = 0;
            Arc::new(reserve(room.max(CHUNK)))
        });
        let piece = Piece { chunk: Arc::clone(&chunk), start: self.used, len };
        self.used += room;
        self.chunk = Some(chunk);
        piece
    }
}

fn reserve(bytes: usize) -> MmapRaw {
    let map = MmapOptions::new().len(bytes).map_anon().unwrap_or_else(|_| {
        handle_alloc_error(Layout::from_size_align(bytes, ALIGNMENT).expect("weights fit into the address space"))
    });
    let map = MmapRaw::from(map);
    // A system that has none is no worse off.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    map
}

/// Memory out of an [`Arena`], which it may outlive.
pub(crate) struct Piece {
    chunk: Arc<MmapRaw>,
    start: usize,
    len: usize,
}

impl Deref for Piece {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `take` found room for these bytes in the chunk, which is zero at first, and gave them to this piece
        // alone.
        unsafe { std::slice::from_raw_parts(self.chunk.as_ptr().add(self.start), self.len) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and the access is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.chunk.as_mut_ptr().add(self.start), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_zero_and_aligned_do_not_overlap_and_outlive_their_arena() {
        let mut arena = Arena::default();
        let lens = [1, 0, 64, 1000, CHUNK - 2000, CHUNK + 1, 7];
        let mut pieces = lens.map(|len| arena.take(len));
        drop(arena);
        for (i, (piece, len)) in pieces.iter_mut().zip(lens).enumerate() {
            assert!(piece.len() == len && piece.as_ptr().addr().is_multiple_of(ALIGNMENT));
            assert!(piece.first().into_iter().chain(piece.last()).all(|&byte| byte == 0));
            if len > 0 {
                piece[0] = i as u8 + 1;
                piece[len - 1] = i as u8 + 1;
            }
        }
        for (i, piece) in pieces.iter().enumerate() {
            assert!(piece.first().into_iter().chain(piece.last()).all(|&byte| byte == i as u8 + 1));
        }
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pieces_are_in_memory_that_asks_for_large_pages() {
        if !std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            return;
        }
        let piece = Arena::default().take(100);
        let address = piece.as_ptr().addr();
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let holds = |line: &str| {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let range = range.and_then(|(start, end)| {
                Some(usize::from_str_radix(start, 16).ok()?..usize::from_str_radix(end, 16).ok()?)
            });
            range.is_some_and(|range| range.contains(&address))
        };
        let flags = maps.lines().skip_while(|line| !holds(line)).find(|line| line.starts_with("VmFlags:"));
        assert!(flags.unwrap().split(' ').any(|flag| flag == "hg"), "{flags:?}");
    }
}
