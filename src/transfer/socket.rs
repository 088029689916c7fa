//! One connection, unix or TCP: non-blocking, vectored, able to pass files and to say who the peer is.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use rustix::net::sockopt;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    Shutdown,
};
use rustix::process::{PidfdFlags, pidfd_open};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::TcpStream;

/// Most elements given to one system call.
pub(super) const VECTOR_MAX: usize = 64;

/// Buffers of a TCP connection that does not leave the host, each way.
const LOCAL_BUFFER_BYTES: usize = 512 << 10;

/// A connected stream socket. Each method makes one system call once the socket is ready, and is cancel safe: what was not
/// returned did not happen.
pub(super) struct Socket(AsyncFd<OwnedFd>);

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
        register(socket.into(), Interest::READABLE | Interest::WRITABLE).map(Self)
    }

    /// Takes over a TCP connection: what is written goes out at once. Between two processes of a host the kernel's buffers are
    /// kept small enough for what one has copied into them to be in the cache when the other copies it out; left to itself, the
    /// kernel lets them grow to megabytes, which was measured to be a quarter slower. Between hosts they are its business.
    pub(super) fn tcp(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        if stream.peer_addr()?.ip() == stream.local_addr()?.ip() {
            sockopt::set_socket_send_buffer_size(&stream, LOCAL_BUFFER_BYTES)?;
            sockopt::set_socket_recv_buffer_size(&stream, LOCAL_BUFFER_BYTES)?;
        }
        Self::new(stream.into_std()?)
    }

    /// Reads into the first of `buffers`, then the next; never returns 0, the end is an error.
    pub(super) async fn read_vectored(&self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let read = self.0.async_io(Interest::READABLE, |fd| Ok(rustix::io::readv(fd, buffers)?)).await?;
        not_the_end(read)
    }

    /// Reads some bytes; never returns 0, the end is an error.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.0.async_io(Interest::READABLE, |fd| Ok(rustix::io::read(fd, &mut *buffer)?)).await?;
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

    /// Writes from the first of `buffers`, then the next.
    pub(super) async fn write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let send = |fd: &OwnedFd| {
            let mut nothing = SendAncillaryBuffer::default();
            Ok(rustix::net::sendmsg(fd, buffers, &mut nothing, SendFlags::NOSIGNAL)?)
        };
        self.0.async_io(Interest::WRITABLE, send).await
    }

    /// Writes all of `bytes`. Not cancel safe.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = self.write_vectored(&[IoSlice::new(bytes)]).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }

    /// Writes all of `bytes`, and two open files with them, which the peer gets as its own. Unix sockets only.
    pub(super) async fn write_with_files(&self, bytes: &[u8], files: [&File; 2]) -> io::Result<()> {
        let files = files.map(|file| file.as_fd());
        let send = |fd: &OwnedFd| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !control.push(SendAncillaryMessage::ScmRights(&files)) {
                return Err(io::Error::other("no room for two files in a control message"));
            }
            Ok(rustix::net::sendmsg(fd, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
        };
        let written = self.0.async_io(Interest::WRITABLE, send).await?;
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
            let read = not_the_end(self.0.async_io(Interest::READABLE, receive).await?)?;
            buffer = &mut buffer[read..];
        }
        Ok(())
    }

    /// Tells the peer that nothing more will come; what it still says can be read.
    pub(super) fn end_writing(&self) {
        // An error means that the connection is gone, and with it the need to say so.
        let _ = rustix::net::shutdown(self.0.get_ref(), Shutdown::Write);
    }

    /// Who connected this unix socket.
    pub(super) fn peer(&self) -> io::Result<PeerProcess> {
        let fd = self.0.get_ref();
        let peer = sockopt::socket_peercred(fd)?;
        // The second way is for kernels before 6.5. There the number could by now be another process', if the peer has ended
        // already; the handshake goes on only if it answers after this.
        let ended = peer_pidfd(fd).or_else(|_| Ok(pidfd_open(peer.pid, PidfdFlags::empty())?));
        let ended = ended.and_then(|fd| register(fd, Interest::READABLE)).ok();
        Ok(PeerProcess { user: peer.uid.as_raw(), ended })
    }
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
