//! The other process: a decode worker, and a plain TCP port.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result};
use engine::transfer::{ClusterToken, SessionAddresses, Transport};
use engine::transfer_bench::{Pages, Place, Receiver};
use engine::worker::Ways;

use super::PAGES;

/// The decode worker's process.
pub(crate) struct Decode {
    child: Child,
    _input: ChildStdin,
    pub(crate) addresses: SessionAddresses,
    /// Takes a stream of one write's bytes, again and again, and answers each with one byte.
    pub(crate) stream: SocketAddr,
}

impl Decode {
    pub(crate) fn start(page_bytes: usize) -> Result<Self> {
        let mut command = Command::new(std::env::current_exe()?);
        command.args(["decode", &page_bytes.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn()?;
        let input = child.stdin.take().context("stdin is piped")?;
        let mut lines = BufReader::new(child.stdout.take().context("stdout is piped")?).lines();
        let mut line = || lines.next().context("the decode worker did not start");
        let addresses = serde_json::from_str(&line()??)?;
        let stream = line()??.parse()?;
        Ok(Self { child, _input: input, addresses, stream })
    }
}

impl Drop for Decode {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs as the decode worker.
pub(crate) fn decode(page_bytes: usize) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let (ways, pages) = (Ways::among(&[Transport::Shm, Transport::Tcp]), Pages::new(PAGES, page_bytes)?);
    let receiver = Receiver::start([127, 0, 0, 1].into(), &ways, ClusterToken::default(), &Place::Host, pages);
    let receiver = runtime.block_on(receiver)?;
    println!("{}", serde_json::to_string(receiver.addresses())?);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    std::thread::spawn(move || drain(&listener, page_bytes));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Reads what one write has, from plain memory to plain memory, and says so; again and again.
fn drain(listener: &TcpListener, page_bytes: usize) -> Result<()> {
    let (mut stream, _) = listener.accept()?;
    stream.set_nodelay(true)?;
    let mut memory = vec![0; PAGES * page_bytes];
    loop {
        stream.read_exact(&mut memory)?;
        stream.write_all(&[1])?;
    }
}
