//! An LLM inference server that disaggregates prefill and decode, decode first.
//!
//! Imports run one way; ARCHITECTURE.md says which.

pub mod api;
pub mod bench;
pub mod bench_kernels;
pub mod cache;
pub mod cli;
pub mod cluster;
pub mod doctor;
pub mod engine;
pub mod frontend;
pub mod grammar;
pub mod handoff;
pub mod http;
pub mod mock;
pub mod process;
pub mod scheduler;
pub mod telemetry;
pub mod transfer;
pub mod transfer_bench;
pub mod worker;
