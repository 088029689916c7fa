//! A server under test, in a process of its own.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::http;
use crate::load::{OUTPUT_TOKENS, PROMPT_TOKENS};

/// Sequences a server runs at once.
const SLOTS: usize = 16;
const START_DEADLINE: Duration = Duration::from_secs(120);

/// A running server; killed when dropped.
pub(crate) struct Server {
    child: Child,
    /// `host:port`.
    pub(crate) address: String,
    /// The name it gives its model.
    pub(crate) model: String,
}

impl Server {
    /// Starts this engine.
    pub(crate) fn engine(model: &Path, threads: usize) -> Result<Self> {
        let port = free_port()?;
        let mut command = Command::new(env!("CARGO_BIN_EXE_engine"));
        command.arg("--model").arg(model).args(["--host", "127.0.0.1"]).arg("--port").arg(port.to_string());
        command
            .arg("--standalone")
            .arg("--threads")
            .arg(threads.to_string())
            .arg("--max-num-seqs")
            .arg(SLOTS.to_string());
        command.arg("--max-model-len").arg((PROMPT_TOKENS + 2 * OUTPUT_TOKENS).to_string());
        command.env_remove("ETCD_ENDPOINTS").env_remove("NATS_SERVER").env_remove("ENGINE_API_KEY");
        Self::start(command, port)
    }

    /// Starts llama.cpp's server with as many slots of the same length.
    pub(crate) fn llama(folder: &Path, model: &Path, threads: usize) -> Result<Self> {
        let port = free_port()?;
        let mut command = Command::new(folder.join("llama-server"));
        command.arg("-m").arg(model).args(["--host", "127.0.0.1"]).arg("--port").arg(port.to_string());
        command.arg("-t").arg(threads.to_string()).arg("-np").arg(SLOTS.to_string());
        command.arg("-c").arg((SLOTS * (PROMPT_TOKENS + 2 * OUTPUT_TOKENS)).to_string());
        command.args(["--no-webui", "--cache-ram", "0"]);
        Self::start(command, port)
    }

    fn start(mut command: Command, port: u16) -> Result<Self> {
        let child = command
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .with_context(|| format!("starting {:?}", command.get_program()))?;
        let mut server = Self { child, address: format!("127.0.0.1:{port}"), model: String::new() };
        let start = Instant::now();
        while http::get(&server.address, "/health").is_err() {
            if let Some(status) = server.child.try_wait()? {
                bail!("{command:?} ended with {status} before it was ready");
            }
            if start.elapsed() > START_DEADLINE {
                bail!("{command:?} was not ready in {START_DEADLINE:?}");
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let models: serde_json::Value = serde_json::from_str(&http::get(&server.address, "/v1/models")?)?;
        server.model = models["data"][0]["id"].as_str().context("the server lists no model")?.to_string();
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // Either call fails only if the process has ended already, which is what is wanted.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port that was free a moment ago.
fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
