//! Moving pages between hosts by RDMA write.

mod choose;
mod devices;

pub use choose::{Choice, ChooseError, Wish, choose};
pub use devices::{Device, Gid, GidKind, Link, Port, PortState, SYSFS_CLASS, devices};
