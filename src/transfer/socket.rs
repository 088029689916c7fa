//! One connection, unix or TCP: non-blocking, vectored, able to pass files and to say who the peer is; over TCP
//! encrypted, if that is wanted.

use std::fs::File;
use std::hint::spin_loop;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    Shutdown,
};
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

use super::tls::Tls;

/// Most elements given to one system call.
pub(super) const VECTOR_MAX: usize = 64;

/// The congestion control of a TCP connection that does not leave the host. Every kernel has it.
const LOCAL_CONGESTION: &str = "reno";

/// How long to look for more of what a peer on this host is sending before sleeping until it comes.
const LOCAL_SPIN: Duration = Duration::from_micros(50);

/// A connected stream socket. Each method makes one system call once the socket is ready (or some, awake, until it is),
/// and is cancel safe: what was not returned did not happen.
pub(super) struct Socket {
    fd: AsyncFd<OwnedFd>,
    /// How long reading pages waits awake, unless they are encrypted.
    spin: Duration,
    /// The last read did.
    spun: AtomicBool,
    /// Never locked while waiting.
    tls: Option<Mutex<Tls>>,
}

/// Who is at the other end of a unix socket.
pub(super) struct PeerProcess {
    /// Its effective user when it connected.
    pub(super) user: u32,
    /// A handle that becomes readable when the process, all threads of it, has ended.
    pub(super) ended: Option<AsyncFd<OwnedFd>>,
}

impl Socket {
    /// Takes over a connected socket that does not block. Needs tokio's context.
    pub(super) fn new(socket: impl Into<OwnedFd>) -> io::Result<Self> {
        let fd = register(socket.into(), Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { fd, spin: Duration::ZERO, spun: AtomicBool::new(false), tls: None })
    }

    /// Agrees on keys with the peer; from then on everything is encrypted.
    pub(super) async fn encrypted(mut self, tls: Tls) -> io::Result<Self> {
        let tls = self.tls.insert(Mutex::new(tls));
        loop {
            // What is wrong with the peer is told to it as well.
            let over = locked(tls).handshake();
            while !locked(tls).to_send().is_empty() {
                send_encrypted(&self.fd, tls).await?;
            }
            if over? {
                return Ok(self);
            }
            receive_encrypted(&self.fd, tls).await?;
        }
    }

