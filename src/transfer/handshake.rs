//! How a session opens: who are you, prove it, here is my memory.
//!
//! ```text
//! prefill → decode   Hello       version, which server it looks for, itself, its model, the transport it wants
//!                                and over RDMA its queue pairs
//! decode  → prefill  Challenge   a random number, and proof of the cluster token
//! prefill → decode   Proof       the same from the other side
//! decode  → prefill  Welcome     limits and sizes; over shm with the files of the KV memory and of the mailbox,
//!                                over CUDA IPC with a handle of the one and the file of the other, over RDMA
//!                                with the queue pairs that lead to them
//! ```
//!
//! At each step the decode worker may answer with a refusal instead. Nothing here may be large or take long.

use std::fs::File;
use std::io;

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::auth::{PROOF_BYTES, Prover};
use super::rdma::{Endpoint, Offer};
use super::socket::Socket;
use super::{ClusterToken, ConnectError, Refusal, Transport};

/// The version of sessions' protocol: raised whenever two builds could misunderstand each other. It is a part of the
/// model key too, so that they do not meet.
pub(crate) const VERSION: u32 = 5;
/// What a handshake frame begins with; whatever else arrives is not for us.
const MAGIC: [u8; 4] = *b"EkvS";
/// The magic and the length.
const HEADER_BYTES: usize = 8;
/// Bytes of one handshake frame after its magic and length.
const FRAME_BYTES_MAX: usize = 4096;

/// What a prefill worker says first.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    /// First in the frame, and never moved, so that any two versions can tell that they differ.
    pub(super) version: u32,
    pub(super) nonce: [u8; PROOF_BYTES],
    /// The server it wants to talk to.
    pub(super) instance: String,
    pub(super) worker: u64,
    pub(super) model_key: String,
    pub(super) transport: Transport,
    pub(super) layers: u64,
    pub(super) page_bytes: u64,
    /// Its queue pairs, over RDMA.
    pub(super) rdma: Vec<Endpoint>,
}

/// What the decode worker tells about itself when it takes the session.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Welcome {
    pub(super) pages: u64,
    pub(super) slots: u32,
    pub(super) message_bytes: u32,
    pub(super) queued_bytes: u64,
    pub(super) frame_bytes: u32,
    pub(super) heartbeat_ms: u32,
    pub(super) missed_heartbeats: u32,
    /// Over CUDA IPC, what its device memory is opened with.
    pub(super) device: Option<Vec<u8>>,
    /// Over RDMA, a queue pair for each of the prefill worker's, and what it leads to.
    pub(super) rdma: Vec<Offer>,
}

#[derive(Serialize, Deserialize)]
struct Challenge {
    nonce: [u8; PROOF_BYTES],
    proof: [u8; PROOF_BYTES],
}

type Answer<T> = Result<T, Refusal>;

