//! Ways for pages to get into another process' memory, and what they are compared with.

use std::io::{BufRead, BufReader, Lines, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use engine::transfer::{ClusterToken, Transport};
use engine::transfer_bench::{Pages, Place, Sender};
use engine::worker::Ways;

use super::PAGES;
use super::peer::Decode;

/// One way.
pub(crate) trait Way {
    /// Its name, and how often each byte is copied.
    fn name(&self) -> (&'static str, &'static str);

    /// Writes all pages once; the seconds that took.
    fn write(&mut self) -> Result<f64>;
}

/// What one core can do: the same pages copied within one process.
pub(crate) struct Copy {
    source: Vec<u8>,
    target: Vec<u8>,
    page_bytes: usize,
}

impl Copy {
    pub(crate) fn new(page_bytes: usize) -> Result<Self> {
        let bytes = 2 * PAGES * page_bytes;
        Ok(Self { source: vec![1; bytes], target: vec![2; bytes], page_bytes })
    }
}

impl Way for Copy {
    fn name(&self) -> (&'static str, &'static str) {
        ("memcpy", "1")
    }

    fn write(&mut self) -> Result<f64> {
        let started = Instant::now();
        for i in 0..PAGES {
            // Every second page, as the others do.
            let start = 2 * i * self.page_bytes;
            let range = start..start + self.page_bytes;
            self.target[range.clone()].copy_from_slice(&self.source[range]);
        }
        Ok(started.elapsed().as_secs_f64())
    }
}

/// A session.
pub(crate) struct Engine(Sender);

impl Engine {
    pub(crate) fn new(decode: &Decode, page_bytes: usize, transport: Transport) -> Result<Self> {
        let (ways, pages) = (Ways::among(&[transport]), Pages::new(PAGES, page_bytes)?);
        let connecting = Sender::connect(&ways, ClusterToken::default(), &Place::Host, pages, &decode.addresses);
        Ok(Self(tokio::runtime::Handle::current().block_on(connecting)?))
    }
}

impl Way for Engine {
    fn name(&self) -> (&'static str, &'static str) {
        match self.0.transport() {
            Transport::CudaIpc => ("engine, cuda-ipc", "0"),
            Transport::Shm => ("engine, shm", "1"),
            Transport::Rdma => ("engine, rdma", "0"),
            Transport::Tcp => ("engine, tcp", "2, into the kernel and out of it"),
        }
    }

    fn write(&mut self) -> Result<f64> {
        self.0.round(PAGES)
    }
}

/// What one TCP connection over loopback can do: the same bytes, with no frames and no pages.
pub(crate) struct Stream {
    stream: TcpStream,
    memory: Vec<u8>,
}

impl Stream {
    pub(crate) fn new(decode: &Decode, page_bytes: usize) -> Result<Self> {
        let stream = TcpStream::connect(decode.stream)?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, memory: vec![1; PAGES * page_bytes] })
    }
}

impl Way for Stream {
    fn name(&self) -> (&'static str, &'static str) {
        ("loopback stream", "2, into the kernel and out of it")
    }

    fn write(&mut self) -> Result<f64> {
        let started = Instant::now();
        self.stream.write_all(&self.memory)?;
        self.stream.read_exact(&mut [0])?;
        Ok(started.elapsed().as_secs_f64())
    }
}

/// NIXL, in processes of its own: see `nixl_write.py`.
pub(crate) struct Nixl {
    child: Child,
    input: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    transport: &'static str,
}

impl Nixl {
    pub(crate) fn new(python: &Path, transport: &'static str, page_bytes: usize) -> Result<Self> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/transfer/nixl_write.py");
        let mut command = Command::new(python);
        command.arg(script).args([transport, &page_bytes.to_string(), &PAGES.to_string()]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("NIXL does not start")?;
        let input = child.stdin.take().context("stdin is piped")?;
        let answers = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
        Ok(Self { child, input, answers, transport })
    }
}

impl Way for Nixl {
    fn name(&self) -> (&'static str, &'static str) {
        match self.transport {
            "tcp" => ("NIXL, UCX over tcp", "2, into the kernel and out of it, or more"),
            _ => ("NIXL, UCX's choice", "1"),
        }
    }

    fn write(&mut self) -> Result<f64> {
        self.input.write_all(b"go\n")?;
        let answer = self.answers.next().context("NIXL has ended")??;
        Ok(answer.trim().parse()?)
    }
}

impl Drop for Nixl {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
