//! Whether adapters read and write pages in a device's memory themselves, or these are staged through the host's: found
//! out once, at start, for each adapter. What to try next, and what follows from it, is a function of what is known.

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
    /// How it is registered.
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
#[error("{0}")]
pub struct Unreached(String);

/// Why that can be.
const WHY: &str = "; see that PCIe's access control (ACS), an IOMMU or a virtual machine lets the two reach each other";

/// What an operator can say.
const UNWANTED: &str = "--rdma-device-memory never";

impl Unreached {
    /// Because nobody wants it.
    pub fn unwanted() -> Self {
        Self(UNWANTED.to_owned())
    }

    /// Whether somebody wants it so.
    pub fn is_wanted(&self) -> bool {
        self.0 == UNWANTED
    }
}

impl From<RdmaError> for Unreached {
    fn from(error: RdmaError) -> Self {
        Self(error.to_string())
    }
}

impl From<DriverError> for Unreached {
    fn from(error: DriverError) -> Self {
        Self(error.to_string())
    }
}

/// Something to try.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Attempt {
    /// Waiting for adapters' writes.
    Flush,
    /// Registering the memory, and reading and writing some of it.
    Register(Registration),
}

/// What follows from what is known.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    /// Find out more.
    Try(Attempt),
    /// Adapters reach the memory.
    Reached(Reached),
    /// They do not.
    Unreached(Unreached),
}

/// What came of an attempt.
type Tried = (Attempt, Result<(), Unreached>);

/// What to do next, if the device says this of itself and so much was tried.
fn next(access: AdapterAccess, used: Use, tried: &[Tried]) -> Next {
    let came_of = |attempt| tried.iter().find(|(of, _)| *of == attempt).map(|(_, result)| result);
    let unreached = |reason: &str| Next::Unreached(Unreached(reason.to_owned()));
    let flush = takes_flush(access, used);
    if flush {
        if !access.flushes {
            return unreached("the device neither orders what adapters write to it nor can be made to wait for it");
        }
        match came_of(Attempt::Flush) {
            None => return Next::Try(Attempt::Flush),
            Some(Err(error)) => return Next::Unreached(error.clone()),
            Some(Ok(())) => {}
        }
    }
    let ways = [(Registration::DmaBuf, access.dma_buf), (Registration::PeerMemory, access.by_address)];
    let mut reasons = Vec::new();
    for (by, _) in ways.into_iter().filter(|(_, offered)| *offered) {
        match came_of(Attempt::Register(by)) {
            None => return Next::Try(Attempt::Register(by)),
            Some(Ok(())) => return Next::Reached(Reached { by, flush }),
            Some(Err(error)) => reasons.push(error.to_string()),
        }
    }
    match reasons.is_empty() {
        true => unreached("the device's driver lets no adapter reach its memory"),
        false => unreached(&reasons.join("; ")),
    }
}

/// Whether what adapters write takes a flush.
fn takes_flush(access: AdapterAccess, used: Use) -> bool {
    used == Use::Written && !access.ordered
}

