//! Whether adapters read and write pages in a device's memory themselves, or these are staged through the host's: found
//! out once, at start, for each adapter.

use std::fmt;

use engine_kernels::DeviceRegion;
use engine_kernels::cuda::{AdapterAccess, DriverError};

use super::echo::Echo;
use super::registered::{Access, Registered};
use super::{Adapters, RdmaError};

/// How device memory is registered with an adapter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registration {
    /// As a file that the device's driver has made for it, and the kernel hands to the adapter's.
    DmaBuf,
    /// By its address, as host memory is: the module nvidia-peermem tells the adapter's driver what lies there.
    PeerMemory,
}

impl fmt::Display for Registration {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::DmaBuf => "dma-buf",
            Self::PeerMemory => "nvidia-peermem",
        })
    }
}

/// What adapters do with pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Use {
    /// A prefill worker's are read.
    Read,
    /// A decode worker's are written.
    Written,
}

/// Adapters reach pages in device memory, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reached {
    /// How it is registered; with several adapters, with the last of them.
    pub by: Registration,
    /// What they wrote takes a flush ([`DeviceRegion::flush`]) before the device may be told to use it.
    pub flush: bool,
}

impl fmt::Display for Reached {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.by, if self.flush { ", flushed before use" } else { "" })
    }
}

/// Why adapters do not reach pages in device memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unreached {
    /// Nobody wants them to.
    #[error("--rdma-device-memory never")]
    Unwanted,
    /// It cannot be had.
    #[error("{0}")]
    Refused(String),
}

/// Why that can be.
const WHY: &str = "; see that PCIe's access control (ACS), an IOMMU or a virtual machine lets the two reach each other";

impl From<RdmaError> for Unreached {
    fn from(error: RdmaError) -> Self {
        Self::Refused(error.to_string())
    }
}

impl From<DriverError> for Unreached {
    fn from(error: DriverError) -> Self {
        Self::Refused(error.to_string())
    }
}

/// Registers the memory in the first way that the device offers and that works, if what is written there can be waited
/// for.
fn register_first<T>(
    access: AdapterAccess,
    used: Use,
    flush: impl Fn() -> Result<(), Unreached>,
    register: impl Fn(Registration) -> Result<T, Unreached>,
) -> Result<(T, Reached), Unreached> {
    let refused = |reason: &str| Unreached::Refused(reason.to_owned());
    let ways = [(Registration::DmaBuf, access.dma_buf), (Registration::PeerMemory, access.by_address)];
    let offered: Vec<_> = ways.into_iter().filter(|(_, offered)| *offered).map(|(by, _)| by).collect();
    if offered.is_empty() {
        return Err(refused("the device's driver lets no adapter reach its memory"));
    }
    let takes_flush = takes_flush(access, used);
    if takes_flush && !access.flushes {
        return Err(refused("the device neither orders what adapters write to it nor can be made to wait for it"));
    }
    if takes_flush {
        flush()?;
    }
    let mut reasons = Vec::new();
    for by in offered {
        match register(by) {
            Ok(memory) => return Ok((memory, Reached { by, flush: takes_flush })),
            Err(error) => reasons.push(error.to_string()),
        }
    }
    Err(refused(&reasons.join("; ")))
}

/// Whether what adapters write takes a flush.
fn takes_flush(access: AdapterAccess, used: Use) -> bool {
    used == Use::Written && !access.ordered
}

/// What there is of pages in device memory for one adapter.
pub(super) struct OnDevice {
    /// Of the spare bytes.
    pub(super) echo: Echo,
    pub(super) pages: Registered,
    /// Bytes of the same memory that hold nothing.
    pub(super) spare: Registered,
}

