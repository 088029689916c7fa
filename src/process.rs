//! How a serving process says that it has begun, and how it is told to leave.

use std::{io::Write, net::SocketAddr};

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A worker or frontend that has begun to serve.
#[derive(Debug)]
pub struct Ready {
    /// Where its HTTP server listens.
    pub address: SocketAddr,
    /// What to tell who started it.
    pub text: String,
}

impl Ready {
    /// Says so on standard output.
    pub fn print(self) {
        // Nobody may be reading; the work is done all the same.
        let mut out = std::io::stdout();
        let _ = out.write_all(self.text.as_bytes()).and_then(|()| out.flush());
    }
}

/// The signals that ask a process to leave.
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Handles them from now on. To be called first: as process 1 of a container, a process ignores signals that it has
    /// no handler for.
    pub(crate) fn new() -> Result<Self> {
        let listen = |kind| signal(kind).context("cannot handle signals");
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// Waits for one and returns the exit status it stands for.
    pub(crate) async fn next(&mut self) -> i32 {
        tokio::select! {
            _ = self.terminate.recv() => 128 + 15,
            _ = self.interrupt.recv() => 128 + 2,
        }
    }

    /// Leaves at once at the next one: whoever asks twice does not want to wait.
    pub(crate) fn leave_at_next(mut self) {
        tokio::spawn(async move { std::process::exit(self.next().await) });
    }
}
