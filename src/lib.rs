//! An LLM inference server that disaggregates prefill and decode, decode first.

pub mod api;
