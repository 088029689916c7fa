use std::io;

use engine_kernels::cuda::DriverError;

use super::{ChooseError, Registration};

/// Why RDMA cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RdmaError {
    /// The library that talks to adapters is not installed.
    #[error("libibverbs cannot be loaded ({reason}); install rdma-core (Debian: libibverbs1 and ibverbs-providers)")]
    NoLibrary {
        /// What the loader said.
        reason: String,
    },
    /// The kernel's list of devices cannot be read.
    #[error("cannot list RDMA devices: {0}")]
    List(io::Error),
    /// No port will do.
    #[error(transparent)]
    Choose(#[from] ChooseError),
    /// The kernel knows the device, and the library does not.
    #[error(
        "libibverbs has no driver for RDMA device {device}, or this process may not use it; install its provider \
         (Debian: ibverbs-providers), and see that /dev/infiniband is there and open to this user"
    )]
    NoProvider {
        /// The device.
        device: String,
    },
    /// The adapter would not do something.
    #[error("RDMA device {device}: cannot {action}: {source}")]
    Device {
        /// The device.
        device: String,
        /// What it was to do.
        action: &'static str,
        /// What the driver said.
        source: io::Error,
    },
    /// Memory could not be registered.
    #[error(
        "RDMA device {device}: cannot register {bytes} bytes of KV memory: {source}; if it is for want of memory, raise \
         the limit of locked memory (ulimit -l unlimited, LimitMEMLOCK=infinity, --ulimit memlock=-1)"
    )]
    Register {
        /// The device.
        device: String,
        /// How many.
        bytes: usize,
        /// What the driver said.
        source: io::Error,
    },
    /// Device memory could not be registered.
    #[error("RDMA device {device} takes no device memory by {by}: {source}")]
    RegisterDevice {
        /// The RDMA device.
        device: String,
        /// How it was tried.
        by: Registration,
        /// What the driver said.
        source: io::Error,
    },
    /// The device's driver would not do something.
    #[error(transparent)]
    Cuda(#[from] DriverError),
    /// More adapters than a session can be striped over.
    #[error("--rdma-device names more than {most} ports; a session uses at most as many")]
    TooMany {
        /// The limit.
        most: usize,
    },
    /// No memory for a scratch page.
    #[error("cannot reserve a page for RDMA reads: {0}")]
    Scratch(io::Error),
    /// The peer's offer makes no sense.
    #[error("the peer's queue pairs do not fit ours")]
    Peer,
    /// Nothing comes back from the peer.
    #[error(
        "the adapters do not reach each other with packets of their size: {0}; see that the network between them lets \
         UDP port 4791 and their MTU through"
    )]
    Unreachable(io::Error),
}
