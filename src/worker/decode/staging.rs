//! Host memory in which pages arrive that are meant for a device, at a decode worker.
//!
//! What cannot write to the device directly, as CUDA IPC does and adapters may, writes here: to pages of a pool, of the
//! same shape as the device's. A loan that is claimed over such a session gets as many of them as it has pages, and
//! they go the way of its pages: whoever holds the loan may write to them, they are in quarantine with it, and they are
//! used again when it is resolved. When its word says that all is written, they are copied up, before any step that
//! reads the pages.
//!
//! A pool, and not a mirror of all pages: that would lock as much host memory as the device has for pages, for the few
//! prompts that are under way at a time. A prompt that finds no room is prefilled here, and one that never would is not
//! handed off.

use std::collections::VecDeque;

use anyhow::{Context, Result};
use engine_kernels::{DeviceRegion, LockedRegion, PageRun, RegionShape, cuda::Mark};

use crate::{
    engine::{Destination, StagedPages},
    telemetry::StagingMetrics,
    transfer::{Reached, Region, Transport, lock_for_device},
};

/// The pool, on the engine thread.
pub(super) struct Staging {
    device: DeviceRegion,
    region: Region,
    used: Used,
    /// Pages that loans have.
    lent: usize,
    /// Pages that are being copied up, oldest first.
    copying: VecDeque<(Box<dyn Mark>, StagedPages)>,
    /// How adapters reach the device's pages themselves, if they do.
    reached: Option<Reached>,
    /// Whether devices of this host may write to them.
    exported: bool,
    /// It was said that some prompts have more pages than the pool.
    told: bool,
    metrics: StagingMetrics,
    _locked: Option<LockedRegion>,
}

impl Staging {
    /// A pool of about `bytes`, one page at least and no more than the device has, in memory that processes of this
    /// host may map.
    pub(super) fn new(device: DeviceRegion, bytes: usize, metrics: StagingMetrics) -> Result<Self> {
        let shape = device.shape();
        let pages = (bytes / (shape.layers * shape.page_bytes).max(1)).clamp(1, shape.pages.max(1));
        let region =
            Region::shared(RegionShape { pages, ..shape }).context("cannot reserve memory to stage pages in")?;
        let locked = lock_for_device(&device, &region);
        let (used, copying) = (Used::new(pages), VecDeque::new());
        let this = Self {
            device,
            region,
            used,
            lent: 0,
            copying,
            reached: None,
            exported: false,
            told: false,
            metrics,
            _locked: locked,
        };
        this.count();
        Ok(this)
    }

    /// Adapters reach the device's pages themselves, in this way.
    pub(super) fn reached(mut self, reached: Reached) -> Self {
        self.reached = Some(reached);
        self
    }

    /// Devices of this host may write to the device's pages themselves.
    pub(super) fn exported(mut self) -> Self {
        self.exported = true;
        self
    }

    /// Whether so many pages can come from another worker: to the pool, or past it, from one whose device is `beside`
    /// this one or that has `adapters`, if there is any. By which way they do is known when somebody has claimed them.
    pub(super) fn lets_in(&mut self, pages: usize, beside: bool, adapters: bool) -> bool {
        self.exported && beside || self.reached.is_some() && adapters || self.could_hold(pages)
    }

    /// Whether the pool has as many pages, free or not.
    fn could_hold(&mut self, pages: usize) -> bool {
        let all = self.used.used.len();
        if pages > all && !self.told {
            self.told = true;
            tracing::info!(
                pages,
                room = all,
                "prompts that need more pages than can be staged are prefilled here: see --kv-staging-memory"
            );
        }
        pages <= all
    }

    /// Where who moves pages in this way writes so many of them, if there is room. To the pages themselves only when
    /// nothing that was computed before still uses them.
    pub(super) fn stage(&mut self, transport: Option<Transport>, pages: usize) -> Option<Destination> {
        let direct = match transport {
            Some(Transport::CudaIpc) => Some(Destination::InPlace),
            Some(Transport::Rdma) => self.reached.map(|_| Destination::ByAdapter),
            Some(Transport::Shm | Transport::Tcp) | None => None,
        };
        match direct {
            None if self.could_hold(pages) => self.take(pages).map(Destination::Staged),
            None => None,
            Some(direct) => self.settle().then_some(direct),
        }
    }

