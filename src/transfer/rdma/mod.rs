//! Moving pages between hosts by RDMA write: the prefill worker's adapter reads its pages, and the decode worker's puts
//! them where they belong, with no processor in between.
//!
//! `devices` and `choose` say which port to use, and take no library. `library`, `adapter`, `registered`,
//! `completions` and `queue_pair` are the little of verbs that is needed, each a safe wrapper that gives back what it
//! holds; [`Source`] and [`Target`] are registered KV memory of a prefill and a decode worker, and what a session is
//! made of on either side; `reach` says whether that can be a device's memory, `echo` reads it back. `requests` cuts
//! pages into requests, and `lane` posts them.

mod adapter;
mod choose;
mod completions;
mod devices;
mod echo;
mod error;
mod lane;
mod library;
mod queue_pair;
mod reach;
mod registered;
mod requests;
mod source;
mod target;

use std::sync::Arc;

use serde::{Deserialize, Serialize};

pub use choose::{Choice, ChooseError, Wish, choose};
pub use devices::{Device, Gid, GidKind, Link, Port, PortState, SYSFS_CLASS, devices};
pub use error::RdmaError;
pub(super) use lane::{Lane, RdmaLane};
pub(super) use queue_pair::Endpoint;
pub use reach::{Reached, Registration, Unreached};
pub(super) use requests::{Piece, Requests};
pub use source::Source;
pub use target::Target;
pub(super) use target::{Granted, Offer};
#[cfg(test)]
pub(super) use {lane::CHAIN_MAX, requests::RequestLimits};

#[cfg(test)]
mod tests;

/// Adapters a session may be striped over.
pub(super) const LANES_MAX: usize = 8;

/// Ports that are open.
#[derive(Clone)]
pub struct Adapters(Vec<Arc<adapter::Adapter>>);

impl Adapters {
    /// Opens what is wished for, or the best there is.
    pub fn open(wish: &Wish) -> Result<Self, RdmaError> {
        if wish.devices.len() > LANES_MAX {
            return Err(RdmaError::TooMany { most: LANES_MAX });
        }
        Ok(Self(adapter::open(wish)?))
    }

    /// Which they are.
    pub fn choices(&self) -> impl Iterator<Item = &Choice> {
        self.0.iter().map(|adapter| &adapter.choice)
    }
}

/// Whether libibverbs can be loaded.
pub fn library() -> Result<(), RdmaError> {
    library::verbs().map(|_| ())
}

/// Whether it can be, and is new enough to register memory by a file that stands for it.
pub fn registers_dma_buf() -> bool {
    library::verbs().is_ok_and(|verbs| verbs.reg_dmabuf_mr.is_some())
}

/// A port that a decode worker can be reached through: part of its card.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RdmaPort {
    /// What it is plugged into.
    pub link: Link,
    /// Its address, written as IPv6's are.
    pub gid: String,
    /// Gigabits a second.
    pub rate_gbps: f64,
}

impl RdmaPort {
    fn of(choice: &Choice) -> Self {
        let gid = std::net::Ipv6Addr::from(choice.gid).to_string();
        Self { link: choice.link, gid, rate_gbps: choice.rate_gbps }
    }
}
