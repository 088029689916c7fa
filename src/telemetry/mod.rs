//! What the server tells its operators: Prometheus metrics and the log.

mod logging;
mod metrics;

pub use logging::{LogFormat, LoggingError, init_logging};
pub use metrics::{EngineMetrics, Metrics, StepKind};
