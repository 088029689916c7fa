//! Threads that share the chunks of one operation.
//!
//! [`Pool::run`] publishes a job and works on it itself; workers help. Chunks are claimed one by one from a counter,
//! and the caller waits for chunks to be finished, not for workers to arrive: on shared cores a worker that the system
//! has put aside delays nothing but the chunk it holds. A job costs no allocation, no lock and, while workers are
//! awake, the caller no system call. Workers look for the next job for a while after one, because it is usually
//! microseconds away, then park.

use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU32, AtomicU64, AtomicUsize, Ordering::*};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

/// Times a thread looks for what it waits for before it starts to give up its core between looks: some tens of
/// microseconds, longer than most waits within a step.
const SPINS: u32 = 2_000;
/// How long from then on a worker looks for work before it parks. Between two steps the engine's thread draws tokens,
/// delivers them and plans, for 50 to 200 µs and with large batches a few times that. Had workers parked by then, each
/// would cost it a system call at the start of the next step, and come late by the time it takes to wake. Whoever else
/// wants the core gets it at the next look, so that more threads than cores, or those that serve HTTP, are not kept
/// waiting. After longer pauses than this there is no steady decoding to be quick for.
const PATIENCE: Duration = Duration::from_millis(1);

/// A job's function: `(context, thread, chunk)`.
type Entry = unsafe fn(*const (), usize, usize);

/// A value that has its cache lines to itself. 128 bytes, because processors fetch lines in pairs.
#[repr(align(128))]
struct Apart<T>(T);

/// What is read together to claim a chunk, hence on one cache line.
struct Job {
    /// Job number in the upper half, chunks not yet claimed in the lower. One word, so that a claim can never mix two
    /// jobs.
    claim: AtomicU64,
    /// The job. Written only while `claim` says that nothing is left and all chunks are finished.
    entry: AtomicPtr<()>,
    context: AtomicPtr<()>,
    chunks: AtomicUsize,
}

/// What is written during a job lies apart: a thread that finishes a chunk takes no line from those that claim one.
struct Shared {
    job: Apart<Job>,
    /// Chunks of the job that have been run.
    finished: Apart<AtomicU32>,
    /// One a worker: set while it is parked or about to park.
    parked: Vec<Apart<AtomicBool>>,
    panicked: AtomicBool,
    stop: AtomicBool,
}

impl Shared {
    /// Works on the current job until no chunk is left to claim.
    fn help(&self, thread: usize) {
        let job = &self.job.0;
        loop {
            let word = job.claim.load(Acquire);
            if word as u32 == 0 {
                return;
            }
            // These belong to the job in `word` if the exchange below succeeds: until its last chunk is claimed and
            // finished nobody writes them.
            let (entry, context) = (job.entry.load(Relaxed), job.context.load(Relaxed));
            let chunks = job.chunks.load(Relaxed);
            if job.claim.compare_exchange_weak(word, word - 1, AcqRel, Relaxed).is_err() {
                continue;
            }
            let chunk = chunks - word as u32 as usize;
            // SAFETY: `run` stored an `Entry` here, and its context lives until `finished` reaches `chunks`.
            let outcome = catch_unwind(AssertUnwindSafe(|| unsafe {
                std::mem::transmute::<*mut (), Entry>(entry)(context, thread, chunk);
            }));
            if outcome.is_err() {
                self.panicked.store(true, Relaxed);
            }
            self.finished.0.fetch_add(1, Release);
        }
    }

    /// Whether there is anything for a worker to do, if only to stop.
    fn is_wanted(&self) -> bool {
        self.job.0.claim.load(SeqCst) as u32 != 0 || self.stop.load(SeqCst)
    }

    /// Looks for something to do until there is, or until a worker's patience ends; says whether there is.
    fn look_around(&self) -> bool {
        for _ in 0..SPINS {
            if self.is_wanted() {
                return true;
            }
            spin_loop();
        }
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            if self.is_wanted() {
                return true;
            }
            thread::yield_now();
        }
        false
    }

    fn work(&self, thread: usize) {
        let parked = &self.parked[thread - 1].0;
        loop {
            if !self.look_around() {
                // Announce first, look again, then park; the caller publishes first and then looks for the
                // announcement.
                parked.store(true, SeqCst);
                while parked.load(SeqCst) && !self.is_wanted() {
                    thread::park();
                }
                parked.store(false, SeqCst);
            }
            if self.stop.load(Relaxed) {
                return;
            }
            self.help(thread);
        }
    }
}

/// Worker threads, and the thread that calls [`Pool::run`].
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<(Thread, Option<JoinHandle<()>>)>,
}

