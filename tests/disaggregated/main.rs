//! Decode and prefill workers as processes, with real etcd and NATS.

mod answers;
mod cases;
#[path = "../cell/mod.rs"]
mod cell;
mod faults;
mod outages;
#[path = "../program/mod.rs"]
mod program;
#[path = "../services/mod.rs"]
mod services;
#[path = "../support/mod.rs"]
mod support;
mod whole;
