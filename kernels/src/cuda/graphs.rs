//! Steps that are recorded once and replayed from then on, and what happens if one cannot be recorded.

use std::collections::HashMap;
use std::panic::{self, AssertUnwindSafe};

use super::backend::CudaBackend;
use super::buffer::{SPARE_BYTES, bytes_of};
use super::driver::{Driver, DriverError};
use super::plan::{RECORDED_ROWS_MAX, Shape, bucket};
use crate::{Batch, WarmUp};

/// Most steps that are recorded, if nobody says otherwise. There are fewer shapes that decoding steps can have, on any
/// device of up to 192 multiprocessors and with any heads and contexts (a test counts them), so this is met by mistake
/// alone. But each recording holds a node for every kernel of a step, some hundred kilobytes of the host's and the
/// device's memory together, so there has to be an end.
pub(super) const GRAPHS_MAX: usize = 128;

/// What is known of steps, by their shape.
pub(super) struct Graphs<D: Driver> {
    known: HashMap<Shape, Known<D>>,
    /// Recordings among `known`.
    count: usize,
    most: usize,
    /// Whether operations are being recorded.
    recording: bool,
    /// Whether it was said that one cannot be recorded.
    said_refused: bool,
    /// Whether it was said that there are too many, or that they would leave too little memory.
    said_full: bool,
}

/// What is known of steps of one shape.
enum Known<D: Driver> {
    /// It came once: whatever had to be allocated for it is there.
    Seen,
    Graph(D::Graph),
    /// It could not be recorded: it is not tried again.
    Refused,
}

impl<D: Driver> Graphs<D> {
    pub(super) fn new() -> Self {
        let (known, most) = (HashMap::new(), GRAPHS_MAX);
        Self { known, count: 0, most, recording: false, said_refused: false, said_full: false }
    }

    /// Records so many steps at most.
    pub(super) fn limit(&mut self, most: usize) {
        self.most = most;
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn is_recording(&self) -> bool {
        self.recording
    }

    /// Something that was recorded lies elsewhere now, or is no more.
    pub(super) fn clear(&mut self) {
        assert!(!self.recording, "a step is recorded when all it needs is there");
        self.known.retain(|_, known| matches!(known, Known::Refused));
        self.count = 0;
    }

    /// Whether there is room for another recording; if not, that is said once.
    fn has_room(&mut self) -> bool {
        let full = self.count >= self.most;
        if full && !std::mem::replace(&mut self.said_full, true) {
            tracing::info!(
                recorded = self.count,
                "no more decoding steps are recorded as CUDA graphs: others are enqueued kernel by kernel"
            );
        }
        !full
    }

    fn insert(&mut self, shape: Shape, graph: D::Graph) {
        if !matches!(self.known.insert(shape, Known::Graph(graph)), Some(Known::Graph(_))) {
            self.count += 1;
        }
    }

    /// Remembers that steps of this shape cannot be recorded. For the first of them it is said why.
    fn refuse(&mut self, shape: Shape, error: &DriverError) {
        self.known.insert(shape, Known::Refused);
        if !std::mem::replace(&mut self.said_refused, true) {
            tracing::warn!(
                %error,
                rows = shape.rows,
                "a decoding step could not be recorded as a CUDA graph: steps like it, and others that cannot be, are \
                 enqueued kernel by kernel, which takes longer"
            );
        }
    }
}

impl<D: Driver> CudaBackend<D> {
    /// Computes the step that was begun: by replaying what was recorded of its shape, or by `operations`.
    pub(super) fn run(&mut self, operations: &mut dyn FnMut(&mut Self)) {
        if self.graphs.most == 0 || !self.plan.is_recordable() || self.stream.check().is_err() {
            return operations(self);
        }
        let shape = self.plan.shape();
        match self.graphs.known.get(&shape) {
            Some(Known::Graph(graph)) => {
                self.stream.attempt(|driver| driver.replay(graph));
                return;
            }
            Some(Known::Refused) => return operations(self),
            Some(Known::Seen) => {}
            None => {
                operations(self);
                self.graphs.known.insert(shape, Known::Seen);
                return;
            }
        }
        if !self.graphs.has_room() {
            return operations(self);
        }
        if !self.has_memory() {
            self.graphs.known.insert(shape, Known::Refused);
            return operations(self);
        }
        match self.record(operations) {
            Ok(graph) => {
                self.stream.attempt(|driver| driver.replay(&graph));
                self.graphs.insert(shape, graph);
            }
            Err(error) => {
                self.graphs.refuse(shape, &error);
                operations(self);
            }
        }
    }

