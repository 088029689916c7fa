use std::time::Instant;

use crate::transfer::{TransferMetrics, Transport, WriteError};

type Done = Box<dyn FnOnce(Result<(), WriteError>) + Send>;

/// The promise to call back exactly once. One that is dropped says that the session has ended.
pub(super) struct Reply(Option<Done>);

impl Reply {
    pub(super) fn new(done: impl FnOnce(Result<(), WriteError>) + Send + 'static) -> Self {
        Self(Some(Box::new(done)))
    }

    /// For a write of `bytes`: counts it if it succeeds.
    pub(super) fn counted(self, bytes: usize, transport: Transport, metrics: &TransferMetrics) -> Self {
        let submitted = Instant::now();
        let labels = [transport.name()];
        let (bytes_total, seconds) =
            (metrics.bytes.with_label_values(&labels), metrics.seconds.with_label_values(&labels));
        Self::new(move |result| {
            if result.is_ok() {
                bytes_total.inc_by(bytes as u64);
                seconds.observe(submitted.elapsed().as_secs_f64());
            }
            self.send(result);
        })
    }

    pub(super) fn send(mut self, result: Result<(), WriteError>) {
        if let Some(done) = self.0.take() {
            done(result);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(done) = self.0.take() {
            done(Err(WriteError::Closed));
        }
    }
}
