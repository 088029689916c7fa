use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::{mpsc, watch},
    time::{Instant, sleep_until},
};

/// A TCP proxy whose connections can be cut or slowed down, to part one client from a service that stays there for
/// others.
pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    open: Arc<AtomicBool>,
    /// Of what the service says.
    delay_ms: Arc<AtomicU64>,
    cut: watch::Sender<u64>,
}

impl Proxy {
    /// A proxy to `target`, open.
    pub(crate) async fn to(target: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (open, delay_ms) = (Arc::new(AtomicBool::new(true)), Arc::<AtomicU64>::default());
        let (cut, cuts) = watch::channel(0);
        tokio::spawn({
            let (open, delay_ms) = (open.clone(), delay_ms.clone());
            async move {
                while let Ok((mut client, _)) = listener.accept().await {
                    if !open.load(Ordering::SeqCst) {
                        continue;
                    }
                    let (mut cuts, delay_ms) = (cuts.clone(), delay_ms.clone());
                    cuts.mark_unchanged();
                    tokio::spawn(async move {
                        let Ok(mut server) = TcpStream::connect(target).await else { return };
                        let ((mut asked, mut told), (mut answers, mut asks)) = (client.split(), server.split());
                        tokio::select! {
                            _ = tokio::io::copy(&mut asked, &mut asks) => {}
                            _ = pass_on(&mut answers, &mut told, &delay_ms) => {}
                            _ = cuts.changed() => {}
                        }
                    });
                }
            }
        });
        Self { address, open, delay_ms, cut }
    }

    /// Keeps whatever the service says from now on for so long, each piece from when it comes.
    pub(crate) fn slow_down(&self, delay: Duration) {
        self.delay_ms.store(delay.as_millis() as u64, Ordering::SeqCst);
    }

    /// Ends all connections and takes no more.
    pub(crate) fn cut(&self) {
        self.open.store(false, Ordering::SeqCst);
        self.cut.send_modify(|cuts| *cuts += 1);
    }

    /// Takes connections again.
    pub(crate) fn mend(&self) {
        self.open.store(true, Ordering::SeqCst);
    }
}

/// Passes on what the service says, each piece after the delay, until it has no more to say.
async fn pass_on(from: &mut ReadHalf<'_>, to: &mut WriteHalf<'_>, delay_ms: &AtomicU64) -> std::io::Result<()> {
    let (sender, mut pieces) = mpsc::unbounded_channel();
    let reading = async move {
        let mut buffer = vec![0; 1 << 16];
        loop {
            let length = from.read(&mut buffer).await?;
            if length == 0 {
                return Ok(());
            }
            let due = Instant::now() + Duration::from_millis(delay_ms.load(Ordering::SeqCst));
            // Who writes is there as long as this is.
            let _ = sender.send((due, buffer[..length].to_vec()));
        }
    };
    let writing = async {
        while let Some((due, piece)) = pieces.recv().await {
            sleep_until(due).await;
            to.write_all(&piece).await?;
        }
        Ok(())
    };
    tokio::try_join!(reading, writing).map(drop)
}
