//! Pages on their way into a socket, cut into frames.

use super::reply::Reply;
use crate::transfer::Region;
use crate::transfer::frame::{RUNS_MAX, Run};
use crate::transfer::outbound::Payload;
use crate::transfer::runs::RunCopy;

/// The pages of one data frame.
pub(super) struct Pages {
    parts: Vec<(*const u8, usize)>,
    /// With the last frame of a write.
    pub(super) reply: Option<Reply>,
    /// Keeps the memory mapped.
    _region: Region,
}

// SAFETY: the pointers lead into the region, which may be used from any thread and is kept mapped by the value itself.
unsafe impl Send for Pages {}

// SAFETY: the parts never change and lie in the region that the value keeps mapped. That their content does not change
// is the promise of whoever wrote them: the engine keeps pages as they are until the write is reported done.
unsafe impl Payload for Pages {
    fn parts(&self) -> &[(*const u8, usize)] {
        &self.parts
    }
}

/// Cuts a write into frames of at most `frame_bytes` of pages each; the last of them reports. `runs` is not empty.
pub(super) fn frames(runs: Vec<RunCopy>, region: &Region, frame_bytes: usize, reply: Reply) -> Vec<(Vec<Run>, Pages)> {
    let page_bytes = region.shape().page_bytes;
    let pages_max = (frame_bytes / page_bytes).max(1) as u32;
    let mut frames: Vec<(Vec<Run>, Pages)> = Vec::new();
    let mut room = 0;
    for run in runs {
        let mut rest = Some(run);
        while let Some(run) = rest.take() {
            if room == 0 || frames.last().is_none_or(|(listed, _)| listed.len() == RUNS_MAX) {
                frames.push((Vec::new(), Pages { parts: Vec::new(), reply: None, _region: region.clone() }));
                room = pages_max;
            }
            let (piece, more) = run.split(room);
            rest = more;
            room -= piece.count;
            if let Some((listed, pages)) = frames.last_mut() {
                listed.push(Run { layer: piece.layer, page: piece.remote, count: piece.count });
                let start = region.pages(piece.layer as usize, piece.local as usize, piece.count as usize);
                pages.parts.push((start, piece.count as usize * page_bytes));
            }
        }
    }
    if let Some((_, last)) = frames.last_mut() {
        last.reply = Some(reply);
    }
    frames
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::RegionShape;

    #[test]
    fn frames_carry_every_page_once_and_none_is_too_large() {
        let region = Region::private(RegionShape { layers: 2, pages: 5000, page_bytes: 16 }).unwrap();
        let long = RunCopy { layer: 1, local: 0, remote: 7, count: 25 };
        let ragged = (0..1500).map(|i| RunCopy { layer: 0, local: 3 * i, remote: 2 * i, count: 1 });
        let runs: Vec<_> = ragged.chain([long]).collect();
        let frames = frames(runs, &region, 10_000 * 16, Reply::new(|_| ()));
        assert_eq!(frames.iter().map(|(runs, _)| runs.len()).collect::<Vec<_>>(), [1024, 477]);
        let small = super::frames(vec![long], &region, 10 * 16, Reply::new(|_| ()));
        let runs: Vec<_> = small.iter().flat_map(|(runs, _)| runs.clone()).collect();
        let expected = [(7, 10), (17, 10), (27, 5)].map(|(page, count)| Run { layer: 1, page, count });
        assert_eq!(runs, expected);
        assert_eq!(small[2].1.parts, [(region.pages(1, 20, 5).cast_const(), 80)]);
        assert!(small[0].1.reply.is_none() && small[2].1.reply.is_some());
    }
}
