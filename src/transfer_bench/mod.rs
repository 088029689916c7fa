//! `engine transfer-bench`: how fast KV pages move between two processes, over the sessions that workers use.
//!
//! One process serves: it lends pages as a decode worker does ([`Receiver`]). The other connects and writes into them
//! as a prefill worker does ([`Sender`]), no two pages adjacent, so that each is a write of its own, as with
//! `ib_write_bw` or NIXL. A round is timed from the submission of its first page until the word behind the last is
//! known to have arrived. Whether every page arrived is checked after every round, and every byte, those between the
//! pages included, after the first rounds and the last.
//!
//! The two agree on a page size over a connection of their own (`control`), because it is part of a session's
//! handshake.

mod control;
mod memory;
mod pages;
mod receiver;
mod report;
mod sender;

pub use memory::Place;
pub use pages::Pages;
pub use receiver::Receiver;
pub use sender::Sender;

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::net::TcpListener;

use crate::{
    cli::{TransferBenchArgs, TransportArg},
    transfer::ClusterToken,
    worker::Ways,
};
use report::Row;

/// In place of a digest of a model: whoever measures has none.
const MODEL_KEY: &str = "engine transfer-bench";
/// How long opening a session may take.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(10);
/// Rounds that are not counted: they meet memory that nobody has touched, and connections without a window.
const ROUNDS_UNCOUNTED: usize = 2;

/// Serves, or connects and prints what it measured.
pub async fn run(args: TransferBenchArgs) -> Result<()> {
    let place = Place::of(args.device)?;
    let (over, on_device) = (args.transports.transport, matches!(place, Place::Device(_)));
    ensure!(
        on_device || over != TransportArg::CudaIpc,
        "--transport cuda-ipc moves pages that are in device memory: name the device, as with --device cuda:0"
    );
    ensure!(
        !on_device || matches!(over, TransportArg::Auto | TransportArg::CudaIpc),
        "--device: between devices only cuda-ipc is measured; the other ways, out of host memory, are with --device cpu"
    );
    match &args.connect {
        Some(address) => connect(&args, &place, address).await,
        None => serve(&args, place).await,
    }
}

/// Lends pages to all who come, until Ctrl-C.
async fn serve(args: &TransferBenchArgs, place: Place) -> Result<()> {
    let listener = TcpListener::bind((args.host.as_str(), args.port)).await;
    let listener = listener.with_context(|| format!("cannot listen on {}:{}", args.host, args.port))?;
    println!("lending pages on {0}; measure with: engine transfer-bench --connect {0}", listener.local_addr()?);
    let (ways, token) = (Ways::of(&args.transports)?.open().await?, token(args));
    let serving = async {
        loop {
            let (stream, peer) = match listener.accept().await {
                Ok(accepted) => accepted,
                Err(error) => return error,
            };
            let (ways, token, place) = (ways.clone(), token.clone(), place.clone());
            tokio::spawn(async move {
                match control::serve(stream, &ways, token, &place).await {
                    Ok(()) => tracing::info!(%peer, "has left"),
                    Err(error) => tracing::warn!(%peer, "{error:#}"),
                }
            });
        }
    };
    tokio::select! {
        error = serving => Err(error).context("cannot accept a connection"),
        interrupted = tokio::signal::ctrl_c() => Ok(interrupted?),
    }
}

/// Measures each page size, and prints it as soon as it is known.
async fn connect(args: &TransferBenchArgs, place: &Place, address: &str) -> Result<()> {
    let ways = Ways::of(&args.transports)?.open().await?;
    for (index, &page_bytes) in args.page_size.iter().enumerate() {
        let pages = Pages::new(args.pages, page_bytes)?;
        let lent = control::Lent::ask(address, pages).await?;
        let sender = Sender::connect(&ways, token(args), place, pages, lent.addresses()).await?;
        let rounds = args.rounds;
        // On a thread that waits by itself: a task's being woken would be part of what is measured.
        let row = tokio::task::spawn_blocking(move || measure(sender, pages, rounds)).await??;
        if args.json {
            println!("{}", row.json());
        } else {
            if index == 0 {
                println!("{}", Row::header(&row));
            }
            println!("{}", row.text());
        }
    }
    Ok(())
}

/// All rounds of one page size, and on a device copies in turns with them.
fn measure(mut sender: Sender, pages: Pages, rounds: usize) -> Result<Row> {
    let mut copies = Vec::new();
    let mut timed = |count: usize| -> Result<Vec<f64>> {
        let mut all = Vec::with_capacity(rounds);
        for round in 0..ROUNDS_UNCOUNTED + rounds {
            let (seconds, copy) = (sender.round(count)?, sender.copy()?);
            if round >= ROUNDS_UNCOUNTED {
                all.push(seconds);
                copies.extend(copy);
            }
        }
        Ok(all)
    };
    let (bandwidth, latency) = (timed(pages.count())?, timed(1)?);
    sender.finish()?;
    Ok(Row::new(sender.transport(), pages, &bandwidth, &latency, &copies))
}

/// The secret, or the empty one.
fn token(args: &TransferBenchArgs) -> ClusterToken {
    ClusterToken::new(args.cluster_token.as_deref().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transfer::Transport;

    #[tokio::test(flavor = "multi_thread")]
    async fn pages_arrive_whole_over_every_way() {
        let pages = Pages::new(8, 4096).unwrap();
        let (all, token) = (Ways::among(&[Transport::Shm, Transport::Tcp]), ClusterToken::default());
        let receiver = Receiver::start([127, 0, 0, 1].into(), &all, token.clone(), &Place::Host, pages).await.unwrap();
        for way in [Transport::Shm, Transport::Tcp] {
            let ways = Ways::among(&[way]);
            let sender =
                Sender::connect(&ways, token.clone(), &Place::Host, pages, receiver.addresses()).await.unwrap();
            let row = tokio::task::spawn_blocking(move || measure(sender, pages, 3)).await.unwrap().unwrap();
            assert!(row.json().contains(way.name()), "{}", row.json());
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn pages_on_a_device_arrive_whole_and_are_compared_with_a_copy() {
        let pages = Pages::new(8, 4096).unwrap();
        let (ways, token) = (Ways::among(&[]), ClusterToken::default());
        // Which does what it is told as late as it may.
        let place = Place::on(engine_cuda_emulated::Emulated::default());
        let receiver = Receiver::start([127, 0, 0, 1].into(), &ways, token.clone(), &place, pages).await.unwrap();
        let sender = Sender::connect(&ways, token, &place, pages, receiver.addresses()).await.unwrap();
        let row = tokio::task::spawn_blocking(move || measure(sender, pages, 3)).await.unwrap().unwrap();
        assert!(row.json().contains("cuda-ipc") && row.json().contains("copy_gigabytes"), "{}", row.json());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_does_not_know_the_token_measures_nothing() {
        let pages = Pages::new(8, 4096).unwrap();
        let ways = Ways::among(&[Transport::Tcp]);
        let token = ClusterToken::new("secret");
        let receiver = Receiver::start([127, 0, 0, 1].into(), &ways, token, &Place::Host, pages).await.unwrap();
        let connecting = Sender::connect(&ways, ClusterToken::default(), &Place::Host, pages, receiver.addresses());
        assert!(connecting.await.is_err());
    }
}