/// Tries until it is known, and keeps what was registered.
fn find_out<T>(
    access: AdapterAccess,
    used: Use,
    flush: impl Fn() -> Result<(), Unreached>,
    register: impl Fn(Registration) -> Result<T, Unreached>,
) -> Result<(T, Reached), Unreached> {
    let (mut tried, mut registered) = (Vec::new(), None);
    loop {
        match next(access, used, &tried) {
            Next::Try(attempt) => {
                let result = match attempt {
                    Attempt::Flush => flush(),
                    Attempt::Register(by) => register(by).map(|memory| registered = Some(memory)),
                };
                tried.push((attempt, result));
            }
            Next::Reached(reached) => {
                // It is reached because it was registered.
                return registered.map(|memory| (memory, reached)).ok_or(Unreached(String::new()));
            }
            Next::Unreached(error) => return Err(error),
        }
    }
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
    let (mut lanes, mut last) = (Vec::new(), Err(Unreached("there is no adapter".to_owned())));
    for adapter in &adapters.0 {
        let register = |by: Registration| {
            let [registered, spare] = Registered::on_device(adapter, pages, by, allowed)?;
            let echo = Echo::new(&spare)?;
            // What can be registered need not be reached: something on the way between the two may keep them apart.
            let same = echo.reads_what_is_there(pages)?
                && (used == Use::Read || echo.writes_what_is_there(pages, takes_flush(access, used))?);
            let device = &adapter.choice.device;
            let wrong =
                || Unreached(format!("RDMA device {device} reads or writes other bytes by {by} than are there{WHY}"));
            same.then_some(OnDevice { echo, pages: registered, spare }).ok_or_else(wrong)
        };
        let (lane, reached) = find_out(access, used, flush, register)?;
        lanes.push(lane);
        last = Ok(reached);
    }
    last.map(|reached| (lanes, reached))
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::Attempt::{Flush, Register};
    use super::Registration::{DmaBuf, PeerMemory};
    use super::*;

    /// A device on which everything may work, and that takes a flush.
    const ALL: AdapterAccess = AdapterAccess { dma_buf: true, by_address: true, ordered: false, flushes: true };

    fn failed(reason: &str) -> Result<(), Unreached> {
        Err(Unreached(reason.to_owned()))
    }

    fn unreached(next: &Next) -> &str {
        match next {
            Next::Unreached(Unreached(reason)) => reason,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn dma_buf_is_tried_before_nvidia_peermem_and_one_of_them_is_enough() {
        assert_eq!(next(ALL, Use::Read, &[]), Next::Try(Register(DmaBuf)));
        let reached = |by| Next::Reached(Reached { by, flush: false });
        assert_eq!(next(ALL, Use::Read, &[(Register(DmaBuf), Ok(()))]), reached(DmaBuf));
        let refused = (Register(DmaBuf), failed("no dma-buf"));
        assert_eq!(next(ALL, Use::Read, std::slice::from_ref(&refused)), Next::Try(Register(PeerMemory)));
        assert_eq!(next(ALL, Use::Read, &[refused, (Register(PeerMemory), Ok(()))]), reached(PeerMemory));
    }

    #[test]
    fn what_the_driver_does_not_offer_is_not_tried() {
        let by_address = AdapterAccess { dma_buf: false, ..ALL };
        assert_eq!(next(by_address, Use::Read, &[]), Next::Try(Register(PeerMemory)));
        let by_file = AdapterAccess { by_address: false, ..ALL };
        assert_eq!(unreached(&next(by_file, Use::Read, &[(Register(DmaBuf), failed("refused"))])), "refused");
        let neither = AdapterAccess { dma_buf: false, by_address: false, ..ALL };
        assert!(unreached(&next(neither, Use::Read, &[])).contains("lets no adapter reach"));
    }

    #[test]
    fn pages_are_staged_with_every_reason_told_if_neither_way_works() {
        let tried = [(Register(DmaBuf), failed("no dma-buf")), (Register(PeerMemory), failed("no module"))];
        assert_eq!(unreached(&next(ALL, Use::Read, &tried)), "no dma-buf; no module");
    }

    #[test]
    fn what_adapters_write_takes_a_flush_that_works_unless_the_device_keeps_their_order() {
        assert_eq!(next(ALL, Use::Written, &[]), Next::Try(Flush));
        assert_eq!(unreached(&next(ALL, Use::Written, &[(Flush, failed("no flush"))])), "no flush");
        let flushed = (Flush, Ok(()));
        assert_eq!(next(ALL, Use::Written, std::slice::from_ref(&flushed)), Next::Try(Register(DmaBuf)));
        let reached = |flush| Next::Reached(Reached { by: DmaBuf, flush });
        assert_eq!(next(ALL, Use::Written, &[flushed, (Register(DmaBuf), Ok(()))]), reached(true));
        let ordered = AdapterAccess { ordered: true, flushes: false, ..ALL };
        assert_eq!(next(ordered, Use::Written, &[]), Next::Try(Register(DmaBuf)));
        assert_eq!(next(ordered, Use::Written, &[(Register(DmaBuf), Ok(()))]), reached(false));
        let unordered = AdapterAccess { flushes: false, ..ALL };
        assert!(unreached(&next(unordered, Use::Written, &[])).contains("neither orders"));
        // Who only reads needs none of it.
        assert_eq!(next(unordered, Use::Read, &[(Register(DmaBuf), Ok(()))]), reached(false));
    }

    #[test]
    fn what_was_registered_is_kept_and_each_way_is_tried_once() {
        let tried = RefCell::default();
        let register = |by| {
            RefCell::<Vec<_>>::borrow_mut(&tried).push(by);
            if by == DmaBuf { Err(Unreached("no dma-buf".into())) } else { Ok("memory") }
        };
        let reached = find_out(ALL, Use::Written, || Ok(()), register).unwrap();
        assert_eq!(reached, ("memory", Reached { by: PeerMemory, flush: true }));
        assert_eq!(*tried.borrow(), [DmaBuf, PeerMemory]);
        let never = |_| -> Result<(), _> { Err(Unreached("no".into())) };
        assert_eq!(find_out(ALL, Use::Read, || Ok(()), never).unwrap_err().to_string(), "no; no");
    }

    #[test]
    fn how_it_is_reached_is_told_in_a_few_words() {
        assert_eq!(Reached { by: DmaBuf, flush: true }.to_string(), "dma-buf, flushed before use");
        assert_eq!(Reached { by: PeerMemory, flush: false }.to_string(), "nvidia-peermem");
    }
}
