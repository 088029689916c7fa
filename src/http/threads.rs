use std::{io, sync::Arc, thread};

use tokio::{
    net::TcpStream,
    runtime::{Builder, Handle},
    sync::oneshot,
};

/// Threads beside each for work that would keep its connections waiting.
const BLOCKING_THREADS: usize = 2;

/// Threads that serve connections, each with a runtime of its own. A connection stays on its thread, with all that its
/// answers wait for: a token wakes one thread, and tokens that come together share that. A runtime that shares out its
/// tasks wakes a second thread for nearly every token, to find that there is nothing to share.
///
/// By default there are none, and connections are served on the runtime that accepts them.
#[derive(Debug, Default)]
pub struct ConnectionThreads(Vec<ConnectionThread>);

#[derive(Debug)]
struct ConnectionThread {
    runtime: Handle,
    /// Each of its connections holds one more of it.
    connections: Arc<()>,
    /// The thread ends when this is dropped.
    _running: oneshot::Sender<()>,
}

impl ConnectionThreads {
    /// Starts `number` threads, which end with this. Fails if the system has no thread or no poller to give.
    pub fn start(number: usize) -> io::Result<Self> {
        (0..number).map(ConnectionThread::start).collect::<io::Result<_>>().map(Self)
    }

    /// How many there are.
    #[cfg(test)]
    pub(crate) fn count(&self) -> usize {
        self.0.len()
    }

    /// Gives a connection to the thread that has the fewest, idle ones included: it stays there.
    pub(super) fn serve<F: Future<Output = ()> + Send>(
        &self,
        stream: TcpStream,
        work: impl FnOnce(TcpStream) -> F + Send + 'static,
    ) -> io::Result<()> {
        let Some(thread) = self.0.iter().min_by_key(|thread| Arc::strong_count(&thread.connections)) else {
            tokio::spawn(async move { work(stream).await });
            return Ok(());
        };
        let (stream, connected) = (stream.into_std()?, thread.connections.clone());
        thread.runtime.spawn(async move {
            match TcpStream::from_std(stream) {
                Ok(stream) => work(stream).await,
                Err(error) => tracing::warn!(%error, "cannot serve a connection"),
            }
            drop(connected);
        });
        Ok(())
    }
}

impl ConnectionThread {
    fn start(number: usize) -> io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        let runtime = builder.max_blocking_threads(BLOCKING_THREADS).enable_all().build()?;
        let (running, ended) = oneshot::channel::<()>();
        let this = Self { runtime: runtime.handle().clone(), connections: Arc::new(()), _running: running };
        thread::Builder::new().name(format!("connections-{number}")).spawn(move || {
            // Nobody sends: it resolves when that is dropped.
            let _ = runtime.block_on(ended);
            // Work on its blocking threads is left behind.
            runtime.shutdown_background();
        })?;
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::{io::AsyncReadExt, net::TcpListener};

    use super::*;

    /// Both ends of a connection.
    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (near.unwrap(), far.unwrap().0)
    }

    /// Serves a connection until the other end closes it, and tells which thread does.
    async fn served(threads: &ConnectionThreads, told: &mpsc::Sender<thread::ThreadId>) -> TcpStream {
        let (near, far) = connection().await;
        let told = told.clone();
        let serve = |mut stream: TcpStream| async move {
            told.send(thread::current().id()).unwrap();
            assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
            told.send(thread::current().id()).unwrap();
        };
        threads.serve(far, serve).unwrap();
        near
    }

    #[tokio::test]
    async fn a_connection_goes_to_the_thread_with_the_fewest_and_stays_there() {
        let (pool, (told, heard)) = (ConnectionThreads::start(2).unwrap(), mpsc::channel());
        let first = served(&pool, &told).await;
        let one = heard.recv().unwrap();
        let _second = served(&pool, &told).await;
        let other = heard.recv().unwrap();
        assert!(one != other && ![one, other].contains(&thread::current().id()));
        drop(first);
        assert_eq!(heard.recv().unwrap(), one);
        while Arc::strong_count(&pool.0[0].connections) > 1 {
            thread::yield_now();
        }
        let _third = served(&pool, &told).await;
        assert_eq!(heard.recv().unwrap(), one, "it has none, the other one");
    }

    #[tokio::test]
    async fn connections_end_with_their_threads() {
        let (pool, (told, heard)) = (ConnectionThreads::start(1).unwrap(), mpsc::channel());
        let mut near = served(&pool, &told).await;
        heard.recv().unwrap();
        drop(pool);
        assert_eq!(near.read(&mut [0]).await.unwrap(), 0);
    }
}
