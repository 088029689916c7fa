//! `engine mock`: many workers in one process that take no hardware.
//!
//! Each is a whole worker: it registers, takes requests or jobs, plans, lends pages, moves them, streams. Only the model is
//! small, made up, and slowed down to a pace that is given; what it answers still follows from the prompt through its keys
//! and values, so that a page gone astray changes the text. It carries benchmarks of what is around a model, and shows
//! what grows with the number of workers.

mod model;

use std::{ffi::OsString, path::Path};

use anyhow::{Context, Result, bail};
use tokio::task::JoinSet;

use crate::{
    cli::{MockArgs, Role, WorkerArgs},
    worker::{Pace, decode, prefill},
};

/// The name of the made-up model.
const NAME: &str = "mock";

/// Runs as many workers as `args` says until a signal comes.
pub async fn run(args: MockArgs) -> Result<()> {
    let folder = std::env::temp_dir().join(format!("engine-mock-{}", std::process::id()));
    model::write(&folder, args.max_model_len).with_context(|| format!("cannot write {}", folder.display()))?;
    let ended = run_workers(&args, &folder).await;
    // A folder that is left behind harms nobody.
    let _ = std::fs::remove_dir_all(&folder);
    ended
}

async fn run_workers(args: &MockArgs, folder: &Path) -> Result<()> {
    let mut workers = JoinSet::new();
    for index in 0..args.decode_workers {
        let mut worker = worker(args, folder, &["--served-model-name".into(), NAME.into()])?;
        // The first is where one would look for it.
        let port = if index == 0 { args.port } else { 0 };
        worker.port = Some(port);
        worker.disagg.max_local_prefill_length = args.max_local_prefill_length;
        workers.spawn(decode::run(worker));
    }
    for _ in 0..args.prefill_workers {
        workers.spawn(prefill::run(worker(args, folder, &["--is-prefill-worker".into()])?));
    }
    if workers.is_empty() {
        bail!("there is nothing to do without --decode-workers or --prefill-workers");
    }
    while let Some(ended) = workers.join_next().await {
        ended.context("a worker panicked")??;
    }
    Ok(())
}

/// The command line of one worker.
fn worker(args: &MockArgs, folder: &Path, role: &[OsString]) -> Result<WorkerArgs> {
    let mut line: Vec<OsString> = vec!["engine".into(), "--model".into(), folder.into()];
    line.extend_from_slice(role);
    let (Role::Decode(mut worker) | Role::Prefill(mut worker)) = Role::try_parse_from(line)? else {
        bail!("a mock is made of workers");
    };
    worker.cluster = args.cluster.clone();
    worker.host.clone_from(&args.host);
    worker.max_model_len = Some(args.max_model_len);
    worker.max_num_seqs = args.max_num_seqs;
    worker.max_num_batched_tokens = args.max_num_batched_tokens;
    // Pages for a few of the longest, or for all at an eighth of the length.
    let tokens = args.max_model_len.max(args.max_num_seqs * args.max_model_len.div_ceil(8));
    worker.kv_blocks = Some(tokens.div_ceil(worker.block_size) + args.max_num_seqs);
    worker.threads = Some(1);
    worker.pace = Some(Pace { step: args.step_time, prompt_token: args.prompt_token_time });
    Ok(worker)
}