    /// Returns when what adapters wrote to the device's pages is there for whatever is computed next. False if the
    /// device fails.
    pub(super) fn flush(&self) -> bool {
        if self.reached.is_none_or(|reached| !reached.flush) {
            return true;
        }
        let flushed = self.device.flush();
        if let Err(error) = &flushed {
            tracing::error!(%error, "the device fails");
        }
        flushed.is_ok()
    }

    /// Returns when the device is done with all that it was told to compute: nothing of it still reads or writes pages
    /// that a peer's device, or an adapter, is about to write to, as a step under way may, in which a sequence that
    /// gave its pages back takes part in vain. (It is waited for whatever it writes to.) False if the device fails.
    fn settle(&self) -> bool {
        let settled = self.device.mark().and_then(|mark| mark.wait());
        if let Err(error) = &settled {
            tracing::error!(%error, "the device fails");
        }
        settled.is_ok()
    }

    /// Where peers write.
    pub(super) fn region(&self) -> &Region {
        &self.region
    }

    /// Room for so many pages, if there is.
    fn take(&mut self, pages: usize) -> Option<StagedPages> {
        // However many copies were waited for.
        if pages > self.used.used.len() - self.lent {
            return None;
        }
        // Those whose copies are over are free; if that is not enough, copies that are under way soon will be.
        while self.copying.front().is_some_and(|(copied, _)| copied.is_past().unwrap_or(false)) {
            self.free_oldest();
        }
        while self.used.free < pages
            && let Some((copied, _)) = self.copying.front()
        {
            if let Err(error) = copied.wait() {
                tracing::error!(%error, "pages cannot be copied to the device");
                return None;
            }
            self.free_oldest();
        }
        let taken = self.used.take(pages).map(StagedPages);
        self.lent += taken.as_ref().map_or(0, |taken| taken.0.len());
        self.count();
        taken
    }

    /// Pages that loans have.
    pub(super) fn lent(&self) -> usize {
        self.lent
    }

    fn count(&self) {
        let Self { used: Used { used, free }, lent, metrics, .. } = self;
        metrics.free.set(*free as i64);
        metrics.lent.set(*lent as i64);
        metrics.copying.set((used.len() - free - lent) as i64);
    }

    fn free_oldest(&mut self) {
        if let Some((_, staged)) = self.copying.pop_front() {
            self.used.give_back(&staged.0);
        }
    }

    /// Copies everything from there to `pages`, of the device, before whatever is computed next. False if the device
    /// fails.
    pub(super) fn take_up(&mut self, staged: StagedPages, pages: &[u32]) -> bool {
        self.lent -= staged.0.len();
        self.count();
        let runs = runs(self.region.shape().layers, &staged.0, pages);
        match self.device.upload(&self.region, &runs) {
            Ok(copied) => {
                self.copying.push_back((copied, staged));
                true
            }
            Err(error) => {
                // Some copies may be under way: these pages are not used again.
                tracing::error!(%error, "pages cannot be copied to the device");
                false
            }
        }
    }

    /// Nobody can write there any more, and nobody wants what was written.
    pub(super) fn give_back(&mut self, staged: &StagedPages) {
        self.lent -= staged.0.len();
        self.used.give_back(&staged.0);
        self.count();
    }
}

/// As few copies as there can be: pages that follow each other on both sides are one, in each layer.
fn runs(layers: usize, staged: &[u32], pages: &[u32]) -> Vec<PageRun> {
    let mut first_layer: Vec<PageRun> = Vec::new();
    for (&from, &to) in staged.iter().zip(pages) {
        let (from, to) = (from as usize, to as usize);
        match first_layer.last_mut() {
            Some(run) if run.from + run.count == from && run.to + run.count == to => run.count += 1,
            _ => first_layer.push(PageRun { layer: 0, from, to, count: 1 }),
        }
    }
    (0..layers).flat_map(|layer| first_layer.iter().map(move |run| PageRun { layer, ..*run })).collect()
}

/// Which pages are in use.
struct Used {
    used: Box<[bool]>,
    free: usize,
}

impl Used {
    fn new(pages: usize) -> Self {
        Self { used: vec![false; pages].into(), free: pages }
    }