/// Why a connection did not become a session, as the decode worker sees it.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeError {
    /// Somebody looked whether anybody listens, as workers that start do to find sockets left behind.
    #[error("it left without a word")]
    Silent,
    /// Too many connections had yet to prove who they are, and this one had been about it for the longest.
    #[error("its place was needed for others")]
    Crowded,
    /// Whatever connected is no prefill worker.
    #[error("not the session protocol: {0}")]
    Protocol(&'static str),
    /// It was told so.
    #[error("refused: {0}")]
    Refused(#[from] Refusal),
    /// The connection failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The decode worker's side up to the point where it knows whom it talks to. `check` has the last word before the
/// proof.
pub(super) async fn accept(
    socket: &Socket,
    token: &ClusterToken,
    check: impl FnOnce(&Hello) -> Result<(), Refusal>,
) -> Result<Hello, HandshakeError> {
    let mut header = [0; HEADER_BYTES];
    let begun = match socket.read(&mut header).await {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(HandshakeError::Silent),
        read => read?,
    };
    // Whoever leaves after this has said something, and not to the end.
    socket.read_exact(&mut header[begun..]).await?;
    let hello_bytes = read_body(socket, header).await?;
    let (version, _) = postcard::take_from_bytes::<u32>(&hello_bytes).map_err(|_| HandshakeError::Protocol("hello"))?;
    if version != VERSION {
        return refuse(socket, Refusal::Version { ours: VERSION }).await;
    }
    let hello: Hello = parse(&hello_bytes)?;
    if let Err(refusal) = check(&hello) {
        return refuse(socket, refusal).await;
    }
    let nonce: [u8; PROOF_BYTES] = rand::random();
    let transcript: [&[u8]; 2] = [&hello_bytes, &nonce];
    let challenge = Challenge { nonce, proof: token.proof(Prover::Decode, &transcript) };
    write_frame(socket, &Answer::Ok(challenge), &[]).await?;
    let proof: [u8; PROOF_BYTES] = parse(&read_frame(socket, None).await?)?;
    if !token.verify(Prover::Prefill, &transcript, &proof) {
        return refuse(socket, Refusal::Token).await;
    }
    Ok(hello)
}

/// Tells the peer why not.
pub(super) async fn refuse<T>(socket: &Socket, refusal: Refusal) -> Result<T, HandshakeError> {
    write_frame(socket, &Answer::<()>::Err(refusal.clone()), &[]).await?;
    Err(refusal.into())
}

/// The decode worker's last step.
pub(super) async fn welcome(socket: &Socket, welcome: Welcome, files: &[&File]) -> io::Result<()> {
    write_frame(socket, &Answer::Ok(welcome), files).await?;
    Ok(())
}

/// The prefill worker's side, from the hello to the welcome.
pub(super) async fn connect(
    socket: &Socket,
    token: &ClusterToken,
    hello: &Hello,
) -> Result<(Welcome, Vec<File>), ConnectError> {
    prove(socket, token, hello).await?;
    welcomed(socket, hello.transport).await
}

/// Connects even to a decode worker that does not know the token.
#[cfg(test)]
pub(super) async fn connect_unchecked(
    socket: &Socket,
    token: &ClusterToken,
    hello: &Hello,
) -> Result<(Welcome, Vec<File>), ConnectError> {
    prove_if(socket, token, hello, |_| true).await?;
    welcomed(socket, hello.transport).await
}

/// The prefill worker's side, from the hello to the proof. From there on the decode worker may keep a place for the
/// session.
pub(super) async fn prove(socket: &Socket, token: &ClusterToken, hello: &Hello) -> Result<(), ConnectError> {
    prove_if(socket, token, hello, |known| known).await
}

async fn prove_if(
    socket: &Socket,
    token: &ClusterToken,
    hello: &Hello,
    trust: impl FnOnce(bool) -> bool,
) -> Result<(), ConnectError> {
    let hello_bytes = write_frame(socket, hello, &[]).await?;
    let challenge: Challenge = answer(&read_frame(socket, None).await?)?;
    let transcript: [&[u8]; 2] = [&hello_bytes, &challenge.nonce];
    if !trust(token.verify(Prover::Decode, &transcript, &challenge.proof)) {
        return Err(ConnectError::Token);
    }
    write_frame(socket, &token.proof(Prover::Prefill, &transcript), &[]).await?;
    Ok(())
}

/// The answer to the proof. Over shm the files of the decode worker's KV memory and mailbox come with it, over CUDA IPC
/// that of the mailbox.
pub(super) async fn welcomed(socket: &Socket, transport: Transport) -> Result<(Welcome, Vec<File>), ConnectError> {
    let mut files = Vec::new();
    let keep = matches!(transport, Transport::Shm | Transport::CudaIpc).then_some(&mut files);
    let welcome = answer(&read_frame(socket, keep).await?)?;
    Ok((welcome, files))
}

fn answer<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ConnectError> {
    let answer: Answer<T> = postcard::from_bytes(bytes).map_err(|error| ConnectError::Protocol(error.to_string()))?;
    Ok(answer?)
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, HandshakeError> {
    postcard::from_bytes(bytes).map_err(|_| HandshakeError::Protocol("unreadable"))
}

async fn read_frame(socket: &Socket, files: Option<&mut Vec<File>>) -> io::Result<Vec<u8>> {
    let mut header = [0; HEADER_BYTES];
    match files {
        Some(files) => socket.read_exact_with_files(&mut header, files).await?,
        None => socket.read_exact(&mut header).await?,
    }
    read_body(socket, header).await
}

/// What follows a frame's magic and length.
async fn read_body(socket: &Socket, header: [u8; HEADER_BYTES]) -> io::Result<Vec<u8>> {
    let [a, b, c, d, length @ ..] = header;
    let length = u32::from_le_bytes(length) as usize;
    if [a, b, c, d] != MAGIC || length > FRAME_BYTES_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not the session protocol"));
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body).await?;
    Ok(body)
}

async fn write_frame(socket: &Socket, body: &impl Serialize, files: &[&File]) -> io::Result<Vec<u8>> {
    let body = postcard::to_stdvec(body).map_err(io::Error::other)?;
    let mut frame = MAGIC.to_vec();
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(&body);
    match files {
        [] => socket.write_all(&frame).await?,
        files => socket.write_with_files(&frame, files).await?,
    }
    Ok(body)
}
