//! Moving KV pages from the prefill worker that computed them into the decode worker that lent the room for them.
//!
//! A decode worker runs a [`SessionServer`] over its KV memory and its [`Mailbox`]; a prefill worker has one
//! [`Connector`], and through it a [`Session`] to each decode worker it has work from. A session carries messages both
//! ways (opaque here; `handoff` gives them meaning), and pages one way:
//!
//! - **cuda-ipc**, on one host, between CUDA devices: the prefill worker opens the decode worker's KV memory, and its
//!   device copies pages into it.
//! - **shm**, on one host: the prefill worker maps the decode worker's KV memory and copies pages into it. One copy,
//!   and nothing for the receiver to do.
//! - **rdma**, between hosts with adapters: the prefill worker's adapter reads its pages and the decode worker's writes
//!   them, and the word behind them, without either's processor.
//! - **tcp**, otherwise: pages are sent straight from the sender's KV memory, and the receiver reads them from the
//!   socket straight into those of its pages that it lent to this session; anything else ends the session.
//!
//! Pages in device memory that neither go from device to device nor are reached by adapters are staged: copied to
//! locked host memory at the prefill worker, sent from there by any of the other ways into locked host memory of the
//! decode worker, and copied up by its engine thread ([`StagingRing`]; `worker/decode/staging.rs`). Which adapters reach
//! a device's memory is found out at start ([`Source::on_device`], [`Target::on_device`]); the two ends need not be
//! alike.
//!
//! What is written under a loan is in place before the loan's mailbox word is, whichever way it went. When a loan can
//! no longer be written to is said by [`SessionEvent::Revoked`] for one loan and by [`SessionEvent::Fenced`] for a
//! session.

mod address;
mod auth;
mod client;
mod config;
mod copy;
mod device;
mod error;
mod frame;
mod handshake;
mod link;
mod mailbox;
mod metrics;
mod outbound;
pub mod rdma;
mod runs;
mod server;
mod socket;
#[cfg(test)]
mod tests;
mod tls;

pub use address::{SessionAddresses, host_identity, runtime_directory};
pub use auth::ClusterToken;
pub use client::{Connector, ConnectorConfig, Session, Writer};
pub use config::{Limits, ServerConfig};
pub(crate) use device::lock_for_device;
pub use device::{Exported, LocalPages, StagingRing};
pub use error::{ConnectError, Refusal, ServerError, WriteError};
pub(crate) use handshake::VERSION as SESSION_VERSION;
pub use mailbox::Mailbox;
pub use metrics::TransferMetrics;
pub use rdma::{Adapters, RdmaError, RdmaPort, Reached, Source, Target, Unreached};
pub use runs::PageCopy;
pub use server::{Peer, SessionEvent, SessionServer, Sink};
pub use tls::{ClientTls, ServerTls, SessionTls, TlsError};

/// The memory that pages are moved from or to.
pub use engine_kernels::{KvRegion as Region, RegionShape};

use serde::{Deserialize, Serialize};

/// How a session moves pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Transport {
    /// Device memory of one process opened by another of the same host.
    #[serde(rename = "cuda-ipc")]
    CudaIpc,
    /// Memory shared between two processes of a host.
    Shm,
    /// Two adapters, and a TCP connection for what is said.
    Rdma,
    /// A TCP connection.
    Tcp,
}

impl Transport {
    /// Its name in metrics, logs and worker cards.
    pub const fn name(self) -> &'static str {
        match self {
            Self::CudaIpc => "cuda-ipc",
            Self::Shm => "shm",
            Self::Rdma => "rdma",
            Self::Tcp => "tcp",
        }
    }
}
