//! An LLM inference server that disaggregates prefill and decode, decode first.
//!
//! Imports run one way: `api → worker → scheduler → cache`, all over `engine_models` and `engine_kernels`.

pub mod api;
pub mod cache;
pub mod scheduler;
pub mod telemetry;
pub mod worker;
