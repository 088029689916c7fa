//! The other process: a decode worker, and a plain TCP port.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::FileExt;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result};
use engine::handoff::{Epoch, Slot};
use engine::transfer::{
    ClusterToken, Limits, Mailbox, Region, RegionShape, ServerConfig, SessionAddresses, SessionEvent, SessionServer,
    TransferMetrics,
};

use super::PAGES;

/// What pages are full of.
const FILLING: u8 = 7;

/// Memory of both workers: twice the pages of one write.
pub(crate) fn shape(page_bytes: usize) -> RegionShape {
    RegionShape { layers: 1, pages: 2 * PAGES, page_bytes }
}

/// Every second page.
pub(crate) fn page(index: usize) -> u32 {
    2 * index as u32
}

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
    let folder = tempfile::tempdir()?;
    let config = ServerConfig {
        tcp_pages: true,
        rdma: None,
        tcp: Some(([127, 0, 0, 1], 0).into()),
        advertise: None,
        unix: Some(folder.path().to_path_buf()),
        tls: None,
        token: ClusterToken::default(),
        model_key: "bench".into(),
        limits: Limits::default(),
        metrics: TransferMetrics::default(),
    };
    let region = Region::shared(shape(page_bytes))?;
    let pages: Arc<[u32]> = (0..PAGES).map(page).collect();
    let server: Arc<OnceLock<SessionServer>> = Arc::default();
    let (answering, memory) = (server.clone(), region.clone());
    // Each message asks for a new loan under the epoch that it names. The answer says what the pages hold so far.
    let sink = move |event| {
        let (Some(server), SessionEvent::Message { session, message }) = (answering.get(), event) else { return };
        let epoch = message.as_ref().try_into().map(u32::from_le_bytes).ok().and_then(Epoch::new);
        if let Some(epoch) = epoch {
            let filled = pages.iter().all(|&page| last_byte(&memory, page) == Some(FILLING));
            server.lend(session, Slot(0), epoch, pages.clone());
            server.send(session, vec![u8::from(filled)].into());
        }
    };
    let started = SessionServer::start(config, region, Mailbox::new(1)?, Arc::new(sink));
    let started = runtime.block_on(started)?;
    println!("{}", serde_json::to_string(started.addresses())?);
    let _ = server.set(started);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?);
    std::thread::spawn(move || drain(&listener, page_bytes));
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Memory of a prefill worker, filled: its own alone, in large pages where the system has them, as a prefill worker's
/// is.
pub(crate) fn filled(page_bytes: usize) -> Result<Region> {
    let region = Region::private(shape(page_bytes))?;
    // Through the system, as writing to an address is nothing that safe code can do.
    let memory = std::fs::File::options().write(true).open("/proc/self/mem")?;
    memory.write_all_at(&vec![FILLING; region.shape().total_bytes()], region.base() as u64)?;
    Ok(region)
}

fn last_byte(memory: &Region, page: u32) -> Option<u8> {
    let mut byte = [0];
    let end = (page as u64 + 1) * memory.shape().page_bytes as u64;
    memory.file()?.read_exact_at(&mut byte, end - 1).ok().map(|()| byte[0])
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
