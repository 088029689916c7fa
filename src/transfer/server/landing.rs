//! A data frame's bytes on their way from the socket into the pages they are for.

use std::io::{self, IoSliceMut};

use super::super::Region;
use super::super::frame::{Loan, Run};
use super::super::socket::{Socket, VECTOR_MAX};
use super::loans::Admission;

/// Bytes read at a time of a frame that nobody wants any more.
const DISCARD_BYTES: usize = 64 << 10;

/// The rest of a data frame.
pub(super) struct Landing {
    loan: Loan,
    region: Region,
    runs: Vec<Run>,
    /// The run being filled, and how much of it is.
    at: usize,
    filled: usize,
    /// Bytes that are still to come.
    remaining: usize,
    /// Somewhere else for them, once the pages are not to be written any more.
    discard: Option<Box<[u8]>>,
}

impl Landing {
    /// `runs` have been admitted.
    pub(super) fn new(loan: Loan, runs: Vec<Run>, admission: Admission, region: Region) -> Self {
        let pages: usize = runs.iter().map(|run| run.count as usize).sum();
        let remaining = pages * region.shape().page_bytes;
        let mut landing = Self { loan, region, runs, at: 0, filled: 0, remaining, discard: None };
        if admission == Admission::Discard {
            landing.revoke(loan);
        }
        landing
    }

    /// Not a byte more goes into the pages if this is the loan they were written under.
    pub(super) fn revoke(&mut self, loan: Loan) {
        if loan == self.loan && self.discard.is_none() {
            self.discard = Some(vec![0; DISCARD_BYTES].into());
        }
    }

    /// Makes one read. Whether the frame is whole. Cancel safe.
    pub(super) async fn step(&mut self, socket: &Socket) -> io::Result<bool> {
        let read = match &mut self.discard {
            Some(buffer) => {
                let length = buffer.len().min(self.remaining);
                socket.read(&mut buffer[..length]).await?
            }
            None => {
                let read = socket.read_vectored(&mut self.targets()).await?;
                self.advance(read);
                read
            }
        };
        self.remaining -= read;
        Ok(self.remaining == 0)
    }

    /// The next places to fill, as many as one system call takes.
    fn targets(&mut self) -> Vec<IoSliceMut<'_>> {
        let page_bytes = self.region.shape().page_bytes;
        let mut skip = self.filled;
        let target = |run: &Run| {
            let start = self.region.pages(run.layer as usize, run.page as usize, run.count as usize);
            let length = run.count as usize * page_bytes - skip;
            // SAFETY: the pages lie within the region, which `self` keeps mapped, and no two runs of a frame share one.
            // They are lent to this session, whose task is the only one that writes under its loans, and it looks at
            // whether the loan still stands before each read. Until the loan is resolved nobody else touches a lent
            // page.
            let bytes = unsafe { std::slice::from_raw_parts_mut(start.add(skip), length) };
            skip = 0;
            IoSliceMut::new(bytes)
        };
        self.runs[self.at..].iter().take(VECTOR_MAX).map(target).collect()
    }

    fn advance(&mut self, mut read: usize) {
        let page_bytes = self.region.shape().page_bytes;
        while read > 0 {
            let step = read.min(self.runs[self.at].count as usize * page_bytes - self.filled);
            self.filled += step;
            read -= step;
            if self.filled == self.runs[self.at].count as usize * page_bytes {
                self.at += 1;
                self.filled = 0;
            }
        }
    }
}
