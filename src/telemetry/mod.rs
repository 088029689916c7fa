//! What the server tells its operators: Prometheus metrics and the log.

mod handoffs;
mod logging;
mod metrics;
mod trace;

pub use handoffs::{HandoffMetrics, HandoffPhase};
pub use logging::{LogFormat, LoggingError, init_logging};
pub(crate) use metrics::register_build_info;
#[cfg(test)]
pub(crate) use metrics::tests::assert_documented;
pub use metrics::{EngineMetrics, Metrics, StagingMetrics, StepKind};
pub use trace::{BadTraceContext, TraceContext};
