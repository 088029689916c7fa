//! Why there is no session, no server, or no write.

use std::io;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::RdmaError;

/// Why a decode worker does not take a session. It tells the peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
pub enum Refusal {
    /// The two builds do not understand each other.
    #[error("the decode worker speaks version {ours} of the session protocol; run the same build on both")]
    Version {
        /// The decode worker's version.
        ours: u32,
    },
    /// Another worker now listens where the one that was looked for did.
    #[error("another worker listens at this address")]
    Instance,
    /// The proof of the cluster token is wrong.
    #[error("the cluster tokens differ; set the same --cluster-token on all workers")]
    Token,
    /// The unix socket's peer is another user.
    #[error("shared memory is for processes of one user, and the peer is another")]
    User,
    /// The workers serve different models, or the same in different types or layouts.
    #[error("the workers serve different models")]
    ModelKey,
    /// Pages of the two workers do not have the same size.
    #[error("the workers' KV pages have different shapes")]
    Layout,
    /// This worker's KV memory cannot be shared, or the system cannot say when a peer has ended.
    #[error("this worker cannot share its memory")]
    NotShared,
    /// Pages do not come to this worker that way.
    #[error("this worker takes no pages over {0}; see its --transport and --require-rdma")]
    Transport(String),
    /// The adapters do not get together.
    #[error("no RDMA with this worker: {0}")]
    Rdma(String),
    /// As many sessions as are allowed.
    #[error("the decode worker has as many sessions as it takes")]
    Busy,
}

/// Why a session did not come about. Each text is whole: whoever prints an error's causes after it prints none twice.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The decode worker said no.
    #[error("refused: {0}")]
    Refused(Refusal),
    /// Whoever answered does not know the cluster token.
    #[error("the peer does not know the cluster token; set the same --cluster-token on all workers")]
    Token,
    /// What came is no answer of a decode worker.
    #[error("the peer does not speak the session protocol: {0}")]
    Protocol(String),
    /// The decode worker's sessions are not encrypted, and ours have to be.
    #[error("the decode worker does not encrypt its sessions, and this worker has --session-ca")]
    Plain,
    /// The decode worker's sessions are encrypted, and ours are not.
    #[error("the decode worker encrypts its sessions; set --session-ca on this worker")]
    Encrypted,
    /// The worker gave no address that can be used from here.
    #[error("the decode worker has no address that can be reached from this host")]
    NoAddress,
    /// RDMA did not come about.
    #[error(transparent)]
    Rdma(#[from] RdmaError),
    /// Its device memory cannot be opened.
    #[error("the decode worker's device memory cannot be opened here: {0}")]
    Device(String),
    /// What leads there is not allowed.
    #[error(
        "pages could go over TCP alone, which --require-rdma or --transport forbids: {0}; 'engine doctor' says what is \
         missing"
    )]
    NoWay(&'static str),
    /// It took too long.
    #[error("no answer within the time allowed for opening a session")]
    TimedOut,
    /// It was not tried.
    #[error("the decode worker did not answer a moment ago, and is left alone for a while")]
    Silent,
    /// The network or the system.
    #[error("cannot open a session: {0}")]
    Io(io::Error),
}

impl From<Refusal> for ConnectError {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl From<io::Error> for ConnectError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Why a [`SessionServer`](super::SessionServer) did not start.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A TCP address cannot be listened on.
    #[error("cannot listen for sessions on {address}: {source}")]
    Tcp {
        /// The address.
        address: std::net::SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// A unix socket cannot be made.
    #[error("cannot listen for sessions in {path}: {source}")]
    Unix {
        /// The folder or socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Neither a TCP address nor a folder for a unix socket was given.
    #[error("a session server needs a TCP address or a folder for a unix socket")]
    Nowhere,
    /// The host's identity cannot be read.
    #[error("cannot read this host's identity: {0}")]
    Host(io::Error),
}

/// Why a write or a completion did not happen. Part of a failed write may have landed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// The session has ended.
    #[error("the session has ended")]
    Closed,
    /// The decode worker took the loan back.
    #[error("the decode worker took the loan back")]
    Revoked,
    /// This worker's device failed to copy pages.
    #[error("the device failed to copy pages; its error is in this worker's log")]
    Device,
    /// A page, layer or slot that one of the workers does not have. Nothing was written.
    #[error("a page, layer or mailbox slot out of range")]
    OutOfRange,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_printed_with_its_causes_says_nothing_twice() {
        let told = |error: ConnectError| format!("{:#}", anyhow::Error::from(error));
        assert_eq!(told(Refusal::Instance.into()), "refused: another worker listens at this address");
        assert_eq!(told(io::Error::other("no route").into()), "cannot open a session: no route");
    }
}
