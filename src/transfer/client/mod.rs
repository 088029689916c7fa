//! The prefill worker's end of sessions.

mod connector;
mod copier;
mod payload;
mod poster;
mod reply;
mod revoked;
mod session;
mod silent;
mod stager;
mod writer;

pub use connector::{Connector, ConnectorConfig};
pub use session::Session;
pub use writer::Writer;