    /// Records `operations`, of which nothing is enqueued, for [`Driver::replay`]. They have been enqueued before, so
    /// that all they need is there, and send nothing to the device; nothing has failed before.
    ///
    /// # Errors
    /// Of the driver. What fails here is a recording, not a step: whether the step fails too is seen when it is
    /// enqueued without.
    pub fn record(&mut self, operations: &mut dyn FnMut(&mut Self)) -> Result<D::Graph, DriverError> {
        self.stream.driver().begin_capture()?;
        self.graphs.recording = true;
        let ended = panic::catch_unwind(AssertUnwindSafe(|| operations(self)));
        self.graphs.recording = false;
        // Whatever failed in between: until it is ended, the stream takes no other work, nor this thread's context any
        // memory.
        let graph = self.stream.driver().end_capture();
        if let Err(panicked) = ended {
            panic::resume_unwind(panicked);
        }
        self.stream.forgive().map_or(graph, Err)
    }

    /// Prepares for steps of a batch's size.
    pub(super) fn prepare(&mut self, batch: &Batch, operations: &mut dyn FnMut(&mut Self)) -> WarmUp {
        if self.graphs.most == 0 {
            return WarmUp::default();
        }
        let (free, count) = (self.memory_free(), self.graphs.count);
        let bytes = self.plan.words_max(batch) * size_of::<i32>();
        if self.step.reserve(&self.stream, bytes) {
            self.graphs.clear();
        }
        // Enqueued once, so that memory is there, and kernels are loaded. Nobody asked for any of its rows.
        let shapes = self.plan.shapes_like(batch);
        self.plan.blank(batch, shapes[0]);
        self.step.upload(&self.stream, &[bytes_of(self.plan.words())]);
        operations(self);
        for shape in shapes {
            self.plan.blank(batch, shape);
            let is_new = !matches!(self.graphs.known.get(&shape), Some(Known::Graph(_) | Known::Refused));
            if !self.plan.is_recordable() || !is_new || self.stream.check().is_err() || !self.graphs.has_room() {
                continue;
            }
            if !self.has_memory() {
                break;
            }
            match self.record(operations) {
                Ok(graph) => self.graphs.insert(shape, graph),
                Err(error) => self.graphs.refuse(shape, &error),
            }
        }
        let device_bytes = free.saturating_sub(self.memory_free());
        WarmUp { recorded: self.graphs.count.saturating_sub(count), device_bytes }
    }

    /// Whether the device has memory for another recording, and some to spare; if not, that is said once.
    fn has_memory(&mut self) -> bool {
        let free = self.memory_free();
        if free < SPARE_BYTES && !std::mem::replace(&mut self.graphs.said_full, true) {
            tracing::warn!(
                recorded = self.graphs.count,
                free_mib = free >> 20,
                "the device has little memory left: further decoding steps are enqueued kernel by kernel, not recorded \
                 as CUDA graphs (a smaller KV cache leaves more)"
            );
        }
        free >= SPARE_BYTES
    }

    fn memory_free(&self) -> usize {
        self.stream.attempt(Driver::memory).map_or(0, |(free, _)| free)
    }

    /// Sizes of decoding steps up to `sequences` of them, one for each bucket.
    pub(super) fn bucket_sizes(&self, sequences: usize) -> Vec<usize> {
        if self.graphs.most == 0 {
            return Vec::new();
        }
        let largest = sequences.min(RECORDED_ROWS_MAX);
        let is_last = |&size: &usize| size == largest || bucket(size) != bucket(size + 1);
        (1..=largest).filter(is_last).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::attention::items_wanted;
    use crate::cuda::plan::Plan;

    #[test]
    fn all_shapes_of_decoding_fit() {
        let mut most = 0;
        for processors in [1, 4, 108, 132, 148, 192] {
            for kv_heads in [1, 2, 4, 8, 16] {
                let mut plan = Plan::default();
                plan.aim_at(items_wanted(processors, kv_heads));
                let mut shapes = 0;
                for rows in (1..=RECORDED_ROWS_MAX).filter(|&rows| bucket(rows) == rows) {
                    let mut batch = Batch::default();
                    (0..rows).for_each(|_| batch.push(&[0], (1 << 20) - 1, &[0], 0));
                    shapes += plan.shapes_like(&batch).len();
                }
                most = most.max(shapes);
            }
        }
        assert!((50..=GRAPHS_MAX).contains(&most), "{most}");
    }
}
