//! TLS for sessions over TCP: certificates, and one connection's records.
//!
//! rustls' interface without buffers keeps the sockets ours, so that a session's reads and writes stay cancel safe and
//! vectored. Records are decrypted where they were received, and rustls hands each out in memory of its own; from there
//! a page's bytes go straight into the page.

use std::io::{self, IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{UnbufferedServerConnection, WebPkiClientVerifier};
use rustls::unbuffered::{
    ConnectionState, EncodeError, EncryptError, InsufficientSizeError, UnbufferedStatus, WriteTraffic,
};
use rustls::{ClientConfig, RootCertStore, ServerConfig};

/// Received and not decrypted, at most: some records, each of which is a little more than 16 KiB at most.
const INCOMING_BYTES: usize = 256 << 10;
/// Encrypted and not sent, at which no more is taken.
const OUTGOING_BYTES: usize = 256 << 10;
/// Plain bytes of a record, at most.
const RECORD_BYTES: usize = 16 << 10;
/// Room for what a record has beside them.
const RECORD_OVERHEAD: usize = 256;

/// Whom to trust, and what to show: files in PEM.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SessionTls {
    /// Certificates that may have signed the peer's.
    pub ca: Option<PathBuf>,
    /// Our own certificate and its key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or is not what it should be.
    #[error("cannot use {path}: {reason}")]
    File {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The files do not go together.
    #[error("the certificates for sessions cannot be used: {0}")]
    Certificates(String),
    /// A decode worker has to show who it is.
    #[error("sessions are encrypted only with a certificate of this worker; set --session-cert and --session-key too")]
    NoIdentity,
    /// A prefill worker has to know whom to believe.
    #[error("encrypted sessions need the certificates that sign those of decode workers; set --session-ca too")]
    NoCa,
}

/// What a decode worker takes sessions with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ServerTls(Arc<ServerConfig>);

/// What a prefill worker opens sessions with. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ClientTls(Arc<ClientConfig>);

impl SessionTls {
    /// For a decode worker: with `ca`, it takes only peers that show a certificate. `None` if nothing is given.
    pub fn server(&self) -> Result<Option<ServerTls>, TlsError> {
        let Some((certificate, key)) = &self.identity else {
            return if self.ca.is_some() { Err(TlsError::NoIdentity) } else { Ok(None) };
        };
        let unfit = |error: rustls::Error| TlsError::Certificates(error.to_string());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone());
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).map_err(unfit)?;
        let builder = match &self.ca {
            None => builder.with_no_client_auth(),
            Some(ca) => {
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots(ca)?), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|e| TlsError::Certificates(e.to_string()))?)
            }
        };
        let mut config = builder.with_single_cert(certificates(certificate)?, private_key(key)?).map_err(unfit)?;
        // Sessions last; nobody comes back with a ticket.
        config.send_tls13_tickets = 0;
        Ok(Some(ServerTls(Arc::new(config))))
    }

    /// For a prefill worker: with `identity`, it shows a certificate to those that ask for one. `None` if nothing is
    /// given.
    pub fn client(&self) -> Result<Option<ClientTls>, TlsError> {
        let Some(ca) = &self.ca else {
            return if self.identity.is_some() { Err(TlsError::NoCa) } else { Ok(None) };
        };
        let unfit = |error: rustls::Error| TlsError::Certificates(error.to_string());
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let builder = builder.with_protocol_versions(&[&rustls::version::TLS13]).map_err(unfit)?;
        let builder = builder.with_root_certificates(roots(ca)?);
        let config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                builder.with_client_auth_cert(certificates(certificate)?, private_key(key)?).map_err(unfit)?
            }
        };
        Ok(Some(ClientTls(Arc::new(config))))
    }
}

fn file_error(path: &Path, reason: impl ToString) -> TlsError {
    TlsError::File { path: path.to_owned(), reason: reason.to_string() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let read = CertificateDer::pem_file_iter(path).and_then(Iterator::collect::<Result<Vec<_>, _>>);
    let read = read.map_err(|error| file_error(path, error))?;
    if read.is_empty() { Err(file_error(path, "there is no certificate in it")) } else { Ok(read) }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_file(path).map_err(|error| file_error(path, error))
}

fn roots(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots.add(certificate).map_err(|error| file_error(path, error))?;
    }
    Ok(roots)
}

/// One side of a connection.
enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// One connection's state between the socket and whoever reads and writes plain bytes. It does no I/O.
pub(super) struct Tls {
    side: Side,
    /// From the socket: `incoming[start..end]`.
    incoming: Box<[u8]>,
    start: usize,
    end: usize,
    /// Decrypted, from `plain_at` on not taken yet.
    plain: Vec<u8>,
    plain_at: usize,
    /// For the socket, from `sent` on.
    outgoing: Vec<u8>,
    sent: usize,
    /// The error after which nothing is done any more, or that the peer has closed the connection.
    over: Option<(io::ErrorKind, String)>,
}