/// Registers pages in device memory, and the spare bytes behind them, with all adapters: each in the first way that
/// works. An error if there is one that does not reach them, as a session is striped over all.
pub(super) fn reach(
    adapters: &Adapters,
    pages: &DeviceRegion,
    used: Use,
) -> Result<(Vec<OnDevice>, Reached), Unreached> {
    // The spare bytes are reached over a connection of the adapter with itself at a prefill worker too, and over no
    // other: its other queue pairs let peers do nothing.
    let allowed = match used {
        Use::Read => [Access::Own, Access::WrittenAndRead],
        Use::Written => [Access::Written, Access::WrittenAndRead],
    };
    let access = pages.adapter_access()?;
    let flush = || pages.flush().map_err(Unreached::from);
    let (mut lanes, mut last) = (Vec::new(), Err(Unreached::Refused("there is no adapter".to_owned())));
    for adapter in &adapters.0 {
        let register = |by: Registration| {
            let [registered, spare] = Registered::on_device(adapter, pages, by, allowed)?;
            let echo = Echo::new(&spare)?;
            // What can be registered need not be reached: something on the way between the two may keep them apart.
            let same = echo.reads_what_is_there(pages)?
                && (used == Use::Read || echo.writes_what_is_there(pages, takes_flush(access, used))?);
            let device = &adapter.choice.device;
            let wrong = || {
                Unreached::Refused(format!(
                    "RDMA device {device} reads or writes other bytes by {by} than are there{WHY}"
                ))
            };
            same.then_some(OnDevice { echo, pages: registered, spare }).ok_or_else(wrong)
        };
        let (lane, reached) = register_first(access, used, flush, register)?;
        lanes.push(lane);
        last = Ok(reached);
    }
    last.map(|reached| (lanes, reached))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::Registration::{DmaBuf, PeerMemory};
    use super::*;

    /// A device on which everything may work, and that takes a flush.
    const ALL: AdapterAccess = AdapterAccess { dma_buf: true, by_address: true, ordered: false, flushes: true };

    fn refused(reason: &str) -> Unreached {
        Unreached::Refused(reason.to_owned())
    }

    /// What comes of it where these ways work, if flushing does; and what was tried.
    fn reached(
        access: AdapterAccess,
        used: Use,
        flushes: bool,
        works: &[Registration],
    ) -> (Result<Reached, Unreached>, Vec<&'static str>) {
        let tried = RefCell::new(Vec::new());
        let flush = || {
            tried.borrow_mut().push("flush");
            flushes.then_some(()).ok_or_else(|| refused("no flush"))
        };
        let register = |by| {
            let (name, reason) = match by {
                DmaBuf => ("dma-buf", "no dma-buf"),
                PeerMemory => ("peermem", "no module"),
            };
            tried.borrow_mut().push(name);
            works.contains(&by).then_some(by).ok_or_else(|| refused(reason))
        };
        let result = register_first(access, used, flush, register);
        let result = result.map(|(registered, reached)| {
            assert_eq!(registered, reached.by, "what was registered is kept");
            reached
        });
        (result, tried.into_inner())
    }

    #[test]
    fn dma_buf_is_tried_before_nvidia_peermem_and_one_of_them_is_enough() {
        let by = |by| Ok(Reached { by, flush: false });
        assert_eq!(reached(ALL, Use::Read, true, &[DmaBuf, PeerMemory]), (by(DmaBuf), vec!["dma-buf"]));
        assert_eq!(reached(ALL, Use::Read, true, &[PeerMemory]), (by(PeerMemory), vec!["dma-buf", "peermem"]));
    }

    #[test]
    fn what_the_driver_does_not_offer_is_not_tried() {
        let by_address = AdapterAccess { dma_buf: false, ..ALL };
        assert_eq!(reached(by_address, Use::Read, true, &[DmaBuf]), (Err(refused("no module")), vec!["peermem"]));
        let by_file = AdapterAccess { by_address: false, ..ALL };
        assert_eq!(reached(by_file, Use::Read, true, &[PeerMemory]), (Err(refused("no dma-buf")), vec!["dma-buf"]));
        let neither = AdapterAccess { dma_buf: false, by_address: false, ..ALL };
        let (result, tried) = reached(neither, Use::Written, true, &[DmaBuf, PeerMemory]);
        assert!(result.unwrap_err().to_string().contains("lets no adapter reach") && tried.is_empty());
    }

    #[test]
    fn pages_are_staged_with_every_reason_told_if_neither_way_works() {
        let (result, tried) = reached(ALL, Use::Written, true, &[]);
        assert_eq!((result, tried), (Err(refused("no dma-buf; no module")), vec!["flush", "dma-buf", "peermem"]));
    }

    #[test]
    fn what_adapters_write_takes_a_flush_that_works_unless_the_device_keeps_their_order() {
        let all = &[DmaBuf, PeerMemory];
        let by = |flush| Ok(Reached { by: DmaBuf, flush });
        assert_eq!(reached(ALL, Use::Written, true, all), (by(true), vec!["flush", "dma-buf"]));
        assert_eq!(reached(ALL, Use::Written, false, all), (Err(refused("no flush")), vec!["flush"]));
        let ordered = AdapterAccess { ordered: true, flushes: false, ..ALL };
        assert_eq!(reached(ordered, Use::Written, false, all), (by(false), vec!["dma-buf"]));
        let unordered = AdapterAccess { flushes: false, ..ALL };
        let (result, tried) = reached(unordered, Use::Written, true, all);
        assert!(result.unwrap_err().to_string().contains("neither orders") && tried.is_empty());
        // Who only reads needs none of it.
        assert_eq!(reached(unordered, Use::Read, false, all), (by(false), vec!["dma-buf"]));
    }

    #[test]
    fn how_it_is_reached_is_told_in_a_few_words() {
        assert_eq!(Reached { by: DmaBuf, flush: true }.to_string(), "dma-buf, flushed before use");
        assert_eq!(Reached { by: PeerMemory, flush: false }.to_string(), "nvidia-peermem");
    }
}
