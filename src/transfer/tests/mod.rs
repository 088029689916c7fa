//! Sessions over real sockets, within one process ([`sessions`], [`refusals`]) and between two ([`processes`]).

mod encrypted;
mod processes;
mod refusals;
mod sessions;
pub(super) mod support;
