//! What both roles begin and end with.

use anyhow::{Context, Result, bail};

use crate::{
    engine::{EngineHandle, EngineStatus},
    process::Signals,
};

/// Loads a model with `work`, which may block, unless a signal comes first.
pub(super) async fn load<T: Send + 'static>(
    signals: &mut Signals,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::select! {
        loaded = tokio::task::spawn_blocking(work) => loaded.context("loading the model panicked")?,
        // The loading thread cannot be told to stop: the process ends around it.
        code = signals.next() => {
            tracing::info!(code, "interrupted");
            bail!("interrupted while the model was loading")
        }
    }
}

/// Returns when a signal has come, or the engine has gone. At the next signal the process ends.
pub(super) async fn told_to_leave(mut signals: Signals, engine: EngineHandle) {
    tokio::select! {
        _ = signals.next() => {}
        _ = engine.stopped() => {}
    }
    // Whichever it was, whoever asks now does not want to wait for what still runs.
    signals.leave_at_next();
}

/// Ends the engine of a worker that serves no more; an error if it had failed.
pub(super) async fn end(engine: &EngineHandle) -> Result<()> {
    if let EngineStatus::Failed { reason } = engine.status() {
        bail!("the engine failed: {reason}");
    }
    engine.stop();
    engine.stopped().await;
    Ok(())
}
