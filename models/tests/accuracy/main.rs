//! How far the engine's numbers are from transformers' in float32. The goldens and the scripts that made them are in
//! `tests/reference/`; the bounds are promises of the README.
//!
//! *Regret* at a position is what our best token costs there in the reference's eyes: the reference's log-probability
//! of its own best token minus that of ours, in nats. It is 0 where both agree.

#[path = "../../../tests/support/assets.rs"]
mod assets;
mod demo;
mod fixtures;
mod golden;
mod runner;
mod stats;
