use std::time::Instant;

use crate::transfer::{TransferMetrics, Transport, WriteError};

type Done = Box<dyn FnOnce(Result<Instant, WriteError>) + Send>;

/// The promise to call back exactly once. One that is dropped says that the session has ended.
pub(super) struct Reply {
    done: Option<Done>,
    /// When what is written was there to be written: from the beginning, unless somebody says later that it was then.
    computed: Instant,
}

impl Reply {
    /// Of a write: whoever is called back hears when what was written was computed.
    pub(super) fn new(done: impl FnOnce(Result<Instant, WriteError>) + Send + 'static) -> Self {
        Self { done: Some(Box::new(done)), computed: Instant::now() }
    }

    /// For a write of `bytes`: counts it if it succeeds.
    pub(super) fn counted(self, bytes: usize, transport: Transport, metrics: &TransferMetrics) -> Self {
        let labels = [transport.name()];
        let (bytes_total, seconds) =
            (metrics.bytes.with_label_values(&labels), metrics.seconds.with_label_values(&labels));
        Self::new(move |result| {
            if let Ok(computed) = result {
                bytes_total.inc_by(bytes as u64);
                seconds.observe(computed.elapsed().as_secs_f64());
            }
            self.finish(result);
        })
    }

    /// What is written was not there before now.
    pub(super) fn computed(&mut self) {
        self.computed = Instant::now();
    }

    pub(super) fn send(self, result: Result<(), WriteError>) {
        let computed = self.computed;
        self.finish(result.map(|()| computed));
    }

    fn finish(mut self, result: Result<Instant, WriteError>) {
        if let Some(done) = self.done.take() {
            done(result);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(done) = self.done.take() {
            done(Err(WriteError::Closed));
        }
    }
}
