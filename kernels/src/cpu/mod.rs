//! The fast CPU backend.

mod sample;