    /// Takes over a TCP connection: what is written goes out at once.
    ///
    /// Between two processes of a host nothing is congested, and whoever reads is the other half of a copy. A system
    /// whose congestion control paces what it sends at the rate that it measures (BBR, the default of some) does so
    /// there too, by a timer, which was measured to cost more than half of the speed. And a reader that sleeps whenever
    /// it has caught up has to be woken on another core each time, while what was sent leaves the caches: so it stays
    /// awake for a moment, if it does not keep the only core from the sender. Between hosts, either is the system's
    /// business.
    pub(super) fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let local = stream.peer_addr()?.ip() == stream.local_addr()?.ip();
        if local && let Err(error) = sockopt::set_tcp_congestion(&stream, LOCAL_CONGESTION) {
            tracing::debug!(%error, "a connection within this host keeps the system's congestion control");
        }
        let spin = if local && available_parallelism().is_ok_and(|cores| cores.get() > 1) {
            LOCAL_SPIN
        } else {
            Duration::ZERO
        };
        Ok(Self { spin, ..Self::new(stream.into_std()?)? })
    }

    /// Reads into the first of `buffers`, then the next; never returns 0, the end is an error.
    pub(super) async fn read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        if let Some(tls) = &self.tls {
            return self.read_encrypted(tls, buffers).await;
        }
        // A sender that trickles must not keep this thread from others' work: after each moment awake it is their turn.
        if self.spun.swap(false, Ordering::Relaxed) {
            tokio::task::yield_now().await;
        }
        let read = |fd: &OwnedFd| {
            let mut caught_up: Option<Instant> = None;
            loop {
                match rustix::io::readv(fd, buffers) {
                    Err(Errno::AGAIN) if caught_up.get_or_insert_with(Instant::now).elapsed() < self.spin => {
                        self.spun.store(true, Ordering::Relaxed);
                        spin_loop();
                    }
                    read => return Ok(read?),
                }
            }
        };
        not_the_end(self.fd.async_io(Interest::READABLE, read).await?)
    }

    /// Reads some bytes; never returns 0, the end is an error.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if let Some(tls) = &self.tls {
            return self.read_encrypted(tls, &mut [IoSliceMut::new(buffer)]).await;
        }
        let read = self.fd.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?)).await?;
        not_the_end(read)
    }

    /// Fills `buffer`. Not cancel safe.
    pub(super) async fn read_exact(&self, mut buffer: &mut [u8]) -> io::Result<()> {
        while !buffer.is_empty() {
            let read = self.read(buffer).await?;
            buffer = &mut buffer[read..];
        }
        Ok(())
    }

    /// What is decrypted; meanwhile, what was encrypted goes out, since nobody else may be there to send it.
    async fn read_encrypted(&self, tls: &Mutex<Tls>, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        loop {
            let (read, sending) = {
                let mut tls = locked(tls);
                let read = tls.decrypt(buffers);
                if read.is_err() {
                    // So that the peer learns why, if the socket takes it at once.
                    let _ = rustix::net::send(self.fd.get_ref(), tls.to_send(), SendFlags::NOSIGNAL);
                }
                (read?, !tls.to_send().is_empty())
            };
            if read > 0 {
                return Ok(read);
            }
            tokio::select! {
                received = receive_encrypted(&self.fd, tls) => received?,
                sent = send_encrypted(&self.fd, tls), if sending => sent?,
            }
        }
    }

    /// Writes from the first of `buffers`, then the next. Encrypted, it may not have left when this returns; reading
    /// sends it.
    pub(super) async fn write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        if let Some(tls) = &self.tls {
            while !locked(tls).to_send().is_empty() {
                send_encrypted(&self.fd, tls).await?;
            }
            let mut tls = locked(tls);
            let taken = tls.encrypt(buffers)?;
            // Whatever the system does not take now goes later.
            if let Ok(sent) = rustix::net::send(self.fd.get_ref(), tls.to_send(), SendFlags::NOSIGNAL) {
                tls.sent(sent);
            }
            return Ok(taken);
        }
        let send = |fd: &OwnedFd| {
            let mut nothing = SendAncillaryBuffer::default();
            Ok(rustix::net::sendmsg(fd, buffers, &mut nothing, SendFlags::NOSIGNAL)?)
        };
        self.fd.async_io(Interest::WRITABLE, send).await
    }

    /// Writes all of `bytes`. Not cancel safe.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.write_vectored(&[IoSlice::new(bytes)]).await?;
            bytes = &bytes[written..];
        }
        if let Some(tls) = &self.tls {
            while !locked(tls).to_send().is_empty() {
                send_encrypted(&self.fd, tls).await?;
            }
        }
        Ok(())
    }

    /// Writes all of `bytes`, and one or two open files with them, which the peer gets as its own. Unix sockets only.
    pub(super) async fn write_with_files(&self, bytes: &[u8], files: &[&File]) -> io::Result<()> {
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        let send = |fd: &OwnedFd| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&files)) {
                return Err(io::Error::other("no room for the files in a control message"));
            }
            Ok(rustix::net::sendmsg(fd, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
        };
        let written = self.fd.async_io(Interest::WRITABLE, send).await?;
        self.write_all(&bytes[written..]).await
    }

    /// Fills `buffer`, and keeps the files that come with its bytes. Unix sockets only; not cancel safe.
    pub(super) async fn read_exact_with_files(&self, mut buffer: &mut [u8], files: &mut Vec<File>) -> io::Result<()> {
        while !buffer.is_empty() {
            let receive = |fd: &OwnedFd| {
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                let message =
                    rustix::net::recvmsg(fd, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
                for part in control.drain() {
                    if let RecvAncillaryMessage::ScmRights(received) = part {
                        files.extend(received.map(File::from));
                    }
                }
                Ok(message.bytes)
            };
            let read = not_the_end(self.fd.async_io(Interest::READABLE, receive).await?)?;
            buffer = &mut buffer[read..];
        }
        Ok(())
    }

    /// Tells the peer that nothing more will come; what it still says can be read.
    pub(super) fn end_writing(&self) {
        // An error means that the connection is gone, and with it the need to say so.
        let _ = rustix::net::shutdown(self.fd.get_ref(), Shutdown::Write);
    }

    /// Who connected this unix socket.
    pub(super) fn peer(&self) -> io::Result<PeerProcess> {
        let fd = self.fd.get_ref();
        let peer = sockopt::socket_peercred(fd)?;
        // The second way is for kernels before 6.5. There the number could by now be another process', if the peer has
        // ended already; the handshake goes on only if it answers after this.
        let ended = peer_pidfd(fd).or_else(|_| Ok(pidfd_open(peer.pid, PidfdFlags::empty())?));
        let ended = ended.and_then(|fd| register(fd, Interest::READABLE)).ok();
        Ok(PeerProcess { user: peer.uid.as_raw(), ended })
    }
}

fn locked(tls: &Mutex<Tls>) -> MutexGuard<'_, Tls> {
    // A panic in between ends the session's task, and nobody looks again.
    tls.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Makes one read of what is to be decrypted. Cancel safe.
