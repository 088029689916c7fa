//! HTTP, as every process here serves it: workers of both roles, and frontends.
//!
//! `server` listens, serves connections and drains them at the end: as many at a time as there are `places`, on
//! `threads` of their own, each as long as its client takes what it is sent (`patient`). `drain` counts the requests
//! that are being answered. `body` reads what they carry, within bounds; `middleware` gives them ids and asks for keys;
//! `router` has what all of these servers answer. An `error` is in the shape that OpenAI's clients read.
//!
//! What else there is to ask of a server is not here: `api` has it for a decode worker, `frontend` for a frontend,
//! `worker::prefill` for a prefill worker. This module uses no other of this crate.

mod body;
mod drain;
mod error;
mod http_token;
mod json;
mod middleware;
mod patient;
mod places;
mod router;
mod server;
mod threads;

pub(crate) use body::{MemoryBudget, Received, SMALL_BODY_BYTES, discard, discard_body, read_body};
pub(crate) use drain::{Drain, InFlight};
pub use error::ApiError;
pub(crate) use error::shown;
pub use http_token::{CLUSTER_TOKEN_HEADER, HttpToken};
pub(crate) use json::Json;
pub(crate) use middleware::{REQUEST_ID, request_id, require_key};
pub(crate) use router::{cors, exposition, fallbacks, live, probes};
pub use server::{Bound, ServerConfig, ServerError, bind};
pub(crate) use server::{CONNECTIONS_BESIDE_REQUESTS, WRITE_STALL_MAX, serve_router};
pub use threads::ConnectionThreads;
