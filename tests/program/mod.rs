//! The real program on a free port with the demo model, and a client small enough to see every byte.
#![allow(dead_code, unused_imports, reason = "each test uses some of it")]

pub(crate) mod client;
pub(crate) mod command;
mod server;
mod signal;

pub(crate) use server::Server;