/// Where a connection has got to with what it has received so far.
#[derive(Debug, PartialEq, Eq)]
enum Reached {
    /// Something was done, and there may be more.
    On,
    /// The handshake needs more from the peer.
    Handshake,
    /// Everything received is decrypted, and something may be sent.
    Idle,
}

impl Tls {
    pub(super) fn server(tls: &ServerTls) -> io::Result<Self> {
        let connection = UnbufferedServerConnection::new(tls.0.clone()).map_err(invalid)?;
        Ok(Self::new(Side::Server(connection)))
    }

    /// `host` is a name or an address, which the peer's certificate has to bear.
    pub(super) fn client(tls: &ClientTls, host: &str) -> io::Result<Self> {
        let name = ServerName::try_from(host.to_owned()).map_err(invalid)?;
        let connection = UnbufferedClientConnection::new(tls.0.clone(), name).map_err(invalid)?;
        Ok(Self::new(Side::Client(connection)))
    }

    fn new(side: Side) -> Self {
        let incoming = vec![0; INCOMING_BYTES].into();
        let (plain, outgoing) = (Vec::with_capacity(RECORD_BYTES), Vec::with_capacity(OUTGOING_BYTES + RECORD_BYTES));
        Self { side, incoming, start: 0, end: 0, plain, plain_at: 0, outgoing, sent: 0, over: None }
    }

    /// Goes on with the handshake as far as what was received allows. Whether it is over.
    pub(super) fn handshake(&mut self) -> io::Result<bool> {
        loop {
            match self.step(&mut Vec::new(), None)? {
                // The peer has begun to talk. What we still owe it for the handshake goes before our own first word.
                Reached::On if !self.plain.is_empty() => return Ok(true),
                Reached::On => {}
                Reached::Handshake => return Ok(false),
                Reached::Idle => return Ok(true),
            }
        }
    }

    /// Where what comes from the socket goes, followed by [`Tls::received`].
    pub(super) fn space(&mut self) -> &mut [u8] {
        if self.start > 0 {
            // Less than a record is left, or nothing.
            self.incoming.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.incoming[self.end..]
    }

    pub(super) fn received(&mut self, bytes: usize) {
        self.end += bytes;
    }

    /// Decrypts into the first of `buffers`, then the next; 0: more has to be received.
    pub(super) fn decrypt(&mut self, buffers: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut targets: Vec<&mut [u8]> = buffers.iter_mut().map(|buffer| &mut **buffer).rev().collect();
        let mut taken = place(&self.plain[self.plain_at..], &mut targets);
        self.plain_at += taken;
        while self.plain_at == self.plain.len() && !targets.is_empty() && self.start < self.end {
            let before: usize = targets.iter().map(|target| target.len()).sum();
            let reached = match self.step(&mut targets, None) {
                // What came before the error is of use.
                Err(_) if taken > 0 => break,
                reached => reached?,
            };
            taken += before - targets.iter().map(|target| target.len()).sum::<usize>();
            if reached != Reached::On {
                break;
            }
        }
        Ok(taken)
    }

    /// Encrypts from the first of `buffers`, then the next; 0: first, some has to be sent.
    pub(super) fn encrypt(&mut self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut taken = 0;
        for piece in buffers.iter().flat_map(|buffer| buffer.chunks(RECORD_BYTES)) {
            if self.outgoing.len() >= OUTGOING_BYTES {
                break;
            }
            self.encrypt_record(piece)?;
            taken += piece.len();
        }
        Ok(taken)
    }

    /// What the socket is to be given.
    pub(super) fn to_send(&self) -> &[u8] {
        &self.outgoing[self.sent..]
    }

    pub(super) fn sent(&mut self, bytes: usize) {
        self.sent += bytes;
        if self.sent == self.outgoing.len() {
            self.outgoing.clear();
            self.sent = 0;
        }
    }

    fn encrypt_record(&mut self, plain: &[u8]) -> io::Result<()> {
        loop {
            match self.step(&mut Vec::new(), Some(plain))? {
                // What has arrived comes first, and waits until somebody reads.
                Reached::On => {}
                Reached::Idle => return Ok(()),
                Reached::Handshake => return Err(invalid("the handshake is not over")),
            }
        }
    }

    /// Does what is due next: with what was received, whose bytes go to `targets` (the last of which is the first to be
    /// filled) and, if those are full, into `plain`; and if that is nothing, encrypts.
    fn step(&mut self, targets: &mut Vec<&mut [u8]>, to_encrypt: Option<&[u8]>) -> io::Result<Reached> {
        if let Some((kind, error)) = &self.over {
            return Err(io::Error::new(*kind, error.clone()));
        }
        let Self { side, incoming, start, end, plain, plain_at, outgoing, .. } = self;
        let received = &mut incoming[*start..*end];
        if *plain_at == plain.len() {
            plain.clear();
            *plain_at = 0;
        }
        let mut due = Due { targets, plain, outgoing, to_encrypt };
        let (discard, reached) = match side {
            Side::Client(connection) => due.handle(connection.process_tls_records(received)),
            Side::Server(connection) => due.handle(connection.process_tls_records(received)),
        };
        *start += discard;
        if let Err(error) = &reached {
            self.over = Some((error.kind(), error.to_string()));
            self.say_why();
        }
        reached
    }

    /// Queues the alert that tells the peer what was wrong with it. Looks once: there is no more than this alert to
    /// send, and the same bytes would fail again.
    fn say_why(&mut self) {
        let Self { side, incoming, start, end, outgoing, .. } = self;
        let received = &mut incoming[*start..*end];
        let mut due = Due { targets: &mut Vec::new(), plain: &mut Vec::new(), outgoing, to_encrypt: None };
        // The first error is the one to report.
        let _ = match side {
            Side::Client(connection) => due.handle(connection.process_tls_records(received)),
            Side::Server(connection) => due.handle(connection.process_tls_records(received)),
        };
    }
}

/// What a step of a connection works on, whichever side it is.
struct Due<'a, 'b> {
    targets: &'a mut Vec<&'b mut [u8]>,
    plain: &'a mut Vec<u8>,
    outgoing: &'a mut Vec<u8>,
    to_encrypt: Option<&'a [u8]>,
}

impl Due<'_, '_> {
    /// Also returns how much of what was received is done with.
    fn handle<Data>(
        &mut self,
        UnbufferedStatus { discard, state, .. }: UnbufferedStatus<'_, '_, Data>,
    ) -> (usize, io::Result<Reached>) {
        let reached = match state {
            Err(error) => Err(invalid(error)),
            Ok(ConnectionState::ReadTraffic(mut traffic)) => loop {
                match traffic.next_record() {
                    None => break Ok(Reached::On),
                    Some(Err(error)) => break Err(invalid(error)),
                    Some(Ok(record)) => self.take(record.payload),
                }
            },
            Ok(ConnectionState::WriteTraffic(mut traffic)) => match self.to_encrypt {
                None => Ok(Reached::Idle),
                Some(plain) => encrypt(&mut traffic, plain, self.outgoing).map(|()| Reached::Idle),
            },
            Ok(state) => send(state, self.outgoing),
        };
        (discard, reached)
    }

