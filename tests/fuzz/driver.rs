//! Replays a corpus and looks for new inputs that break its target.

use std::collections::HashSet;
use std::fs::File;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::Write as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crate::memory;
use crate::mutate::{Rng, mutate};

/// Memory one input may make a target hold at once.
const MAX_BYTES: usize = 64 << 20;
/// An input that takes longer than this hangs; they take microseconds.
const MAX_SECONDS: u64 = 30;
/// Inputs kept to mutate further because their outcome was new.
const MAX_POOL: usize = 4096;

/// Something that reads untrusted bytes. It may refuse them, with the error as text, but must return.
pub(crate) trait Target {
    /// Reads `input`; the text tells outcomes apart (an error message, say).
    fn run(&mut self, input: &[u8]) -> String;
}

/// Runs everything in a folder of the corpus, then mutations of it for `FUZZ_SECONDS` (10 unless set). `FUZZ_SEED`
/// repeats a run of the target called `name`.
pub(crate) fn fuzz<T: Target>(name: &str, corpus: &str, mut target: T) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/corpus").join(corpus);
    let mut files: Vec<PathBuf> = std::fs::read_dir(&folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());

    // Without a backtrace: reading debug information would count as the target's memory.
    std::panic::set_hook(Box::new(|panic| eprintln!("{panic}")));
    let watch = Watch::start(name);
    let mut pool: Vec<Vec<u8>> = Vec::new();
    let mut outcomes = HashSet::new();
    for file in &files {
        let input = std::fs::read(file).unwrap();
        match watch.check(&mut target, &input) {
            Ok(outcome) => outcomes.insert(signature(&outcome)),
            Err(problem) => panic!("{}: {problem}", file.display()),
        };
        pool.push(input);
    }

    let seed = number("FUZZ_SEED").unwrap_or_else(|| {
        SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos() as u64)
    });
    println!("{}: {} inputs of the corpus are fine; seed FUZZ_SEED={seed}", name, files.len());
    let mut rng = Rng::new(seed);
    let end = Instant::now() + Duration::from_secs(number("FUZZ_SECONDS").unwrap_or(10));
    let mut runs = 0_u64;
    while Instant::now() < end {
        let (base, other) = (rng.below(pool.len()), rng.below(pool.len()));
        let input = mutate(&mut rng, &pool[base], &pool[other]);
        match watch.check(&mut target, &input) {
            Ok(outcome) => {
                if outcomes.insert(signature(&outcome)) && pool.len() < MAX_POOL {
                    pool.push(input);
                }
            }
            Err(problem) => {
                let mut hasher = DefaultHasher::new();
                input.hash(&mut hasher);
                let file = folder.join(format!("crash-{:016x}", hasher.finish()));
                std::fs::write(&file, &input).unwrap();
                panic!("after {runs} inputs: {problem}; the input is now {}", file.display());
            }
        }
        runs += 1;
    }
    println!("{}: {runs} inputs, {} different outcomes, no failure", name, outcomes.len());
}

/// Outcomes that differ only in their numbers are the same.
fn signature(outcome: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    for byte in outcome.bytes().filter(|byte| !byte.is_ascii_digit()).take(400) {
        byte.hash(&mut hasher);
    }
    hasher.finish()
}

fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// Watches one target: panics and memory from inside, hangs from a thread of its own. Each input lies in a file while
/// it runs, for those that take the process with them.
struct Watch {
    running: PathBuf,
    state: std::sync::Arc<State>,
}

struct State {
    /// Seconds since `epoch` at which the input that runs now began; 0: none does.
    began: AtomicU64,
    epoch: Instant,
    done: AtomicBool,
}

impl Watch {
    fn start(name: &str) -> Self {
        let running = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("fuzz-{name}-running"));
        let state = std::sync::Arc::new(State {
            began: AtomicU64::new(0),
            epoch: Instant::now(),
            done: AtomicBool::new(false),
        });
        let (shared, file) = (state.clone(), running.clone());
        std::thread::spawn(move || {
            while !shared.done.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_secs(1));
                let began = shared.began.load(Ordering::Relaxed);
                if began != 0 && shared.epoch.elapsed().as_secs() + 1 > began + MAX_SECONDS {
                    eprintln!("the input in {} takes more than {MAX_SECONDS} s", file.display());
                    std::process::abort();
                }
            }
        });
        Self { running, state }
    }

    fn check<T: Target>(&self, target: &mut T, input: &[u8]) -> Result<String, String> {
        overwrite(&self.running, input);
        self.state.began.store(self.state.epoch.elapsed().as_secs() + 1, Ordering::Relaxed);
        memory::reset();
        let outcome = catch_unwind(AssertUnwindSafe(|| target.run(input)));
        let peak = memory::peak();
        self.state.began.store(0, Ordering::Relaxed);
        let outcome = outcome.map_err(|_| "panicked (see above)".to_string())?;
        if peak > MAX_BYTES {
            return Err(format!("held {peak} bytes for an input of {}", input.len()));
        }
        Ok(outcome)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.state.done.store(true, Ordering::Relaxed);
    }
}

/// Makes `input` the file's content. Not by truncating it first, which file systems answer with a flush to the disk.
pub(crate) fn overwrite(file: &Path, input: &[u8]) {
    let mut file = File::options().write(true).create(true).truncate(false).open(file).unwrap();
    file.write_all(input).unwrap();
    file.set_len(input.len() as u64).unwrap();
}