impl Pool {
    /// A pool of `threads` in all, the caller's included. If the system refuses some, there are fewer.
    pub(crate) fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            job: Apart(Job {
                claim: AtomicU64::new(0),
                entry: AtomicPtr::new(std::ptr::null_mut()),
                context: AtomicPtr::new(std::ptr::null_mut()),
                chunks: AtomicUsize::new(0),
            }),
            finished: Apart(AtomicU32::new(0)),
            parked: (1..threads).map(|_| Apart(AtomicBool::new(false))).collect(),
            panicked: AtomicBool::new(false),
            stop: AtomicBool::new(false),
        });
        let spawn = |thread| {
            let shared = Arc::clone(&shared);
            let handle =
                thread::Builder::new().name(format!("cpu-{thread}")).spawn(move || shared.work(thread)).ok()?;
            Some((handle.thread().clone(), Some(handle)))
        };
        let workers = (1..threads).map_while(spawn).collect();
        Self { shared, workers }
    }

    /// Threads that may run chunks at once, the caller's included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `job(thread, chunk)` once for each `chunk` in `0..chunks`, on any threads in any order, and returns when
    /// all have been called. No two calls at one time have the same `thread`, which is below [`Pool::threads`].
    pub(crate) fn run<F: Fn(usize, usize) + Sync>(&mut self, chunks: usize, job: &F) {
        if self.workers.is_empty() || chunks <= 1 {
            for chunk in 0..chunks {
                job(0, chunk);
            }
            return;
        }
        unsafe fn enter<F: Fn(usize, usize) + Sync>(context: *const (), thread: usize, chunk: usize) {
            // SAFETY: `run` passes its own `job`, which it outlives.
            unsafe { (*context.cast::<F>())(thread, chunk) }
        }
        let shared = &*self.shared;
        let count = u32::try_from(chunks).expect("operations split into far fewer chunks");
        let slot = &shared.job.0;
        slot.entry.store(enter::<F> as *mut (), Relaxed);
        slot.context.store(std::ptr::from_ref(job).cast_mut().cast(), Relaxed);
        slot.chunks.store(chunks, Relaxed);
        shared.finished.0.store(0, Relaxed);
        let epoch = (slot.claim.load(Relaxed) >> 32).wrapping_add(1);
        slot.claim.store(epoch << 32 | u64::from(count), SeqCst);
        for (Apart(parked), (worker, _)) in shared.parked.iter().zip(&self.workers).take(chunks - 1) {
            if parked.load(SeqCst) && parked.swap(false, SeqCst) {
                worker.unpark();
            }
        }
        // Panics are caught within, so nothing unwinds past a job that workers may still be in.
        shared.help(0);
        let mut looks = 0u32;
        while shared.finished.0.load(Acquire) != count {
            looks += 1;
            if looks < SPINS {
                spin_loop();
            } else {
                thread::yield_now();
            }
        }
        if shared.panicked.swap(false, Relaxed) {
            panic!("a kernel panicked");
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        for (worker, handle) in &mut self.workers {
            worker.unpark();
            if let Some(handle) = handle.take() {
                // A worker catches its jobs' panics; there is nothing to report.
                let _ = handle.join();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thousands_of_tiny_jobs_run_every_chunk_once() {
        let mut pool = Pool::new(4);
        for round in 0..5_000usize {
            let counts: [AtomicU32; 13] = Default::default();
            let chunks = round % 14;
            pool.run(chunks, &|_, chunk| {
                counts[chunk].fetch_add(1, Relaxed);
            });
            for (chunk, count) in counts.iter().enumerate() {
                assert_eq!(count.load(Relaxed), u32::from(chunk < chunks));
            }
        }
    }

    #[test]
    fn far_more_threads_than_cores_still_finish() {
        let mut pool = Pool::new(24);
        let busy: Vec<AtomicBool> = (0..24).map(|_| AtomicBool::new(false)).collect();
        let sum = AtomicUsize::new(0);
        for _ in 0..200 {
            pool.run(64, &|thread, chunk| {
                assert!(!busy[thread].swap(true, SeqCst));
                thread::yield_now();
                sum.fetch_add(chunk, Relaxed);
                busy[thread].store(false, SeqCst);
            });
        }
        assert_eq!(sum.into_inner(), 200 * (63 * 64 / 2));
    }

    #[test]
    fn a_parked_pool_wakes_up() {
        let mut pool = Pool::new(2);
        for _ in 0..50 {
            while !pool.shared.parked[0].0.load(SeqCst) {
                thread::yield_now();
            }
            let done = AtomicUsize::new(0);
            pool.run(8, &|_, _| {
                done.fetch_add(1, Relaxed);
            });
            assert_eq!(done.into_inner(), 8);
        }
    }

    #[test]
    fn what_threads_write_while_others_claim_is_on_other_cache_lines() {
        fn line_of<T>(value: &T) -> usize {
            std::ptr::from_ref(value).addr() / 64
        }
        let pool = Pool::new(3);
        let Shared { job: Apart(job), finished, parked, stop, .. } = &*pool.shared;
        let claim = line_of(&job.claim);
        assert_eq!([line_of(&job.entry), line_of(&job.context), line_of(&job.chunks)], [claim; 3]);
        let mut lines = vec![claim, line_of(finished), line_of(stop)];
        lines.extend(parked.iter().map(line_of));
        lines.sort_unstable();
        lines.dedup();
        assert_eq!(lines.len(), 5);
    }

    #[test]
    fn a_panic_in_a_chunk_reaches_the_caller_and_the_pool_lives_on() {
        let mut pool = Pool::new(3);
        let outcome = catch_unwind(AssertUnwindSafe(|| pool.run(10, &|_, chunk| assert_ne!(chunk, 5))));
        assert!(outcome.is_err());
        let done = AtomicUsize::new(0);
        pool.run(10, &|_, _| {
            done.fetch_add(1, Relaxed);
        });
        assert_eq!(done.into_inner(), 10);
    }
}