    fn take(&mut self, payload: &[u8]) {
        // What came before and was not taken yet is read first.
        let placed = if self.plain.is_empty() { place(payload, self.targets) } else { 0 };
        self.plain.extend_from_slice(&payload[placed..]);
    }
}

fn encrypt<Data>(traffic: &mut WriteTraffic<'_, Data>, plain: &[u8], outgoing: &mut Vec<u8>) -> io::Result<()> {
    let start = outgoing.len();
    outgoing.resize(start + plain.len() + RECORD_OVERHEAD, 0);
    let written = match traffic.encrypt(plain, &mut outgoing[start..]) {
        Err(EncryptError::InsufficientSize(InsufficientSizeError { required_size })) => {
            outgoing.resize(start + required_size, 0);
            traffic.encrypt(plain, &mut outgoing[start..])
        }
        written => written,
    };
    outgoing.truncate(start + *written.as_ref().unwrap_or(&0));
    written.map(|_| ()).map_err(invalid)
}

/// What the protocol itself has to say.
fn send<Data>(state: ConnectionState<'_, '_, Data>, outgoing: &mut Vec<u8>) -> io::Result<Reached> {
    match state {
        ConnectionState::EncodeTlsData(mut data) => {
            let start = outgoing.len();
            let required = match data.encode(&mut []) {
                Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => required_size,
                Err(error) => return Err(invalid(error)),
                Ok(_) => 0,
            };
            outgoing.resize(start + required, 0);
            if required > 0 {
                data.encode(&mut outgoing[start..]).map_err(invalid)?;
            }
            Ok(Reached::On)
        }
        // It is in `outgoing`, and goes before anything else.
        ConnectionState::TransmitTlsData(data) => {
            data.done();
            Ok(Reached::On)
        }
        ConnectionState::BlockedHandshake => Ok(Reached::Handshake),
        ConnectionState::PeerClosed | ConnectionState::Closed => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Err(invalid("early data, which was not asked for")),
    }
}

/// Fills `targets`, the last one first, and drops those that are full. How much of `bytes` went there.
fn place(bytes: &[u8], targets: &mut Vec<&mut [u8]>) -> usize {
    let mut placed = 0;
    while let Some(target) = targets.pop() {
        let length = target.len().min(bytes.len() - placed);
        let (now, later) = target.split_at_mut(length);
        now.copy_from_slice(&bytes[placed..placed + length]);
        placed += length;
        if !later.is_empty() {
            targets.push(later);
            break;
        }
    }
    placed
}

fn invalid(error: impl ToString) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}
