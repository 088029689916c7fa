//! From pages to requests: what one element of a send queue writes. Pure.

use crate::transfer::RegionShape;
use crate::transfer::runs::RunCopy;

/// Neighbouring bytes of the prefill worker's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Piece {
    /// From the start of its region.
    pub(in super::super) offset: u64,
    pub(in super::super) bytes: u32,
}

/// How much one request may write.
#[derive(Debug, Clone, Copy)]
pub(in super::super) struct RequestLimits {
    pub(in super::super) bytes_max: usize,
    pub(in super::super) pieces_max: usize,
}

/// Cuts a write into requests: each fills one stretch of the decode worker's memory, from as many places of the prefill
/// worker's as it takes. Pages that follow each other there are one request even if they do not here; those of a layer
/// of a fresh prompt usually do on both sides.
pub(in super::super) struct Requests {
    runs: Vec<RunCopy>,
    /// The run that is next, and how many of its bytes are done.
    at: usize,
    done: usize,
    local: RegionShape,
    remote: RegionShape,
}

impl Requests {
    /// `runs` are sorted by where they go, as `coalesce` leaves them.
    pub(in super::super) fn new(runs: Vec<RunCopy>, local: RegionShape, remote: RegionShape) -> Self {
        Self { runs, at: 0, done: 0, local, remote }
    }

    /// Whether all are made.
    pub(in super::super) fn is_empty(&self) -> bool {
        self.at == self.runs.len()
    }

    /// The next request: where it writes to, from the start of the decode worker's region. What it writes is left in
    /// `pieces`. `None` when all are made.
    pub(in super::super) fn next(&mut self, limits: RequestLimits, pieces: &mut Vec<Piece>) -> Option<u64> {
        pieces.clear();
        let page_bytes = self.local.page_bytes;
        let offset = |shape: RegionShape, layer: u32, page: u32| {
            (layer as usize * shape.layer_stride() + page as usize * page_bytes) as u64
        };
        let (mut start, mut room) = (None, limits.bytes_max);
        while let Some(run) = self.runs.get(self.at) {
            let to = offset(self.remote, run.layer, run.remote) + self.done as u64;
            let follows = start.is_none_or(|start| start + (limits.bytes_max - room) as u64 == to);
            if !follows || room == 0 || pieces.len() == limits.pieces_max {
                break;
            }
            let left = run.count as usize * page_bytes - self.done;
            let bytes = left.min(room);
            let from = offset(self.local, run.layer, run.local) + self.done as u64;
            // No more than `bytes_max`, which an adapter counts in 32 bits.
            pieces.push(Piece { offset: from, bytes: bytes as u32 });
            start.get_or_insert(to);
            room -= bytes;
            if bytes == left {
                self.at += 1;
                self.done = 0;
            } else {
                self.done += bytes;
            }
        }
        start
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::transfer::PageCopy;
    use crate::transfer::runs::coalesce;

    const LOCAL: RegionShape = RegionShape { layers: 3, pages: 40, page_bytes: 64 };
    const REMOTE: RegionShape = RegionShape { layers: 3, pages: 50, page_bytes: 64 };

    fn requests(copies: Vec<PageCopy>, limits: RequestLimits) -> Vec<(u64, Vec<Piece>)> {
        let mut requests = Requests::new(coalesce(copies, LOCAL, REMOTE).unwrap(), LOCAL, REMOTE);
        let mut pieces = Vec::new();
        std::iter::from_fn(|| Some((requests.next(limits, &mut pieces)?, pieces.clone()))).collect()
    }

    fn copy(layer: u32, local: u32, remote: u32) -> PageCopy {
        PageCopy { layer, local, remote }
    }

    #[test]
    fn pages_that_follow_each_other_there_are_one_request_wherever_they_are_here() {
        let limits = RequestLimits { bytes_max: 1 << 20, pieces_max: 4 };
        let copies = vec![copy(0, 7, 2), copy(0, 3, 3), copy(0, 4, 4), copy(0, 9, 6), copy(1, 0, 7)];
        let piece = |offset, bytes| Piece { offset, bytes };
        let expected = vec![
            (2 * 64, vec![piece(7 * 64, 64), piece(3 * 64, 128)]),
            (6 * 64, vec![piece(9 * 64, 64)]),
            (50 * 64 + 7 * 64, vec![piece(40 * 64, 64)]),
        ];
        assert_eq!(requests(copies, limits), expected);
    }

    #[test]
    fn a_request_has_no_more_bytes_or_pieces_than_the_adapter_takes() {
        let copies: Vec<_> = (0..20).map(|i| copy(0, 2 * i, i)).collect();
        let made = requests(copies.clone(), RequestLimits { bytes_max: 1 << 20, pieces_max: 3 });
        assert!(made.iter().all(|(_, pieces)| pieces.len() <= 3));
        assert_eq!(made.len(), 7);
        let made = requests(copies, RequestLimits { bytes_max: 100, pieces_max: 8 });
        assert!(made.iter().all(|(_, pieces)| pieces.iter().map(|piece| piece.bytes).sum::<u32>() <= 100));
    }

    proptest! {
        #[test]
        fn every_byte_is_written_once_from_where_it_is(
            pages in proptest::sample::subsequence((0..50u32).collect::<Vec<_>>(), 1..50),
            layers in 1..3u32,
            from in proptest::collection::vec(0..40u32, 50),
            bytes_max in 1..400usize,
            pieces_max in 1..5usize,
        ) {
            let copies: Vec<_> = (0..layers)
                .flat_map(|layer| pages.iter().map(move |&remote| (layer, remote)))
                .map(|(layer, remote)| copy(layer, from[remote as usize], remote))
                .collect();
            let mut written = vec![None; REMOTE.total_bytes()];
            for (mut to, pieces) in requests(copies.clone(), RequestLimits { bytes_max, pieces_max }) {
                prop_assert!(!pieces.is_empty());
                for piece in pieces {
                    for i in 0..u64::from(piece.bytes) {
                        let byte = &mut written[to as usize];
                        prop_assert_eq!(*byte, None);
                        *byte = Some(piece.offset + i);
                        to += 1;
                    }
                }
            }
            let mut expected = vec![None; REMOTE.total_bytes()];
            for copy in copies {
                let at = |shape: RegionShape, page: u32| copy.layer as usize * shape.layer_stride() + page as usize * 64;
                for i in 0..64 {
                    expected[at(REMOTE, copy.remote) + i] = Some((at(LOCAL, copy.local) + i) as u64);
                }
            }
            prop_assert_eq!(written, expected);
        }
    }
}
