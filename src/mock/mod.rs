//! `engine mock`: many workers in one process that take no hardware.
//!
//! Each is a whole worker: it registers, takes requests or jobs, plans, lends pages, moves them, streams. Only the
//! arithmetic is not there: steps take the time that is given, and pages hold digests of the tokens, from which the
//! answer follows, so that a page gone astray changes the text. It carries benchmarks of what is around a model, and
//! shows what grows with the number of workers.

mod model;

use std::{ffi::OsString, fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result, bail};
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    cli::{Invocation, LoadFormatArg, MockArgs, WorkerArgs},
    engine::MockModel,
    process::Ready,
    worker::{decode, prefill},
};

/// The name of the made-up model.
const NAME: &str = "mock";
/// Tokens of a page.
const BLOCK_SIZE: usize = 16;

/// Runs as many workers as `args` says until a signal comes.
pub async fn run(args: MockArgs) -> Result<()> {
    if args.decode_workers + args.prefill_workers == 0 {
        bail!("there is nothing to do without --decode-workers or --prefill-workers");
    }
    let folder = std::env::temp_dir().join(format!("engine-mock-{:016x}", rand::random::<u64>()));
    // Fails if somebody else's is there.
    fs::create_dir(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let written = model::write(&folder, args.max_model_len);
    let ended = match written.with_context(|| format!("cannot write {}", folder.display())) {
        Ok(()) => run_workers(&args, &folder).await,
        Err(error) => Err(error),
    };
    // A folder that is left behind harms nobody.
    let _ = fs::remove_dir_all(&folder);
    ended
}

async fn run_workers(args: &MockArgs, folder: &Path) -> Result<()> {
    let mut workers = JoinSet::new();
    let (ready, mut all_ready) = mpsc::unbounded_channel();
    // The first of the list is announced: a decode worker, if there is one.
    for index in 0..args.decode_workers + args.prefill_workers {
        let ready = ready.clone();
        let ready = move |worker: Ready| {
            // It is heard for as long as this function runs.
            let _ = ready.send((index, worker.address));
        };
        if index < args.decode_workers {
            let mut worker = worker(args, folder, &["--served-model-name".into(), NAME.into()])?;
            // The first is where one would look for it.
            worker.port = Some(if index == 0 { args.port } else { 0 });
            worker.disagg.max_local_prefill_length = args.max_local_prefill_length;
            workers.spawn(decode::run(worker, ready));
        } else {
            workers.spawn(prefill::run(worker(args, folder, &["--is-prefill-worker".into()])?, ready));
        }
    }
    drop(ready);
    let (mut waiting, mut first) = (workers.len(), None);
    loop {
        tokio::select! {
            Some((index, address)) = all_ready.recv() => {
                if index == 0 {
                    first = Some(address);
                }
                waiting -= 1;
                if let (0, Some(address)) = (waiting, first) {
                    Ready { address, text: announcement(args, address) }.print();
                }
            }
            ended = workers.join_next() => match ended {
                Some(ended) => ended.context("a worker panicked")??,
                None => return Ok(()),
            },
        }
    }
}

/// What there is, said once for all: which worker is up first is a matter of chance.
fn announcement(args: &MockArgs, address: SocketAddr) -> String {
    let MockArgs { decode_workers, prefill_workers, .. } = args;
    format!(
        "engine {} mocks {decode_workers} decode and {prefill_workers} prefill workers; the first is \
         http://{address}\n",
        env!("CARGO_PKG_VERSION"),
    )
}

/// The command line of one worker.
fn worker(args: &MockArgs, folder: &Path, role: &[OsString]) -> Result<WorkerArgs> {
    let mut line: Vec<OsString> = vec!["engine".into(), "--model".into(), folder.into()];
    line.extend_from_slice(role);
    let (Invocation::Decode(mut worker) | Invocation::Prefill(mut worker)) = Invocation::try_parse_from(line)? else {
        bail!("a mock is made of workers");
    };
    worker.cluster = args.cluster.clone();
    worker.host.clone_from(&args.host);
    worker.disagg.transports = args.transports.clone();
    let engine = &mut worker.engine;
    engine.max_model_len = Some(args.max_model_len);
    engine.max_num_seqs = Some(args.max_num_seqs);
    engine.max_num_batched_tokens = Some(args.max_num_batched_tokens);
    // Pages for a few of the longest, or for all at an eighth of the length.
    let tokens = args.max_model_len.max(args.max_num_seqs * args.max_model_len.div_ceil(8));
    engine.block_size = Some(BLOCK_SIZE);
    engine.kv_blocks = Some(tokens.div_ceil(BLOCK_SIZE) + args.max_num_seqs);
    engine.threads = Some(1);
    engine.load_format = LoadFormatArg::Dummy;
    let (step, prompt_token) = (args.step_time, args.prompt_token_time);
    engine.mock = Some(MockModel { step, prompt_token, words: model::WORDS });
    Ok(worker)
}
