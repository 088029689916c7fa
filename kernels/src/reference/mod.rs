//! The naive version of every operation, and the oracle the fast ones are held against.
//!
//! Weights are single precision copies, sums are taken in double precision in the order of their definition, and every
//! key is visited one at a time. A cache slot nobody has written is NaN, so that reading one shows.

mod backend;
mod dequant;
pub(crate) mod sample;

pub use backend::{ReferenceActivations, ReferenceBackend, ReferenceKvCache, ReferenceLinear};
pub use dequant::{dequantize, dequantize_row};
