//! From facts to findings. Functions without I/O.

mod gpu;
mod host;
mod locked_memory;
mod measured;
mod pairs;
mod rdma;
mod services;
mod workers;

pub(super) use gpu::gpus;
pub(super) use host::host;
pub(super) use locked_memory::locked_memory;
pub(super) use measured::measured;
pub(super) use pairs::pairs;
pub(super) use rdma::rdma;
pub(super) use services::services;
pub(super) use workers::workers;

use super::{Area, Finding, Level};

/// How pages are meant to travel between hosts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wanted {
    /// By RDMA where it is there.
    Any,
    /// By RDMA: without it something is wrong.
    Rdma,
    /// Over TCP, or between hosts not at all.
    NoRdma,
}

impl Wanted {
    /// How bad it is that RDMA cannot be had.
    fn missing_rdma(self) -> Level {
        match self {
            Self::Rdma => Level::Failure,
            Self::Any | Self::NoRdma => Level::Note,
        }
    }

    /// How bad it is that RDMA is there and does not work.
    fn broken_rdma(self) -> Level {
        match self {
            Self::Rdma => Level::Failure,
            Self::Any => Level::Warning,
            Self::NoRdma => Level::Note,
        }
    }
}

/// What to do where pages go over TCP.
const MISSED_RDMA: &str = "run engine doctor --require-rdma on both hosts to see what RDMA lacks there; if TCP is all \
                           there is, say so with --transport tcp";

/// Bytes as people read them.
fn size(bytes: u64) -> String {
    let (unit, name) = match bytes {
        0..0x400 => return format!("{bytes} bytes"),
        0x400..0x10_0000 => (1u64 << 10, "KiB"),
        0x10_0000..0x4000_0000 => (1 << 20, "MiB"),
        _ => (1 << 30, "GiB"),
    };
    let number = format!("{:.1}", bytes as f64 / unit as f64);
    format!("{} {name}", number.strip_suffix(".0").unwrap_or(&number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_written_in_the_unit_that_fits() {
        assert_eq!(size(64 << 10), "64 KiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
        assert_eq!(size(12), "12 bytes");
    }
}
