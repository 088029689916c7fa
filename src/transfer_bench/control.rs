//! Agreeing on a page size: a line of JSON each way. The pages are lent for as long as the connection stands.

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::TcpStream,
};

use super::{Pages, Place, Receiver};
use crate::{
    transfer::{ClusterToken, SessionAddresses},
    worker::Ways,
};

/// Bytes of a line.
const LINE_MAX: u64 = 1 << 16;

/// What is asked for.
#[derive(Debug, Serialize, Deserialize)]
struct Wanted {
    pages: usize,
    page_bytes: usize,
}

/// What is answered.
type Lending = Result<SessionAddresses, String>;

/// Serves one that connected, until it leaves.
pub(super) async fn serve(stream: TcpStream, ways: &Ways, token: ClusterToken, place: &Place) -> Result<()> {
    // The address that led here leads to sessions too.
    let address = stream.local_addr()?.ip();
    let mut stream = BufReader::new(stream);
    let wanted: Wanted = serde_json::from_str(&line(&mut stream).await?)?;
    let started = async {
        let pages = Pages::new(wanted.pages, wanted.page_bytes)?;
        Receiver::start(address, ways, token, place, pages).await
    };
    let (receiver, lending) = match started.await {
        Ok(receiver) => {
            let addresses = receiver.addresses().clone();
            (Some(receiver), Lending::Ok(addresses))
        }
        Err(error) => (None, Lending::Err(format!("{error:#}"))),
    };
    say(&mut stream, &lending).await?;
    // Whoever measures says nothing more, and closes the connection when done.
    let left = stream.read_u8().await.is_err();
    drop(receiver);
    ensure!(left, "a second line where none belongs");
    Ok(())
}

/// Pages that are lent by another process.
pub(super) struct Lent {
    addresses: SessionAddresses,
    _while_open: BufReader<TcpStream>,
}

impl Lent {
    /// Asks the process at `address` for pages.
    pub(super) async fn ask(address: &str, pages: Pages) -> Result<Self> {
        let stream = TcpStream::connect(address).await;
        let mut stream = BufReader::new(stream.with_context(|| format!("nobody lends pages on {address}"))?);
        say(&mut stream, &Wanted { pages: pages.count(), page_bytes: pages.page_bytes() }).await?;
        match serde_json::from_str::<Lending>(&line(&mut stream).await?)? {
            Ok(addresses) => Ok(Self { addresses, _while_open: stream }),
            Err(error) => bail!("{address} lends no pages: {error}"),
        }
    }

    /// Where sessions are opened.
    pub(super) fn addresses(&self) -> &SessionAddresses {
        &self.addresses
    }
}

async fn say(stream: &mut BufReader<TcpStream>, what: &impl Serialize) -> Result<()> {
    let mut text = serde_json::to_string(what)?;
    text.push('\n');
    stream.write_all(text.as_bytes()).await?;
    Ok(())
}

async fn line(stream: &mut BufReader<TcpStream>) -> Result<String> {
    let mut line = String::new();
    stream.take(LINE_MAX).read_line(&mut line).await?;
    ensure!(line.ends_with('\n'), "the peer left, or does not speak as engine transfer-bench does");
    Ok(line)
}
