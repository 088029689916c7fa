//! Sessions over real sockets, within one process ([`sessions`], [`refusals`]) and between two ([`processes`]), and out
//! of and into the memory of an emulated device ([`device`]).

pub(super) mod device;
mod encrypted;
mod processes;
mod refusals;
mod sessions;
pub(super) mod support;