    /// Pages that follow each other if there are as many, or else the first that are free.
    fn take(&mut self, pages: usize) -> Option<Box<[u32]>> {
        if self.free < pages {
            return None;
        }
        let mut start = 0;
        let together = self.used.iter().enumerate().find_map(|(at, &used)| {
            if used {
                start = at + 1;
            }
            (at + 1 - start >= pages && !used).then_some(start)
        });
        let taken: Box<[u32]> = match together {
            Some(start) => (start..start + pages).map(|page| page as u32).collect(),
            None => (0..).zip(&self.used).filter(|(_, used)| !**used).map(|(page, _)| page).take(pages).collect(),
        };
        taken.iter().for_each(|&page| self.used[page as usize] = true);
        self.free -= pages;
        Some(taken)
    }

    fn give_back(&mut self, pages: &[u32]) {
        for &page in pages {
            debug_assert!(self.used[page as usize], "a page is given back once");
            self.used[page as usize] = false;
        }
        self.free += pages.len();
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::{os::unix::fs::FileExt, sync::Arc};

    use engine_cuda_emulated::Emulated;
    use engine_kernels::cuda::{Driver, Memory};

    use super::*;
    use crate::telemetry::Metrics;
    use crate::transfer::rdma::Registration;

    const SHAPE: RegionShape = RegionShape { layers: 2, pages: 8, page_bytes: 64 };

    /// A device's pages, and a pool of so many for them. The device copies when somebody waits for it, and not before.
    pub(in crate::worker) fn staging(pages: usize) -> (Emulated, Arc<dyn Memory>, Staging) {
        let driver = Emulated::default();
        let memory: Arc<dyn Memory> = Arc::new(driver.allocate(DeviceRegion::bytes(SHAPE)).unwrap());
        let device = DeviceRegion::new(memory.clone(), driver.mover(), SHAPE);
        let metrics = Metrics::new().engine.staging;
        let staging = Staging::new(device, pages * SHAPE.layers * SHAPE.page_bytes, metrics).unwrap();
        (driver, memory, staging)
    }

    /// As a peer does that has mapped the pool.
    fn write(staging: &Staging, pages: &StagedPages, byte: u8) {
        let region = staging.region();
        for layer in 0..SHAPE.layers {
            for &page in pages.numbers() {
                let at = region.shape().offset(layer, page as usize, 1) as u64;
                region.file().unwrap().write_all_at(&[byte + layer as u8; SHAPE.page_bytes], at).unwrap();
            }
        }
    }

    fn page(driver: &Emulated, memory: &Arc<dyn Memory>, layer: usize, page: usize) -> Vec<u8> {
        let mut bytes = vec![0; SHAPE.page_bytes];
        driver.read(memory.address().offset(SHAPE.offset(layer, page, 1)), &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn pages_of_the_pool_are_used_again_when_they_were_copied_and_not_before() {
        let (driver, memory, mut staging) = staging(2);
        let counts = |staging: &Staging| {
            let StagingMetrics { free, lent, copying } = &staging.metrics;
            assert_eq!(lent.get(), staging.lent() as i64);
            [free, lent, copying].map(|gauge| gauge.get())
        };
        let first = staging.take(2).unwrap();
        assert!(staging.take(1).is_none(), "all are lent");
        assert_eq!(counts(&staging), [0, 2, 0]);
        write(&staging, &first, 10);
        assert!(staging.take_up(first, &[5, 3]));
        assert_eq!(counts(&staging), [0, 0, 2]);
        // The copy has not run, but the room is wanted.
        let second = staging.take(2).unwrap();
        write(&staging, &second, 20);
        for (layer, number) in [(0, 5), (1, 5), (0, 3), (1, 3)] {
            assert_eq!(page(&driver, &memory, layer, number), [10 + layer as u8; SHAPE.page_bytes]);
        }
        staging.give_back(&second);
        assert_eq!(counts(&staging), [2, 0, 0]);
        assert!(staging.take(2).is_some());
    }

    #[test]
    fn no_copy_is_waited_for_by_who_would_find_no_room_after_it() {
        let (_driver, _memory, mut staging) = staging(4);
        let (copied, lent) = (staging.take(2).unwrap(), staging.take(1).unwrap());
        assert!(staging.take_up(copied, &[0, 1]));
        assert!(staging.take(4).is_none());
        assert_eq!(staging.metrics.copying.get(), 2);
        assert!(staging.take(3).is_some(), "beside the one that is lent");
        staging.give_back(&lent);
    }

    #[test]
    fn more_pages_than_the_pool_has_come_only_past_it() {
        let new = || staging(2).2;
        let mut pooled = new();
        assert!(pooled.lets_in(2, false, false) && !pooled.lets_in(3, true, true));
        assert_eq!(pooled.stage(Some(Transport::Tcp), 3), None);
        let mut exported = new().exported();
        assert!(exported.lets_in(3, true, false) && !exported.lets_in(3, false, true));
        let mut reached = new().reached(Reached { by: Registration::PeerMemory, flush: false });
        assert!(reached.lets_in(3, false, true) && !reached.lets_in(3, true, false));
    }

    #[test]
    fn a_device_that_fails_brings_nothing_up_and_gives_no_room() {
        let (driver, _memory, mut staging) = staging(4);
        let (one, other) = (staging.take(2).unwrap(), staging.take(2).unwrap());
        assert!(staging.settle() && staging.take_up(one, &[0, 1]));
        driver.break_down();
        assert!(!staging.take_up(other, &[2, 3]) && !staging.settle());
        assert!(staging.take(1).is_none());
    }

    #[test]
    fn adapters_that_reach_the_device_take_no_room_and_are_waited_for_where_that_is_needed() {
        let (driver, _memory, mut staging) = staging(2);
        assert!(
            matches!(staging.stage(Some(Transport::Rdma), 2), Some(Destination::Staged(_))),
            "they do not reach it"
        );
        assert!(staging.flush() && driver.flushes() == 0, "nothing is written there");
        let by = Registration::PeerMemory;
        let mut staging = staging.reached(Reached { by, flush: false });
        assert_eq!(staging.stage(Some(Transport::Rdma), 100), Some(Destination::ByAdapter));
        assert!(staging.flush() && driver.flushes() == 0, "the device keeps their order");
        let mut staging = staging.reached(Reached { by, flush: true });
        assert!(staging.flush() && driver.flushes() == 1);
        assert_eq!(staging.stage(Some(Transport::CudaIpc), 100), Some(Destination::InPlace));
        assert_eq!(staging.stage(Some(Transport::Tcp), 1), None, "all are lent");
        driver.break_down();
        assert!(!staging.flush());
        assert_eq!(staging.stage(Some(Transport::Rdma), 1), None);
    }

    #[test]
    fn adapters_write_to_pages_only_when_what_was_computed_before_is_done_with_them() {
        let (driver, memory, staging) = staging(1);
        let mut staging = staging.reached(Reached { by: Registration::DmaBuf, flush: true });
        let host = driver.allocate_host(SHAPE.page_bytes).unwrap();
        // SAFETY: its own memory, as large.
        unsafe { engine_kernels::cuda::HostMemory::start(&host).write_bytes(7, SHAPE.page_bytes) };
        driver.upload(&host, memory.address(), SHAPE.page_bytes).unwrap();
        assert_eq!(staging.stage(Some(Transport::Rdma), 1), Some(Destination::ByAdapter));
        // SAFETY: the device's memory is the process's, and no work that could write there is left.
        let there = unsafe { std::slice::from_raw_parts(memory.address().0 as *const u8, SHAPE.page_bytes) };
        assert_eq!(there, [7; SHAPE.page_bytes], "the device was done with it");
    }

    #[test]
    fn a_pool_is_no_larger_than_what_it_stands_in_for_and_never_empty() {
        assert_eq!(staging(0).2.region().shape().pages, 1);
        assert_eq!(staging(100).2.region().shape(), SHAPE);
    }

    #[test]
    fn pages_are_taken_together_where_there_are_as_many_and_never_twice() {
        let mut used = Used::new(8);
        assert_eq!(used.take(3).as_deref(), Some(&[0, 1, 2][..]));
        let four = used.take(4).unwrap();
        assert_eq!(*four, [3, 4, 5, 6]);
        assert_eq!(used.take(2), None);
        used.give_back(&[0, 1, 2]);
        assert_eq!(used.take(2).as_deref(), Some(&[0, 1][..]));
        assert_eq!(used.take(2).as_deref(), Some(&[2, 7][..]), "scattered, if that is all");
        used.give_back(&four);
        assert_eq!(used.take(4), Some(four));
        assert_eq!(used.take(0).as_deref(), Some(&[][..]));
    }

    #[test]
    fn what_follows_on_both_sides_is_one_copy_a_layer() {
        let run = |layer, from, to, count| PageRun { layer, from, to, count };
        let expected = [run(0, 4, 7, 2), run(0, 6, 1, 1), run(1, 4, 7, 2), run(1, 6, 1, 1)];
        assert_eq!(runs(2, &[4, 5, 6], &[7, 8, 1]), expected);
        assert_eq!(runs(3, &[], &[]), []);
    }
}
