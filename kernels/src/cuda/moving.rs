//! A device as those see it who move its pages: from other threads than the one that computes, and in other processes.

use std::fmt;
use std::os::fd::OwnedFd;
use std::str::FromStr;

use super::driver::{Address, DriverError};
use crate::KvRegion;

/// Tells a device from all others (its UUID), in every process that sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct DeviceId(pub [u8; 16]);

impl fmt::Display for DeviceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("GPU-")?;
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl FromStr for DeviceId {
    type Err = ();

    /// From what [`Display`](fmt::Display) writes.
    fn from_str(text: &str) -> Result<Self, ()> {
        let digits = text.strip_prefix("GPU-").filter(|digits| digits.len() == 32 && digits.is_ascii()).ok_or(())?;
        let mut id = [0; 16];
        for (byte, at) in id.iter_mut().zip((0..32).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16).map_err(|_| ())?;
        }
        Ok(Self(id))
    }
}

/// Names an allocation to other processes of the host. Whoever has it can read and write the memory, until that process
/// ends or lets go by itself: it cannot be taken back.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct IpcHandle(pub [u8; 64]);

impl fmt::Debug for IpcHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // It is as good as a key.
        f.write_str("IpcHandle(…)")
    }
}

/// What a device says of network adapters that read and write its memory by themselves (GPUDirect RDMA).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterAccess {
    /// Its memory can be handed to their drivers as a file ([`Mover::dma_buf`]).
    pub dma_buf: bool,
    /// Its driver finds the memory behind an address for theirs, if the module for that is loaded (nvidia-peermem).
    pub by_address: bool,
    /// What the device is told to do sees whatever they had written when it was told. If not, that takes a
    /// [`Mover::flush`].
    pub ordered: bool,
    /// There is such a flush.
    pub flushes: bool,
}

/// A point in what a device computes.
pub trait Mark: Send {
    /// Whether everything before it has run. Returns at once.
    fn is_past(&self) -> Result<bool, DriverError>;

    /// Waits until it has, without taking a core for long.
    fn wait(&self) -> Result<(), DriverError>;
}

/// Moves a device's memory beside its computing. Used from any thread.
pub trait Mover: fmt::Debug + Send + Sync {
    /// Which device.
    fn id(&self) -> DeviceId;

    /// Whether this device can write to the memory of that one, which may be itself. If this process does not see that
    /// one, it can as far as anybody knows: opening the memory ([`Mover::open`]) will tell.
    fn reaches(&self, other: DeviceId) -> bool;

    /// Marks the end of what was enqueued to be computed so far. Never waits. Not while the computing thread records
    /// ([`crate::Backend::is_recording`]).
    fn mark(&self) -> Result<Box<dyn Mark>, DriverError>;

    /// Enqueues copies among what is computed, in any order among themselves: behind all that was enqueued before, and
    /// before all that comes after. What they read of `from` has to stay until a mark behind them is past. After an
    /// error some of them may have been enqueued. Not while the computing thread records, as with [`Mover::mark`].
    fn upload(&self, from: &KvRegion, spans: &[HostSpan]) -> Result<(), DriverError>;

    /// A stream of copies of its own, beside the computing.
    fn stream(&self) -> Result<Box<dyn CopyStream>, DriverError>;

    /// Locks host memory, so that the device copies from and to it by itself, and the driver may be told many such
    /// copies at a time. Undone by [`Mover::unlock`].
    fn lock(&self, region: &KvRegion) -> Result<(), DriverError>;

    /// Unlocks what was locked.
    fn unlock(&self, region: &KvRegion);

    /// What another process opens the allocation with that starts here.
    fn export(&self, start: Address) -> Result<IpcHandle, DriverError>;

    /// Opens another process's allocation; where it starts here. Undone by [`Mover::close`]. Fails too where the end of
    /// this process would not be the end of its copies (MPS).
    fn open(&self, handle: &IpcHandle) -> Result<Address, DriverError>;

    /// Closes what was opened: nothing of this process can write there any more.
    fn close(&self, start: Address) -> Result<(), DriverError>;

    /// How network adapters may get at this device's memory.
    fn adapter_access(&self) -> Result<AdapterAccess, DriverError>;

    /// Prepares the allocation that starts here for adapters: copies that the driver calls synchronous, but may let run
    /// on, are over for them too when it returns from them. It changes nothing for kernels, nor for what marks say.
    fn open_to_adapters(&self, start: Address) -> Result<(), DriverError>;

    /// A file that stands for memory of one allocation, for adapters' drivers. Both numbers are whole pages of the
    /// host.
    fn dma_buf(&self, start: Address, bytes: usize) -> Result<OwnedFd, DriverError>;

    /// Returns when what adapters had written to this device's memory is there for whatever it is told to do next, and
    /// can change nothing that is written there afterwards.
    fn flush(&self) -> Result<(), DriverError>;
}

/// A copy: what it reads, and where it writes that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopySpan {
    /// The first byte read.
    pub from: Address,
    /// Where it goes.
    pub to: Address,
    /// Bytes.
    pub bytes: usize,
}

/// A copy between a region of host memory and device memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostSpan {
    /// The first byte, counted from the region's start.
    pub at: usize,
    /// The first byte in device memory.
    pub device: Address,
    /// Bytes.
    pub bytes: usize,
}

/// Copies that run in order, some time later, and in no order with what is computed.
pub trait CopyStream: fmt::Debug + Send {
    /// Enqueues copies from device memory to `to`, in any order among themselves. After an error some of them may have
    /// been.
    fn download(&self, to: &KvRegion, spans: &[HostSpan]) -> Result<(), DriverError>;

    /// Enqueues copies within device memory, or into that of another device that was opened, in any order among
    /// themselves. After an error some of them may have been.
    fn copy(&self, spans: &[CopySpan]) -> Result<(), DriverError>;

    /// Waits until all copies are over, without taking a core for long. Afterwards whatever this thread does is ordered
    /// behind them for everybody, on the host and on devices. After an error nobody knows whether copies are under way.
    fn finish(&self) -> Result<(), DriverError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_found_again_by_its_name() {
        let id = DeviceId(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in ["", "GPU-", "GPU-12", &"0".repeat(32), &format!("GPU-{}", "x".repeat(32))] {
            assert_eq!(text.parse::<DeviceId>(), Err(()));
        }
    }
}