async fn receive_encrypted(fd: &AsyncFd<OwnedFd>, tls: &Mutex<Tls>) -> io::Result<()> {
    let receive = |fd: &OwnedFd| {
        let mut tls = locked(tls);
        let received = rustix::io::read(fd, tls.space())?;
        tls.received(received);
        Ok(received)
    };
    not_the_end(fd.async_io(Interest::READABLE, receive).await?).map(|_| ())
}

/// Makes one write of what was encrypted. Cancel safe.
async fn send_encrypted(fd: &AsyncFd<OwnedFd>, tls: &Mutex<Tls>) -> io::Result<()> {
    let send = |fd: &OwnedFd| {
        let mut tls = locked(tls);
        let sent = rustix::net::send(fd, tls.to_send(), SendFlags::NOSIGNAL)?;
        tls.sent(sent);
        Ok(())
    };
    fd.async_io(Interest::WRITABLE, send).await
}

fn register(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an owned descriptor stays open and the same as long as the `AsyncFd` owns it; none is taken out of it.
    let registered = unsafe { AsyncFd::register_with_interest(fd, interest) };
    Ok(registered?)
}

fn not_the_end(read: usize) -> io::Result<usize> {
    if read == 0 { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(read) }
}

/// A handle to the process that connected a unix socket: `SO_PEERPIDFD`, Linux 6.5.
fn peer_pidfd(socket: &OwnedFd) -> io::Result<OwnedFd> {
    const SO_PEERPIDFD: libc::c_int = 77;
    let mut pidfd: libc::c_int = -1;
    let mut length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the system writes at most `length` bytes, the size of what `pidfd` points to.
    let result = unsafe {
        let value = (&raw mut pidfd).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_PEERPIDFD, value, &raw mut length)
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    if pidfd < 0 {
        return Err(io::ErrorKind::NotFound.into());
    }
    // SAFETY: the system has just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(pidfd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn pair() -> [Socket; 2] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (connected, accepted) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        [connected.unwrap(), accepted.unwrap().0].map(|stream| Socket::tcp(stream).unwrap())
    }

    #[tokio::test]
    async fn what_does_not_leave_the_host_does_without_the_system_s_congestion_control() {
        for socket in pair().await {
            assert_eq!(sockopt::tcp_congestion(socket.fd.get_ref()).unwrap(), LOCAL_CONGESTION);
        }
    }

    #[tokio::test]
    async fn a_reader_that_waits_awake_sleeps_in_the_end() {
        let [sender, receiver] = pair().await;
        let mut buffer = [0; 3];
        sender.write_all(b"ab").await.unwrap();
        assert_eq!(receiver.read_vectored(&mut [IoSliceMut::new(&mut buffer)]).await.unwrap(), 2);
        // On this one thread nothing is sent before the reader sleeps.
        let mut rest = [IoSliceMut::new(&mut buffer)];
        let (read, sent) = tokio::join!(receiver.read_vectored(&mut rest), sender.write_all(b"c"));
        assert_eq!((read.unwrap(), sent.unwrap()), (1, ()));
        drop(sender);
        let ended = receiver.read_vectored(&mut [IoSliceMut::new(&mut buffer)]).await;
        assert_eq!(ended.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[tokio::test]
    async fn what_may_leave_the_host_is_the_system_s_business() {
        // As far as addresses tell.
        let [here, there] = ["127.0.0.1:0", "127.0.0.2:0"].map(|address| address.parse().unwrap());
        let listener = tokio::net::TcpListener::bind::<std::net::SocketAddr>(there).await.unwrap();
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.bind(here).unwrap();
        let stream = socket.connect(listener.local_addr().unwrap()).await.unwrap();
        let of_the_system = sockopt::tcp_congestion(&stream).unwrap();
        let socket = Socket::tcp(stream).unwrap();
        assert_eq!(sockopt::tcp_congestion(socket.fd.get_ref()).unwrap(), of_the_system);
        assert_eq!(socket.spin, Duration::ZERO);
    }

    #[tokio::test]
    async fn whoever_has_waited_awake_lets_others_go_first() {
        let [sender, mut receiver] = pair().await;
        // Whatever cores there are.
        receiver.spin = LOCAL_SPIN;
        let mut buffer = [0; 3];
        let mut buffer = [IoSliceMut::new(&mut buffer)];
        for has_waited in [false, true] {
            sender.write_all(b"a").await.unwrap();
            drop(receiver.fd.readable().await.unwrap());
            {
                let mut reading = std::pin::pin!(receiver.read_vectored(&mut buffer));
                assert_eq!(futures::poll!(&mut reading).is_pending(), has_waited);
                if has_waited {
                    assert_eq!(reading.await.unwrap(), 1);
                }
            }
            let (read, sent) = tokio::join!(receiver.read_vectored(&mut buffer), sender.write_all(b"b"));
            assert_eq!((read.unwrap(), sent.unwrap()), (1, ()));
        }
    }
}
