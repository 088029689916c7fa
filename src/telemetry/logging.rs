use std::io::IsTerminal;

use tracing_subscriber::{EnvFilter, filter::ParseError};

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line, for collectors.
    Json,
}

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter does not parse.
    #[error("bad log filter {filter:?}: {source}; expected something like `info` or `warn,engine=debug`")]
    Filter {
        /// The filter as given.
        filter: String,
        /// What is wrong with it.
        source: ParseError,
    },
    /// Another subscriber is in place.
    #[error("the log is set up already")]
    AlreadySet,
}

/// `ureq-proto`, which reads workers' answers for a frontend, would write them out, and heads with keys, at `trace`.
const UNHEARD: &str = "ureq_proto=off";

fn env_filter(filter: &str) -> Result<EnvFilter, ParseError> {
    Ok(EnvFilter::try_new(filter)?.add_directive(UNHEARD.parse()?))
}

/// Sends `tracing` events that pass `filter` (the syntax of `RUST_LOG`) to standard error, for the whole process.
pub fn init_logging(filter: &str, format: LogFormat) -> Result<(), LoggingError> {
    let filter = env_filter(filter).map_err(|source| LoggingError::Filter { filter: filter.to_owned(), source })?;
    let colours = std::io::stderr().is_terminal();
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours);
    match format {
        LogFormat::Text => builder.with_target(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    }
    .map_err(|_| LoggingError::AlreadySet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_filter_is_refused_and_keys_are_never_written_out() {
        assert!(env_filter("engine=loud").is_err());
        for filter in ["", "trace", "warn,engine=trace"] {
            assert!(env_filter(filter).unwrap().to_string().contains(UNHEARD));
        }
    }
}
