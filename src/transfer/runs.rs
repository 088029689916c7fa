//! Lists of pages to copy, with neighbours joined.

use super::{RegionShape, WriteError};

/// One page of one layer to be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageCopy {
    /// Layer, the same on both sides.
    pub layer: u32,
    /// Page of the prefill worker to read.
    pub local: u32,
    /// Page of the decode worker to write.
    pub remote: u32,
}

/// Pages of one layer that follow each other on both sides: one copy, one element of a vectored write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RunCopy {
    pub(super) layer: u32,
    pub(super) local: u32,
    pub(super) remote: u32,
    pub(super) count: u32,
}

/// Checks that every page exists on both sides, and brings them into the order of layers and of `remote`'s pages.
pub(super) fn in_order(
    mut copies: Vec<PageCopy>,
    local: RegionShape,
    remote: RegionShape,
) -> Result<Vec<PageCopy>, WriteError> {
    let fits = |copy: &PageCopy| {
        (copy.layer as usize) < local.layers.min(remote.layers)
            && (copy.local as usize) < local.pages
            && (copy.remote as usize) < remote.pages
    };
    if !copies.iter().all(fits) {
        return Err(WriteError::OutOfRange);
    }
    copies.sort_unstable_by_key(|copy| (copy.layer, copy.remote));
    Ok(copies)
}

/// The same, and joins those that follow each other. Posting each page for itself is what made others' transfers slow.
pub(super) fn coalesce(
    copies: Vec<PageCopy>,
    local: RegionShape,
    remote: RegionShape,
) -> Result<Vec<RunCopy>, WriteError> {
    let copies = in_order(copies, local, remote)?;
    let mut runs: Vec<RunCopy> = Vec::new();
    for PageCopy { layer, local, remote } in copies {
        match runs.last_mut() {
            Some(run) if run.layer == layer && run.local + run.count == local && run.remote + run.count == remote => {
                run.count += 1;
            }
            _ => runs.push(RunCopy { layer, local, remote, count: 1 }),
        }
    }
    Ok(runs)
}

impl RunCopy {
    /// Splits off the first `count` pages; the whole if there are no more.
    pub(super) fn split(self, count: u32) -> (Self, Option<Self>) {
        if count >= self.count {
            return (self, None);
        }
        let rest = Self { local: self.local + count, remote: self.remote + count, count: self.count - count, ..self };
        (Self { count, ..self }, Some(rest))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SHAPE: RegionShape = RegionShape { layers: 3, pages: 40, page_bytes: 64 };

    fn copy(layer: u32, local: u32, remote: u32) -> PageCopy {
        PageCopy { layer, local, remote }
    }

    #[test]
    fn neighbours_on_both_sides_are_one_run_in_whatever_order_they_come() {
        let copies = vec![copy(0, 6, 3), copy(0, 5, 2), copy(0, 7, 4), copy(0, 9, 5), copy(1, 10, 6)];
        let runs = coalesce(copies, SHAPE, SHAPE).unwrap();
        let expected = [(0, 5, 2, 3), (0, 9, 5, 1), (1, 10, 6, 1)].map(|(layer, local, remote, count)| RunCopy {
            layer,
            local,
            remote,
            count,
        });
        assert_eq!(runs, expected);
    }

    #[test]
    fn pages_that_one_side_lacks_are_refused() {
        for bad in [copy(3, 0, 0), copy(0, 40, 0), copy(0, 0, 40)] {
            assert_eq!(coalesce(vec![bad], SHAPE, SHAPE), Err(WriteError::OutOfRange));
        }
        let smaller = RegionShape { pages: 10, ..SHAPE };
        assert!(coalesce(vec![copy(0, 20, 5)], SHAPE, smaller).is_ok());
        assert!(coalesce(vec![copy(0, 5, 20)], SHAPE, smaller).is_err());
    }

    proptest! {
        #[test]
        fn runs_say_exactly_what_the_pages_said(pairs in proptest::collection::btree_map(0u32..40, (0u32..3, 0u32..40), 0..40)) {
            let copies: Vec<_> = pairs.iter().map(|(&remote, &(layer, local))| copy(layer, local, remote)).collect();
            let runs = coalesce(copies.clone(), SHAPE, SHAPE).unwrap();
            let mut expanded: Vec<_> = runs
                .iter()
                .flat_map(|run| (0..run.count).map(|i| copy(run.layer, run.local + i, run.remote + i)))
                .collect();
            expanded.sort_unstable_by_key(|copy| copy.remote);
            prop_assert_eq!(expanded, copies);
        }
    }
}
