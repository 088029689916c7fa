//! The naive reference backend.
